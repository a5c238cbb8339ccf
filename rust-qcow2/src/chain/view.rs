//! What an image knows of the layers below it, and they of it.

use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use arc_swap::{ArcSwap, Guard};
use parking_lot::{Mutex, RwLock};
use rustc_hash::FxHashMap;

use super::entry::MAX_LAYERS;
use super::index::Index;
use super::stats::ReadCounters;
use crate::cache::pool::Pool;
use crate::host::Host;
use crate::image::Image;
use crate::units::{GuestOffset, HostOffset};

/// A chain of layers as seen from the image on top of it, at one generation of
/// the graph.
pub(crate) struct View<H: Host> {
    /// [`Host::generation`] when the links were walked; `None` before that.
    generation: Option<u64>,
    /// The layers, from the lowest one up. The last one backs the image.
    pub(crate) layers: Vec<Arc<Image<H>>>,
    /// Where each of them is in memory.
    pub(super) places: Vec<H::Places>,
    /// Where the disk of the last layer ends; what the image has beyond that
    /// reads as zeroes.
    pub(crate) end: u64,
    /// What layers tell of their changes: see [`View::index`]. `None` without
    /// layers.
    watch: Option<Arc<Index<H>>>,
    /// Numbers of the layers, by their addresses; made when first needed.
    pub(super) positions: OnceLock<FxHashMap<usize, usize>>,
}

impl<H: Host> View<H> {
    fn unknown() -> Arc<Self> {
        Arc::new(Self {
            generation: None,
            layers: Vec::new(),
            places: Vec::new(),
            end: 0,
            watch: None,
            positions: OnceLock::new(),
        })
    }

    /// `None` without layers, and for chains or disks too large for an index.
    #[inline]
    pub(crate) fn index(&self) -> Option<&Arc<Index<H>>> {
        self.watch.as_ref().filter(|index| index.is_of_use())
    }

    /// The same, but for the index of the image above, which looks after it.
    pub(crate) fn own_index(&self) -> Option<&Arc<Index<H>>> {
        self.index().filter(|_| !self.borrows())
    }

    /// Whether its index belongs to an image above.
    fn borrows(&self) -> bool {
        let index = self.watch.as_ref();
        index.is_some_and(|index| index.layers() > self.layers.len())
    }

    fn is_current(&self, generation: u64) -> bool {
        self.generation == Some(generation)
            && self.watch.as_ref().is_none_or(|index| index.is_alive())
    }

    fn has_layers(&self, layers: &[Arc<Image<H>>]) -> bool {
        self.layers.len() == layers.len()
            && self
                .layers
                .iter()
                .zip(layers)
                .all(|(a, b)| Arc::ptr_eq(a, b))
    }
}

/// The links of an image to the chain it is part of.
pub(crate) struct Links<H: Host> {
    view: ArcSwap<View<H>>,
    reads: ReadCounters,
    /// Held while the view is made.
    making: Mutex<()>,
    /// Indexes that say something about this image, and its number there.
    watchers: RwLock<Vec<(Weak<Index<H>>, usize)>>,
    /// Whether there may be any.
    watched: AtomicBool,
}

impl<H: Host> Default for Links<H> {
    fn default() -> Self {
        Self {
            view: ArcSwap::new(View::unknown()),
            reads: ReadCounters::default(),
            making: Mutex::new(()),
            watchers: RwLock::default(),
            watched: AtomicBool::new(false),
        }
    }
}

impl<H: Host> Links<H> {
    pub(super) fn add_watcher(&self, index: &Arc<Index<H>>, number: usize) {
        let mut watchers = self.watchers.write();
        watchers.retain(|(known, _)| {
            known.strong_count() > 0 && !ptr::eq(known.as_ptr(), Arc::as_ptr(index))
        });
        watchers.push((Arc::downgrade(index), number));
        self.watched.store(true, Ordering::SeqCst);
    }

    /// Whether an image above has looked this one up.
    pub(crate) fn is_watched(&self) -> bool {
        let watchers = self.watchers.read();
        watchers.iter().any(|(index, _)| index.strong_count() > 0)
    }

    fn for_watchers(&self, f: impl Fn(&Index<H>, usize)) {
        if !self.watched.load(Ordering::SeqCst) {
            return;
        }
        for (index, number) in self.watchers.read().iter() {
            if let Some(index) = index.upgrade() {
                f(&index, *number);
            }
        }
    }

    /// Data of this image at `guest`, as an index above knows it: the place and
    /// how many of the `len` bytes are there in one piece.
    pub(crate) fn data_known_above(
        &self,
        guest: GuestOffset,
        len: u64,
    ) -> Option<(HostOffset, u64)> {
        if !self.watched.load(Ordering::SeqCst) {
            return None;
        }
        let watchers = self.watchers.read();
        watchers
            .iter()
            .find_map(|(index, number)| index.upgrade()?.data_of(*number, guest, len))
    }

