//! Filling slices of the index: the L2 tables of all layers, merged from the
//! top down.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;

use super::entry::{Entry, Resolved};
use super::index::{Index, SLICE_ENTRIES, Slice};
use super::view::View;
use crate::error::Result;
use crate::format::entry::Mapping;
use crate::format::subclusters::SUBCLUSTERS;
use crate::host::{Host, Task, WaitQueue};
use crate::image::{Image, NumberedEntry, TablePiece};
use crate::units::GuestOffset;

/// Slices that are filled in one go where the neighbourhood is in use: what
/// the L2 table of one 64 KiB cluster covers.
const GROUP: u64 = 16;
/// Pieces of tables that are in memory at a time.
const BATCH: usize = 32;
/// Pieces that are read at a time.
const READERS: usize = 16;
/// How often a fill is tried while layers keep changing.
const TRIES: usize = 4;

impl<H: Host> View<H> {
    /// Fills the slice that `guest` is in, and for a `scan`, which will come to
    /// them, those around it. Returns false where layers change too fast for
    /// that; the caller has to walk through them.
    ///
    /// What a layer cannot tell, as its file cannot be read, has to be asked for.
    ///
    /// # Errors
    /// `ENOMEM`.
    #[cold]
    pub(super) fn fill(
        &self,
        index: &Index<H>,
        top: &Image<H>,
        guest: GuestOffset,
        scan: bool,
    ) -> Result<bool> {
        let (slot, _) = index.position(guest);
        for _ in 0..TRIES {
            let mut gate = index.gate.lock();
            if !index.is_alive() {
                return Ok(false);
            }
            if index.get(slot, self.layers.len()).is_some() {
                return Ok(true);
            }
            if index.is_filling(slot, 1) {
                index.filled.wait(&mut gate);
                continue;
            }
            let (first, count) = self.group(index, slot, scan);
            index.begin_fill(first, count);
            drop(gate);
            let mut filling = Filling {
                index,
                first,
                slices: Vec::new(),
                placed: false,
            };
            let merged = self.merge(index, top, first, count);
            let result = merged.map(|slices| filling.slices = slices);
            if filling.finish(result)? {
                return Ok(true);
            }
        }
        Ok(index.get(slot, self.layers.len()).is_some())
    }

    /// Which slices to fill when `slot` is needed: it alone at first, its whole
    /// neighbourhood for a scan and once another one there is known. Not if the
    /// image above has them already, whose index it is: that covers more.
    fn group(&self, index: &Index<H>, slot: u64, scan: bool) -> (u64, u64) {
        let first = slot / GROUP * GROUP;
        let count = GROUP.min(index.slots() - first);
        let mut in_use = scan;
        let mut known_above = false;
        for slice in (first..first + count).filter_map(|slot| index.peek(slot)) {
            in_use = true;
            known_above |= slice.covers > self.layers.len();
        }
        if in_use && !known_above && !index.is_filling(first, count) {
            (first, count)
        } else {
            (slot, 1)
        }
    }

    /// Merges the tables of all layers in the range of some slices.
    fn merge(
        &self,
        index: &Index<H>,
        top: &Image<H>,
        first: u64,
        count: u64,
    ) -> Result<Vec<Slice>> {
        let start = index.start_of(first);
        let end = index.start_of(first + count).min(index.end());
        let mut work = Work {
            bits: index.bits(),
            start,
            entries: vec![Entry::UNDECIDED; count as usize * SLICE_ENTRIES],
            undecided: count as usize * SLICE_ENTRIES,
            known: Vec::new(),
        };
        let memory = Mutex::new(Vec::new());
        let mut next = self.layers.len();
        work.known = (first..first + count)
            .map(|slot| index.peek(slot).filter(|slice| slice.covers <= next))
            .collect();
        while next > 0 && work.undecided > 0 {
            // What the next layers down have in the range, as far as memory goes.
            let from = next;
            let mut pieces = Vec::new();
            while next > 0 && pieces.len() < BATCH {
                // Where all slices knew this layer nothing has to be read.
                if work.known.iter().any(|known| !covers(known.as_ref(), next)) {
                    self.layers[next - 1].table_pieces(start, end, |piece| {
                        pieces.push((next - 1, piece));
                    });
                }
                next -= 1;
            }
            let tables = self.read_pieces(index, top, &pieces, &memory)?;
            let mut tables = pieces.iter().zip(tables).peekable();
            for layer in (next..from).rev() {
                work.adopt(layer + 1);
                work.cut(layer, self.layers[layer].visible_size());
                while let Some(((_, piece), table)) = tables.next_if(|((of, _), _)| *of == layer) {
                    work.apply(&self.layers[layer], layer, piece, &table);
                }
            }
        }
        work.adopt(0);
        index.counters.merged.fetch_add(count, Ordering::Relaxed);
        Ok(work.finish(self.layers.len()))
    }

