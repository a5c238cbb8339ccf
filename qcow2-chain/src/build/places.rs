//! Where the data of each layer go.

use std::path::Path;

use anyhow::{Context, Result, bail};
use rand::Rng;
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, Zipf};
use rustc_hash::FxHashSet;

use crate::cli::{Build, Place};

/// The share of the disk that a hot spot takes.
const SPOT_SHARE: u64 = 200;

/// Draws slots: runs of clusters.
pub struct Places {
    pattern: Pattern,
    random: ChaCha8Rng,
}

enum Pattern {
    Uniform,
    /// Every slot once before any is used again.
    Deal {
        stack: Vec<u64>,
        slots: u64,
    },
    Zipf {
        exponent: f64,
        /// Multiplier that scatters ranks over the disk.
        salt: u64,
    },
    Sequential {
        next: u64,
    },
    /// Writes go to spots of the disk, one of which moves with each layer.
    Ageing {
        spots: Vec<u64>,
        share: f64,
    },
    Trace(Trace),
}

/// A recorded trace: what each layer got.
struct Trace {
    layers: std::vec::IntoIter<Vec<Event>>,
}

#[derive(Clone, Copy)]
struct Event {
    offset: u64,
    len: u64,
    zero: bool,
    /// Of the trace.
    line: usize,
}

/// The clusters of a layer: with data, and of zeroes.
#[derive(Default)]
pub struct Drawn {
    pub data: Vec<u64>,
    pub zeroes: Vec<u64>,
}

impl Places {
    /// The pattern that the user asked for; `size` has the disk of each layer.
    pub fn new(args: &Build, size: &dyn Fn(usize) -> u64) -> Result<Self> {
        let mut random = ChaCha8Rng::seed_from_u64(args.seed ^ 0x9E37_79B9_7F4A_7C15);
        let pattern = match args.place {
            _ if args.trace.is_some() => {
                let path = args.trace.as_deref().unwrap_or(Path::new(""));
                let text = std::fs::read_to_string(path)
                    .with_context(|| format!("cannot read {}", path.display()))?;
                let layers = parse_trace(&text, args.layers)
                    .and_then(|layers| within(layers, args.layers, size))
                    .with_context(|| path.display().to_string())?;
                Pattern::Trace(Trace {
                    layers: layers.into_iter(),
                })
            }
            Place::Uniform => Pattern::Uniform,
            Place::Deal => Pattern::Deal {
                stack: Vec::new(),
                slots: 0,
            },
            Place::Zipf => Pattern::Zipf {
                exponent: args.zipf_exponent,
                salt: random.random::<u64>() | 1,
            },
            Place::Sequential => Pattern::Sequential { next: 0 },
            Place::Ageing => Pattern::Ageing {
                spots: (0..args.hot_spots).map(|_| random.random()).collect(),
                share: args.hot_share,
            },
        };
        Ok(Self { pattern, random })
    }

    /// The clusters of the next layer, in ascending order: about `amount`
    /// bytes in runs of `run` clusters of a disk of `disk` bytes.
    pub fn draw(&mut self, disk: u64, cluster: u64, run: u64, amount: u64) -> Drawn {
        let clusters = disk.div_ceil(cluster);
        if let Pattern::Trace(trace) = &mut self.pattern {
            return trace.next(disk, cluster);
        }
        let slots = clusters.div_ceil(run);
        let count = amount.div_ceil(cluster * run).min(slots);
        let slots = self.slots(slots, count);
        let data = slots
            .into_iter()
            .flat_map(|slot| slot * run..((slot + 1) * run).min(clusters))
            .collect();
        Drawn {
            data,
            zeroes: Vec::new(),
        }
    }

