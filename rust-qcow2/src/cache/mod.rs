//! Metadata in memory.
//!
//! [`l2`] holds slices of L2 tables. It is shared by all requests of an image
//! and looked up without the metadata lock. Refcount blocks are only ever
//! touched under that lock and live with the allocator.

pub mod l2;