    /// The index of the image above, if that has this image as its last layer,
    /// with just these `layers` below, and serves for the `end` bytes of them as
    /// well. Jobs that ask both images in turn, as a stream does, need one index
    /// then.
    fn index_above(&self, layers: &[Arc<Image<H>>], end: u64) -> Option<Arc<Index<H>>> {
        let last = layers.last()?;
        let watchers = self.watchers.read();
        let mut indexes = watchers.iter().filter_map(|(index, number)| {
            let index = index.upgrade()?;
            (*number == layers.len() && index.layers() == layers.len() + 1).then_some(index)
        });
        indexes.find(|index| {
            let watches = |(layer, number): (&Arc<Image<H>>, usize)| {
                let watchers = layer.links().watchers.read();
                let mut numbers = watchers.iter();
                numbers.any(|(by, as_number)| {
                    *as_number == number && ptr::eq(by.as_ptr(), Arc::as_ptr(index))
                })
            };
            index.is_of_use()
                && index.is_alive()
                && index.end() >= end
                && layers.iter().zip(0..).all(watches)
                // Who changes the size from here on ends the index.
                && last.visible_size() == end
        })
    }

    /// Tells those who have looked this image up that `len` guest bytes from
    /// `start` on are mapped differently now.
    #[inline]
    pub(crate) fn changed(&self, start: u64, len: u64) {
        self.for_watchers(|index, layer| index.changed(layer, start, len));
    }

    /// Tells them that nothing of what they know of this image is true any
    /// more.
    pub(crate) fn changed_altogether(&self) {
        self.for_watchers(|index, _| index.kill());
    }

    /// What is known of the layers below, as it was last looked at.
    pub(crate) fn last_view(&self) -> Guard<Arc<View<H>>> {
        self.view.load()
    }

    /// Where reads have found their data.
    #[inline]
    pub(crate) fn reads(&self) -> &ReadCounters {
        &self.reads
    }

    /// Forgets the layers below.
    pub(crate) fn forget_view(&self) {
        self.view.store(View::unknown());
    }
}

impl<H: Host> Image<H> {
    /// The layers below, as they are now.
    #[inline]
    pub(crate) fn view(&self) -> Guard<Arc<View<H>>> {
        let view = self.links().view.load();
        if view.is_current(self.host().generation()) {
            return view;
        }
        drop(view);
        self.make_view();
        self.links().view.load()
    }

    #[cold]
    fn make_view(&self) {
        let links = self.links();
        let _making = links.making.lock();
        // The links do not change while a request is in flight; what changes
        // elsewhere in the graph meanwhile makes the number too old, not wrong.
        let generation = self.host().generation();
        let old = links.view.load_full();
        if old.is_current(generation) {
            return;
        }
        let mut layers = Vec::new();
        let mut below = self.host().layer_below();
        while let Some(layer) = below {
            below = layer.host().layer_below();
            layers.push(layer);
        }
        layers.reverse();
        let mut end = layers.last().map_or(0, |layer| layer.visible_size());
        let alive = old.watch.as_ref().is_none_or(|index| index.is_alive());
        let pool = if links.is_watched() {
            self.pool()
        } else {
            self.own_pool_on_top()
        };
        for layer in &layers {
            layer.join_pool(&pool);
        }
        let above = links.index_above(&layers, end);
        let keep = old.generation.is_some() && alive && !old.borrows() && old.has_layers(&layers);
        let watch = if above.is_some() {
            above
        } else if keep {
            if let Some(index) = &old.watch {
                index.move_to(&pool);
            }
            old.watch.clone()
        } else {
            loop {
                let index = self.index_for(&layers, end, &pool);
                // Watched from here on: who changes the size now ends the index.
                let now = layers.last().map_or(0, |layer| layer.visible_size());
                if now == end {
                    break index;
                }
                end = now;
            }
        };
        links.view.store(Arc::new(View {
            generation: Some(generation),
            places: layers.iter().map(H::places).collect(),
            layers,
            end,
            watch,
            positions: OnceLock::new(),
        }));
    }

    /// An index for `layers`: that of the image below, which is put on top of
    /// what it knows, or a new one. It watches the layers even if it is not of use.
    fn index_for(
        &self,
        layers: &[Arc<Image<H>>],
        end: u64,
        pool: &Arc<Pool>,
    ) -> Option<Arc<Index<H>>> {
        let (last, rest) = layers.split_last()?;
        let bits = layers
            .iter()
            .map(|layer| layer.geometry().subcluster_bits());
        let bits = bits.min()?;
        let possible = layers.len() < MAX_LAYERS && Index::<H>::fits(bits, end);
        let before = last.links().view.load_full();
        if let Some(index) = before.own_index() {
            let fits = index.bits() == bits && index.end() >= end && index.is_alive();
            if possible && fits && before.has_layers(rest) {
                last.links().forget_view();
                index.move_to(pool);
                index.move_up();
                last.links().add_watcher(index, rest.len());
                return Some(Arc::clone(index));
            }
            // It would go on taking memory for what is asked up here from now on.
            last.links().forget_view();
        }
        let index = Index::new(bits, if possible { end } else { 0 }, layers.len(), pool);
        for (number, layer) in layers.iter().enumerate() {
            layer.links().add_watcher(&index, number);
        }
        Some(index)
    }
}
