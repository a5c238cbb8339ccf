//! What is where: block status.

use super::map::Run;
use super::{Image, StateGuard};
use crate::error::Result;
use crate::format::entry::Mapping;
use crate::format::subclusters::Part;
use crate::host::{Content, File, Host};
use crate::units::{ClusterIndex, GuestOffset, HostOffset, round_up};

/// Clusters that are looked at where this image has nothing, even if the layers
/// below have different ones: 512 KiB of the usual size, which a stream copies at
/// once.
const CLUSTERS_AHEAD: u64 = 8;

/// A range of one kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockStatus {
    /// Bytes of the range, at least 1.
    pub len: u64,
    /// What they are.
    pub kind: StatusKind,
    /// Data may be a hole in the file: it has to be asked (clusters were
    /// preallocated without writing to them).
    pub sparse: bool,
}

/// What guest bytes are in one image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StatusKind {
    /// Not in this image.
    Unallocated {
        /// The place reserved for it, if any.
        host: Option<HostOffset>,
    },
    /// Zeroes.
    Zero {
        /// The place reserved for them, if any.
        host: Option<HostOffset>,
    },
    /// Data, at this place.
    Data(HostOffset),
    /// Compressed data.
    Compressed,
}

impl<H: Host> Image<H> {
    /// What `len` > 0 bytes at `guest` are in this image, as far as they are of
    /// one kind.
    ///
    /// # Errors
    /// Those of the file, `EIO` for damaged tables.
    pub fn block_status(&self, guest: GuestOffset, len: u64) -> Result<BlockStatus> {
        let cluster = self.geometry.cluster_size() - guest.within(self.geometry.cluster_bits);
        let (first, mut len_known) = self.part_at(guest, len.min(cluster))?;
        let len = match first.mapping {
            Mapping::Unallocated if len > cluster => self.worth_asking(guest, len),
            _ => len,
        };
        let kind = match first.mapping {
            Mapping::Unallocated => StatusKind::Unallocated {
                host: first.reserved,
            },
            Mapping::ZeroPlain => StatusKind::Zero { host: None },
            Mapping::ZeroAllocated(host) => StatusKind::Zero { host: Some(host) },
            Mapping::Normal(host) => StatusKind::Data(host),
            Mapping::Compressed => StatusKind::Compressed,
        };
        // Runs end at slices; a status goes on while the kind stays.
        while len_known < len {
            // What cannot be told further on is an error only for who asks for it.
            let next = self.part_at(guest.add(len_known), len - len_known);
            let Ok((next, next_len)) = next else { break };
            if first.mapping == Mapping::Compressed || next != first.plus(len_known) {
                break;
            }
            len_known += next_len;
        }
        // Looked up for any kind, so that the first status takes its time when
        // nobody depends on the order of events yet, as with the C driver.
        let sparse = self.is_sparse() && matches!(kind, StatusKind::Data(_));
        Ok(BlockStatus {
            len: len_known,
            kind,
            sparse,
        })
    }

    /// How many of `len` bytes are to be looked at where this image has nothing
    /// at `guest`. The next question is what the layers below have: with data in
    /// many of them the answer is short, and to find the end of what is not here
    /// each time would take the square of the number of clusters. A few more,
    /// though, for those who copy what several layers have in one request.
    /// Whole clusters of this image, whatever theirs are: copy-on-read depends
    /// on that.
    fn worth_asking(&self, guest: GuestOffset, len: u64) -> u64 {
        let cluster_bits = self.geometry.cluster_bits;
        match self.known_below(guest, len) {
            Some(known) => {
                let known = known.max(CLUSTERS_AHEAD << cluster_bits);
                len.min(round_up(guest.0 + known, cluster_bits) - guest.0)
            }
            None => len,
        }
    }

    /// What is at `guest`, as far as one run goes. An index above that found
    /// data here spares the layer to load its table for it: that is where the
    /// status of a long chain comes from.
    fn part_at(&self, guest: GuestOffset, len: u64) -> Result<(Part, u64)> {
        let part = |run: Run| Part {
            mapping: run.mapping,
            reserved: run.reserved,
        };
        if let Some(run) = self.lookup_fast(guest, len) {
            return Ok((part(run), run.len));
        }
        if let Some((host, len)) = self.links().data_known_above(guest, len) {
            return Ok((Part::plain(Mapping::Normal(host)), len));
        }
        let run = self.lookup(guest, len)?;
        Ok((part(run), run.len))
    }

    /// How many of the `len` bytes at `host`, data of the guest, are a hole in
    /// the file, so that they read as zeroes; `None` where that is not worth
    /// asking, as no clusters were preallocated.
    pub(super) fn hole_at(&self, host: HostOffset, len: u64) -> Result<Option<u64>> {
        if self.encryption.is_some() {
            return Ok(None);
        }
        match self.data_file()?.content(host.0, len, true)? {
            (Content::Zero, known) if self.is_sparse() => Ok(Some(known)),
            _ => Ok(None),
        }
    }

    /// Whether notably more clusters are counted than the storage holds. Looked
    /// up once, with every refcount block.
    fn is_sparse(&self) -> bool {
        if let Some(known) = self.sparse.get() {
            return *known;
        }
        let mut st = self.lock();
        let sparse = match self.host.file().allocated() {
            None => false,
            Some(allocated) => {
                let size = self.geometry.cluster_size();
                let stored = allocated / size;
                let threshold = (stored * 10 / 9).max(stored + 2);
                // Where the refcounts cannot be read nothing is known of it.
                let counted = self.counted_clusters_reach(&mut st, threshold);
                self.release_refcounts(&mut st);
                counted.unwrap_or(false)
            }
        };
        *self.sparse.get_or_init(|| sparse)
    }

    fn counted_clusters_reach(&self, st: &mut StateGuard<'_, H>, threshold: u64) -> Result<bool> {
        let end = self
            .host
            .file()
            .length()?
            .div_ceil(self.geometry.cluster_size());
        if end < threshold {
            // Not even if all of them are in use.
            return Ok(false);
        }
        self.need_refcounts(st)?;
        let mut counted = 0;
        let mut cluster = 0;
        while cluster < end {
            let (id, _) = self.block_of(ClusterIndex(cluster));
            if st.refcounts.block_offset(id).is_none() {
                cluster = (id.0 + 1) * self.geometry.refcounts_per_block();
                continue;
            }
            if self.refcount(st, ClusterIndex(cluster))? != 0 {
                counted += 1;
                if counted >= threshold {
                    return Ok(true);
                }
            }
            cluster += 1;
        }
        Ok(false)
    }
}
