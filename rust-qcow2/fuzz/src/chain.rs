//! Layers of a chain that change while others read through them, guided by the
//! code that this reaches: no layer reads what was before.
#![no_main]

#[path = "../../tests/common/mod.rs"]
mod common;

use arbitrary::Arbitrary;
use common::chain::{Chain, SIZE, Step};
use libfuzzer_sys::fuzz_target;

/// A step, in few bytes.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Input {
    Write(u8, u16, u16, u8),
    Zero(u8, u16, u16),
    Discard(u8, u16, u16),
    Snapshot(u8),
    Resize(u8, u8),
    Empty(u8),
    Remove(u8),
    Read(u8, u16, u16),
}

impl From<Input> for Step {
    fn from(input: Input) -> Self {
        let bytes = |len: u16| u64::from(len) % 9000 + 1;
        match input {
            Input::Write(layer, at, len, byte) => {
                Self::Write(layer.into(), at.into(), bytes(len), byte)
            }
            Input::Zero(layer, at, len) => Self::Zero(layer.into(), at.into(), bytes(len)),
            Input::Discard(layer, at, len) => Self::Discard(layer.into(), at.into(), bytes(len)),
            Input::Snapshot(bits) => Self::Snapshot([9, 10, 12, 14][usize::from(bits % 4)]),
            Input::Resize(layer, sectors) => {
                Self::Resize(layer.into(), (u64::from(sectors) * 512 % SIZE).max(512))
            }
            Input::Empty(layer) => Self::Empty(layer.into()),
            Input::Remove(layer) => Self::Remove(layer.into()),
            Input::Read(layer, at, len) => Self::Read(layer.into(), at.into(), bytes(len)),
        }
    }
}

fuzz_target!(|steps: Vec<Input>| {
    let mut chain = Chain::new(true);
    for step in steps.into_iter().take(60) {
        chain.step(step.into());
    }
});
