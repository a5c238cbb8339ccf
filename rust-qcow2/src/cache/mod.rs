//! Metadata in memory.
//!
//! [`pool`] is the memory that all caches of a chain share. [`l2`] holds slices
//! of L2 tables ([`mod@slice`]). It is shared by all requests of an image and looked
//! up without the metadata lock. Refcount blocks are only ever touched under
//! that lock and live with the allocator.

pub mod l2;
pub mod pool;
pub mod slice;
