//! The commands that carry a merge out.

use serde::Serialize;
use serde_json::{Value, json};

use crate::chain::{Chain, Name, for_qemu, link};
use crate::cli::{Method, Plan};
use crate::text::quoted;

use super::nodes::Nodes;

/// For whoever has the chain open, or for qemu-img where nobody has.
#[derive(Serialize)]
pub struct Commands {
    /// Commands of QMP, one a line.
    qmp: Vec<String>,
    /// Where virsh can do it.
    virsh: Vec<String>,
    /// Offline.
    qemu_img: Vec<String>,
}

impl Commands {
    /// For the layers from depth `top` down to depth `bottom`, when all merges
    /// further down have been carried out: the layer below is at depth `below`.
    pub fn new(
        args: &Plan,
        (chain, nodes): (&Chain, Option<&Nodes>),
        (top, bottom, below): (usize, usize, Option<usize>),
        method: Method,
    ) -> Self {
        let name = |depth: usize| chain.layers[depth].path.display().to_string();
        let word = |depth: usize| quoted(&for_qemu(&name(depth)));
        let recorded = |overlay: usize, at: usize| link(&chain.layers[overlay], &chain.layers[at]);
        let format = |depth: usize| chain.layers[depth].format().to_owned();
        let (domain, target) = (quoted(&args.domain), quoted(&args.target));
        let device = args.device.as_deref().unwrap_or("DEVICE");
        let mut commands = Self {
            qmp: Vec::new(),
            virsh: Vec::new(),
            qemu_img: Vec::new(),
        };
        if method == Method::Stream {
            let mut arguments = match nodes {
                Some(nodes) => json!({"device": nodes.layer(top)}),
                None if top > 0 => json!({"device": format!("NODE-NAME of {}", name(top))}),
                None => json!({"device": device}),
            };
            match (below, nodes) {
                (Some(below), Some(nodes)) => {
                    arguments["base-node"] = json!(nodes.layer(below));
                    arguments["backing-file"] = json!(recorded(top, below));
                }
                (Some(below), None) => {
                    arguments["base"] = json!(name(below));
                    arguments["backing-file"] = json!(opened(chain, below));
                }
                (None, _) => {}
            }
            commands.job("block-stream", top, arguments);
            // Only into the topmost image.
            if top == 0 {
                let base = below.map_or(String::new(), |at| format!(" --base {}", word(at)));
                commands.virsh.push(format!(
                    "virsh blockpull {domain} {target}{base} --wait --verbose"
                ));
            }
            let base = below.map_or_else(
                || "-b ''".into(),
                |at| {
                    let name = quoted(&recorded(top, at));
                    format!("-b {name} -F {}", quoted(&format(at)))
                },
            );
            commands
                .qemu_img
                .push(format!("qemu-img rebase -p -f qcow2 {base} {}", word(top)));
            return commands;
        }
        let mut arguments = match nodes {
            Some(nodes) => json!({"device": nodes.root, "base-node": nodes.layer(bottom)}),
            None => json!({"device": device, "base": name(bottom)}),
        };
        match nodes {
            _ if top == 0 => {}
            Some(nodes) => {
                arguments["top-node"] = json!(nodes.layer(top));
                arguments["backing-file"] = json!(recorded(top - 1, bottom));
            }
            None => {
                arguments["top"] = json!(name(top));
                arguments["backing-file"] = json!(opened(chain, bottom));
            }
        }
        commands.job("block-commit", top, arguments);
        let options = if top > 0 {
            format!(" --top {}", word(top))
        } else {
            commands.job("job-complete", top, json!({}));
            " --active --pivot".to_owned()
        };
        commands.virsh.push(format!(
            "virsh blockcommit {domain} {target} --base {}{options} --wait --verbose",
            word(bottom)
        ));
        commands.qemu_img.push(format!(
            "qemu-img commit -p -d -f qcow2 -b {} {}",
            word(bottom),
            word(top)
        ));
        if top > 0 {
            commands.qemu_img.push(format!(
                "qemu-img rebase -u -f qcow2 -b {} -F {} {}",
                quoted(&recorded(top - 1, bottom)),
                quoted(&format(bottom)),
                word(top - 1)
            ));
        }
        commands
    }

    /// A command for the job that merges down to the layer at depth `top`.
    fn job(&mut self, command: &str, top: usize, mut arguments: Value) {
        let key = match command {
            "job-complete" => "id",
            _ => "job-id",
        };
        arguments[key] = json!(format!("merge{top}"));
        let command = json!({"execute": command, "arguments": arguments});
        self.qmp.push(command.to_string());
    }

    /// All of them with the name of the program.
    pub fn each(&self) -> [(&'static str, &[String]); 3] {
        [
            ("QMP", &self.qmp),
            ("virsh", &self.virsh),
            ("qemu-img", &self.qemu_img),
        ]
    }
}

/// The name by which QEMU has a layer open if it was given the top by its
/// absolute name: put together in its way, as it does not find again what an
/// image records by another one. What it would record by itself is relative to
/// its own directory if the top was named so, and leads nowhere then.
fn opened(chain: &Chain, depth: usize) -> String {
    let top = &chain.layers[0].path;
    let top = std::path::absolute(top).unwrap_or_else(|_| top.clone());
    let below = chain.layers[1..=depth].iter();
    below.fold(top.display().to_string(), |above, layer| {
        match (Name::parse(&layer.name), above.rsplit_once('/')) {
            (Name::Path(path), Some((dir, _))) if !path.starts_with('/') => {
                format!("{dir}/{path}")
            }
            _ => layer.path.display().to_string(),
        }
    })
}
