//! Persistent dirty bitmaps: reading them, storing what is in memory, removing.
//!
//! While an image is written its bitmaps live in memory, with the
//! surroundings, and the file says that they are in use. They are stored, and
//! that mark is taken back, when the image is left.
//!
//! What is new is written beside what there is: bits, tables, the directory,
//! each durable before what points to it, the header last. Only then the old
//! ones are freed. The autoclear bit vouches for all of it.

mod store;

use super::refcounts::Reason;
use super::{Image, Shared, StateGuard};
use crate::error::{Error, Result};
use crate::format::bitmaps::{
    self, Bitmap, BitmapFlags, Directory, TableEntry, TablePlace, bytes_needed, encode_directory,
    entry_size, parse_directory,
};
use crate::format::entry::MetadataKind;
use crate::format::geometry::Geometry;
use crate::format::header::Autoclear;
use crate::host::{File, Host};

/// A bitmap in memory that is to be stored.
pub trait DirtyBits {
    /// Its name.
    fn name(&self) -> &[u8];
    /// Logarithm of its granularity.
    fn granularity_bits(&self) -> u32;
    /// Bytes of the disk that it is for.
    fn disk_size(&self) -> u64;
    /// Whether it records writes.
    fn is_enabled(&self) -> bool;
    /// The first byte of the disk from `from` on whose bit is set.
    fn next_dirty(&self, from: u64) -> Option<u64>;
    /// Puts the bits for `len` bytes of the disk from `from` on into `bytes`,
    /// the first one lowest in the first byte, as words of 64 bits.
    fn serialize(&self, from: u64, len: u64, bytes: &mut [u8]);
}

/// A piece of a bitmap that is read.
#[derive(Clone, Copy, Debug)]
pub enum Bits<'a> {
    /// All of them are one.
    Ones,
    /// These, in the order of [`DirtyBits::serialize`]; what is beyond the end
    /// of the disk is zero.
    Bytes(&'a [u8]),
}

impl Shared {
    /// Where the directory is. An extension that is void was dropped when the
    /// image was opened, and all others were validated.
    pub(super) fn directory(&self, geometry: &Geometry) -> Option<Directory> {
        let data = self.extensions.bitmaps.as_ref()?;
        Directory::parse(data, geometry).ok()
    }
}

impl<H: Host> Image<H> {
    /// Where the directory of bitmaps is.
    pub(super) fn bitmap_directory(&self) -> Option<Directory> {
        self.shared.read().directory(&self.geometry)
    }

    /// Whether the image can have persistent bitmaps.
    pub fn supports_bitmaps(&self) -> bool {
        // Older images have no autoclear bits.
        self.geometry.version >= 3
    }

    /// Whether the image has persistent bitmaps.
    pub fn has_bitmaps(&self) -> bool {
        self.shared.read().extensions.bitmaps.is_some()
    }

    /// The entries of the directory of bitmaps, in the order of the file.
    ///
    /// # Errors
    /// The sentences that users of QEMU know.
    pub fn bitmaps(&self) -> Result<Vec<Bitmap>> {
        let Some(directory) = self.bitmap_directory() else {
            return Ok(Vec::new());
        };
        if directory.size == 0 {
            return Err(Error::invalid("Requested bitmap directory size is zero"));
        }
        let mut bytes = vec![0; directory.size as usize];
        self.host
            .file()
            .read(directory.offset.0, &mut bytes)
            .map_err(|error| error.context("Failed to read bitmap directory"))?;
        let size = self.visible_size();
        parse_directory(&bytes, directory.count, &self.geometry, size)
    }

    /// The entries of a bitmap table.
    pub(super) fn read_bitmap_table(&self, place: TablePlace) -> Result<Vec<TableEntry>> {
        let mut bytes = vec![0; place.bytes() as usize];
        self.host.file().read(place.offset.0, &mut bytes)?;
        let mut be = [0; 8];
        bytes
            .chunks_exact(8)
            .map(|word| {
                be.copy_from_slice(word);
                TableEntry::parse(u64::from_be_bytes(be), self.geometry.cluster_bits)
                    .ok_or_else(|| Error::errno(libc::EINVAL))
            })
            .collect()
    }

