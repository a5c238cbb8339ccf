//! What a chain of this length is going to meet.

use rustix::process::{Resource, getrlimit};

use super::Finding;
use crate::chain::Chain;
use crate::text::quoted;

/// libvirt describes no longer chain.
const LIBVIRT: usize = 200;
/// Layers at which a read overflows the coroutine stack of unpatched QEMU:
/// 1 MiB, and 1.2 KiB for each layer.
pub const STACK: usize = 870;
/// Files that QEMU has open besides the layers, roughly.
const OTHER_FILES: u64 = 64;

/// Checks all limits that are known.
pub fn check(chain: &Chain, findings: &mut Vec<Finding>) {
    let depth = chain.layers.len();
    let top = chain.layers[0].path.display().to_string();
    let plan = |depth: usize| format!("qcow2-chain plan --depth {depth} {}", quoted(&top));

    let limit = getrlimit(Resource::Nofile);
    if let Some(finding) = files(depth as u64 + OTHER_FILES, limit.current, limit.maximum) {
        findings.push(finding);
    }
    if depth > LIBVIRT {
        findings.push(
            Finding::warning(
                "limit-libvirt",
                format!("{depth} layers; libvirt refuses chains of more than {LIBVIRT}"),
            )
            .command(plan(LIBVIRT)),
        );
    } else if ahead(depth, LIBVIRT) {
        findings.push(
            Finding::note(
                "limit-libvirt",
                format!("{depth} layers; libvirt refuses chains of more than {LIBVIRT}"),
            )
            .command(plan(LIBVIRT / 2)),
        );
    }
    if depth >= STACK {
        findings.push(
            Finding::warning(
                "limit-stack",
                format!("{depth} layers; QEMU's own qcow2 driver crashes on a read through about {STACK}"),
            )
            .command(plan(LIBVIRT))
            .advice("the driver rqcow2 reads chains of any length"),
        );
    } else if ahead(depth, STACK) {
        findings.push(
            Finding::note(
                "limit-stack",
                format!("{depth} layers; QEMU's own qcow2 driver crashes on a read through about {STACK}"),
            )
            .command(plan(LIBVIRT)),
        );
    }
}

/// More than three quarters of a limit.
fn ahead(count: usize, limit: usize) -> bool {
    count * 4 > limit * 3
}

fn files(needed: u64, soft: Option<u64>, hard: Option<u64>) -> Option<Finding> {
    let soft = soft?;
    let want = (2 * needed).next_power_of_two();
    let text =
        format!("QEMU needs about {needed} open files for this chain, {soft} are allowed here");
    let finding = match needed <= soft {
        true if needed * 4 <= soft * 3 => return None,
        true => Finding::note("limit-files", text),
        false => Finding::warning("limit-files", text),
    };
    Some(match hard {
        Some(hard) if hard < needed || hard <= soft => finding
            .command(format!("prlimit --pid $$ --nofile={want}:{want}"))
            .advice("as root; for a service LimitNOFILE= in its unit"),
        _ => finding.command(format!("ulimit -n {}", hard.map_or(want, |h| want.min(h)))),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::check::Severity;

    #[test]
    fn open_files() {
        assert!(files(100, Some(1024), None).is_none());
        assert!(files(100, None, None).is_none());
        assert_eq!(
            files(1000, Some(1024), None).unwrap().severity,
            Severity::Note
        );
        for (hard, command) in [(4096, "ulimit -n 2048"), (1500, "ulimit -n 1500")] {
            let finding = files(1000, Some(1024), Some(hard)).unwrap();
            assert_eq!(finding.command.unwrap(), command);
        }
        let finding = files(1000, Some(1024), Some(1024)).unwrap();
        assert!(finding.command.unwrap().starts_with("prlimit"));
        let finding = files(2000, Some(1024), Some(4096)).unwrap();
        assert_eq!(finding.command.unwrap(), "ulimit -n 4096");
        let finding = files(5000, Some(1024), Some(4096)).unwrap();
        assert!(finding.command.unwrap().starts_with("prlimit"));
    }
}
