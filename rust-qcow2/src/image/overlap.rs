//! Where metadata is, so that no write hits it by accident.

use crate::format::entry::MetadataKind;

/// The kinds that a template of the option `overlap-check` stands for.
#[must_use]
pub fn template(name: &str) -> Option<MetadataKind> {
    match name {
        "none" => Some(MetadataKind::empty()),
        "constant" => Some(MetadataKind::CONSTANT),
        "cached" => Some(MetadataKind::CACHED),
        "all" => Some(MetadataKind::ALL),
        _ => None,
    }
}