    /// Reads a bitmap that is not in use. `put` is called with the first byte
    /// of the disk, the number of bytes and their bits, for each piece that
    /// may have bits set.
    ///
    /// # Errors
    /// The sentences that users of QEMU know.
    pub fn read_bitmap(
        &self,
        bitmap: &Bitmap,
        put: &mut dyn FnMut(u64, u64, Bits<'_>),
    ) -> Result<()> {
        let name = bitmap.display_name();
        let table = self.read_bitmap_table(bitmap.table).map_err(|error| {
            error.context(format!(
                "Could not read bitmap_table table from image for bitmap '{name}'"
            ))
        })?;
        self.read_bits(&table, bitmap.granularity_bits, put)
            .map_err(|error| error.context(format!("Could not read bitmap '{name}' from image")))
    }

    fn read_bits(
        &self,
        table: &[TableEntry],
        granularity_bits: u32,
        put: &mut dyn FnMut(u64, u64, Bits<'_>),
    ) -> Result<()> {
        let size = self.visible_size();
        if self.bitmap_table_len(size, granularity_bits) != table.len() as u64 {
            return Err(Error::errno(libc::EINVAL));
        }
        let span = self.bitmap_span(granularity_bits);
        let mut bytes = self.host.aligned(self.geometry.cluster_size() as usize)?;
        for (entry, index) in table.iter().zip(0..) {
            let from = index * span;
            let len = span.min(size - from);
            match entry {
                TableEntry::Zeroes => continue,
                TableEntry::Ones if len == span => {
                    put(from, len, Bits::Ones);
                    continue;
                }
                TableEntry::Ones => bytes.fill(0xff),
                TableEntry::Cluster(offset) => self.host.file().read(offset.0, &mut bytes)?,
            }
            clear_from(&mut bytes, len.div_ceil(1 << granularity_bits));
            put(from, len, Bits::Bytes(&bytes));
        }
        Ok(())
    }

    /// Bytes of the disk that one cluster of bits stands for.
    fn bitmap_span(&self, granularity_bits: u32) -> u64 {
        (self.geometry.cluster_size() * 8) << granularity_bits
    }

    /// Entries of the table of a bitmap.
    fn bitmap_table_len(&self, disk_size: u64, granularity_bits: u32) -> u64 {
        bytes_needed(disk_size, granularity_bits).div_ceil(self.geometry.cluster_size())
    }

    /// Says in the file that all bitmaps are in use from now on.
    ///
    /// # Errors
    /// Those of the file; the bitmaps in the file are void then, or as before.
    pub fn mark_bitmaps_in_use(&self) -> Result<()> {
        let mut st = self.lock();
        self.ensure_usable()?;
        let mut list = self.bitmaps()?;
        if list.iter().all(Bitmap::in_use) {
            return Ok(());
        }
        if !self.is_writable() {
            return Err(Error::errno(libc::EACCES));
        }
        for bitmap in &mut list {
            bitmap.flags.insert(BitmapFlags::IN_USE);
        }
        self.rewrite_directory(&mut st, &list)
    }

    /// Writes the directory in place, while the autoclear bit is not set.
    fn rewrite_directory(&self, st: &mut StateGuard<'_, H>, list: &[Bitmap]) -> Result<()> {
        let invalid = || Error::errno(libc::EINVAL);
        let directory = self.bitmap_directory().ok_or_else(invalid)?;
        let bytes = encode_directory(list, &self.geometry, self.visible_size())?;
        if bytes.len() as u64 != directory.size || !self.vouches_for_bitmaps() {
            return Err(invalid());
        }
        self.vouch_for_bitmaps(st, false)?;
        let (offset, len) = (directory.offset.0, directory.size);
        self.ensure_no_overlap(st, MetadataKind::BITMAP_DIRECTORY, offset, len)?;
        let file = self.host.file();
        file.write(offset, &bytes)?;
        file.flush()?;
        self.vouch_for_bitmaps(st, true)
    }

    fn vouches_for_bitmaps(&self) -> bool {
        let autoclear = self.shared.read().header.autoclear;
        autoclear.contains(Autoclear::BITMAPS)
    }

    /// Sets or clears the autoclear bit, durably.
    fn vouch_for_bitmaps(&self, st: &mut StateGuard<'_, H>, yes: bool) -> Result<()> {
        self.shared
            .write()
            .header
            .autoclear
            .set(Autoclear::BITMAPS, yes);
        let result = self
            .update_header(st)
            .and_then(|()| self.host.file().flush());
        if yes && result.is_err() {
            // Nobody knows which one the file has. The next header has none.
            self.shared
                .write()
                .header
                .autoclear
                .remove(Autoclear::BITMAPS);
        }
        result
    }

    /// Checks that a bitmap could be stored.
    ///
    /// # Errors
    /// The sentences that users of QEMU know.
    pub fn check_bitmap(&self, name: &[u8], granularity_bits: u32) -> Result<()> {
        let size = self.visible_size();
        bitmaps::check_constraints(name.len(), granularity_bits, &self.geometry, size)
    }

    /// Checks that a new bitmap can be stored beside others, whose names have
    /// the lengths `others`.
    ///
    /// # Errors
    /// The sentences that users of QEMU know.
    pub fn check_new_bitmap(
        &self,
        name: &[u8],
        granularity_bits: u32,
        others: impl Iterator<Item = usize>,
    ) -> Result<()> {
        if !self.supports_bitmaps() {
            return Err(Error::invalid(
                "Cannot store dirty bitmaps in qcow2 v2 files",
            ));
        }
        self.check_bitmap(name, granularity_bits)?;
        let (mut count, mut size) = (1u64, entry_size(name.len()));
        for len in others {
            count += 1;
            size += entry_size(len);
        }
        if count > u64::from(bitmaps::MAX_BITMAPS) {
            return Err(Error::invalid(
                "Maximum number of persistent bitmaps is already reached",
            ));
        }
        if size > bitmaps::MAX_DIRECTORY {
            return Err(Error::invalid("Not enough space in the bitmap directory"));
        }
        Ok(())
    }

    /// Removes a bitmap from the file, if there is one of that name.
    ///
    /// # Errors
    /// Those of the file, and of a directory that is damaged.
    pub fn remove_bitmap(&self, name: &[u8]) -> Result<()> {
        if !self.has_bitmaps() {
            return Ok(());
        }
        let mut st = self.lock();
        self.ensure_usable()?;
        let mut list = self.bitmaps()?;
        let Some(index) = list.iter().position(|bitmap| bitmap.name == name) else {
            return Ok(());
        };
        if !self.is_writable() {
            return Err(Error::errno(libc::EACCES));
        }
        let removed = list.remove(index);
        self.write_directory(&mut st, &list)
            .and_then(|new| self.switch_directory(&mut st, new))
            .map_err(|error| error.context("Failed to update bitmap extension"))?;
        self.free_bitmap(&mut st, removed.table);
        // The bitmap is gone; what is left is advice.
        let _ = self.pass_discards(&mut st);
        Ok(())
    }

    /// Frees table and bits of a bitmap that nothing refers to any more. Of a
    /// damaged one they are left to a repair.
    fn free_bitmap(&self, st: &mut StateGuard<'_, H>, place: TablePlace) {
        let Ok(table) = self.read_bitmap_table(place) else {
            return;
        };
        self.free_bits(st, &table);
        self.free_table(st, place.offset, place.bytes());
    }

    fn free_bits(&self, st: &mut StateGuard<'_, H>, table: &[TableEntry]) {
        let size = self.geometry.cluster_size();
        for entry in table {
            if let TableEntry::Cluster(offset) = *entry {
                self.free(st, offset, size, Reason::Always);
            }
        }
    }
}

/// Clears all bits from number `first` on.
fn clear_from(bytes: &mut [u8], first: u64) {
    let index = (first / 8).min(bytes.len() as u64) as usize;
    let (_, rest) = bytes.split_at_mut(index);
    if let [byte, rest @ ..] = rest {
        *byte &= (1u8 << (first % 8)) - 1;
        rest.fill(0);
    }
}

#[cfg(test)]
mod tests {
    use super::clear_from;

    #[test]
    fn bits_beyond_the_end() {
        let mut bytes = [0xff; 4];
        clear_from(&mut bytes, 32);
        assert_eq!(bytes, [0xff; 4]);
        clear_from(&mut bytes, 17);
        assert_eq!(bytes, [0xff, 0xff, 1, 0]);
        clear_from(&mut bytes, 8);
        assert_eq!(bytes, [0xff, 0, 0, 0]);
        clear_from(&mut bytes, 0);
        assert_eq!(bytes, [0; 4]);
    }
}
