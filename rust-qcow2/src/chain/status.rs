//! Block status: which layer has to be asked.

use std::ptr;
use std::sync::Arc;

use arc_swap::Guard;

use super::entry::{Entry, Resolved};
use super::index::{Index, SLICE_ENTRIES};
use super::view::View;
use crate::error::Result;
use crate::format::entry::Mapping;
use crate::host::Host;
use crate::image::Image;
use crate::units::GuestOffset;

/// The first layer below an image that has something to say of guest bytes.
pub struct NextLayer<H: Host> {
    /// The layer.
    pub layer: Arc<Image<H>>,
    /// Layers between it and the image that have nothing there.
    pub skipped: usize,
    /// Bytes for which this is true, at least 1.
    pub len: u64,
}

impl<H: Host> Image<H> {
    /// The first layer below this image that has any of the `len` > 0 bytes at
    /// `guest`, or whose own backing layer ends before them: not below `base`,
    /// if that is one of the layers. The lowest layer, if nobody has them.
    /// `None` where the next layer has to be asked anyway.
    ///
    /// # Errors
    /// Those of the layers' files.
    pub fn next_layer(
        &self,
        guest: GuestOffset,
        len: u64,
        base: Option<&Self>,
    ) -> Result<Option<NextLayer<H>>> {
        // Makes no view of what is below a layer that is asked in its turn.
        let next = self.host().layer_below();
        if next.is_none_or(|next| next.visible_size() <= guest.0) {
            return Ok(None);
        }
        loop {
            let view = Guard::into_inner(self.view());
            let Some(last) = view.layers.len().checked_sub(1) else {
                return Ok(None);
            };
            let lowest = base.and_then(|base| view.position(base)).unwrap_or(0);
            if guest.0 >= view.end {
                return Ok(None);
            }
            let len = len.min(view.end - guest.0);
            let (mut layer, len) = match view.index() {
                None => walk(&view, view.layers.len(), guest, len)?,
                Some(index) => match index.layer_of(guest, len, view.layers.len(), lowest) {
                    Some((Target::Layer(layer), len)) => (layer, len),
                    Some((Target::AskFrom(layer), len)) => walk(&view, layer + 1, guest, len)?,
                    None if view.fill(index, self, guest, true)? => continue,
                    None => walk(&view, view.layers.len(), guest, len)?,
                },
            };
            // What is beyond the end of a layer is zeroes for the one above,
            // and that is who says so. The topmost is long enough.
            if view.layers[layer].visible_size() <= guest.0 {
                layer = (layer + 1).min(last);
            }
            let layer = layer.max(lowest);
            return Ok(Some(NextLayer {
                layer: Arc::clone(&view.layers[layer]),
                skipped: last - layer,
                len,
            }));
        }
    }
}

impl<H: Host> Image<H> {
    /// How many of `len` > 0 bytes at `guest` come from the same place below
    /// this image, if the index has that in memory.
    pub(crate) fn known_below(&self, guest: GuestOffset, len: u64) -> Option<u64> {
        let view = self.links().last_view();
        let index = view.index()?;
        let known = index.look_up(guest, len, view.layers.len())?;
        Some(known.len)
    }
}

/// What the index says of a question for a layer.
enum Target {
    Layer(usize),
    /// It does not know about this layer.
    AskFrom(usize),
}

impl<H: Host> Index<H> {
    /// Which layer has the bytes, not below `lowest`, and for how many of them
    /// that is so.
    fn layer_of(
        &self,
        guest: GuestOffset,
        len: u64,
        layers: usize,
        lowest: usize,
    ) -> Option<(Target, u64)> {
        let (slot, at) = self.position(guest);
        let guard = self.get(slot, layers)?;
        let slice = guard.as_ref()?;
        let target = |entry: Entry| match entry.unpack().below(layers) {
            Resolved::Data(layer, _) | Resolved::Zero(layer) => Some(layer.max(lowest)),
            Resolved::Below => Some(lowest),
            Resolved::Ask(_) => None,
        };
        let bits = self.bits();
        let mut covered = (1 << bits) - guest.within(bits);
        let first = slice.get(at);
        let Some(layer) = target(first) else {
            let Resolved::Ask(layer) = first.unpack().below(layers) else {
                return None;
            };
            return Some((Target::AskFrom(layer), covered.min(len)));
        };
        let mut next = at + 1;
        while covered < len && next < SLICE_ENTRIES && target(slice.get(next)) == Some(layer) {
            covered += 1 << bits;
            next += 1;
        }
        Some((Target::Layer(layer), covered.min(len)))
    }
}

impl<H: Host> View<H> {
    /// The number of a layer.
    pub(super) fn position(&self, image: &Image<H>) -> Option<usize> {
        let positions = self.positions.get_or_init(|| {
            let numbered = self.layers.iter().zip(0..);
            numbered
                .map(|(layer, number)| (Arc::as_ptr(layer).addr(), number))
                .collect()
        });
        positions.get(&ptr::from_ref(image).addr()).copied()
    }
}

/// Asks the lowest `count` layers one after the other.
fn walk<H: Host>(
    view: &View<H>,
    count: usize,
    guest: GuestOffset,
    mut len: u64,
) -> Result<(usize, u64)> {
    for number in (0..count).rev() {
        let layer = &view.layers[number];
        let size = layer.visible_size();
        if guest.0 >= size {
            return Ok((number, len));
        }
        len = len.min(size - guest.0);
        if let Some(clear) = layer.without_table(guest, len) {
            len = clear;
            continue;
        }
        let run = layer.lookup(guest, len)?;
        len = run.len;
        if run.mapping != Mapping::Unallocated {
            return Ok((number, len));
        }
    }
    Ok((0, len))
}
