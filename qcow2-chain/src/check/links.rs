//! What holds the layers together.

use std::path::Path;
use std::time::Duration;

use super::Finding;
use crate::chain::{Chain, End, Layer, Looks, Name, Refusal, for_qemu};
use crate::text::{bytes, quoted};

/// The longest name of a backing file that the format allows, in bytes.
const MAX_NAME: usize = 1023;
/// Names from here on deserve a word.
const LONG_NAME: usize = 900;
/// Clocks of file systems are this coarse.
const CLOCK: Duration = Duration::from_secs(2);

/// Checks all links.
pub fn check(chain: &Chain, findings: &mut Vec<Finding>) {
    for (depth, overlay) in chain.layers.iter().enumerate() {
        names(depth, overlay, findings);
        match chain.layers.get(depth + 1) {
            Some(below) => link(depth, overlay, below, findings),
            None => end(chain, depth, overlay, findings),
        }
    }
    movable(chain, findings);
}

/// The command that gives `overlay` another name or format of its backing
/// file, without touching data.
fn relink(overlay: &Layer, name: &str, format: &str) -> String {
    format!(
        "qemu-img rebase -u -f qcow2 -b {} -F {} {}",
        quoted(name),
        quoted(format),
        quoted(&for_qemu(&overlay.path.display().to_string()))
    )
}

fn names(depth: usize, layer: &Layer, findings: &mut Vec<Finding>) {
    let Some(image) = layer.qcow2() else { return };
    if let Some(name) = &image.backing_file {
        if name.len() >= LONG_NAME {
            findings.push(
                Finding::warning(
                    "name-long",
                    format!(
                        "the name of the backing file has {} bytes, at most {MAX_NAME} are allowed",
                        name.len()
                    ),
                )
                .at(depth, layer)
                .advice("name it relative to its overlay"),
            );
        }
        if is_relative(name) && layer.path.parent().is_some() {
            through_link(depth, layer, name, findings);
        }
    }
    if let Some(name) = &image.data_file {
        findings.push(
            Finding::note(
                "data-file",
                format!("its data are in another file, {name:?}, which was not opened"),
            )
            .at(depth, layer),
        );
    }
}

fn is_relative(name: &str) -> bool {
    matches!(Name::parse(name), Name::Path(path) if Path::new(path).is_relative())
}

/// Relative to what: the directory in which the overlay was named, which is
/// another one when it is reached through a symbolic link.
fn through_link(depth: usize, layer: &Layer, name: &str, findings: &mut Vec<Finding>) {
    let named = layer.path.parent().and_then(|dir| {
        let dir = if dir.as_os_str().is_empty() {
            Path::new(".")
        } else {
            dir
        };
        dir.canonicalize().ok()
    });
    let (Some(named), Some(real)) = (named, layer.real.parent()) else {
        return;
    };
    if named != real {
        findings.push(
            Finding::warning(
                "relative-through-link",
                format!(
                    "it is reached through a symbolic link: {name:?} is looked for in {}, and in \
                     {} when the file is opened by its own name",
                    named.display(),
                    real.display()
                ),
            )
            .at(depth, layer)
            .advice(
                "use one name for the file everywhere, or an absolute name of the backing file",
            ),
        );
    }
}

fn link(depth: usize, overlay: &Layer, below: &Layer, findings: &mut Vec<Finding>) {
    let Some(image) = overlay.qcow2() else { return };
    let name = image.backing_file.as_deref().unwrap_or_default();
    match image.backing_format.as_deref() {
        None => {
            findings.push(
                Finding::warning(
                    "format-missing",
                    "the format of its backing file is not recorded: it is guessed, which a guest \
                     can make use of, and libvirt refuses it",
                )
                .at(depth, overlay)
                .command(relink(overlay, name, below.format())),
            );
        }
        Some("raw") if below.file.looks == Looks::Qcow2 => {
            findings.push(
                Finding::warning(
                    "format-wrong",
                    format!("{name:?} is recorded as raw, but begins as a qcow2 image does"),
                )
                .at(depth, overlay)
                .command(relink(overlay, name, "qcow2"))
                .advice(
                    "only if it is one: a guest that has a raw disk may write there what it likes",
                ),
            );
        }
        Some(_) => {}
    }
    if let (Some(size), Some(lower)) = (overlay.disk_size(), below.disk_size()) {
        if lower < size {
            findings.push(
                Finding::note(
                    "smaller-than-overlay",
                    format!(
                        "its disk of {} is smaller than that of its overlay, {}; what is beyond \
                         reads as zeroes",
                        bytes(lower),
                        bytes(size)
                    ),
                )
                .at(depth + 1, below),
            );
        } else if lower > size {
            findings.push(
                Finding::note(
                    "larger-than-overlay",
                    format!(
                        "its disk of {} is larger than that of its overlay, {}; what is beyond is \
                         not seen",
                        bytes(lower),
                        bytes(size)
                    ),
                )
                .at(depth + 1, below),
            );
        }
    }
    if let (Some(written), Some(made)) = (below.file.modified, overlay.file.created) {
        if let Some(late) = written.duration_since(made).ok().filter(|d| *d > CLOCK) {
            findings.push(
                Finding::warning(
                    "written-after-overlay",
                    format!(
                        "it was written {} after its overlay was made",
                        duration(late)
                    ),
                )
                .at(depth + 1, below)
                .advice(
                    "right after a commit into it or where the files were copied; if something \
                     else wrote to it the overlay's data do not fit any more: compare with a backup",
                ),
            );
        }
    }
}

