//! The commands that carry a merge out.

use serde::Serialize;
use serde_json::json;

use crate::chain::Chain;
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
        let word = |depth: usize| quoted(&name(depth));
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
                |at| format!("-b {} -F {}", link(chain, top, at), quoted(&format(at))),
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
                link(chain, top - 1, bottom),
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

/// The name that `overlay` is to record for `below`: relative where they are in
/// one directory and the link was relative.
fn link(chain: &Chain, overlay: usize, below: usize) -> String {
    let (from, to) = (&chain.layers[overlay], &chain.layers[below]);
    let recorded = from.qcow2().and_then(|image| image.backing_file.as_deref());
    let relative = recorded.is_some_and(|name| !name.starts_with('/'));
    let file = to
        .real
        .file_name()
        .filter(|_| from.real.parent() == to.real.parent());
    match file {
        Some(file) if relative => quoted(&file.to_string_lossy()),
        _ => quoted(&to.real.display().to_string()),
    }
}