    fn slots(&mut self, slots: u64, count: u64) -> Vec<u64> {
        let random = &mut self.random;
        let mut chosen = FxHashSet::default();
        match &mut self.pattern {
            // All of them: nothing to draw.
            _ if count == slots => chosen.extend(0..slots),
            Pattern::Uniform => {
                sample(random, slots, count, &mut chosen, &mut |random| {
                    random.random_range(0..slots)
                });
            }
            Pattern::Deal {
                stack,
                slots: known,
            } => {
                if slots > *known {
                    // The disk has grown: its new part is shuffled in.
                    stack.extend(*known..slots);
                    stack.shuffle(random);
                    *known = slots;
                }
                while (chosen.len() as u64) < count {
                    if stack.is_empty() {
                        stack.extend(0..slots);
                        stack.shuffle(random);
                    }
                    chosen.extend(stack.pop());
                }
            }
            Pattern::Zipf { exponent, salt } => {
                let zipf = Zipf::new(slots as f64, *exponent).ok();
                let salt = *salt;
                sample(random, slots, count, &mut chosen, &mut |random| {
                    let rank = zipf.map_or(0, |zipf| zipf.sample(random) as u64);
                    scatter(rank, salt, slots)
                });
            }
            Pattern::Sequential { next } => {
                chosen.extend((0..count).map(|at| (*next + at) % slots));
                *next = (*next + count) % slots;
            }
            Pattern::Ageing { spots, share } => {
                let moves = random.random_range(0..spots.len());
                spots[moves] = random.random();
                let wide = slots.div_ceil(SPOT_SHARE).max(1);
                let (spots, share) = (&*spots, *share);
                sample(random, slots, count, &mut chosen, &mut |random| {
                    if random.random_bool(share) {
                        let spot = spots[random.random_range(0..spots.len())] % slots;
                        (spot + random.random_range(0..wide)) % slots
                    } else {
                        random.random_range(0..slots)
                    }
                });
            }
            Pattern::Trace(_) => {}
        }
        let mut chosen: Vec<_> = chosen.into_iter().collect();
        chosen.sort_unstable();
        chosen
    }
}

/// Draws until there are `count` different ones. Where that takes too long, as
/// a hot spot is full, neighbours are taken.
fn sample(
    random: &mut ChaCha8Rng,
    slots: u64,
    count: u64,
    chosen: &mut FxHashSet<u64>,
    draw: &mut dyn FnMut(&mut ChaCha8Rng) -> u64,
) {
    let mut misses = 0;
    while (chosen.len() as u64) < count {
        let mut slot = draw(random);
        if misses > 4 * count + 100 {
            while chosen.contains(&slot) {
                slot = (slot + 1) % slots;
            }
        }
        if !chosen.insert(slot) {
            misses += 1;
        }
    }
}

/// A place for each rank, neighbours apart; not all are hit, some twice.
fn scatter(rank: u64, salt: u64, slots: u64) -> u64 {
    let mixed = (rank ^ (rank >> 7)).wrapping_mul(salt);
    (mixed ^ (mixed >> 29)) % slots
}

impl Trace {
    fn next(&mut self, disk: u64, cluster: u64) -> Drawn {
        let mut last = std::collections::BTreeMap::new();
        for event in self.layers.next().unwrap_or_default() {
            let end = event.offset.saturating_add(event.len).min(disk);
            if event.len == 0 {
                continue;
            }
            let (from, upto) = if event.zero {
                // Only whole clusters become zero.
                (event.offset.div_ceil(cluster), end / cluster)
            } else {
                (event.offset / cluster, end.div_ceil(cluster))
            };
            last.extend((from..upto).map(|number| (number, event.zero)));
        }
        let of = |zero| {
            let numbers = last.iter().filter(move |(_, is_zero)| **is_zero == zero);
            numbers.map(|(number, _)| *number).collect()
        };
        Drawn {
            data: of(false),
            zeroes: of(true),
        }
    }
}

