//! A complete qcow2 file in one pass: header, L1, L2 tables, data, compressed
//! data, and behind them the refcounts of all that.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use flate2::{Compress, Compression, FlushCompress, Status};
use rust_qcow2::format::extension::Extensions;
use rust_qcow2::format::header::{
    Autoclear, Compatible, CompressionType, Header, Incompatible, V2_LENGTH, V3_LENGTH,
};
use rust_qcow2::format::refcount::RefcountOrder;
use ruzstd::encoding::{CompressionLevel, compress_to_vec};

/// Refers to this cluster alone.
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
/// What QEMU's decompressor has as its window, in bits.
const DEFLATE_WINDOW: u8 = 12;

/// What an image is to be.
#[derive(Clone, Debug)]
pub struct Format {
    pub size: u64,
    pub version: u32,
    pub cluster_bits: u32,
    pub refcount_order: RefcountOrder,
    pub extended_l2: bool,
    pub compression: CompressionType,
    /// Name and format of the backing file.
    pub backing: Option<(String, String)>,
    /// Data clusters lie in the file in this order: a permutation's seed, or
    /// as on the disk.
    pub scatter: Option<u64>,
}

/// What a cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum What {
    Data,
    Compressed,
    Zero,
    /// Some subclusters have data, some are zero: bits as in the bitmap.
    Parts {
        data: u32,
        zero: u32,
    },
}

/// Writes a file that is not there; see `write_to`.
pub fn write(
    path: &Path,
    format: &Format,
    clusters: &[(u64, What)],
    fill: &dyn Fn(u64, bool, &mut [u8]),
) -> Result<u64> {
    let name = || path.display().to_string();
    let file = File::create_new(path).with_context(name)?;
    write_to(&file, format, clusters, fill).with_context(name)
}

/// Writes into an empty file an image with the clusters given, in ascending order; `fill` makes
/// their content. Returns the length of the file.
pub fn write_to(
    file: &File,
    format: &Format,
    clusters: &[(u64, What)],
    fill: &dyn Fn(u64, bool, &mut [u8]),
) -> Result<u64> {
    Writer {
        file,
        format,
        cluster: 1 << format.cluster_bits,
    }
    .image(clusters, fill)
}

struct Writer<'a> {
    file: &'a File,
    format: &'a Format,
    cluster: u64,
}

