//! A chain whose layers change while others read through them, and what each of
//! them has to read as.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;
use rust_qcow2::host::memory::MemoryHost;
use rust_qcow2::host::{Preallocation, ZeroFlags};
use rust_qcow2::image::{Image, OptionRequest};
use rust_qcow2::units::GuestOffset;

use super::{PLAIN, Shape, TestImage, WRITABLE, create, read, write};

/// Bytes of the disk.
pub const SIZE: u64 = 48 << 10;

/// A chain gets no longer.
pub const MAX_LAYERS: usize = 12;

/// What is done with a layer, whose number and whose bytes are taken modulo what
/// there is.
#[derive(Clone, Copy, Debug)]
pub enum Step {
    /// Layer, first byte, bytes, and which ones.
    Write(usize, u64, u64, u8),
    /// Layer, first byte, bytes.
    Zero(usize, u64, u64),
    /// Layer, first byte, bytes.
    Discard(usize, u64, u64),
    /// A layer on top, with clusters of so many bits.
    Snapshot(u32),
    /// Layer and bytes, not 0.
    Resize(usize, u64),
    /// Layer.
    Empty(usize),
    /// Takes a layer out; what it holds is not copied.
    Remove(usize),
    /// Layer, first byte, bytes.
    Read(usize, u64, u64),
}

/// A chain whose layers all are in use.
pub struct Chain {
    layers: Vec<Arc<TestImage>>,
    /// What each layer reads as is the sum of what was done to it and those
    /// below, so each layer's own content is kept: `None` is not its own.
    own: Vec<Vec<Option<u8>>>,
    generation: Arc<AtomicU64>,
    one_thread: bool,
}

impl Chain {
    /// One of a single layer.
    pub fn new(one_thread: bool) -> Self {
        let mut chain = Self {
            layers: Vec::new(),
            own: Vec::new(),
            generation: Arc::default(),
            one_thread,
        };
        chain.push(9);
        chain
    }

    /// Puts a layer on top; those with large clusters have subclusters.
    fn push(&mut self, cluster_bits: u32) {
        let shape = Shape {
            cluster_bits,
            extended_l2: cluster_bits >= 14,
            ..PLAIN
        };
        let host = MemoryHost {
            file: create(shape, SIZE),
            layer_below: Mutex::new(self.layers.last().cloned()),
            generation: Arc::clone(&self.generation),
            one_thread: self.one_thread,
            ..Default::default()
        };
        let image = Image::open(host, WRITABLE, &OptionRequest::default()).unwrap();
        self.generation.fetch_add(1, Ordering::SeqCst);
        self.layers.push(Arc::new(image));
        self.own.push(vec![None; SIZE as usize]);
    }

    /// What a layer reads as.
    fn content(&self, layer: usize) -> Vec<u8> {
        let mut content = Vec::new();
        for own in &self.own[..=layer] {
            content.resize(own.len(), 0);
            for (byte, own) in content.iter_mut().zip(own) {
                *byte = own.unwrap_or(*byte);
            }
        }
        content
    }

    /// Who has to be asked next, below a layer: nobody is left out that has any
    /// of the bytes.
    fn ask(&self, layer: usize, start: u64, len: u64) {
        let Some(next) = self.layers[layer]
            .next_layer(GuestOffset(start), len, None)
            .unwrap()
        else {
            return;
        };
        assert!((1..=len).contains(&next.len));
        let first = layer - 1;
        let at = first - next.skipped;
        assert!(Arc::ptr_eq(&next.layer, &self.layers[at]));
        for (left_out, own) in self.own.iter().enumerate().take(layer).skip(at + 1) {
            let from = start as usize;
            let bytes = own.get(from..from + next.len as usize);
            assert!(
                bytes.is_some_and(|bytes| bytes.iter().all(Option::is_none)),
                "layer {left_out} of {layer} at {start}"
            );
        }
    }

    /// Bytes that a layer gets itself when it is written: whole clusters or
    /// subclusters, with the content they had.
    fn take(&mut self, layer: usize, start: u64, len: u64) {
        let before = self.content(layer);
        let bits = self.layers[layer].geometry().subcluster_bits();
        let from = ((start >> bits) << bits) as usize;
        let to = ((start + len).next_multiple_of(1 << bits) as usize).min(before.len());
        let own = &mut self.own[layer][from..to];
        for (own, before) in own.iter_mut().zip(&before[from..to]) {
            *own = Some(*before);
        }
    }

    /// Does a step, and reads all of the top.
    pub fn step(&mut self, step: Step) {
        let count = self.layers.len();
        match step {
            Step::Write(layer, at, len, byte) => {
                let layer = layer % count;
                let size = self.layers[layer].size();
                let at = at % size;
                let len = len.min(size - at);
                self.take(layer, at, len);
                write(&self.layers[layer], at, &vec![byte; len as usize]).unwrap();
                self.own[layer][at as usize..(at + len) as usize].fill(Some(byte));
            }
            Step::Zero(layer, at, len) | Step::Discard(layer, at, len) => {
                let layer = layer % count;
                let image = &self.layers[layer];
                let size = image.size();
                let bits = match step {
                    Step::Zero(..) => image.geometry().subcluster_bits(),
                    _ => image.geometry().cluster_bits,
                };
                let at = ((at % size) >> bits) << bits;
                let end = (at + len).next_multiple_of(1 << bits).min(size);
                let flags = ZeroFlags {
                    may_unmap: len % 2 == 0,
                    no_fallback: false,
                };
                match step {
                    Step::Zero(..) => image.write_zeroes(GuestOffset(at), end - at, flags),
                    _ => {
                        // In the lowest layer what has nothing stays so.
                        image.discard(GuestOffset(at), end - at)
                    }
                }
                .unwrap();
                self.own[layer][at as usize..end as usize].fill(Some(0));
            }
            Step::Snapshot(bits) => {
                if count < MAX_LAYERS {
                    self.push(bits);
                }
            }
            Step::Resize(layer, size) => {
                let layer = layer % count;
                // What is added to a layer with something below shows that.
                // The rest of a cluster that is cut is kept out of this.
                let bits = self.layers[layer].geometry().cluster_bits;
                let size = size.next_multiple_of(1 << bits);
                let image = &self.layers[layer];
                image.resize(size, true, Preallocation::Off, true).unwrap();
                self.own[layer].resize(size as usize, Some(0));
            }
            Step::Empty(layer) => {
                let layer = layer % count;
                self.layers[layer].make_empty().unwrap();
                self.own[layer].fill(None);
            }
            Step::Remove(layer) => {
                let layer = layer % count;
                if layer + 1 < count {
                    let below = layer.checked_sub(1).map(|below| self.layers[below].clone());
                    *self.layers[layer + 1].host().layer_below.lock() = below;
                    self.generation.fetch_add(1, Ordering::SeqCst);
                    self.layers.remove(layer);
                    self.own.remove(layer);
                }
            }
            Step::Read(layer, at, len) => {
                let layer = layer % count;
                let size = self.layers[layer].size();
                let at = at % size;
                let len = len.min(size - at) as usize;
                self.ask(layer, at, len as u64);
                let expected = self.content(layer);
                let at_bytes = at as usize;
                let got = read(&self.layers[layer], at, len);
                assert!(got == expected[at_bytes..at_bytes + len], "layer {layer}");
            }
        }
        let top = self.layers.len() - 1;
        let size = self.layers[top].size() as usize;
        assert!(
            read(&self.layers[top], 0, size) == self.content(top),
            "the top"
        );
    }
}