/// Reads lines that end in `write OFFSET LENGTH` or `trim OFFSET LENGTH`, in
/// bytes, as fio's `write_iolog` has them; a line `snapshot` begins the next
/// layer. Without such lines the layers get equal parts.
fn parse_trace(text: &str, layers: usize) -> Result<Vec<Vec<Event>>> {
    let mut parts = vec![Vec::new()];
    for (number, line) in text.lines().enumerate() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words.as_slice() {
            [] => {}
            [first, ..] if first.starts_with('#') => {}
            ["snapshot"] => parts.push(Vec::new()),
            [.., action @ ("write" | "trim"), offset, len] => {
                let (Ok(offset), Ok(len)) = (offset.parse(), len.parse()) else {
                    bail!("line {}: no numbers: {offset} {len}", number + 1);
                };
                let zero = *action == "trim";
                if let Some(part) = parts.last_mut() {
                    part.push(Event {
                        offset,
                        len,
                        zero,
                        line: number + 1,
                    });
                }
            }
            // Opening, closing, reading, waiting.
            _ => {}
        }
    }
    if let [all] = parts.as_mut_slice() {
        let all = std::mem::take(all);
        let size = all.len().div_ceil(layers.max(1)).max(1);
        parts = all.chunks(size).map(<[Event]>::to_vec).collect();
    }
    if parts.iter().all(Vec::is_empty) {
        bail!("no line ends in \"write OFFSET LENGTH\"");
    }
    Ok(parts)
}

/// Refuses what is beyond the end of a layer's disk, or of the chain.
fn within(
    layers: Vec<Vec<Event>>,
    count: usize,
    size: &dyn Fn(usize) -> u64,
) -> Result<Vec<Vec<Event>>> {
    if let Some(Event { line, .. }) = layers.iter().skip(count).flatten().next() {
        bail!("line {line}: there are no more than {count} layers (--layers)");
    }
    for (layer, events) in layers.iter().enumerate() {
        let disk = size(layer);
        let beyond = |event: &&Event| {
            let end = event.offset.checked_add(event.len);
            end.is_none_or(|end| end > disk)
        };
        if let Some(Event {
            offset, len, line, ..
        }) = events.iter().find(beyond)
        {
            bail!(
                "line {line}: {len} bytes at {offset} are beyond the end of the disk, which has \
                 {disk} (--disk)"
            );
        }
    }
    Ok(layers)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn traces() {
        let log = "fio version 2 iolog\ndisk add\ndisk open\ndisk write 0 4096\n\
                   disk read 0 4096\n123 disk trim 65536 131072\nsnapshot\ndisk write 70000 1\n";
        let parts = parse_trace(log, 9).unwrap();
        assert_eq!(parts.len(), 2);
        let mut trace = Trace {
            layers: parts.into_iter(),
        };
        let drawn = trace.next(1 << 30, 65536);
        assert_eq!((drawn.data, drawn.zeroes), (vec![0], vec![1, 2]));
        let drawn = trace.next(1 << 30, 65536);
        assert_eq!((drawn.data, drawn.zeroes), (vec![1], vec![]));
        assert!(trace.next(1 << 30, 65536).data.is_empty());
        assert_eq!(
            parse_trace("write 0 1\nwrite 1 1\nwrite 2 1", 2)
                .unwrap()
                .len(),
            2
        );
        let beyond = |trace| within(parse_trace(trace, 2).unwrap(), 2, &|_| 4096);
        assert!(beyond("write 0 4096").is_ok());
        assert!(beyond("snapshot\nwrite 0 1\nsnapshot").is_ok());
        let error = beyond("snapshot\nsnapshot\nwrite 0 1").err().unwrap();
        assert!(error.to_string().starts_with("line 3:"), "{error}");
        for trace in [
            "write 0 1\ntrim 4096 1",
            "write 0 1\nwrite 1 18446744073709551615",
        ] {
            let error = beyond(trace).err().unwrap().to_string();
            assert!(error.starts_with("line 2:"), "{error}");
        }
        assert!(parse_trace("write x 1", 2).is_err());
        assert!(parse_trace("", 2).is_err());
    }
}
