//! Which neighbours to merge, so that little is copied.

use std::borrow::Cow;

use super::segments::Segments;
use crate::cli::Method;

/// Neighbouring layers that become one.
#[derive(Clone)]
pub struct Group {
    /// Depth of the topmost layer.
    pub top: usize,
    /// Depth of the lowest one.
    pub bottom: usize,
    /// What they decide together.
    pub all: Segments,
    /// What all but the lowest decide.
    uppers: Segments,
    /// Bytes of data and of zeroes of the topmost one.
    top_bytes: u64,
    top_zero_bytes: u64,
    /// Bytes of the disks of the topmost, the lowest, and the smallest one.
    size: u64,
    lowest_size: u64,
    smallest: u64,
    /// No layer is smaller than one below it. Else a commit would show what the
    /// smaller one hides, which reads as zeroes.
    descending: bool,
    /// The topmost, the lowest one has zero clusters: version 2 has none.
    top_zeroes: bool,
    lowest_zeroes: bool,
}

impl Group {
    /// One layer, whose disk has `size` bytes.
    pub fn new(depth: usize, size: u64, layer: Segments) -> Self {
        Self {
            top: depth,
            bottom: depth,
            top_bytes: layer.data_bytes(),
            top_zero_bytes: layer.zero_bytes(),
            all: layer,
            uppers: Segments::default(),
            size,
            lowest_size: size,
            smallest: size,
            descending: true,
            top_zeroes: true,
            lowest_zeroes: true,
        }
    }

    /// The same for a layer that has no zero clusters.
    pub fn without_zeroes(self) -> Self {
        Self {
            top_zeroes: false,
            lowest_zeroes: false,
            ..self
        }
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.bottom - self.top + 1
    }

    /// Bytes that are copied when everything goes into the lowest layer.
    pub fn commit_bytes(&self) -> u64 {
        match self.lowest_zeroes {
            true => self.uppers.data_bytes(),
            false => self.uppers.filled().data_bytes(),
        }
    }

    /// Bytes that are copied when everything goes into the topmost layer.
    pub fn stream_bytes(&self) -> u64 {
        self.kept(Method::Stream).data_bytes() - self.top_bytes
    }

    /// Bytes of zeroes that the topmost layer gets besides, as zero clusters.
    pub fn stream_zero_bytes(&self) -> u64 {
        let kept = self.kept(Method::Stream).zero_bytes();
        kept.saturating_sub(self.top_zero_bytes)
    }

    /// What the layer has that stays.
    pub fn kept(&self, method: Method) -> Cow<'_, Segments> {
        let zeroes = match method {
            Method::Stream => self.top_zeroes,
            _ => self.lowest_zeroes,
        };
        match zeroes {
            true => Cow::Borrowed(&self.all),
            false => Cow::Owned(self.all.filled()),
        }
    }

    /// How to merge it: as `wanted`, or in the cheaper way that keeps what the
    /// guest sees. `None` where there is none.
    pub fn method(&self, wanted: Method) -> Option<Method> {
        match wanted {
            Method::Commit if !self.descending => None,
            Method::Auto if !self.descending => Some(Method::Stream),
            Method::Auto if self.stream_bytes() < self.commit_bytes() => Some(Method::Stream),
            Method::Auto => Some(Method::Commit),
            wanted => Some(wanted),
        }
    }

    /// Bytes that are copied then.
    pub fn bytes(&self, wanted: Method) -> Option<u64> {
        Some(match self.method(wanted)? {
            Method::Stream => self.stream_bytes(),
            _ => self.commit_bytes(),
        })
    }

    /// This one and the next one below.
    fn with(&self, below: &Self) -> Self {
        // A layer reads as zeroes beyond its end, whatever is below.
        let seen = |layers: &Segments| self.all.over(&layers.up_to(self.smallest));
        Self {
            top: self.top,
            bottom: below.bottom,
            all: seen(&below.all),
            uppers: seen(&below.uppers),
            top_bytes: self.top_bytes,
            top_zero_bytes: self.top_zero_bytes,
            size: self.size,
            lowest_size: below.lowest_size,
            smallest: self.smallest.min(below.smallest),
            descending: self.descending && below.descending && self.lowest_size >= below.size,
            top_zeroes: self.top_zeroes,
            lowest_zeroes: below.lowest_zeroes,
        }
    }
}

/// When to stop.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// There are no more layers than this.
    pub depth: usize,
    /// No more bytes are copied than this.
    pub bytes: u64,
    /// How merges may be done.
    pub method: Method,
}