    /// Reads parts of tables, several at a time. What they are read into is
    /// taken from `memory` and left there.
    fn read_pieces(
        &self,
        index: &Index<H>,
        top: &Image<H>,
        pieces: &[(usize, TablePiece)],
        memory: &Mutex<Vec<H::Aligned>>,
    ) -> Result<Vec<Vec<NumberedEntry>>> {
        let reads = pieces.len() as u64;
        index
            .counters
            .table_reads
            .fetch_add(reads, Ordering::Relaxed);
        let read = |(layer, piece): &(usize, TablePiece)| {
            let mut buffer = memory.lock().pop();
            let entries = self.layers[*layer].read_piece(piece, &mut buffer);
            memory.lock().extend(buffer);
            entries
        };
        if let [piece] = pieces {
            return Ok(vec![read(piece)?]);
        }
        let tables: Vec<_> = pieces.iter().map(|_| Mutex::new(Vec::new())).collect();
        let tasks = pieces.iter().zip(&tables);
        let tasks = tasks.map(|(piece, table)| -> Task<'_> {
            Box::new(move || {
                let entries = read(piece)?;
                *table.lock() = entries;
                Ok(())
            })
        });
        top.host().parallel(READERS, tasks.collect())?;
        Ok(tables.into_iter().map(Mutex::into_inner).collect())
    }
}

fn covers(known: Option<&Arc<Slice>>, layers: usize) -> bool {
    known.is_some_and(|slice| slice.covers >= layers)
}

/// A fill that was begun. It is ended whatever happens, or others would wait
/// for it for ever.
struct Filling<'a, H: Host> {
    index: &'a Index<H>,
    first: u64,
    slices: Vec<Slice>,
    placed: bool,
}

impl<H: Host> Filling<'_, H> {
    fn finish(mut self, result: Result<()>) -> Result<bool> {
        self.end();
        let placed = self.placed;
        std::mem::forget(self);
        result.map(|()| placed)
    }

    fn end(&mut self) {
        let gate = self.index.gate.lock();
        self.placed = self
            .index
            .end_fill(self.first, std::mem::take(&mut self.slices));
        self.index.filled.wake_all();
        drop(gate);
    }
}

impl<H: Host> Drop for Filling<'_, H> {
    fn drop(&mut self) {
        self.end();
    }
}

/// Slices in the making.
struct Work {
    bits: u32,
    start: u64,
    entries: Vec<Entry>,
    undecided: usize,
    /// What was known before of each slice.
    known: Vec<Option<Arc<Slice>>>,
}

impl Work {
    fn decide(&mut self, at: usize, resolved: Resolved) {
        if self.entries[at] == Entry::UNDECIDED {
            self.entries[at] = Entry::pack(resolved);
            self.undecided -= 1;
        }
    }

    /// Takes over slices that were merged from the lowest `layers` layers; for
    /// none of them, that is the end of the chain.
    fn adopt(&mut self, layers: usize) {
        let Self {
            entries,
            undecided,
            known,
            ..
        } = self;
        for (known, entries) in known.iter().zip(entries.chunks_mut(SLICE_ENTRIES)) {
            let known = known.as_ref().filter(|slice| slice.covers == layers);
            if known.is_none() && layers > 0 {
                continue;
            }
            for (i, entry) in entries.iter_mut().enumerate() {
                if *entry == Entry::UNDECIDED {
                    *entry = known.map_or(Entry::pack(Resolved::Below), |known| known.get(i));
                    *undecided -= 1;
                }
            }
        }
    }

