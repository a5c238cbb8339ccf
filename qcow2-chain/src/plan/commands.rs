//! The commands that carry a merge out.

use serde::Serialize;
use serde_json::json;

use crate::chain::{Chain, Name, for_qemu, link};
use crate::cli::{Method, Plan};
use crate::text::quoted;

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
        chain: &Chain,
        (top, bottom, below): (usize, usize, Option<usize>),
        method: Method,
    ) -> Self {
        let name = |depth: usize| chain.layers[depth].path.display().to_string();
        let word = |depth: usize| quoted(&for_qemu(&name(depth)));
        let recorded = |overlay: usize, at: usize| link(&chain.layers[overlay], &chain.layers[at]);
        let format = |depth: usize| chain.layers[depth].format().to_owned();
        let (device, domain, target) = (&args.device, quoted(&args.domain), quoted(&args.target));
        let mut commands = Self {
            qmp: Vec::new(),
            virsh: Vec::new(),
            qemu_img: Vec::new(),
        };
        if method == Method::Stream {
            let mut arguments = json!({"job-id": format!("merge{top}"), "device": device});
            if top > 0 {
                arguments["device"] = json!(format!("NODE-NAME of {}", name(top)));
            }
            if let Some(below) = below {
                arguments["base"] = json!(name(below));
                arguments["backing-file"] = json!(opened(chain, below));
            }
            commands.qmp(&json!({"execute": "block-stream", "arguments": arguments}));
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
        let mut arguments = json!({
            "job-id": format!("merge{top}"), "device": device, "base": name(bottom),
        });
        let (mut options, mut last) = (String::new(), None);
        if top > 0 {
            arguments["top"] = json!(name(top));
            arguments["backing-file"] = json!(opened(chain, bottom));
            options = format!(" --top {}", word(top));
        } else {
            last = Some(json!({
                "execute": "job-complete", "arguments": {"id": format!("merge{top}")},
            }));
            options.push_str(" --active --pivot");
        }
        commands.qmp(&json!({"execute": "block-commit", "arguments": arguments}));
        if let Some(last) = last {
            commands.qmp(&last);
        }
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

    fn qmp(&mut self, command: &serde_json::Value) {
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
