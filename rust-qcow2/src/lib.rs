//! qcow2 images and chains of them.
//!
//! The crate knows the on-disk format ([`mod@format`]), what is done with one
//! image file ([`image`]), and nothing of QEMU: all I/O, locking and waiting
//! goes through the traits of [`host`]. The same code serves the QEMU block
//! driver, command-line tools, tests and fuzzers.
#![forbid(unsafe_code)]

pub mod cache;
pub mod chain;
pub mod error;
pub mod format;
pub mod host;
pub mod image;
pub mod inspect;
mod shard;
pub mod units;

pub use error::{Error, Result};
