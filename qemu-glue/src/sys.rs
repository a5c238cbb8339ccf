//! What bindgen made of the headers of the QEMU tree that is being built.
//!
//! The build compares the layout of all types that are read or filled in here
//! with what the C compiler of that build makes of them.

include!(concat!(env!("OUT_DIR"), "/bindings.rs"));
