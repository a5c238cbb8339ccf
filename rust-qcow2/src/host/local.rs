//! Files of the operating system: for tools and tests without QEMU.

use std::os::unix::fs::{FileExt, FileTypeExt};
use std::sync::Arc;

use super::{
    Buf, Content, Corruption, CryptoHeader, Host, Part, Preallocation, Task, WaitQueue, ZeroFlags,
};
use crate::error::{Error, Result};
use crate::format::header::Encryption;
use crate::image::Image;
use lock_api::MutexGuard;
use parking_lot::{Condvar, Mutex, RawMutex};

/// Threads that wait for each other.
#[derive(Default)]
pub struct ThreadQueue(Condvar);

impl WaitQueue<RawMutex> for ThreadQueue {
    fn wait<T>(&self, guard: &mut MutexGuard<'_, RawMutex, T>) {
        self.0.wait(guard);
    }

    fn wake_all(&self) {
        self.0.notify_all();
    }
}

/// Guest memory in one piece, behind a lock: simple rather than fast.
#[derive(Clone, Copy)]
pub struct SharedBuf<'a>(pub &'a Mutex<Vec<u8>>);

impl Buf for SharedBuf<'_> {
    fn zero(&self, at: usize, len: usize) {
        self.0.lock()[at..at + len].fill(0);
    }

    fn put(&self, at: usize, data: &[u8]) {
        self.0.lock()[at..at + data.len()].copy_from_slice(data);
    }

    fn get(&self, at: usize, data: &mut [u8]) {
        data.copy_from_slice(&self.0.lock()[at..at + data.len()]);
    }
}

/// All parts of a gathered write in one piece.
pub(super) fn gather(parts: &[Part<'_, SharedBuf<'_>>]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for part in parts {
        match part {
            Part::Bytes(slice) => bytes.extend_from_slice(slice),
            Part::Guest { buf, at, len } => {
                let start = bytes.len();
                bytes.resize(start + len, 0);
                buf.get(*at, &mut bytes[start..]);
            }
        }
    }
    bytes
}

/// A file of the operating system.
#[derive(Clone)]
pub struct LocalFile(Arc<std::fs::File>);

impl LocalFile {
    /// Wraps an open file.
    #[must_use]
    pub fn new(file: std::fs::File) -> Self {
        Self(Arc::new(file))
    }
}

impl super::File for LocalFile {
    type Buf<'a> = SharedBuf<'a>;

