//! Many layers that back each other.
//!
//! An image on top of others has a `view` of them: the list of layers, walked
//! anew when the graph has changed, and the resolved `index`, which tells for
//! any guest byte below the image which layer has it, and where. `fill` merges
//! the layers' tables into slices of the index when they are first needed.
//! `walk` is how a request finds its bytes: by the image's own tables, then by
//! the index of packed words (`entry`), and only in rare cases (compressed
//! clusters, layers that change faster than they can be indexed) by a loop over
//! the layers. `status` tells which layer a question about some bytes has to go
//! to, `stats` counts. Nothing in here recurses over layers.
//!
//! Section 3 of the design document has the idea; what keeps the index true
//! while layers change is in the documentation of `index`.

mod entry;
mod fill;
#[cfg(test)]
mod handover;
pub(crate) mod index;
pub mod stats;
pub mod status;
pub(crate) mod view;
pub(crate) mod walk;
