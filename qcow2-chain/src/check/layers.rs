//! Each layer by itself.

use rust_qcow2::format::header::Incompatible;
use rust_qcow2::host::local::LocalHost;
use rust_qcow2::image::check::{CheckReport, Fix};
use rust_qcow2::image::{Image, OpenFlags, OptionRequest};
use rust_qcow2::inspect::Walked;

use super::Finding;
use crate::chain::{Kind, Layer, Qcow2};
use crate::text::quoted;

/// What the full check would have to read at most, where the tables are not
/// where data can be.
const TABLES_IN_HOLES: u64 = 64 << 20;
/// References to bad tables up to which the full check is worth its time: each
/// may have it read one and the same table again.
const MAX_BAD_TABLES: u64 = 64;
/// Lines of a check that are kept.
const MAX_LINES: usize = 3;

/// Checks one layer; tells whether its tables and refcounts were verified.
pub fn check(depth: usize, layer: &Layer, findings: &mut Vec<Finding>) -> bool {
    let image = match &layer.kind {
        Kind::Qcow2(image) => image,
        Kind::Raw => return false,
        Kind::Other(name) => {
            let why = format!("images of the format {name} are not looked into");
            findings.push(Finding::note("not-verified", why).at(depth, layer));
            return false;
        }
    };
    header(depth, layer, image, findings);
    let walked = match layer
        .inspect()
        .and_then(|tables| Ok(tables.walk(&mut |_| ())?))
    {
        Ok(walked) => walked,
        Err(error) => {
            let finding = Finding::error("layer-unreadable", format!("{error:#}"));
            findings.push(finding.at(depth, layer));
            return false;
        }
    };
    if walked.bad_tables > 0 {
        findings.push(
            Finding::error(
                "layer-damaged",
                format!(
                    "{} of {} references to L2 tables are misplaced, shared or beyond the end of \
                     the file",
                    walked.bad_tables, walked.l2_tables
                ),
            )
            .at(depth, layer)
            .command(repair(layer, "all"))
            .advice("after a copy of the file was made: clusters of such tables are lost"),
        );
    }
    let why = if too_much(layer, image, walked) {
        "its L2 tables are in places without data, or misplaced: refcounts were not compared"
    } else if layer.file.in_use && image.incompatible.contains(Incompatible::DIRTY) {
        "who has it open writes refcounts when it closes: they were not compared"
    } else {
        return verify(depth, layer, findings);
    };
    findings.push(Finding::note("not-verified", why).at(depth, layer));
    false
}

/// Whether the tables are made to keep a reader busy.
fn too_much(layer: &Layer, image: &Qcow2, walked: Walked) -> bool {
    let claimed = walked.l2_tables.saturating_mul(image.cluster_size);
    walked.bad_tables > MAX_BAD_TABLES || claimed > layer.file.allocated + TABLES_IN_HOLES
}

fn repair(layer: &Layer, what: &str) -> String {
    let path = quoted(&layer.real.display().to_string());
    format!("qemu-img check -f qcow2 -r {what} {path}")
}

fn header(depth: usize, layer: &Layer, image: &Qcow2, findings: &mut Vec<Finding>) {
    if image.incompatible.contains(Incompatible::CORRUPT) {
        findings.push(
            Finding::error("marked-corrupt", "it is marked as corrupt")
                .at(depth, layer)
                .command(repair(layer, "all")),
        );
    }
    if layer.file.in_use {
        findings.push(
            Finding::note(
                "in-use",
                "a program has it open for writing: its refcounts are checked as they are in the \
                 file and may be behind",
            )
            .at(depth, layer),
        );
    } else if image.incompatible.contains(Incompatible::DIRTY) {
        findings.push(
            Finding::warning(
                "not-closed",
                "it was not closed, or is in use: its refcounts may be too low",
            )
            .at(depth, layer)
            .command(repair(layer, "all"))
            .advice("if nobody uses it; opening it for writing repairs it as well"),
        );
    }
    if image.snapshots > 0 {
        let text = format!("it has {} internal snapshots", image.snapshots);
        let advice = "mixing them with overlays is fragile: a commit or rebase ignores them";
        findings.push(
            Finding::note("internal-snapshots", text)
                .at(depth, layer)
                .advice(advice),
        );
    }
}

/// The check of the image itself, by the code that the driver has.
fn verify(depth: usize, layer: &Layer, findings: &mut Vec<Finding>) -> bool {
    let mut lines = Vec::new();
    let flags = OpenFlags {
        check: true,
        no_io: true,
        ..OpenFlags::default()
    };
    let result = layer.reopen().and_then(|file| {
        let host = LocalHost::new(file, None);
        let image = Image::open(host, flags, &OptionRequest::default())?;
        Ok(image.check(Fix::default(), &mut |line| {
            if lines.len() < MAX_LINES {
                lines.push(line.to_owned());
            }
        })?)
    });
    match result {
        Ok(report) => {
            damage(depth, layer, &report, lines, findings);
            true
        }
        Err(error) => {
            let path = quoted(&layer.real.display().to_string());
            findings.push(
                Finding::error("layer-unreadable", format!("{error:#}"))
                    .at(depth, layer)
                    .command(format!("qemu-img check -f qcow2 {path}")),
            );
            false
        }
    }
}

fn damage(
    depth: usize,
    layer: &Layer,
    report: &CheckReport,
    mut lines: Vec<String>,
    findings: &mut Vec<Finding>,
) {
    let all = report.corruptions + report.leaks + report.check_errors;
    if all > lines.len() as u64 {
        lines.push("...".into());
    }
    if report.corruptions + report.check_errors > 0 {
        findings.push(
            Finding::error(
                "layer-damaged",
                format!(
                    "{} errors in its metadata, {} that hindered the check: {}",
                    report.corruptions,
                    report.check_errors,
                    lines.join("; ")
                ),
            )
            .at(depth, layer)
            .command(repair(layer, "all"))
            .advice(if layer.file.in_use {
                "it is in use: check again when nobody writes to it before anything is repaired"
            } else {
                "after a copy of the file was made"
            }),
        );
    // What is in use may have clusters that its tables do not refer to as yet.
    } else if report.leaks > 0 && !layer.file.in_use {
        findings.push(
            Finding::warning(
                "layer-leaks",
                format!("{} clusters are counted but not used", report.leaks),
            )
            .at(depth, layer)
            .command(repair(layer, "leaks"))
            .advice("harmless but for the space"),
        );
    }
}
