//! Layers of a chain that change while others read through them, guided by the
//! code that this reaches: no layer reads what was before.
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;

use arbitrary::{Arbitrary, Result, Unstructured};
use common::chain::{Chain, MAX_LAYERS, SIZE, Step};
use libfuzzer_sys::fuzz_target;

impl<'a> Arbitrary<'a> for Step {
    fn arbitrary(input: &mut Unstructured<'a>) -> Result<Self> {
        let layer = input.int_in_range(0..=MAX_LAYERS - 1)?;
        let at = input.int_in_range(0..=SIZE - 1)?;
        let len = input.int_in_range(1..=8999)?;
        Ok(match input.int_in_range(0..=7)? {
            0 => Self::Write(layer, at, len, input.arbitrary()?),
            1 => Self::Zero(layer, at, len),
            2 => Self::Discard(layer, at, len),
            3 => Self::Snapshot(*input.choose(&[9, 10, 12, 14])?),
            4 => Self::Resize(layer, at.next_multiple_of(512).max(512)),
            5 => Self::Empty(layer),
            6 => Self::Remove(layer),
            _ => Self::Read(layer, at, len),
        })
    }
}

fuzz_target!(|steps: Vec<Step>| {
    let mut chain = Chain::new(true);
    for step in steps.into_iter().take(60) {
        chain.step(step);
    }
});
