//! From the top down to the layer that has the data.

use std::ptr;
use std::sync::Arc;

use arc_swap::Guard;

use super::entry::{Entry, Resolved};
use super::index::{Index, SLICE_ENTRIES, Slice};
use super::view::View;
use crate::error::Result;
use crate::format::entry::{CompressedExtent, Mapping};
use crate::host::{Buf, File, GuestBuf, Host, ReadPiece, ServedFrom};
use crate::image::{Held, Image, Run, Token};
use crate::units::{GuestOffset, HostOffset};

/// Where guest bytes are.
pub(crate) enum Source<'a, H: Host> {
    /// In the file of the image itself. The place is not reused as long as the
    /// token lives.
    Own(&'a Image<H>, HostOffset, #[allow(dead_code)] Token<'a>),
    /// In the file of a layer below. The place is not reused as long as the
    /// layer is held.
    Layer(Held<H>, HostOffset),
    /// Compressed, in the file of one of the images. The place is not reused as
    /// long as the image is held.
    Packed(Keeper<'a, H>, CompressedExtent),
    /// They are zeroes.
    Zero,
    /// In what is below the last layer of this kind.
    Below(H::File),
}

/// An image of the chain whose clusters stay where they are.
pub(crate) enum Keeper<'a, H: Host> {
    /// The image itself.
    Own(&'a Image<H>, #[allow(dead_code)] Token<'a>),
    /// A layer below.
    Layer(Held<H>),
}

impl<H: Host> Keeper<'_, H> {
    fn image(&self) -> &Image<H> {
        match self {
            Self::Own(image, _) => image,
            Self::Layer(held) => held.image(),
        }
    }

    /// The bytes from `guest` on, as many as `bytes`, of a cluster that is
    /// compressed.
    fn with_bytes(
        &self,
        extent: CompressedExtent,
        guest: GuestOffset,
        len: usize,
        then: impl FnOnce(&[u8]),
    ) -> Result<()> {
        let image = self.image();
        let cluster = image.read_compressed(extent)?;
        let within = guest.within(image.geometry().cluster_bits) as usize;
        then(&cluster[within..within + len]);
        Ok(())
    }
}

/// A range of guest bytes that come from one source.
pub(crate) struct Found<'a, H: Host> {
    /// Bytes of the range, at least 1.
    pub(crate) len: u64,
    /// Where they are.
    pub(crate) source: Source<'a, H>,
}

impl<H: Host> Found<'_, H> {
    /// Reads the range, whose first byte is `guest`, into guest memory.
    pub(crate) fn read_guest(
        &self,
        guest: GuestOffset,
        buf: GuestBuf<'_, H>,
        at: usize,
    ) -> Result<()> {
        let len = self.len as usize;
        match &self.source {
            Source::Own(image, host, _) => image.read_data_guest(guest, *host, buf, at, len),
            Source::Layer(held, host) => held.image().read_data_guest(guest, *host, buf, at, len),
            Source::Packed(keeper, extent) => {
                keeper.with_bytes(*extent, guest, len, |bytes| buf.put(at, bytes))
            }
            Source::Zero => {
                buf.zero(at, len);
                Ok(())
            }
            Source::Below(file) => file.read_guest(guest.0, buf, at, len),
        }
    }

    /// Reads the range, whose first byte is `guest`, into driver memory.
    pub(crate) fn read(&self, guest: GuestOffset, bytes: &mut [u8]) -> Result<()> {
        match &self.source {
            Source::Own(image, host, _) => image.read_data(guest, *host, bytes),
            Source::Layer(held, host) => held.image().read_data(guest, *host, bytes),
            Source::Packed(keeper, extent) => {
                keeper.with_bytes(*extent, guest, bytes.len(), |found| {
                    bytes.copy_from_slice(found);
                })
            }
            Source::Zero => {
                bytes.fill(0);
                Ok(())
            }
            Source::Below(file) => file.read(guest.0, bytes),
        }
    }
}

impl<H: Host> Found<'_, H> {
    /// Tells the host of `top`, through which it was found, what serves the
    /// range, whose first byte is `guest`.
    #[cold]
    pub(crate) fn trace(&self, top: &Image<H>, guest: GuestOffset) {
        let view = top.view();
        let (image, offset, compressed) = match &self.source {
            Source::Own(image, host, _) => (Some(*image), *host, false),
            Source::Layer(held, host) => (Some(held.image()), *host, false),
            Source::Packed(keeper, extent) => (Some(keeper.image()), extent.offset, true),
            Source::Zero | Source::Below(_) => (None, HostOffset(0), false),
        };
        let what = match image {
            Some(image) => ServedFrom::Image {
                host: image.host(),
                depth: if ptr::eq(image, top) {
                    Some(0)
                } else {
                    view.position(image).map(|at| view.layers.len() - at)
                },
                offset,
                compressed,
            },
            None if matches!(self.source, Source::Zero) => ServedFrom::Zeroes,
            None => ServedFrom::Below {
                depth: view.layers.len() + 1,
            },
        };
        let len = self.len;
        top.host().trace_read(&ReadPiece { guest, len, what });
    }
}

