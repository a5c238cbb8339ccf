//! What the guest of a chain is to see.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use rustc_hash::FxHashMap;

use super::content::Content;
use super::writer::What;
use crate::cli::Build;

/// Who has each unit of the disk.
pub struct Expected {
    bits: u32,
    units: FxHashMap<u64, Owner>,
}

#[derive(Clone, Copy)]
struct Owner {
    layer: u32,
    cluster_bits: u8,
    compressible: bool,
    zero: bool,
}

impl Expected {
    /// An empty disk.
    pub fn new(unit: u64) -> Self {
        Self {
            bits: unit.ilog2(),
            units: FxHashMap::default(),
        }
    }

    /// Puts a layer on top.
    pub fn layer(&mut self, layer: usize, cluster_bits: u32, clusters: &[(u64, What)]) {
        let units = 1u64 << (cluster_bits - self.bits);
        for (number, what) in clusters {
            for unit in 0..units {
                let zero = match what {
                    What::Zero => true,
                    What::Data | What::Compressed => false,
                    What::Parts { data, zero } => {
                        let bit = 1u32 << (unit * 32 / units);
                        if (data | zero) & bit == 0 {
                            continue;
                        }
                        zero & bit != 0
                    }
                };
                let owner = Owner {
                    layer: layer as u32,
                    cluster_bits: cluster_bits as u8,
                    compressible: *what == What::Compressed,
                    zero,
                };
                self.units.insert(number * units + unit, owner);
            }
        }
    }

    /// Writes it as a sparse raw file. What a layer has beyond its end is not
    /// seen through larger ones.
    pub fn write(
        &self,
        file: &File,
        content: &Content,
        size: &dyn Fn(usize) -> u64,
        args: &Build,
    ) -> io::Result<()> {
        // Nothing of what was there before.
        file.set_len(0)?;
        file.set_len(size(args.layers - 1))?;
        let mut units: Vec<_> = self.units.iter().filter(|(_, owner)| !owner.zero).collect();
        units.sort_unstable_by_key(|(unit, _)| **unit);
        let mut bytes = Vec::new();
        let mut held = None;
        for (unit, owner) in units {
            let at = unit << self.bits;
            let (layer, number) = (owner.layer as usize, at >> owner.cluster_bits);
            if held != Some((layer, number)) {
                bytes.resize(1 << owner.cluster_bits, 0);
                content.fill(layer, number, owner.compressible, &mut bytes);
                held = Some((layer, number));
            }
            let end = (at + (1 << self.bits)).min(size(layer));
            if at < end {
                let first = (at - (number << owner.cluster_bits)) as usize;
                file.write_all_at(&bytes[first..first + (end - at) as usize], at)?;
            }
        }
        Ok(())
    }
}
