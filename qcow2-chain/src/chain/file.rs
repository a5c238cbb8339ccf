//! Opening files that somebody else named.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use rustix::fs::OFlags;

use super::format::{Looks, START};

/// The byte that whoever may write to an image locks in its file: QEMU has one
/// for each permission, from 100 on, and BLK_PERM_WRITE is the second.
const WRITE_LOCK: libc::off_t = 101;

/// What the file system says of a file.
#[derive(Clone, Copy, Debug)]
pub struct FileFacts {
    /// Device and inode.
    pub id: (u64, u64),
    /// Bytes.
    pub length: u64,
    /// Bytes that are allocated on the storage.
    pub allocated: u64,
    /// When it was written last.
    pub modified: Option<SystemTime>,
    /// When it was created, where the file system knows.
    pub created: Option<SystemTime>,
    /// What its first bytes say.
    pub looks: Looks,
    /// Another program has it open for writing, as QEMU does.
    pub in_use: bool,
}

/// Opens a regular file or block device for reading. Waits for nobody (a
/// FIFO), starts nothing (a character device), follows no symbolic link.
pub fn open_read_only(path: &Path) -> io::Result<(File, FileFacts)> {
    let flags = OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::NOCTTY;
    let plain = |data: &std::fs::Metadata| data.is_file() || data.file_type().is_block_device();
    let strange = || io::Error::other("neither a regular file nor a block device");
    if !plain(&std::fs::symlink_metadata(path)?) {
        return Err(strange());
    }
    let mut file = OpenOptions::new()
        .read(true)
        .custom_flags(flags.bits() as i32)
        .open(path)?;
    let data = file.metadata()?;
    if !plain(&data) {
        return Err(strange());
    }
    let (length, allocated) = if data.is_file() {
        (data.len(), data.blocks() * 512)
    } else {
        let length = file.seek(SeekFrom::End(0))?;
        (length, length)
    };
    let mut start = [0; START];
    // What cannot be read is told when more than the start is wanted.
    let known = read_start(&file, &mut start).unwrap_or(0);
    let facts = FileFacts {
        id: (data.dev(), data.ino()),
        length,
        allocated,
        modified: data.modified().ok(),
        created: data.created().ok(),
        looks: Looks::of(&start[..known]),
        in_use: is_in_use(&file),
    };
    Ok((file, facts))
}

/// As much of the start as there is.
fn read_start(file: &File, start: &mut [u8]) -> io::Result<usize> {
    let mut known = 0;
    while known < start.len() {
        match file.read_at(&mut start[known..], known as u64)? {
            0 => break,
            got => known += got,
        }
    }
    Ok(known)
}

/// Whether somebody holds QEMU's lock of those who write. The question takes
/// no lock, so that nobody is disturbed by it.
fn is_in_use(file: &File) -> bool {
    // Locks in use are shared ones, in the way of an exclusive one only.
    let mut lock = libc::flock {
        l_type: libc::F_WRLCK as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: WRITE_LOCK,
        l_len: 1,
        l_pid: 0,
    };
    // File systems without locks have nobody to ask.
    fcntl(file, FcntlArg::F_OFD_GETLK(&mut lock)).is_ok()
        && lock.l_type != libc::F_UNLCK as libc::c_short
}
