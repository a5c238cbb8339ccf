//! Which neighbours to merge, so that little is copied.

use super::segments::Segments;

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
    /// Bytes of data of the topmost one.
    top_bytes: u64,
}

impl Group {
    /// One layer.
    pub fn new(depth: usize, layer: Segments) -> Self {
        Self {
            top: depth,
            bottom: depth,
            top_bytes: layer.data_bytes(),
            all: layer,
            uppers: Segments::default(),
        }
    }

    /// Number of layers.
    pub fn layers(&self) -> usize {
        self.bottom - self.top + 1
    }

    /// Bytes that are copied when everything goes into the lowest layer.
    pub fn commit_bytes(&self) -> u64 {
        self.uppers.data_bytes()
    }

    /// Bytes that are copied when everything goes into the topmost layer.
    pub fn stream_bytes(&self) -> u64 {
        self.all.data_bytes() - self.top_bytes
    }

    /// What the cheaper way costs.
    pub fn bytes(&self) -> u64 {
        self.commit_bytes().min(self.stream_bytes())
    }

    /// This one and the next one below.
    fn with(&self, below: &Self) -> Self {
        Self {
            top: self.top,
            bottom: below.bottom,
            all: self.all.over(&below.all),
            uppers: self.all.over(&below.uppers),
            top_bytes: self.top_bytes,
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
}

/// Merges the neighbours that cost least, again and again. The first and the
/// last ones that may not be merged are left out of `groups` and counted in
/// `fixed`.
pub fn merge(mut groups: Vec<Group>, fixed: usize, limits: Limits) -> Vec<Group> {
    let candidate = |pair: &[Group]| {
        let merged = pair[0].with(&pair[1]);
        let more = merged.bytes() - merged.bytes().min(pair[0].bytes() + pair[1].bytes());
        (more, merged)
    };
    let mut costs: Vec<u64> = groups.windows(2).map(|pair| candidate(pair).0).collect();
    let mut spent = 0u64;
    while groups.len() + fixed > limits.depth {
        // Of equals the fewest layers, as the same bytes are copied less often.
        let layers = |at: usize| groups[at].layers() + groups[at + 1].layers();
        let each = costs.iter().enumerate();
        let cheapest = each.min_by_key(|(at, cost)| (**cost, layers(*at)));
        let Some((at, cost)) = cheapest.map(|(at, cost)| (at, *cost)) else {
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
        Group::new(depth, segments)
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
        };
        let merged = merge(layers.clone(), 0, limits);
        // Into the top nothing has to be copied: it hides both.
        assert_eq!((merged[0].top, merged[0].bottom), (0, 2));
        assert_eq!((merged[0].bytes(), merged[0].stream_bytes()), (0, 0));
        assert_eq!(merged[0].commit_bytes(), 10);
        let none = Limits { depth: 1, bytes: 3 };
        assert_eq!(merge(layers.clone(), 0, none).len(), 2);
        let all = Limits {
            depth: 1,
            bytes: 10,
        };
        let merged = merge(layers, 0, all);
        assert_eq!((merged.len(), merged[0].bytes()), (1, 10));
    }
}