fn duration(time: Duration) -> String {
    match time.as_secs() {
        s @ 0..=119 => format!("{s} s"),
        s @ 120..=7199 => format!("{} min", s / 60),
        s @ 7200..=172_799 => format!("{} h", s / 3600),
        s => format!("{} days", s / 86_400),
    }
}

fn end(chain: &Chain, depth: usize, last: &Layer, findings: &mut Vec<Finding>) {
    let recorded = last.qcow2().and_then(|image| image.backing_file.as_deref());
    let name = recorded.unwrap_or_default();
    let format = last.qcow2().and_then(|image| image.backing_format.clone());
    let format = format.unwrap_or_else(|| "qcow2".into());
    let finding =
        match &chain.end {
            End::Complete => return,
            End::Missing(path) => {
                let finding = Finding::error(
                    "link-missing",
                    format!("its backing file {} is not there", path.display()),
                );
                match elsewhere(chain, last, path) {
                Some(found) => finding.command(relink(last, &found, &format)).advice(format!(
                    "if {found} is that file; it has the name that is missing"
                )),
                None => finding.command(relink(last, "NEW-PLACE", &format)).advice(
                    "restore the file, or put in where it is now; another file than the one that \
                     was there makes the disk unusable",
                ),
            }
            }
            End::Loop(_, above) => Finding::error(
                "link-loop",
                format!("its backing file {name:?} is the layer at depth {above}: a loop"),
            )
            .command(relink(last, "RIGHT-FILE", &format)),
            End::Refused(refusal) => Finding::warning(
                "link-not-followed",
                format!("its backing file was not opened: {refusal}"),
            )
            .advice(match refusal {
                Refusal::Outside(path) => format!(
                    "what is below was not checked; if that file is meant: --allow {}",
                    quoted(&path.parent().unwrap_or(path).display().to_string())
                ),
                Refusal::Json | Refusal::Protocol(_) => "what is below was not checked: check it \
                     by itself, where it is a file"
                    .into(),
            }),
            End::Unreadable(path, why) if why == "Image is not in qcow2 format" => Finding::error(
                "format-wrong",
                format!("its backing file {} is no qcow2 image", path.display()),
            )
            .command(relink(last, name, "raw"))
            .advice("if it is a raw image; if it was a qcow2 image it has lost its header"),
            End::Unreadable(path, why) => Finding::error(
                "link-unreadable",
                format!("its backing file {} cannot be used: {why}", path.display()),
            )
            .advice(
                "it has to be a regular file or block device that this user may read; if its \
                 content is damaged, restore it from a backup",
            ),
            End::TooLong(limit) => Finding::error(
                "chain-too-long",
                format!("there are more than {limit} layers"),
            )
            .advice("--max-layers follows it further"),
        };
    findings.push(finding.at(depth, last));
}

/// A file of that name where other layers are.
fn elsewhere(chain: &Chain, overlay: &Layer, missing: &Path) -> Option<String> {
    let name = missing.file_name()?;
    let dirs = [Some(overlay), chain.layers.first()];
    let mut places = dirs
        .into_iter()
        .flatten()
        .filter_map(|layer| layer.real.parent())
        .map(|dir| dir.join(name));
    places
        .find(|path| path.is_file())
        .map(|path| path.display().to_string())
}

/// Whether the directory can be moved with all that is in it.
fn movable(chain: &Chain, findings: &mut Vec<Finding>) {
    let absolute = |layer: &&Layer| {
        let name = layer.qcow2().and_then(|image| image.backing_file.as_ref());
        name.is_some_and(
            |name| matches!(Name::parse(name), Name::Path(path) if Path::new(path).is_absolute()),
        )
    };
    let count = chain.layers.iter().filter(absolute).count();
    if count > 0 {
        findings.push(Finding::note(
            "absolute-names",
            format!(
                "{count} of {} links are absolute names: the files cannot be moved without \
                 changing them",
                chain.layers.len() - usize::from(matches!(chain.end, End::Complete))
            ),
        ));
    }
}
