//! Which parts of the disk a layer further up has decided already.

use rustc_hash::FxHashMap;

/// Units of a chunk.
const CHUNK: u64 = 4096;
const WORDS: usize = (CHUNK / 64) as usize;

/// A set of units of the disk, in memory in proportion to the tables that put
/// them there.
pub struct Coverage {
    bits: u32,
    chunks: FxHashMap<u64, Chunk>,
}

enum Chunk {
    Full,
    Part(Box<[u64; WORDS]>),
}

impl Coverage {
    /// Nothing as yet. `unit` is a power of two.
    pub fn new(unit: u64) -> Self {
        Self {
            bits: unit.ilog2(),
            chunks: FxHashMap::default(),
        }
    }

    /// Adds the bytes from `start` to `end`, which are multiples of the unit
    /// (`end` is rounded up), and tells the parts that were not there before.
    pub fn claim(&mut self, start: u64, end: u64, tell: &mut dyn FnMut(u64, u64)) {
        let last = end.div_ceil(1 << self.bits);
        let mut runs = Runs::new(self.bits, end, tell);
        let mut at = start >> self.bits;
        while at < last {
            let (number, from) = (at / CHUNK, at % CHUNK);
            let upto = (last - number * CHUNK).min(CHUNK);
            let base = number * CHUNK;
            match self.chunks.get_mut(&number) {
                Some(Chunk::Full) => {}
                None if from == 0 && upto == CHUNK => {
                    self.chunks.insert(number, Chunk::Full);
                    runs.add(base, base + CHUNK);
                }
                _ => {
                    let fresh = || Chunk::Part(Box::new([0; WORDS]));
                    let chunk = self.chunks.entry(number).or_insert_with(fresh);
                    if let Chunk::Part(words) = chunk {
                        each_gap(words, from, upto, &mut |a, b| runs.add(base + a, base + b));
                        set(words, from, upto);
                        if words.iter().all(|word| *word == !0) {
                            *chunk = Chunk::Full;
                        }
                    }
                }
            }
            at = base + upto;
        }
        runs.finish();
    }

    /// Tells the parts of `start..end`, in bytes and not rounded, that are not
    /// in the set.
    pub fn gaps(&self, start: u64, end: u64, tell: &mut dyn FnMut(u64, u64)) {
        let bits = self.bits;
        let mut clipped = |a: u64, b: u64| {
            let (a, b) = (a.max(start), b.min(end));
            if a < b {
                tell(a, b);
            }
        };
        let last = end.div_ceil(1 << bits);
        let mut runs = Runs::new(bits, u64::MAX, &mut clipped);
        let mut at = start >> bits;
        while at < last {
            let (number, from) = (at / CHUNK, at % CHUNK);
            let base = number * CHUNK;
            let upto = (last - base).min(CHUNK);
            match self.chunks.get(&number) {
                Some(Chunk::Full) => {}
                Some(Chunk::Part(words)) => {
                    each_gap(words, from, upto, &mut |a, b| runs.add(base + a, base + b));
                }
                None => runs.add(base + from, base + upto),
            }
            at = base + upto;
        }
        runs.finish();
    }
}

/// What nobody has claimed.
impl Coverage {
    /// Whether all of `start..end`, in bytes, is in the set.
    pub fn has_all(&self, start: u64, end: u64) -> bool {
        let last = end.div_ceil(1 << self.bits);
        let mut at = start >> self.bits;
        while at < last {
            let (number, from) = (at / CHUNK, at % CHUNK);
            let upto = (last - number * CHUNK).min(CHUNK);
            let full = match self.chunks.get(&number) {
                Some(Chunk::Full) => true,
                Some(Chunk::Part(words)) => first_gap(words, from, upto).is_none(),
                None => false,
            };
            if !full {
                return false;
            }
            at = number * CHUNK + upto;
        }
        true
    }

    /// Tells what is not in the set up to `end`, in time that depends on what
    /// is in it and not on the size of the disk.
    pub fn holes(&self, end: u64, tell: &mut dyn FnMut(u64, u64)) {
        let last = end.div_ceil(1 << self.bits);
        let mut numbers: Vec<_> = self.chunks.keys().copied().collect();
        numbers.sort_unstable();
        let mut runs = Runs::new(self.bits, end, tell);
        let mut at = 0;
        for number in numbers {
            let base = number * CHUNK;
            if base >= last {
                break;
            }
            if at < base {
                runs.add(at, base);
            }
            let upto = (last - base).min(CHUNK);
            if let Some(Chunk::Part(words)) = self.chunks.get(&number) {
                each_gap(words, 0, upto, &mut |a, b| runs.add(base + a, base + b));
            }
            at = base + upto;
        }
        if at < last {
            runs.add(at, last);
        }
        runs.finish();
    }
}