/// Finds the first of the `len` > 0 bytes at `guest`, and as many of the
/// following ones as come from the same place in one piece.
///
/// # Errors
/// Those of a layer's file, `EIO` for damaged tables.
pub(crate) fn find<H: Host>(top: &Image<H>, guest: GuestOffset, len: u64) -> Result<Found<'_, H>> {
    find_by(top, guest, len, |len| top.lookup(guest, len))
}

/// [`find`], where the image itself is asked by `lookup`: by one that has its
/// metadata lock already.
pub(crate) fn find_by<H: Host>(
    top: &Image<H>,
    guest: GuestOffset,
    mut len: u64,
    lookup: impl FnOnce(u64) -> Result<Run>,
) -> Result<Found<'_, H>> {
    if let Some(clear) = top.without_table(guest, len) {
        len = clear;
    } else {
        let token = top.enter();
        let run = lookup(len)?;
        len = run.len;
        let source = match run.mapping {
            Mapping::Normal(host) => Some(Source::Own(top, host, token)),
            Mapping::ZeroPlain | Mapping::ZeroAllocated(_) => Some(Source::Zero),
            Mapping::Compressed => {
                let extent = run.entry.compressed(top.geometry().cluster_bits);
                Some(Source::Packed(Keeper::Own(top, token), extent))
            }
            Mapping::Unallocated => None,
        };
        if let Some(source) = source {
            match source {
                Source::Zero => top.links().reads().zero(),
                _ => top.links().reads().data(0),
            }
            return Ok(Found { len, source });
        }
    }
    find_below(top, guest, len)
}

/// [`find`] for bytes that are not in the image itself.
fn find_below<H: Host>(top: &Image<H>, guest: GuestOffset, len: u64) -> Result<Found<'_, H>> {
    let reads = top.links().reads();
    loop {
        let view = top.view();
        if view.layers.is_empty() {
            reads.below();
            let source = below(top);
            return Ok(Found { len, source });
        }
        if guest.0 >= view.end {
            reads.zero();
            let source = Source::Zero;
            return Ok(Found { len, source });
        }
        let len = len.min(view.end - guest.0);
        let Some(index) = view.index() else {
            return walk_all(top, &view, guest, len);
        };
        let Some(known) = index.look_up(guest, len, view.layers.len()) else {
            let view = Guard::into_inner(view);
            let Some(index) = view.index() else { continue };
            reads.miss();
            if !view.fill(index, top, guest, false)? {
                return walk_all(top, &view, guest, len);
            }
            continue;
        };
        let source = match known.resolved {
            Resolved::Data(layer, host) => {
                H::prefetch(&view.places[layer]);
                let held = Held::enter(Arc::clone(&view.layers[layer]));
                // See the documentation of `index` for why in this order.
                if !known.is_still_true(index.bits()) {
                    continue;
                }
                reads.data(view.layers.len() - layer);
                Source::Layer(held, host)
            }
            Resolved::Zero(_) => {
                reads.zero();
                Source::Zero
            }
            Resolved::Below => {
                reads.below();
                below(&view.layers[0])
            }
            Resolved::Ask(layer) => return ask(top, &view, index, layer, guest, known.len),
        };
        let len = known.len;
        return Ok(Found { len, source });
    }
}

/// What is below the lowest layer.
fn below<'a, H: Host>(lowest: &Image<H>) -> Source<'a, H> {
    lowest.host().backing().map_or(Source::Zero, Source::Below)
}

/// What an index says of a range.
pub(super) struct Known {
    pub(super) resolved: Resolved,
    /// Bytes of the range, at least 1.
    pub(super) len: u64,
    slice: Guard<Option<Arc<Slice>>>,
    /// The first entry of the run, its place, and how many there are.
    first: Entry,
    at: usize,
    count: usize,
}

impl Known {
    /// Whether a run of data has not changed, now that its layer is held.
    #[inline]
    pub(super) fn is_still_true(&self, bits: u32) -> bool {
        self.slice.as_ref().is_some_and(|slice| {
            let same = |i| slice.get(self.at + i) == self.first.plus((i as u64) << bits);
            slice.is_valid() && (0..self.count).all(same)
        })
    }
}

impl<H: Host> Index<H> {
    /// What the `len` > 0 bytes at `guest` are, as far as one run goes; `None`
    /// where the index does not know it for the lowest `layers` layers.
    #[inline]
    pub(super) fn look_up(&self, guest: GuestOffset, len: u64, layers: usize) -> Option<Known> {
        let (slot, _) = self.position(guest);
        self.run_in(self.get(slot, layers)?, guest, len, layers)
    }