    fn read(&self, mut offset: u64, mut buf: &mut [u8]) -> Result<()> {
        while !buf.is_empty() {
            match self.0.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    offset += n as u64;
                    buf = &mut buf[n..];
                }
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn write(&self, offset: u64, buf: &[u8]) -> Result<()> {
        Ok(self.0.write_all_at(buf, offset)?)
    }

    fn read_guest(&self, offset: u64, buf: SharedBuf<'_>, at: usize, len: usize) -> Result<()> {
        let mut bytes = vec![0; len];
        self.read(offset, &mut bytes)?;
        buf.put(at, &bytes);
        Ok(())
    }

    fn write_guest(&self, offset: u64, buf: SharedBuf<'_>, at: usize, len: usize) -> Result<()> {
        self.write_parts(offset, &[Part::Guest { buf, at, len }])
    }

    fn write_parts(&self, offset: u64, parts: &[Part<'_, SharedBuf<'_>>]) -> Result<()> {
        self.write(offset, &gather(parts))
    }

    fn write_zeroes(&self, offset: u64, len: u64, flags: ZeroFlags) -> Result<()> {
        if flags.no_fallback {
            return Err(Error::errno(libc::ENOTSUP));
        }
        let zeroes = vec![0; len.min(1 << 20) as usize];
        let mut done = 0;
        while done < len {
            let step = (len - done).min(zeroes.len() as u64);
            self.write(offset + done, &zeroes[..step as usize])?;
            done += step;
        }
        Ok(())
    }

    fn zeroes_fast(&self) -> bool {
        false
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        Ok(self.0.sync_data()?)
    }

    fn length(&self) -> Result<u64> {
        use std::io::{Seek, SeekFrom};
        let data = self.0.metadata()?;
        if data.file_type().is_block_device() {
            // Of these it says 0. All access is by offset: the position is free.
            return Ok((&*self.0).seek(SeekFrom::End(0))?);
        }
        Ok(data.len())
    }

    fn allocated(&self) -> Option<u64> {
        use std::os::unix::fs::MetadataExt;
        let data = self.0.metadata().ok()?;
        if data.file_type().is_block_device() {
            return self.length().ok();
        }
        Some(data.blocks() * 512)
    }

    fn truncate(&self, len: u64, _exact: bool, how: Preallocation, _zero: bool) -> Result<()> {
        if matches!(how, Preallocation::Falloc | Preallocation::Full) {
            return Err(Error::errno(libc::ENOTSUP));
        }
        Ok(self.0.set_len(len)?)
    }

    fn content(&self, offset: u64, len: u64, precise: bool) -> Result<(Content, u64)> {
        use rustix::fs::{SeekFrom, seek};
        use rustix::io::Errno;
        if !precise || len == 0 {
            return Ok((Content::Data, len));
        }
        match seek(&*self.0, SeekFrom::Data(offset)) {
            Ok(data) if data > offset => Ok((Content::Zero, len.min(data - offset))),
            Ok(_) => match seek(&*self.0, SeekFrom::Hole(offset)) {
                Ok(hole) if hole > offset => Ok((Content::Data, len.min(hole - offset))),
                // The file changes, or holes are not known here.
                _ => Ok((Content::Data, len)),
            },
            Err(Errno::NXIO) => Ok((Content::Zero, len)),
            Err(_) => Ok((Content::Data, len)),
        }
    }
}

/// One image in a file, with another file below.
pub struct LocalHost {
    file: LocalFile,
    backing: Option<LocalFile>,
}

impl LocalHost {
    /// An image in `file`; `backing` is raw.
    #[must_use]
    pub fn new(file: LocalFile, backing: Option<LocalFile>) -> Self {
        Self { file, backing }
    }
}

impl Host for LocalHost {
    type RawMutex = RawMutex;
    type WaitQueue = ThreadQueue;
    type File = LocalFile;
    type Aligned = Vec<u8>;
    type Places = ();

    fn places(_image: &Arc<Image<Self>>) {}

    fn file(&self) -> LocalFile {
        self.file.clone()
    }

    /// There are no keys here; what is not read needs none.
    fn open_encryption(
        &self,
        encrypted: Option<(Encryption, Option<CryptoHeader>)>,
        no_io: bool,
    ) -> Result<()> {
        if encrypted.is_some() && !no_io {
            return Err(Error::unsupported("there is no encryption here"));
        }
        Ok(())
    }

    fn backing(&self) -> Option<LocalFile> {
        self.backing.clone()
    }

    fn layer_below(&self) -> Option<Arc<Image<Self>>> {
        None
    }

    fn generation(&self) -> u64 {
        0
    }

    fn aligned(&self, len: usize) -> Result<Vec<u8>> {
        Ok(vec![0; len])
    }

    fn scratch(&self, len: usize) -> Result<Vec<u8>> {
        // So that it is seen when somebody relies on zeroes.
        Ok(vec![0xa5; len])
    }

    fn parallel(&self, _workers: usize, tasks: Vec<Task<'_>>) -> Result<()> {
        tasks.into_iter().try_for_each(|task| task())
    }

    fn report(&self, error: &Error) {
        eprintln!("{error}");
    }

    fn warn(&self, sentence: &str, advice: &str) {
        eprintln!("warning: {sentence}\n{advice}");
    }

    fn report_corruption(&self, event: &Corruption) {
        eprintln!("qcow2: {}", event.message);
    }
}
