//! Many layers that back each other: the resolved index over them.
//!
//! This is the place of the index that makes a lookup independent of depth
//! (section 3 of the design document). At this stage every layer resolves its
//! own clusters and asks the layer below through [`crate::host::Host::backing`].
