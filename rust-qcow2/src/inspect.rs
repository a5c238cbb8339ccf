//! Looking through an image file without opening it for use.
//!
//! [`Inspection`] reads what the file says of itself and walks its mapping
//! tables. It serves every kind of image, also those that
//! [`Image::open`](crate::image::Image::open) refuses, as neither data nor
//! other files are touched. It never writes, and a table that makes no sense
//! is counted and passed over, not an error. Meant for files that nobody
//! writes to meanwhile; of others the answers are a mixture of before and
//! after, no worse.

use rustc_hash::FxHashSet;

use crate::error::{Error, Result};
use crate::format::entry::{L1_RESERVED_MASK, L1Entry, L2Entry, Mapping};
use crate::format::geometry::{Geometry, MAX_L1_BYTES, MAX_REFTABLE_BYTES};
use crate::format::header::{Header, Incompatible};
use crate::format::subclusters::ClusterEntry;
use crate::host::{Content, File};
use crate::image::open::read_first;
use crate::units::{GuestOffset, HostOffset};

/// Bytes of the tables of tables that are read at a time.
const PIECE: u64 = 1 << 20;
/// Subclusters of a cluster.
const SUBCLUSTERS: u32 = 32;

/// An image file that is looked through.
pub struct Inspection<F: File> {
    file: F,
    header: Header,
    geometry: Geometry,
    /// Name and format of the backing file, as recorded.
    backing: (Option<Vec<u8>>, Option<Vec<u8>>),
    data_file: Option<Vec<u8>>,
    bitmaps: bool,
    length: u64,
}

/// What a stretch of the disk is in one image. Stretches that are not told
/// are unallocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Data, from this place of the file (or the data file) on.
    Data(HostOffset),
    /// One compressed cluster.
    Compressed {
        /// First byte in the file.
        at: HostOffset,
        /// Bytes in the file, an upper bound.
        len: u64,
    },
    /// Reads as zeroes.
    Zero {
        /// Whether space is reserved for it.
        allocated: bool,
    },
}

/// A stretch of the disk that is of one kind and, for data, in one piece in
/// the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins.
    pub guest: GuestOffset,
    /// Its length in bytes, not zero.
    pub len: u64,
    /// What it is.
    pub kind: ExtentKind,
}

/// What [`Inspection::walk`] met on its way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Walked {
    /// L2 tables that the L1 table refers to.
    pub l2_tables: u64,
    /// References to tables that are shared, misplaced or beyond the end of
    /// the file; passed over.
    pub bad_tables: u64,
    /// Entries of L2 tables that make no sense. What a read refuses is passed
    /// over; reserved bits it does not look at.
    pub bad_entries: u64,
}

/// Puts extents together where they go on in the same way.
struct Joined<'a> {
    pending: Option<Extent>,
    limit: u64,
    visit: &'a mut dyn FnMut(Extent),
}

impl Joined<'_> {
    fn put(&mut self, guest: u64, len: u64, kind: ExtentKind) {
        let len = len.min(self.limit.saturating_sub(guest));
        if len == 0 {
            return;
        }
        if let Some(last) = &mut self.pending {
            let goes_on = last.guest.0 + last.len == guest
                && match (last.kind, kind) {
                    (ExtentKind::Data(first), ExtentKind::Data(next)) => {
                        first.0 + last.len == next.0
                    }
                    (ExtentKind::Zero { allocated: a }, ExtentKind::Zero { allocated: b }) => {
                        a == b
                    }
                    _ => false,
                };
            if goes_on {
                last.len += len;
                return;
            }
        }
        let next = Extent {
            guest: GuestOffset(guest),
            len,
            kind,
        };
        if let Some(last) = self.pending.replace(next) {
            (self.visit)(last);
        }
    }

    fn finish(&mut self) {
        if let Some(last) = self.pending.take() {
            (self.visit)(last);
        }
    }
}

