//! What a file looks like that nobody declared.

use rust_qcow2::format::header::{Header, V2_LENGTH};

/// Bytes at the start that tell.
pub(super) const START: usize = 512;

/// What begins a file of another format, and at which byte. The names are
/// QEMU's.
const MAGIC: [(&str, usize, &[u8]); 11] = [
    ("luks", 0, b"LUKS\xba\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("qcow", 0, b"QFI\xfb\0\0\0\x01"),
    ("qed", 0, b"QED\0"),
    ("vdi", 0x40, b"\x7f\x10\xda\xbe"),
    ("vhdx", 0, b"vhdxfile"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vpc", 0, b"conectix"),
];

/// What the first bytes of a file say.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Looks {
    /// As a qcow2 image does.
    Qcow2,
    /// The same, but it ends before its header does.
    CutQcow2,
    /// As an image of this format does.
    Other(&'static str),
    /// As nothing that is known: a raw disk, or any file.
    Unknown,
}

impl Looks {
    /// Of a file that starts so.
    pub(super) fn of(start: &[u8]) -> Self {
        if Header::probe(start) {
            return Self::Qcow2;
        }
        let is = |(_, at, magic): &&(&str, usize, &[u8])| {
            start.get(*at..).is_some_and(|rest| rest.starts_with(magic))
        };
        match MAGIC.iter().find(is) {
            Some((name, ..)) => Self::Other(name),
            None if start.starts_with(b"QFI\xfb") && start.len() < V2_LENGTH => Self::CutQcow2,
            None => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn told_by_their_first_bytes() {
        for (name, at, magic) in MAGIC {
            let mut start = vec![0; at];
            start.extend_from_slice(magic);
            start.resize(START, 0);
            assert_eq!(Looks::of(&start), Looks::Other(name));
        }
        let mut start = b"QFI\xfb\0\0\0\x03".to_vec();
        assert_eq!(Looks::of(&start), Looks::CutQcow2);
        start.resize(V2_LENGTH, 0);
        assert_eq!(Looks::of(&start), Looks::Qcow2);
        assert_eq!(Looks::of(b""), Looks::Unknown);
        assert_eq!(Looks::of(&[7; START]), Looks::Unknown);
    }
}
