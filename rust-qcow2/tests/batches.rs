//! How many writes to the file a write of the guest becomes.

mod common;

use common::{PLAIN, Shape, TestImage, create, open, read, write};
use rust_qcow2::host::memory::{Event, MemoryFile};
use rust_qcow2::image::OptionRequest;

const CLUSTER: u64 = 65536;

fn empty() -> (MemoryFile, TestImage) {
    let shape = Shape {
        cluster_bits: CLUSTER.trailing_zeros(),
        ..PLAIN
    };
    let file = create(shape, 64 * CLUSTER);
    let image = open(&file, None, &OptionRequest::default());
    (file, image)
}

/// The bytes of each write of a request that goes from clusters that are there
/// to new ones, whose end it leaves alone.
fn lengths(file: &MemoryFile, image: &TestImage) -> Vec<usize> {
    write(image, 0, &vec![1; CLUSTER as usize + 4096]).unwrap();
    let _ = file.take_events();
    let data = vec![2; 3 * CLUSTER as usize];
    write(image, CLUSTER + 4096, &data).unwrap();
    let written = file.take_events();
    assert_eq!(read(image, CLUSTER + 4096, data.len()), data);
    let last = read(image, 0, 5 * CLUSTER as usize);
    assert!(
        last[..CLUSTER as usize + 4096]
            .iter()
            .all(|byte| *byte == 1)
    );
    assert!(
        last[4 * CLUSTER as usize + 4096..]
            .iter()
            .all(|byte| *byte == 0)
    );
    let lengths = written.iter().filter_map(|event| match event {
        Event::Write(_, bytes) => Some(bytes.len()),
        _ => None,
    });
    lengths.collect()
}

#[test]
fn old_and_new_clusters_are_written_together() {
    let (file, image) = empty();
    let to_the_end = 4 * CLUSTER - 4096;
    assert_eq!(lengths(&file, &image), [to_the_end as usize]);
}

/// Zeroes go over what is new, and over nothing else.
#[test]
fn old_and_new_clusters_are_written_together_over_zeroes() {
    let (file, image) = empty();
    file.set_zeroes_fast(true);
    let size = 3 * CLUSTER as usize;
    assert_eq!(lengths(&file, &image), [size, size]);
}
