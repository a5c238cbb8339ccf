//! The rqcow2 block driver: qcow2 images in QEMU, served by `rust-qcow2`.
//!
//! Everything unsafe of the project is in this crate, and no knowledge of the
//! format is. QEMU links it as a static library and calls
//! [`rqcow2_register`]; everything else happens through the table of
//! callbacks ([`driver`]).
//!
//! What the callbacks rely on, in short: QEMU calls those for I/O in
//! coroutines, from any thread, with the graph locked for reading, and only
//! between a successful open and close. The node is shared by all of them, so
//! there are only shared references to it.

mod aligned;
mod child;
mod cleaner;
mod coroutine;
mod crypto;
mod driver;
mod error;
mod host;
mod lineage;
mod lock;
mod node;
mod options;
mod panic;
mod parallel;
mod prefetch;
mod qiov;
#[allow(
    dead_code,
    missing_docs,
    non_camel_case_types,
    non_snake_case,
    non_upper_case_globals,
    unsafe_op_in_unsafe_fn,
    unused_imports,
    clippy::all,
    clippy::cast_lossless,
    clippy::missing_safety_doc,
    clippy::ptr_as_ptr,
    clippy::undocumented_unsafe_blocks,
    reason = "generated"
)]
mod sys;
mod transfer;

pub use driver::rqcow2_register;