    /// Where data are, `len` > 0 bytes at `guest` as far as one run goes, that
    /// layer number `layer` is known to have.
    pub(super) fn data_of(
        &self,
        layer: usize,
        guest: GuestOffset,
        len: u64,
    ) -> Option<(HostOffset, u64)> {
        let len = len.min(self.end().checked_sub(guest.0)?);
        let (slot, _) = self.position(guest);
        let known = self.run_in(self.get(slot, layer + 1)?, guest, len, layer + 1)?;
        match known.resolved {
            Resolved::Data(of, host) if of == layer && known.len > 0 => Some((host, known.len)),
            _ => None,
        }
    }

    #[inline]
    fn run_in(
        &self,
        guard: Guard<Option<Arc<Slice>>>,
        guest: GuestOffset,
        len: u64,
        layers: usize,
    ) -> Option<Known> {
        let (_, at) = self.position(guest);
        let slice = guard.as_ref()?;
        let bits = self.bits();
        let within = guest.within(bits);
        let first = slice.get(at);
        let resolved = match first.unpack().below(layers) {
            Resolved::Data(layer, host) => Resolved::Data(layer, host.add(within)),
            other => other,
        };
        let continues = |entry: Entry, steps: usize| match resolved {
            Resolved::Zero(_) => matches!(entry.unpack().below(layers), Resolved::Zero(_)),
            Resolved::Ask(_) => false,
            _ => entry == first.plus((steps as u64) << bits),
        };
        let mut covered = (1 << bits) - within;
        let mut next = at + 1;
        while covered < len && next < SLICE_ENTRIES && continues(slice.get(next), next - at) {
            covered += 1 << bits;
            next += 1;
        }
        Some(Known {
            resolved,
            len: covered.min(len),
            first,
            at,
            count: next - at,
            slice: guard,
        })
    }
}

/// Finds bytes of one index cluster that `layer` has to be asked for, and puts
/// the answer into the index where it fits in.
fn ask<'a, H: Host>(
    top: &Image<H>,
    view: &View<H>,
    index: &Index<H>,
    layer: usize,
    guest: GuestOffset,
    len: u64,
) -> Result<Found<'a, H>> {
    let changes = index.changes();
    let (len, source) = walk(top, view, layer + 1, guest, len)?;
    let within = guest.within(index.bits());
    let end = (guest.0 - within).saturating_add(1 << index.bits());
    let number = |image: &Image<H>| view.position(image);
    let answer = match &source {
        Some(Source::Layer(held, host)) => number(held.image())
            .filter(|_| host.0 >= within)
            .map(|number| Resolved::Data(number, HostOffset(host.0 - within))),
        None => Some(Resolved::Below),
        _ => None,
    };
    // What the end of a layer cuts has to be asked for each time.
    let cut = || {
        view.layers[..=layer]
            .iter()
            .any(|layer| layer.visible_size() < end)
    };
    if let Some(answer) = answer.filter(|_| !cut()) {
        index.settle(guest, Entry::pack(Resolved::Ask(layer)), answer, changes);
    }
    let source = source.unwrap_or_else(|| below(&view.layers[0]));
    Ok(Found { len, source })
}

/// Finds bytes by asking all layers one after the other.
fn walk_all<'a, H: Host>(
    top: &Image<H>,
    view: &View<H>,
    guest: GuestOffset,
    len: u64,
) -> Result<Found<'a, H>> {
    let (len, source) = walk(top, view, view.layers.len(), guest, len)?;
    let source = source.unwrap_or_else(|| below(&view.layers[0]));
    Ok(Found { len, source })
}

/// Finds bytes by asking the lowest `count` layers one after the other; the
/// source is `None` where none of them has any.
fn walk<'a, H: Host>(
    top: &Image<H>,
    view: &View<H>,
    count: usize,
    guest: GuestOffset,
    mut len: u64,
) -> Result<(u64, Option<Source<'a, H>>)> {
    let reads = top.links().reads();
    for (number, layer) in view.layers[..count].iter().enumerate().rev() {
        // A layer that is shorter ends there, whatever is below it.
        let size = layer.visible_size();
        if guest.0 >= size {
            return Ok((len, Some(Source::Zero)));
        }
        len = len.min(size - guest.0);
        if let Some(clear) = layer.without_table(guest, len) {
            len = clear;
            continue;
        }
        let held = Held::enter(Arc::clone(layer));
        let run = layer.lookup(guest, len)?;
        len = run.len;
        let source = match run.mapping {
            Mapping::Normal(host) => {
                reads.data(view.layers.len() - number);
                Source::Layer(held, host)
            }
            Mapping::ZeroPlain | Mapping::ZeroAllocated(_) => {
                reads.zero();
                Source::Zero
            }
            Mapping::Compressed => {
                reads.data(view.layers.len() - number);
                let extent = run.entry.compressed(layer.geometry().cluster_bits);
                Source::Packed(Keeper::Layer(held), extent)
            }
            Mapping::Unallocated => continue,
        };
        return Ok((len, Some(source)));
    }
    reads.below();
    Ok((len, None))
}