    /// What nobody has said before is beyond the end of a layer's disk: that
    /// reads as zeroes, whatever is below.
    fn cut(&mut self, layer: usize, size: u64) {
        let end = self.start + ((self.entries.len() as u64) << self.bits);
        if size >= end {
            return;
        }
        let from = size.saturating_sub(self.start);
        let first = from >> self.bits;
        let partly = from != first << self.bits;
        for at in first as usize..self.entries.len() {
            if partly && at == first as usize {
                self.decide(at, Resolved::Ask(layer));
            } else {
                self.decide(at, Resolved::Zero(layer));
            }
        }
    }

    /// Takes what a layer says in a piece of its tables.
    fn apply<H: Host>(
        &mut self,
        image: &Image<H>,
        layer: usize,
        piece: &TablePiece,
        table: &[NumberedEntry],
    ) {
        let geometry = image.geometry();
        let cluster_bits = geometry.cluster_bits;
        for (number, entry) in table {
            let cluster = piece.guest.0 + (u64::from(*number) << cluster_bits);
            let mapping = geometry.mapping(entry.entry);
            if image.is_bad_entry(*entry, GuestOffset(cluster)) {
                self.apply_part(layer, cluster, geometry.cluster_size(), None);
            } else if geometry.has_subclusters() {
                let bits = geometry.subcluster_bits();
                let mut index = 0;
                while index < SUBCLUSTERS {
                    let within = u64::from(index) << bits;
                    let (part, count) = entry.part(mapping, index, within);
                    let len = u64::from(count) << bits;
                    self.apply_part(layer, cluster + within, len, Some(part.mapping));
                    index += count;
                }
            } else {
                self.apply_part(layer, cluster, geometry.cluster_size(), Some(mapping));
            }
        }
    }

    /// Takes what a layer says of a cluster or a part of one; `None` is
    /// something that it has to be asked for.
    fn apply_part(&mut self, layer: usize, guest: u64, len: u64, mapping: Option<Mapping>) {
        if mapping == Some(Mapping::Unallocated) {
            return;
        }
        let steps = len >> self.bits;
        for step in 0..steps {
            let Some(offset) = (guest + (step << self.bits)).checked_sub(self.start) else {
                continue;
            };
            let at = (offset >> self.bits) as usize;
            if at >= self.entries.len() {
                break;
            }
            self.decide(
                at,
                match mapping {
                    Some(Mapping::Normal(host)) => {
                        Resolved::Data(layer, host.add(step << self.bits))
                    }
                    None | Some(Mapping::Compressed) => Resolved::Ask(layer),
                    Some(_) => Resolved::Zero(layer),
                },
            );
        }
    }

    fn finish(self, covers: usize) -> Vec<Slice> {
        self.entries
            .chunks(SLICE_ENTRIES)
            .map(|entries| Slice::new(covers, entries))
            .collect()
    }
}

impl<H: Host> Image<H> {
    /// The parts of the L2 tables for guest bytes from `start` to `end`.
    fn table_pieces(&self, start: u64, end: u64, mut found: impl FnMut(TablePiece)) {
        let end = end.min(self.visible_size());
        if start >= end {
            return;
        }
        let geometry = self.geometry();
        let span = geometry.l2_span_bits();
        for index in start >> span..=(end - 1) >> span {
            let entry = self.l1_entry(index);
            if entry.table().is_none() {
                continue;
            }
            let from = start.max(index << span) >> geometry.cluster_bits << geometry.cluster_bits;
            let to = end.min((index + 1) << span);
            let clusters = (to - from).div_ceil(1 << geometry.cluster_bits);
            found(TablePiece {
                l1_index: index,
                l1_entry: entry,
                guest: GuestOffset(from),
                entries: clusters as usize,
            });
        }
    }
}
