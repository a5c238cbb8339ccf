//! Opening files that somebody else named.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::SystemTime;

use rust_qcow2::format::header::{Header, V2_LENGTH};
use rustix::fs::OFlags;

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
    /// It begins as a qcow2 image does.
    pub looks_like_qcow2: bool,
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
    let mut start = [0; V2_LENGTH];
    let looks_like_qcow2 = file.read_exact_at(&mut start, 0).is_ok() && Header::probe(&start);
    let facts = FileFacts {
        id: (data.dev(), data.ino()),
        length,
        allocated,
        modified: data.modified().ok(),
        created: data.created().ok(),
        looks_like_qcow2,
    };
    Ok((file, facts))
}