impl<F: File> Inspection<F> {
    /// Reads header, extensions and the name of the backing file.
    ///
    /// # Errors
    /// Where the file is no qcow2 image or its header makes no sense, with the
    /// sentences that [`Image::open`](crate::image::Image::open) has for that.
    pub fn open(file: F) -> Result<Self> {
        let (header, extensions, name) = read_first(&file)?;
        let geometry = Geometry::of(&header);
        geometry.validate_table(
            header.l1_table_offset,
            u64::from(header.l1_size),
            8,
            MAX_L1_BYTES,
            "Active L1 table",
        )?;
        let length = file.length()?;
        Ok(Self {
            backing: (name, extensions.backing_format),
            data_file: extensions.data_file,
            bitmaps: extensions.bitmaps.is_some(),
            geometry,
            header,
            file,
            length,
        })
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The sizes that follow from the header.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Name of the backing file, as recorded.
    pub fn backing_file(&self) -> Option<&[u8]> {
        self.backing.0.as_deref()
    }

    /// Format of the backing file, as recorded.
    pub fn backing_format(&self) -> Option<&[u8]> {
        self.backing.1.as_deref()
    }

    /// Name of the external data file; an image that has one need not name it.
    pub fn data_file(&self) -> Option<&[u8]> {
        self.data_file.as_deref()
    }

    /// Whether guest data are in a file of their own.
    pub fn has_data_file(&self) -> bool {
        self.header.incompatible.contains(Incompatible::DATA_FILE)
    }

    /// Whether there are persistent bitmaps.
    pub fn has_bitmaps(&self) -> bool {
        self.bitmaps
    }

    /// Bytes of the finest part of the disk that has a mapping of its own: a
    /// cluster or subcluster.
    pub fn unit(&self) -> u64 {
        if self.geometry.l2_entry_bits == 4 {
            self.geometry.cluster_size() / u64::from(SUBCLUSTERS)
        } else {
            self.geometry.cluster_size()
        }
    }

    /// The number of refcount blocks.
    ///
    /// # Errors
    /// Those of the file, and where the table is out of range.
    pub fn refcount_blocks(&self) -> Result<u64> {
        let clusters = u64::from(self.header.refcount_table_clusters);
        let (start, size) = (
            self.header.refcount_table_offset,
            self.geometry.cluster_size(),
        );
        self.geometry.validate_table(
            start,
            clusters,
            size,
            MAX_REFTABLE_BYTES,
            "Reference count table",
        )?;
        let mut blocks = 0;
        self.words(start, clusters * size / 8, &mut |_, _| blocks += 1)?;
        Ok(blocks)
    }

    /// Tells all extents of the active disk in ascending order.
    ///
    /// # Errors
    /// Those of the file.
    pub fn walk(&self, visit: &mut dyn FnMut(Extent)) -> Result<Walked> {
        let mut walked = Walked::default();
        let tables = self.l2_tables(&mut walked)?;
        let mut joined = Joined {
            pending: None,
            limit: self.header.size,
            visit,
        };
        let mut table = vec![0; self.geometry.cluster_size() as usize];
        let span_bits = self.geometry.l2_span_bits();
        for (index, at) in tables {
            if self.is_hole(at.0, table.len() as u64)? {
                continue;
            }
            self.file.read(at.0, &mut table)?;
            self.table(index << span_bits, &table, &mut walked, &mut joined);
        }
        joined.finish();
        Ok(walked)
    }

    /// The L2 tables with their numbers.
    fn l2_tables(&self, walked: &mut Walked) -> Result<Vec<(u64, HostOffset)>> {
        let needed = self.geometry.l1_entries_for(self.header.size);
        let entries = u64::from(self.header.l1_size).min(needed);
        let (mut tables, mut seen) = (Vec::new(), FxHashSet::default());
        let (bits, end) = (self.geometry.cluster_bits, self.length);
        self.words(self.header.l1_table_offset, entries, &mut |index, word| {
            walked.l2_tables += 1;
            let table = L1Entry(word).table();
            match table {
                Some(at)
                    if word & L1_RESERVED_MASK == 0
                        && at.is_aligned(bits)
                        && at.0 < end
                        && seen.insert(at.0) =>
                {
                    tables.push((index, at));
                }
                _ => walked.bad_tables += 1,
            }
        })?;
        Ok(tables)
    }

    /// Tells the words of a table that are not zero.
    fn words(&self, start: u64, count: u64, tell: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let mut buffer = vec![0; PIECE.min(count * 8) as usize];
        let mut done = 0;
        while done < count * 8 {
            let len = PIECE.min(count * 8 - done);
            let piece = &mut buffer[..len as usize];
            let at = start.checked_add(done).ok_or(Error::errno(libc::EFBIG))?;
            if at >= self.length {
                break;
            }
            if !self.is_hole(at, len)? {
                self.file.read(at, piece)?;
                for (index, word) in words_of(piece) {
                    tell(done / 8 + index, word);
                }
            }
            done += len;
        }
        Ok(())
    }

    /// Whether there is nothing but a hole of the file system: what an endless
    /// sparse file has must not cost the time to read it.
    fn is_hole(&self, at: u64, len: u64) -> Result<bool> {
        Ok(self.file.content(at, len, true)? == (Content::Zero, len))
    }

    fn table(&self, start: u64, table: &[u8], walked: &mut Walked, out: &mut Joined<'_>) {
        let bits = self.geometry.cluster_bits;
        let size = self.geometry.cluster_size();
        if self.geometry.l2_entry_bits == 4 {
            for (index, pair) in table.chunks_exact(16).enumerate() {
                let (entry, bitmap) = (word(&pair[..8]), word(&pair[8..]));
                if entry | bitmap != 0 {
                    let guest = start + ((index as u64) << bits);
                    let full = ClusterEntry::extended(entry, bitmap);
                    self.extended(guest, full, walked, out);
                }
            }
            return;
        }
        for (index, word) in words_of(table) {
            let guest = start + (index << bits);
            let entry = L2Entry(word);
            if entry.reserved() != 0 {
                walked.bad_entries += 1;
            }
            match self.geometry.mapping(entry) {
                Mapping::Unallocated => {}
                Mapping::Compressed => out.put(guest, size, self.compressed(entry)),
                Mapping::ZeroPlain => out.put(guest, size, ExtentKind::Zero { allocated: false }),
                Mapping::ZeroAllocated(_) => {
                    out.put(guest, size, ExtentKind::Zero { allocated: true });
                }
                Mapping::Normal(at) if self.is_data_place(at) => {
                    out.put(guest, size, ExtentKind::Data(at));
                }
                Mapping::Normal(_) => walked.bad_entries += 1,
            }
        }
    }

    fn extended(&self, guest: u64, full: ClusterEntry, walked: &mut Walked, out: &mut Joined<'_>) {
        let entry = full.entry;
        if entry.is_compressed() {
            out.put(guest, self.geometry.cluster_size(), self.compressed(entry));
            return;
        }
        let mapping = self.geometry.mapping(entry);
        let place = mapping.host_cluster();
        let (data, zero) = (full.subclusters.data(), full.subclusters.zeroes());
        let misplaced = data != 0 && place.is_some_and(|at| !self.is_data_place(at));
        let damaged = full.contradicts_itself(mapping) || misplaced;
        if damaged || entry.reserved() != 0 {
            walked.bad_entries += 1;
        }
        if damaged {
            return;
        }
        let unit = self.unit();
        for number in 0..SUBCLUSTERS {
            let offset = u64::from(number) * unit;
            if (data >> number) & 1 != 0 {
                let at = place.unwrap_or_default().add(offset);
                out.put(guest + offset, unit, ExtentKind::Data(at));
            } else if (zero >> number) & 1 != 0 {
                let allocated = place.is_some();
                out.put(guest + offset, unit, ExtentKind::Zero { allocated });
            }
        }
    }

    fn compressed(&self, entry: L2Entry) -> ExtentKind {
        let place = entry.compressed(self.geometry.cluster_bits);
        ExtentKind::Compressed {
            at: place.offset,
            len: place.len,
        }
    }

    fn is_data_place(&self, at: HostOffset) -> bool {
        at.is_aligned(self.geometry.cluster_bits)
    }
}

fn word(bytes: &[u8]) -> u64 {
    let mut be = [0; 8];
    be.copy_from_slice(bytes);
    u64::from_be_bytes(be)
}

/// The words that are not zero, with their numbers.
fn words_of(bytes: &[u8]) -> impl Iterator<Item = (u64, u64)> + '_ {
    let words = bytes.chunks_exact(8).enumerate();
    words
        .map(|(index, bytes)| (index as u64, word(bytes)))
        .filter(|(_, word)| *word != 0)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;
    use crate::format::extension::Extensions;
    use crate::format::header::tests::sample;
    use crate::host::local::LocalFile;

