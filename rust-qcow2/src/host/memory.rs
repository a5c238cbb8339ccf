//! Files in memory, for tests: every write and flush is on record, and any of
//! them can be made to fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use super::local::{SharedBuf, ThreadQueue, gather};
use super::{Content, Corruption, Crypt, CryptoHeader, Host, Part, Preallocation, Task, ZeroFlags};
use crate::error::{Error, Result};
use crate::format::header::Encryption;
use crate::image::Image;
use parking_lot::{Mutex, RawMutex};

/// What was done to a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes at an offset.
    Write(u64, Vec<u8>),
    /// A flush.
    Flush,
    /// A new length.
    Truncate(u64),
}

/// How much was read of a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    /// Requests.
    pub count: u64,
    /// Bytes of all of them.
    pub bytes: u64,
}

/// No file in memory gets longer than this.
const MAX_LENGTH: u64 = 256 << 20;

#[derive(Default)]
struct Inner {
    bytes: Vec<u8>,
    events: Vec<Event>,
    /// Writes and flushes until the first that fails.
    good: usize,
    /// How many fail then.
    bad: usize,
    reads: Reads,
    /// Reads fail.
    unreadable: bool,
    /// Zeroes are written fast.
    zeroes_fast: bool,
}

/// A file in memory.
#[derive(Clone, Default)]
pub struct MemoryFile(Arc<Mutex<Inner>>);

impl MemoryFile {
    /// A file with content.
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Inner {
            bytes,
            ..Inner::default()
        })))
    }

    /// The content.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        self.0.lock().bytes.clone()
    }

    /// What was done since the last call.
    #[must_use]
    pub fn take_events(&self) -> Vec<Event> {
        std::mem::take(&mut self.0.lock().events)
    }

    /// How much was read since the last call.
    #[must_use]
    pub fn take_reads(&self) -> Reads {
        std::mem::take(&mut self.0.lock().reads)
    }

    /// Makes every write and flush after the next `count` fail with `EIO`;
    /// `None` ends that.
    pub fn fail_after(&self, count: Option<usize>) {
        self.fail_some(count.unwrap_or(0), count.map_or(0, |_| usize::MAX));
    }

    /// Makes `bad` writes and flushes after the next `good` ones fail with `EIO`.
    pub fn fail_some(&self, good: usize, bad: usize) {
        let mut inner = self.0.lock();
        inner.good = good;
        inner.bad = bad;
    }

    /// Makes every read fail with `EIO`, or ends that.
    pub fn set_unreadable(&self, unreadable: bool) {
        self.0.lock().unreadable = unreadable;
    }

    /// Says whether zeroes are written faster than other bytes. They are not,
    /// but what writes to the file may go another way then.
    pub fn set_zeroes_fast(&self, fast: bool) {
        self.0.lock().zeroes_fast = fast;
    }
}

impl Inner {
    fn step(&mut self, event: Event) -> Result<()> {
        if self.good > 0 {
            self.good -= 1;
        } else if self.bad > 0 {
            self.bad -= 1;
            return Err(Error::errno(libc::EIO));
        }
        let end = match &event {
            Event::Write(offset, bytes) => offset.saturating_add(bytes.len() as u64),
            Event::Truncate(len) => *len,
            Event::Flush => 0,
        };
        if end > MAX_LENGTH {
            return Err(Error::errno(libc::EFBIG));
        }
        match &event {
            Event::Write(offset, bytes) => {
                let offset = *offset as usize;
                let end = offset + bytes.len();
                if self.bytes.len() < end {
                    self.bytes.resize(end, 0);
                }
                self.bytes[offset..end].copy_from_slice(bytes);
            }
            Event::Truncate(len) => self.bytes.resize(*len as usize, 0),
            Event::Flush => {}
        }
        self.events.push(event);
        Ok(())
    }
}

impl super::File for MemoryFile {
    type Buf<'a> = SharedBuf<'a>;

    fn read(&self, offset: u64, buf: &mut [u8]) -> Result<()> {
        let mut inner = self.0.lock();
        if inner.unreadable {
            return Err(Error::errno(libc::EIO));
        }
        inner.reads.count += 1;
        inner.reads.bytes += buf.len() as u64;
        let start = (offset.min(inner.bytes.len() as u64)) as usize;
        let len = buf.len().min(inner.bytes.len() - start);
        buf[..len].copy_from_slice(&inner.bytes[start..start + len]);
        buf[len..].fill(0);
        Ok(())
    }

    fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        self.0.lock().step(Event::Write(offset, buf.to_vec()))
    }

    fn read_guest(&self, offset: u64, buf: SharedBuf<'_>, at: usize, len: usize) -> Result<()> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes)?;
        super::Buf::put(&buf, at, &bytes);
        Ok(())
    }

    fn write_guest(&self, offset: u64, buf: SharedBuf<'_>, at: usize, len: usize) -> Result<()> {
        self.write_parts(offset, &[Part::Guest { buf, at, len }])
    }

    fn write_parts(&self, offset: u64, parts: &[Part<'_, SharedBuf<'_>>]) -> Result<()> {
        self.write(offset, &gather(parts))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        if flags.no_fallback && !self.zeroes_fast() {
            return Err(Error::errno(libc::ENOTSUP));
        }
        self.write(offset, &vec![0; len as usize])
    }

    fn zeroes_fast(&self) -> bool {
        self.0.lock().zeroes_fast
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let mut inner = self.0.lock();
        let len = len.min((inner.bytes.len() as u64).saturating_sub(offset));
        inner.step(Event::Write(offset, vec![0; len as usize]))
    }

    fn flush(&self) -> Result<()> {
        self.0.lock().step(Event::Flush)
    }

    fn length(&self) -> Result<u64> {
        Ok(self.0.lock().bytes.len() as u64)
    }

    fn allocated(&self) -> Option<u64> {
        None
    }

    fn truncate(&self, len: u64, _exact: bool, _how: Preallocation, _zero: bool) -> Result<()> {
        self.0.lock().step(Event::Truncate(len))
    }

    fn content(&self, offset: u64, len: u64, _precise: bool) -> Result<(Content, u64)> {
        let inner = self.0.lock();
        let start = (offset as usize).min(inner.bytes.len());
        let end = (offset.saturating_add(len) as usize).min(inner.bytes.len());
        let zero = inner.bytes[start..end].iter().all(|byte| *byte == 0);
        Ok((if zero { Content::Zero } else { Content::Data }, len))
    }
}

/// One image in memory, with a raw file or another image below.
#[derive(Default)]
pub struct MemoryHost {
    /// The image.
    pub file: MemoryFile,
    /// The external data file.
    pub data: Option<MemoryFile>,
    /// Encrypted images are opened; the cipher is nothing to rely on, but
    /// different for each sector.
    pub has_key: bool,
    /// What is below, if that is raw.
    pub backing: Option<MemoryFile>,
    /// What is below, if that is an image.
    pub layer_below: Mutex<Option<Arc<Image<MemoryHost>>>>,
    /// To be increased when that changes, for all images of a chain.
    pub generation: Arc<AtomicU64>,
    /// Tasks do not run in threads, but one after the other.
    pub one_thread: bool,
    /// Failures that were reported.
    pub errors: Arc<Mutex<Vec<Error>>>,
    /// Warnings.
    pub warnings: Arc<Mutex<Vec<String>>>,
    /// Corruption that was reported.
    pub reports: Arc<Mutex<Vec<Corruption>>>,
}

impl Host for MemoryHost {
    type RawMutex = RawMutex;
    type WaitQueue = ThreadQueue;
    type File = MemoryFile;
    type Aligned = Vec<u8>;
    type Places = ();

    fn places(_image: &Arc<Image<Self>>) {}

    fn file(&self) -> MemoryFile {
        self.file.clone()
    }

    fn data_file(&self) -> Option<MemoryFile> {
        self.data.clone()
    }

    fn open_encryption(
        &self,
        encrypted: Option<(Encryption, Option<CryptoHeader>)>,
        _no_io: bool,
    ) -> Result<()> {
        if encrypted.is_some() && !self.has_key {
            return Err(Error::invalid("there is no key"));
        }
        Ok(())
    }

    fn crypt(&self, how: Crypt, offset: u64, bytes: &mut [u8]) -> Result<()> {
        if offset % 512 != 0 || bytes.len() % 512 != 0 {
            return Err(Error::errno(libc::EIO));
        }
        for (sector, number) in bytes.chunks_mut(512).zip(offset / 512..) {
            let key = (number as u8).wrapping_mul(29).wrapping_add(101);
            for byte in sector {
                *byte = match how {
                    Crypt::Encrypt => byte.wrapping_add(key),
                    Crypt::Decrypt => byte.wrapping_sub(key),
                };
            }
        }
        Ok(())
    }

    fn backing(&self) -> Option<MemoryFile> {
        // An image below has a file as well, which nobody reads.
        let below = self.layer_below.lock().is_some();
        self.backing
            .clone()
            .or_else(|| below.then(MemoryFile::default))
    }

    fn layer_below(&self) -> Option<Arc<Image<Self>>> {
        self.layer_below.lock().clone()
    }

    fn generation(&self) -> u64 {
        self.generation.load(Ordering::SeqCst)
    }

    fn aligned(&self, len: usize) -> Result<Vec<u8>> {
        Ok(vec![0; len])
    }

    fn scratch(&self, len: usize) -> Result<Vec<u8>> {
        // So that it is seen when somebody relies on zeroes.
        Ok(vec![0xa5; len])
    }

    fn parallel(&self, _workers: usize, tasks: Vec<Task<'_>>) -> Result<()> {
        if self.one_thread {
            let results: Vec<_> = tasks.into_iter().map(|task| task()).collect();
            return results.into_iter().collect();
        }
        std::thread::scope(|scope| {
            let threads: Vec<_> = tasks.into_iter().map(|task| scope.spawn(task)).collect();
            // All of them have to end, also after a failure.
            let results: Vec<_> = threads
                .into_iter()
                .map(|thread| {
                    thread
                        .join()
                        .unwrap_or_else(|_| Err(Error::errno(libc::EIO)))
                })
                .collect();
            results.into_iter().collect()
        })
    }

    fn report(&self, error: &Error) {
        self.errors.lock().push(error.clone());
    }

    fn warn(&self, sentence: &str, _advice: &str) {
        self.warnings.lock().push(sentence.to_owned());
    }

    fn report_corruption(&self, event: &Corruption) {
        self.reports.lock().push(event.clone());
    }
}