/// Merges the neighbours that cost least, again and again. The first and the
/// last ones that may not be merged are left out of `groups` and counted in
/// `fixed`.
pub fn merge(mut groups: Vec<Group>, fixed: usize, limits: Limits) -> Vec<Group> {
    let candidate = |pair: &[Group]| {
        let merged = pair[0].with(&pair[1]);
        let before = pair.iter().filter_map(|group| group.bytes(limits.method));
        let before: u64 = before.sum();
        let more = merged.bytes(limits.method);
        (more.map(|bytes| bytes.saturating_sub(before)), merged)
    };
    let mut costs: Vec<Option<u64>> = groups.windows(2).map(|pair| candidate(pair).0).collect();
    let mut spent = 0u64;
    while groups.len() + fixed > limits.depth {
        // Of equals the fewest layers, as the same bytes are copied less often.
        let layers = |at: usize| groups[at].layers() + groups[at + 1].layers();
        let each = costs.iter().enumerate();
        let possible = each.filter_map(|(at, cost)| Some((at, (*cost)?)));
        let cheapest = possible.min_by_key(|(at, cost)| (*cost, layers(*at)));
        let Some((at, cost)) = cheapest else {
            break;
        };
        if spent.saturating_add(cost) > limits.bytes {
            break;
        }
        spent += cost;
        groups[at] = candidate(&groups[at..at + 2]).1;
        groups.remove(at + 1);
        costs.remove(at);
        if at < costs.len() {
            costs[at] = candidate(&groups[at..at + 2]).0;
        }
        if at > 0 {
            costs[at - 1] = candidate(&groups[at - 1..=at]).0;
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::super::segments::Segment;
    use super::*;

    fn layer(depth: usize, parts: &[(u64, u64)]) -> Group {
        let mut segments = Segments::default();
        for (start, end) in parts {
            segments.push(Segment {
                start: *start,
                end: *end,
                data: true,
            });
        }
        Group::new(depth, 100, segments)
    }

    #[test]
    fn the_cheapest_neighbours() {
        let layers = vec![
            layer(0, &[(0, 10)]),
            layer(1, &[(0, 1)]),
            layer(2, &[(5, 8)]),
            layer(3, &[(0, 50)]),
        ];
        let limits = Limits {
            depth: 2,
            bytes: u64::MAX,
            method: Method::Auto,
        };
        let merged = merge(layers.clone(), 0, limits);
        // Into the top nothing has to be copied: it hides both.
        assert_eq!((merged[0].top, merged[0].bottom), (0, 2));
        assert_eq!(
            (merged[0].bytes(Method::Auto), merged[0].stream_bytes()),
            (Some(0), 0)
        );
        assert_eq!(merged[0].commit_bytes(), 10);
        let none = Limits {
            depth: 1,
            bytes: 3,
            ..limits
        };
        assert_eq!(merge(layers.clone(), 0, none).len(), 2);
        let all = Limits {
            depth: 1,
            bytes: 10,
            ..limits
        };
        let merged = merge(layers, 0, all);
        assert_eq!((merged.len(), merged[0].bytes(Method::Auto)), (1, Some(10)));
    }

    /// What is behind the end of a smaller layer reads as zeroes, and has to.
    #[test]
    fn a_smaller_layer_is_not_committed() {
        let part = |end| {
            let mut segments = Segments::default();
            segments.push(Segment {
                start: 0,
                end,
                data: true,
            });
            segments
        };
        let layers = vec![
            Group::new(0, 100, part(1)),
            Group::new(1, 50, part(2)),
            Group::new(2, 100, part(100)),
        ];
        let limits = Limits {
            depth: 2,
            bytes: u64::MAX,
            method: Method::Auto,
        };
        // Downwards sizes may shrink.
        let merged = merge(layers.clone(), 0, limits);
        assert_eq!((merged[0].top, merged[0].bottom), (0, 1));
        assert_eq!(merged[0].method(Method::Auto), Some(Method::Commit));
        let one = Limits { depth: 1, ..limits };
        let merged = merge(layers.clone(), 0, one);
        assert_eq!(merged[0].method(Method::Auto), Some(Method::Stream));
        assert_eq!((merged[0].layers(), merged[0].stream_bytes()), (3, 49));
        let commit = Limits {
            method: Method::Commit,
            ..one
        };
        assert_eq!(merge(layers, 0, commit).len(), 2);
    }
}