    /// One L2 table of 64 KiB clusters, whose entries are given.
    fn image(l1: &[u64], entries: &[u64], extended: bool) -> Inspection<LocalFile> {
        let mut header = sample();
        header.l1_table_offset = 0x10000;
        header.l1_size = l1.len() as u32;
        header.size = (l1.len() as u64) << 29;
        if extended {
            header.incompatible |= Incompatible::EXTENDED_L2;
            header.size /= 2;
        }
        let first = Extensions::default()
            .encode(&mut header, Some(&b"below"[..]))
            .unwrap();
        let bytes = |words: &[u64]| -> Vec<u8> {
            words.iter().flat_map(|word| word.to_be_bytes()).collect()
        };
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&first, 0).unwrap();
        file.write_all_at(&bytes(l1), 0x10000).unwrap();
        file.write_all_at(&bytes(entries), 0x20000).unwrap();
        file.set_len(0x40000).unwrap();
        Inspection::open(LocalFile::new(file)).unwrap()
    }

    fn walk(image: &Inspection<LocalFile>) -> (Vec<(u64, u64, ExtentKind)>, Walked) {
        let mut extents = Vec::new();
        let walked = image
            .walk(&mut |extent| extents.push((extent.guest.0, extent.len, extent.kind)))
            .unwrap();
        (extents, walked)
    }

    const COPIED: u64 = 1 << 63;
    const KIB64: u64 = 0x10000;

    #[test]
    fn extents_are_joined() {
        let entries = [
            COPIED | 0x50000,
            COPIED | 0x60000,
            COPIED | 0x80000,
            0,
            1,
            1,
            COPIED | 0x90001,
            (1 << 62) | 0x1_2345,
        ];
        let image = image(&[COPIED | 0x20000], &entries, false);
        assert_eq!(image.backing_file(), Some(&b"below"[..]));
        let (extents, walked) = walk(&image);
        let data = |at| ExtentKind::Data(HostOffset(at));
        assert_eq!(
            extents,
            [
                (0, 2 * KIB64, data(0x50000)),
                (2 * KIB64, KIB64, data(0x80000)),
                (4 * KIB64, 2 * KIB64, ExtentKind::Zero { allocated: false }),
                (6 * KIB64, KIB64, ExtentKind::Zero { allocated: true }),
                (
                    7 * KIB64,
                    KIB64,
                    ExtentKind::Compressed {
                        at: HostOffset(0x1_2345),
                        len: 512 - 0x145
                    }
                ),
            ]
        );
        assert_eq!((walked.l2_tables, walked.bad_entries), (1, 0));
    }

    #[test]
    fn subclusters() {
        // The zero flag is ignored; data of a cluster without a place are nonsense.
        let entries = [COPIED | 0x50001, 0b0110 | (0b1001 << 32), 0, 1 << 32, 0, 1];
        let image = image(&[COPIED | 0x20000], &entries, true);
        assert_eq!(image.unit(), 2048);
        let (extents, walked) = walk(&image);
        assert_eq!(walked.bad_entries, 1);
        assert_eq!(
            extents,
            [
                (0, 2048, ExtentKind::Zero { allocated: true }),
                (2048, 4096, ExtentKind::Data(HostOffset(0x50800))),
                (6144, 2048, ExtentKind::Zero { allocated: true }),
                (KIB64, 2048, ExtentKind::Zero { allocated: false }),
            ]
        );
    }

    #[test]
    fn nonsense_is_counted() {
        // Shared, beyond the end, not aligned, reserved bits.
        let l1 = [0x20000, 0x20000, 0x900_0000, 0x20200, 0x20001, 1 << 60];
        let image = image(&l1, &[0x50200, 0x50002, 0x50000], false);
        let (extents, walked) = walk(&image);
        assert_eq!(extents.len(), 2);
        assert_eq!(
            walked,
            Walked {
                l2_tables: 6,
                bad_tables: 5,
                bad_entries: 2
            }
        );
    }
}
