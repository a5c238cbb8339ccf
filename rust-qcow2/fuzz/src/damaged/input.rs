//! What one run does, made from the bytes of the fuzzer.

use arbitrary::Arbitrary;

/// One run.
#[derive(Arbitrary, Clone, Debug)]
pub struct Input {
    /// Which image.
    pub sample: u8,
    /// What is done to its bytes.
    pub damage: Vec<Damage>,
    /// The file ends here, in 64 bytes.
    pub cut: Option<u16>,
    /// There is a backing file.
    pub backing: bool,
    /// The cache holds next to nothing.
    pub small_cache: bool,
    /// Zeroes are written fast.
    pub zeroes_fast: bool,
    /// What is done then.
    pub steps: Vec<Step>,
}

/// A word of the image, of eight bytes, that gets another value.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Damage {
    /// Any value.
    Word(u16, u64),
    /// Any value for its first half.
    Half(u16, u32),
    /// One bit turned over.
    Flip(u16, u8),
    /// What another word has.
    Copy(u16, u16),
    /// The number of a cluster, with the flags of an entry in the highest and
    /// lowest bits of the last number.
    Entry(u16, u8, u8),
}

/// Something that is done with the image. Sectors and clusters are counted from
/// the begin of the disk.
#[derive(Arbitrary, Clone, Copy, Debug)]
pub enum Step {
    /// Sector, bytes, and which ones.
    Write(u16, u16, u8),
    /// The same, at any byte.
    WriteAt(u32, u16, u8),
    /// A cluster of bytes like this one, compressed.
    WriteCompressed(u8, u8),
    /// Cluster, how many, and whether their space may go.
    WriteZeroes(u8, u8, bool),
    /// Cluster, and how many.
    Discard(u8, u8),
    /// Sector, and bytes.
    Status(u16, u16),
    /// Everything to the file.
    Flush,
    /// As when the cache is emptied by and by.
    CleanCaches,
    /// Closed and opened again.
    Reopen,
    /// 2 KiB, how it is preallocated, and whether it is zeroed.
    Resize(u8, u8, bool),
    /// As after a commit.
    MakeEmpty,
    /// With so many bytes of the state of a machine.
    CreateSnapshot(u16),
    /// Back to one.
    ApplySnapshot(u8),
    /// One less.
    DeleteSnapshot(u8),
    /// As when a guest begins to write.
    MarkBitmaps,
    /// A bitmap, how many bits, and their distance.
    StoreBitmap(u8, u8),
    /// All of them.
    ReadBitmaps,
    /// One less.
    RemoveBitmap(u8),
    /// Refcounts of another width.
    ChangeWidth(u8),
    /// To version 2.
    Downgrade,
    /// After some writes and flushes of the file some more of them fail.
    FailWrites(u8, u8),
    /// A check that may repair leaks (1) and errors (2).
    Check(u8),
}
