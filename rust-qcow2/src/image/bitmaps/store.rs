//! Writing bitmaps and their directory to new places.

use rustc_hash::FxHashMap;

use super::super::refcounts::Reason;
use super::super::{Image, StateGuard};
use super::DirtyBits;
use crate::error::{Error, Result};
use crate::format::bitmaps::{
    Bitmap, BitmapFlags, Directory, MAX_BITMAPS, MAX_BYTES, MAX_DIRECTORY, TableEntry, TablePlace,
    encode_directory, entry_size,
};
use crate::format::entry::MetadataKind;
use crate::format::header::Autoclear;
use crate::host::{File, Host};
use crate::units::HostOffset;

/// A bitmap that was written, and is not in the directory yet.
struct Stored {
    place: TablePlace,
    table: Vec<TableEntry>,
}

/// Bitmaps to be stored, put into the list of what there is.
#[derive(Default)]
struct Merged<'a> {
    /// Each with its place in the list.
    places: Vec<(usize, &'a dyn DirtyBits)>,
    /// The tables of old ones that they take the place of.
    replaced: Vec<TablePlace>,
}

impl<H: Host> Image<H> {
    /// Stores bitmaps: new ones, and such as are in use. No request is in
    /// flight.
    ///
    /// # Errors
    /// The sentences that users of QEMU know. The file has what it had before.
    pub fn store_bitmaps(&self, bitmaps: &[&dyn DirtyBits]) -> Result<()> {
        let mut st = self.lock();
        self.ensure_usable()?;
        let mut list = self.bitmaps()?;
        let Merged {
            mut places,
            replaced,
        } = self.merge_bitmaps(&mut list, bitmaps)?;
        if bitmaps.is_empty() {
            return Ok(());
        }
        if !self.is_writable() {
            return Err(Error::invalid("No write access"));
        }
        let mut stored: Vec<Stored> = Vec::new();
        let mut result = Ok(());
        // In the order of the directory.
        places.sort_unstable_by_key(|(index, _)| *index);
        for (index, bits) in places {
            match self.store_bitmap(&mut st, bits) {
                Ok(new) => {
                    list[index].table = new.place;
                    stored.push(new);
                }
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        let update_failed = |error: Error| error.context("Failed to update bitmap extension");
        let written =
            result.and_then(|()| self.write_directory(&mut st, &list).map_err(update_failed));
        let new = match written {
            Ok(new) => new,
            Err(error) => {
                for bitmap in &stored {
                    self.free_bits(&mut st, &bitmap.table);
                    let TablePlace { offset, .. } = bitmap.place;
                    self.free(&mut st, offset, bitmap.place.bytes(), Reason::Other);
                }
                return Err(error);
            }
        };
        self.switch_directory(&mut st, new).map_err(update_failed)?;
        for place in replaced {
            self.free_bitmap(&mut st, place);
        }
        // The bitmaps are stored; what is left is advice.
        let _ = self.pass_discards(&mut st);
        Ok(())
    }

    /// Puts `bitmaps` into the list of what there is.
    fn merge_bitmaps<'a>(
        &self,
        list: &mut Vec<Bitmap>,
        bitmaps: &[&'a dyn DirtyBits],
    ) -> Result<Merged<'a>> {
        let mut known: FxHashMap<Vec<u8>, usize> = FxHashMap::default();
        for (index, bitmap) in list.iter().enumerate() {
            known.entry(bitmap.name.clone()).or_insert(index);
        }
        let mut size: u64 = list
            .iter()
            .map(|bitmap| entry_size(bitmap.name.len()))
            .sum();
        let mut merged = Merged::default();
        for bits in bitmaps {
            let (name, granularity_bits) = (bits.name(), bits.granularity_bits());
            let shown = || String::from_utf8_lossy(name);
            self.check_bitmap(name, granularity_bits).map_err(|error| {
                Error::invalid(format!(
                    "Bitmap '{}' doesn't satisfy the constraints: {error}",
                    shown()
                ))
            })?;
            let mut flags = BitmapFlags::empty();
            flags.set(BitmapFlags::AUTO, bits.is_enabled());
            let new = Bitmap {
                table: TablePlace::default(),
                flags,
                granularity_bits,
                name: name.to_vec(),
            };
            if let Some(index) = known.get(name) {
                let old = &mut list[*index];
                if !old.in_use() {
                    return Err(Error::invalid(format!(
                        "Bitmap '{}' already exists in the image",
                        shown()
                    )));
                }
                merged.replaced.push(old.table);
                *old = new;
                merged.places.push((*index, *bits));
                continue;
            }
            if list.len() >= MAX_BITMAPS as usize {
                return Err(Error::invalid("Too many persistent bitmaps"));
            }
            size += entry_size(name.len());
            if size > MAX_DIRECTORY {
                return Err(Error::invalid("Bitmap directory is too large"));
            }
            merged.places.push((list.len(), *bits));
            list.push(new);
        }
        Ok(merged)
    }

    /// Writes the bits and the table of a bitmap. What was taken for it is
    /// given back on failure.
    fn store_bitmap(&self, st: &mut StateGuard<'_, H>, bits: &dyn DirtyBits) -> Result<Stored> {
        let name = String::from_utf8_lossy(bits.name()).into_owned();
        let len = self.bitmap_table_len(bits.disk_size(), bits.granularity_bits());
        if len << self.geometry.cluster_bits > MAX_BYTES {
            return Err(Error::invalid(format!("Bitmap '{name}' is too big")));
        }
        if len == 0 {
            return Err(Error::invalid(
                "Failed to update bitmap extension: Invalid argument",
            ));
        }
        let mut table = vec![TableEntry::Zeroes; len as usize];
        let stored = self
            .write_bits(st, bits, &name, &mut table)
            .and_then(|()| self.write_bitmap_table(st, &name, &table));
        match stored {
            Ok(place) => Ok(Stored { place, table }),
            Err(error) => {
                self.free_bits(st, &table);
                Err(error)
            }
        }
    }

    fn write_bits(
        &self,
        st: &mut StateGuard<'_, H>,
        bits: &dyn DirtyBits,
        name: &str,
        table: &mut [TableEntry],
    ) -> Result<()> {
        let span = self.bitmap_span(bits.granularity_bits());
        let size = bits.disk_size();
        let cluster_size = self.geometry.cluster_size();
        let mut bytes = self.host.aligned(cluster_size as usize)?;
        let mut at = 0;
        while let Some(dirty) = bits.next_dirty(at).filter(|dirty| *dirty < size) {
            let index = dirty / span;
            let from = index * span;
            let offset = self
                .allocate(st, cluster_size)
                .map_err(|error| error.context(allocation_failed(name)))?;
            table[index as usize] = TableEntry::Cluster(offset);
            let len = span.min(size - from);
            bytes.fill(0);
            bits.serialize(from, len, &mut bytes);
            self.write_bitmap_part(st, offset, &bytes, name)?;
            at = from + len;
        }
        Ok(())
    }

    fn write_bitmap_table(
        &self,
        st: &mut StateGuard<'_, H>,
        name: &str,
        table: &[TableEntry],
    ) -> Result<TablePlace> {
        let place = TablePlace {
            offset: HostOffset(0),
            entries: table.len() as u32,
        };
        let offset = self
            .allocate(st, place.bytes())
            .map_err(|error| error.context(allocation_failed(name)))?;
        let bytes: Vec<u8> = table
            .iter()
            .flat_map(|entry| entry.raw().to_be_bytes())
            .collect();
        if let Err(error) = self.write_bitmap_part(st, offset, &bytes, name) {
            self.free(st, offset, place.bytes(), Reason::Other);
            return Err(error);
        }
        Ok(TablePlace { offset, ..place })
    }

    /// Writes to clusters that were just allocated.
    fn write_bitmap_part(
        &self,
        st: &mut StateGuard<'_, H>,
        offset: HostOffset,
        bytes: &[u8],
        name: &str,
    ) -> Result<()> {
        self.ensure_free(st, offset, bytes.len() as u64)
            .map_err(|error| error.context("Qcow2 overlap check failed"))?;
        self.host
            .file()
            .write(offset.0, bytes)
            .map_err(|error| error.context(format!("Failed to write bitmap '{name}' to file")))
    }

    /// Refuses to write where metadata is, and the header whatever the options
    /// say.
    fn ensure_free(&self, st: &mut StateGuard<'_, H>, offset: HostOffset, len: u64) -> Result<()> {
        if offset.0 == 0 {
            let message = "Preventing invalid allocation of bitmap at offset 0".to_owned();
            return Err(self.corrupt(st, true, None, None, message));
        }
        self.ensure_no_overlap(st, MetadataKind::empty(), offset.0, len)
    }

    /// Writes a directory, or none for an empty list, and makes it durable
    /// with everything that it refers to.
    pub(super) fn write_directory(
        &self,
        st: &mut StateGuard<'_, H>,
        list: &[Bitmap],
    ) -> Result<Option<Directory>> {
        let new = if list.is_empty() {
            None
        } else {
            Some(self.write_directory_bytes(st, list)?)
        };
        if let Err(error) = self.write_back_all(st) {
            if let Some(Directory { offset, size, .. }) = new {
                self.free(st, offset, size, Reason::Other);
            }
            return Err(error);
        }
        Ok(new)
    }

    fn write_directory_bytes(
        &self,
        st: &mut StateGuard<'_, H>,
        list: &[Bitmap],
    ) -> Result<Directory> {
        let bytes = encode_directory(list, &self.geometry, self.visible_size())?;
        let size = bytes.len() as u64;
        let offset = self.allocate(st, size)?;
        let written = self
            .ensure_free(st, offset, size)
            .and_then(|()| self.host.file().write(offset.0, &bytes));
        if let Err(error) = written {
            self.free(st, offset, size, Reason::Other);
            return Err(error);
        }
        Ok(Directory {
            count: list.len() as u32,
            size,
            offset,
        })
    }

    /// Makes the header point to a directory that was written, and frees the
    /// old one. After a failure nobody knows which one the header points to:
    /// nothing is freed, and memory has the old one still.
    pub(super) fn switch_directory(
        &self,
        st: &mut StateGuard<'_, H>,
        new: Option<Directory>,
    ) -> Result<()> {
        let old = self.bitmap_directory();
        let before = {
            let mut shared = self.shared.write();
            let before = (shared.header.autoclear, shared.extensions.bitmaps.take());
            shared
                .header
                .autoclear
                .set(Autoclear::BITMAPS, new.is_some());
            shared.extensions.bitmaps = new.map(|new| new.encode());
            before
        };
        let written = self
            .update_header(st)
            .and_then(|()| self.host.file().flush());
        if let Err(error) = written {
            let mut shared = self.shared.write();
            (shared.header.autoclear, shared.extensions.bitmaps) = before;
            return Err(error);
        }
        self.forget_overlap_map();
        if let Some(Directory { offset, size, .. }) = old {
            self.free_table(st, offset, size);
        }
        Ok(())
    }
}

fn allocation_failed(name: &str) -> String {
    format!("Failed to allocate clusters for bitmap '{name}'")
}
