//! What is predicted and measured.

use serde::{Deserialize, Serialize};

/// A figure of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Figure {
    /// Seconds to open the chain, read-only.
    Open,
    /// Bytes resident in `qemu-io` when the chain is open.
    MemoryOpen,
    /// The same when there was a read to every table.
    MemoryWarm,
    /// Microseconds of a 4 KiB read of data, all tables in memory, one at a time.
    ReadData,
    /// The same of what no layer has.
    ReadHole,
    /// Microseconds for each of many 4 KiB reads in a row all over the disk, so
    /// many at a time.
    ReadDisk,
    /// Seconds of a `block-stream` of everything into a new overlay.
    Stream,
    /// Seconds of a `qemu-img convert` into a new image.
    Merge,
}

impl Figure {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::Open,
        Self::MemoryOpen,
        Self::MemoryWarm,
        Self::ReadData,
        Self::ReadHole,
        Self::ReadDisk,
        Self::Stream,
        Self::Merge,
    ];

    /// The unit of its values.
    pub fn unit(self) -> &'static str {
        match self {
            Self::Open | Self::Stream | Self::Merge => "s",
            Self::MemoryOpen | Self::MemoryWarm => "B",
            Self::ReadData | Self::ReadHole | Self::ReadDisk => "us",
        }
    }

    /// Whether it is the duration of a job that writes a copy.
    pub fn is_job(self) -> bool {
        matches!(self, Self::Stream | Self::Merge)
    }

    /// How far the same figure of the same chain is off in another process at
    /// another time, one relative standard deviation. What was fitted does not
    /// tell: `calibrate` measures all its points within minutes. Of times it
    /// depends on which pages of memory a process gets (seen: 7 % with reads of
    /// a thousand files), with jobs on what the file system writes back.
    pub fn scatter(self) -> f64 {
        match self {
            Self::MemoryOpen | Self::MemoryWarm => 0.02,
            Self::Open | Self::ReadData | Self::ReadHole | Self::ReadDisk => 0.07,
            Self::Stream | Self::Merge => 0.25,
        }
    }

    /// For people.
    pub fn label(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::MemoryOpen => "memory, open",
            Self::MemoryWarm => "memory, all tables read",
            Self::ReadData => "4 KiB read of data",
            Self::ReadHole => "4 KiB read of a hole",
            Self::ReadDisk => "4 KiB reads in a row",
            Self::Stream => "stream",
            Self::Merge => "merge (copy)",
        }
    }
}

/// A figure, with what it depends on besides the chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Key {
    pub figure: Figure,
    /// Requests at a time.
    pub queue_depth: u32,
}

impl Key {
    /// Reads in a row.
    pub fn queue(queue_depth: u32) -> Self {
        Self {
            figure: Figure::ReadDisk,
            queue_depth,
        }
    }
}

impl From<Figure> for Key {
    fn from(figure: Figure) -> Self {
        Self {
            figure,
            queue_depth: 1,
        }
    }
}