/// Writes one piece behind the other.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Write for At<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let done = self.file.write_at(bytes, self.offset)?;
        self.offset += done as u64;
        Ok(done)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Writer<'_> {
    fn image(&self, clusters: &[(u64, What)], fill: &dyn Fn(u64, bool, &mut [u8])) -> Result<u64> {
        let entry_bits = if self.format.extended_l2 { 4 } else { 3 };
        let l2_bits = self.format.cluster_bits - entry_bits;
        let l1_size = self.format.size.div_ceil(self.cluster << l2_bits);
        let l1_clusters = (l1_size * 8).div_ceil(self.cluster);
        let tables = clusters.chunk_by(|a, b| a.0 >> l2_bits == b.0 >> l2_bits);
        let tables: Vec<_> = tables.collect();
        let l2_start = 1 + l1_clusters;
        let data_start = l2_start + tables.len() as u64;
        ensure!(
            l1_size * 8 <= 32 << 20,
            "the disk is too large for this cluster size"
        );

        let mut l1 = vec![0; (l1_clusters * self.cluster) as usize];
        for (at, table) in tables.iter().enumerate() {
            let index = (table[0].0 >> l2_bits) as usize;
            let offset = (l2_start + at as u64) * self.cluster;
            l1[index * 8..][..8].copy_from_slice(&(COPIED | offset).to_be_bytes());
        }
        self.file.write_all_at(&l1, self.cluster)?;

        let places = self.places(clusters, data_start);
        let data_end = data_start + places.iter().flatten().count() as u64;
        self.data(clusters, &places, fill)?;
        let (packed, shared) = self.compressed(clusters, data_end, fill)?;

        let mut table = vec![0; self.cluster as usize];
        let mut number = 0;
        for (at, entries) in tables.iter().enumerate() {
            table.fill(0);
            for (guest, what) in *entries {
                let index = ((guest & ((1 << l2_bits) - 1)) << entry_bits) as usize;
                let place = places[number].map(|place| COPIED | (place * self.cluster));
                let (entry, bitmap) = match what {
                    What::Compressed => (packed.get(&number).copied().or(place), !0 >> 32),
                    What::Data => (place, !0 >> 32),
                    What::Zero if self.format.extended_l2 => (None, !0 << 32),
                    What::Zero => (Some(1), 0),
                    What::Parts { data, zero } => {
                        (place, (u64::from(*zero) << 32) | u64::from(*data))
                    }
                };
                let entry = entry.unwrap_or(0);
                table[index..index + 8].copy_from_slice(&entry.to_be_bytes());
                if self.format.extended_l2 {
                    let bitmap = if entry & COMPRESSED != 0 { 0 } else { bitmap };
                    table[index + 8..index + 16].copy_from_slice(&bitmap.to_be_bytes());
                }
                number += 1;
            }
            self.file
                .write_all_at(&table, (l2_start + at as u64) * self.cluster)?;
        }
        self.finish(data_end, &shared, l1_size as u32)
    }

    /// Which clusters of the file the data get.
    fn places(&self, clusters: &[(u64, What)], start: u64) -> Vec<Option<u64>> {
        use rand::SeedableRng;
        use rand::seq::SliceRandom;
        let own = |what| matches!(what, What::Data | What::Parts { .. });
        let count = clusters.iter().filter(|(_, what)| own(*what)).count() as u64;
        let mut order: Vec<_> = (start..start + count).collect();
        if let Some(seed) = self.format.scatter {
            order.shuffle(&mut rand_chacha::ChaCha8Rng::seed_from_u64(seed));
        }
        let mut order = order.into_iter();
        let place = |(_, what): &(u64, What)| own(*what).then(|| order.next()).flatten();
        clusters.iter().map(place).collect()
    }

    fn data(
        &self,
        clusters: &[(u64, What)],
        places: &[Option<u64>],
        fill: &dyn Fn(u64, bool, &mut [u8]),
    ) -> Result<()> {
        let mut bytes = vec![0; self.cluster as usize];
        let capacity = (1 << 20).max(bytes.len());
        let mut out = BufWriter::with_capacity(
            capacity,
            At {
                file: self.file,
                offset: 0,
            },
        );
        let mut next = None;
        for ((guest, _), place) in clusters.iter().zip(places) {
            let Some(place) = *place else { continue };
            fill(*guest, false, &mut bytes);
            if next != Some(place) {
                out.flush()?;
                out.get_mut().offset = place * self.cluster;
            }
            out.write_all(&bytes)?;
            next = Some(place + 1);
        }
        out.flush()?;
        Ok(())
    }

    /// Packs compressed clusters one behind the other. Returns their entries by
    /// number, and the refcounts of the clusters of the file that they share.
    fn compressed(
        &self,
        clusters: &[(u64, What)],
        start: u64,
        fill: &dyn Fn(u64, bool, &mut [u8]),
    ) -> Result<(rustc_hash::FxHashMap<usize, u64>, Vec<u64>)> {
        let mut entries = rustc_hash::FxHashMap::default();
        let mut counts: Vec<u64> = Vec::new();
        let mut bytes = vec![0; self.cluster as usize];
        let mut offset = start * self.cluster;
        let max = self.format.refcount_order.max();
        let shift = 62 - (self.format.cluster_bits - 8);
        for (number, (guest, what)) in clusters.iter().enumerate() {
            if *what != What::Compressed {
                continue;
            }
            fill(*guest, true, &mut bytes);
            let packed = self.compress(&bytes)?;
            let (len, mut payload) = (packed.len() as u64, packed);
            let open = (offset / self.cluster - start) as usize;
            if counts.get(open).is_some_and(|count| *count >= max) {
                offset = offset.next_multiple_of(self.cluster);
            }
            let plain = len >= self.cluster;
            if plain {
                // As QEMU does with what does not compress.
                offset = offset.next_multiple_of(self.cluster);
                payload.clone_from(&bytes);
            }
            let len = payload.len() as u64;
            self.file.write_all_at(&payload, offset)?;
            let (first, last) = (offset / self.cluster, (offset + len - 1) / self.cluster);
            counts.resize((last - start + 1) as usize, 0);
            for cluster in first..=last {
                counts[(cluster - start) as usize] += 1;
            }
            let entry = if plain {
                COPIED | offset
            } else {
                let sectors = (offset + len - 1) / 512 - offset / 512;
                COMPRESSED | (sectors << shift) | offset
            };
            entries.insert(number, entry);
            offset += len;
            if plain {
                // Nobody may share this one.
                offset = offset.next_multiple_of(self.cluster);
            }
        }
        Ok((entries, counts))
    }

    fn compress(&self, bytes: &[u8]) -> Result<Vec<u8>> {
        if self.format.compression == CompressionType::Zstd {
            return Ok(compress_to_vec(bytes, CompressionLevel::Fastest));
        }
        let mut packed = Vec::with_capacity(bytes.len() + 1024);
        let mut state = Compress::new_with_window_bits(Compression::fast(), false, DEFLATE_WINDOW);
        let status = state.compress_vec(bytes, &mut packed, FlushCompress::Finish)?;
        if status != Status::StreamEnd {
            // It got longer than the cluster.
            packed.resize(bytes.len(), 0);
        }
        Ok(packed)
    }

    /// The refcounts, which count themselves, and at last the header. `owned`
    /// clusters have one user each; behind them are those that are shared.
    fn finish(&self, owned: u64, shared: &[u64], l1_size: u32) -> Result<u64> {
        let per_block = self.format.refcount_order.per_bytes(self.cluster);
        let others = owned + shared.len() as u64;
        let (mut blocks, mut table) = (1, 1);
        loop {
            let want_blocks = (others + blocks + table).div_ceil(per_block).max(blocks);
            let want_table = (want_blocks * 8).div_ceil(self.cluster).max(table);
            if (want_blocks, want_table) == (blocks, table) {
                break;
            }
            (blocks, table) = (want_blocks, want_table);
        }
        let total = others + blocks + table;
        let mut bytes = vec![0; (blocks * self.cluster) as usize];
        let per_block_bytes = self.cluster as usize;
        for cluster in 0..total {
            let count = cluster
                .checked_sub(owned)
                .and_then(|at| shared.get(at as usize))
                .copied()
                .unwrap_or(1);
            let block = (cluster / per_block) as usize * per_block_bytes;
            self.format.refcount_order.set(
                &mut bytes[block..block + per_block_bytes],
                (cluster % per_block) as usize,
                count,
            );
        }
        self.file.write_all_at(&bytes, others * self.cluster)?;
        let table_at = (others + blocks) * self.cluster;
        let mut bytes = vec![0; (table * self.cluster) as usize];
        for block in 0..blocks {
            let at = (others + block) * self.cluster;
            bytes[block as usize * 8..][..8].copy_from_slice(&at.to_be_bytes());
        }
        self.file.write_all_at(&bytes, table_at)?;
        self.header(table_at, table as u32, l1_size)?;
        Ok(table_at + table * self.cluster)
    }

    fn header(&self, table_at: u64, table_clusters: u32, l1_size: u32) -> Result<()> {
        let format = self.format;
        let zstd = format.compression == CompressionType::Zstd;
        let mut incompatible = Incompatible::empty();
        incompatible.set(Incompatible::EXTENDED_L2, format.extended_l2);
        incompatible.set(Incompatible::COMPRESSION, zstd);
        let mut header = Header {
            version: format.version,
            cluster_bits: format.cluster_bits,
            size: format.size,
            backing_name: None,
            crypt_method: 0,
            l1_size,
            l1_table_offset: self.cluster,
            refcount_table_offset: table_at,
            refcount_table_clusters: table_clusters,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible,
            compatible: Compatible::empty(),
            autoclear: Autoclear::empty(),
            refcount_order: format.refcount_order,
            header_length: if format.version < 3 {
                V2_LENGTH
            } else {
                V3_LENGTH
            } as u32,
            compression: u8::from(zstd),
            unknown_fields: Vec::new(),
        };
        let extensions = Extensions {
            backing_format: format
                .backing
                .as_ref()
                .map(|(_, format)| format.clone().into_bytes()),
            ..Extensions::default()
        };
        let name = format.backing.as_ref().map(|(name, _)| name.as_bytes());
        let first = extensions
            .encode(&mut header, name)
            .context("the name of the backing file does not fit the first cluster")?;
        self.file.write_all_at(&first, 0)?;
        Ok(())
    }
}