/// Puts runs of units together and tells them in bytes.
struct Runs<'a> {
    bits: u32,
    end: u64,
    open: Option<(u64, u64)>,
    tell: &'a mut dyn FnMut(u64, u64),
}

impl<'a> Runs<'a> {
    fn new(bits: u32, end: u64, tell: &'a mut dyn FnMut(u64, u64)) -> Self {
        Self {
            bits,
            end,
            open: None,
            tell,
        }
    }

    fn add(&mut self, from: u64, upto: u64) {
        match &mut self.open {
            Some((_, end)) if *end == from => *end = upto,
            _ => {
                self.finish();
                self.open = Some((from, upto));
            }
        }
    }

    fn finish(&mut self) {
        if let Some((from, upto)) = self.open.take() {
            let upto = upto.saturating_mul(1 << self.bits).min(self.end);
            (self.tell)(from << self.bits, upto);
        }
    }
}

/// The first clear bit in `from..upto`.
fn first_gap(words: &[u64; WORDS], from: u64, upto: u64) -> Option<u64> {
    let mut at = from;
    while at < upto {
        let rest = words[(at / 64) as usize] >> (at % 64);
        let taken = u64::from(rest.trailing_ones()).min(64 - at % 64);
        if taken < 64 - at % 64 {
            return Some(at + taken).filter(|at| *at < upto);
        }
        at += taken;
    }
    None
}

/// Tells the runs of clear bits in `from..upto`.
fn each_gap(words: &[u64; WORDS], from: u64, upto: u64, tell: &mut dyn FnMut(u64, u64)) {
    let mut at = from;
    while at < upto {
        let rest = words[(at / 64) as usize] >> (at % 64);
        let left = 64 - at % 64;
        let taken = u64::from(rest.trailing_ones()).min(left);
        if taken > 0 {
            at += taken;
            continue;
        }
        let free = u64::from(rest.trailing_zeros()).min(left);
        let end = (at + free).min(upto);
        tell(at, end);
        at = end;
    }
}

fn set(words: &mut [u64; WORDS], from: u64, upto: u64) {
    let mut at = from;
    while at < upto {
        let len = (64 - at % 64).min(upto - at);
        let mask = if len == 64 { !0 } else { (1 << len) - 1 };
        words[(at / 64) as usize] |= mask << (at % 64);
        at += len;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn like_a_list_of_flags(ranges in prop::collection::vec((0u64..20_000, 1u64..9000), 1..12)) {
            let mut flags = vec![false; 40_000];
            let mut set = Coverage::new(512);
            for (start, len) in ranges {
                let (from, upto) = (start, start + len);
                let mut gaps = vec![false; flags.len()];
                set.gaps(from * 512 + 7, upto * 512 - 9, &mut |a, b| {
                    assert!(a < b && a >= from * 512 + 7 && b <= upto * 512 - 9);
                    for unit in a / 512..b.div_ceil(512) {
                        gaps[unit as usize] = true;
                    }
                });
                let mut told = vec![false; flags.len()];
                set.claim(from * 512, upto * 512 - 100, &mut |a, b| {
                    assert!(a < b && b <= upto * 512 - 100);
                    for unit in a / 512..b.div_ceil(512) {
                        assert!(!told[unit as usize]);
                        told[unit as usize] = true;
                    }
                });
                prop_assert_eq!(&gaps, &told);
                prop_assert!(set.has_all(from * 512, upto * 512 - 100));
                for unit in 0..flags.len() {
                    let inside = (from..upto).contains(&(unit as u64));
                    prop_assert_eq!(told[unit], inside && !flags[unit]);
                    flags[unit] |= inside;
                }
                let mut holes = vec![false; flags.len()];
                set.holes(flags.len() as u64 * 512, &mut |a, b| {
                    holes[(a / 512) as usize..(b / 512) as usize].fill(true);
                });
                prop_assert!(holes.iter().zip(&flags).all(|(hole, flag)| hole != flag));
                let some = flags[from as usize..(upto + 9) as usize].iter().all(|flag| *flag);
                prop_assert_eq!(set.has_all(from * 512, (upto + 9) * 512), some);
            }
        }
    }
}
