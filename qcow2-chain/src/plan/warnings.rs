//! What a plan does not keep, and where it must not be made.

use anyhow::{Result, bail};

use super::Merge;
use super::merge::Group;
use crate::chain::{Chain, Layer};
use crate::cli::{Method, Plan};
use crate::survey::LayerFigures;

/// Refuses to plan with layers that are damaged: what their tables do not say
/// any more would be lost for good.
pub fn refuse_damage(chain: &Chain, figures: &[LayerFigures], groups: &[Group]) -> Result<()> {
    let merged = groups.iter().filter(|group| group.layers() > 1);
    for depth in merged.flat_map(|group| group.top..=group.bottom) {
        let figures = &figures[depth];
        let why = match &figures.error {
            Some(error) => error.clone(),
            None if figures.bad_references > 0 => {
                format!("{} references make no sense", figures.bad_references)
            }
            None => continue,
        };
        bail!(
            "the layer at depth {depth} would be merged and is damaged: {}: {why}; see \
             `qcow2-chain check`",
            chain.layers[depth].real.display()
        );
    }
    Ok(())
}

/// Sentences for the user. `short_of` the goal there are layers too many.
pub fn of(
    args: &Plan,
    chain: &Chain,
    groups: &[Group],
    short_of: bool,
    merges: &[Merge],
) -> Vec<String> {
    let mut warnings = Vec::new();
    // From the top down, as the chain is.
    let merged = merges.iter().rev();
    let lost = merged.flat_map(|merge| {
        let depths = (merge.top..=merge.bottom).filter(|depth| *depth != merge.kept);
        depths.map(|depth| &chain.layers[depth])
    });
    let lost: Vec<&Layer> = lost.collect();
    let named = |has: &dyn Fn(&Layer) -> bool| {
        let mut names = lost.iter().filter(|layer| has(layer));
        let first = names.next()?.real.display().to_string();
        Some(match names.count() {
            0 => first,
            more => format!("{first} and {more} more"),
        })
    };
    let snapshots = |layer: &Layer| layer.qcow2().is_some_and(|image| image.snapshots > 0);
    if let Some(names) = named(&snapshots) {
        warnings.push(format!("internal snapshots are lost: those of {names}"));
    }
    let bitmaps = |layer: &Layer| layer.qcow2().is_some_and(|image| image.bitmaps);
    if let Some(names) = named(&bitmaps) {
        warnings.push(format!("persistent bitmaps are lost: those of {names}"));
    }
    let encrypted = |layer: &Layer| layer.qcow2().is_some_and(|image| image.crypt_method != 0);
    if !merges.is_empty() && chain.layers.iter().any(encrypted) {
        warnings.push(
            "there are encrypted layers: the commands of qemu-img need their keys, by --object \
             secret,... and --image-opts in the place of -f"
                .into(),
        );
    }
    if args.qmp.is_some() && !merges.is_empty() {
        warnings.push(
            "layers whose nodes were added one by one stay open after a merge: blockdev-del their \
             nodes, the topmost first, before their files are deleted"
                .into(),
        );
    }
    let smaller = |pair: &[Layer]| pair[0].disk_size() < pair[1].disk_size();
    let (first, last) = (groups.first(), groups.last());
    if let (Some(first), Some(last)) = (first, last) {
        let mut pairs = (first.top..).zip(chain.layers[first.top..=last.bottom].windows(2));
        let found = pairs.find(|(_, pair)| smaller(pair));
        if let Some((depth, _)) = found.filter(|_| args.method == Method::Commit && short_of) {
            warnings.push(format!(
                "the layer at depth {depth} is smaller than the one below it: a commit would show \
                 what it hides; --method stream can merge them"
            ));
        }
    }
    let last = chain.layers.last().filter(|layer| layer.qcow2().is_none());
    if let Some(base) = last.filter(|_| args.into_base) {
        warnings.push(format!(
            "nothing is merged into {}, which is {}",
            base.real.display(),
            base.format()
        ));
    }
    warnings
}
