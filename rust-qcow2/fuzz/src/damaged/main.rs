//! Damaged images and requests, guided by the code that they reach.
//!
//! Each run damages one of a few small images, opens it and does something with
//! it. There is no panic and no endless loop, whatever the numbers in the file
//! are; and an image in which a check finds nothing wrong has nothing wrong
//! afterwards either, and reads as what was written to it.
#![no_main]

#[path = "../../../tests/common/mod.rs"]
mod common;
mod input;
mod model;
mod run;
mod samples;

use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: input::Input| run::run(&input));
