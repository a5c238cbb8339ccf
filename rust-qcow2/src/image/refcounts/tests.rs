//! Searches in refcount blocks.

use super::*;
use crate::host::memory::{MemoryFile, MemoryHost};
use crate::image::create::{PLAIN, format};
use crate::image::{OpenFlags, OptionRequest};

fn empty_image() -> Image<MemoryHost> {
    let file = MemoryFile::default();
    format(&file, &PLAIN, None).unwrap();
    let host = MemoryHost {
        file,
        ..Default::default()
    };
    let flags = OpenFlags {
        writable: true,
        ..Default::default()
    };
    Image::open(host, flags, &OptionRequest::default()).unwrap()
}

/// A block counts thousands of clusters. One that is allocated must not cost
/// a look at all of them.
#[test]
fn a_search_ends_with_its_range() {
    let image = empty_image();
    let mut st = image.lock();
    let count = |st: &mut _, cluster: u64| {
        let at = image.geometry.offset_of(ClusterIndex(cluster));
        image
            .change_refcount(st, at, 1, Change::Add(1), Reason::Never)
            .unwrap();
    };
    count(&mut st, 20);
    let mut scan = |range: Range<u64>, zero| {
        let range = ClusterIndex(range.start)..ClusterIndex(range.end);
        let found = image.scan_block(&mut st, range, zero).unwrap();
        found.map(|cluster| cluster.0)
    };
    assert_eq!(scan(10..20, false), None);
    assert_eq!(scan(10..21, false), Some(20));
    assert_eq!(scan(10..1 << 40, false), Some(20));
    assert_eq!(scan(21..1 << 40, false), None);
    assert_eq!(scan(20..21, true), None);
    assert_eq!(scan(20..22, true), Some(21));
    // There is no second block.
    assert_eq!(scan(40_000..40_001, true), Some(40_000));
    assert_eq!(scan(40_000..40_000, true), None);
}
