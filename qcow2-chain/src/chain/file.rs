//! Opening files that somebody else named.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::OFlags;

use super::format::{Looks, START};

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
