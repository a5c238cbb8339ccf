//! What a layer, or several that are merged, decides of the disk.

/// A part of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// First byte.
    pub start: u64,
    /// The byte behind the last one.
    pub end: u64,
    /// Data, or else zeroes.
    pub data: bool,
}

/// Parts in ascending order that do not overlap.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Segments(Vec<Segment>);

impl Segments {
    /// Puts a part behind the others.
    pub fn push(&mut self, next: Segment) {
        match self.0.last_mut() {
            Some(last) if last.end == next.start && last.data == next.data => last.end = next.end,
            _ => self.0.push(next),
        }
    }

    /// Number of parts.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Start and end of each part.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.0.iter().map(|segment| (segment.start, segment.end))
    }

    /// Bytes of data.
    pub fn data_bytes(&self) -> u64 {
        self.bytes(true)
    }

    /// Bytes of zeroes.
    pub fn zero_bytes(&self) -> u64 {
        self.bytes(false)
    }

    fn bytes(&self, data: bool) -> u64 {
        let those = self.0.iter().filter(|segment| segment.data == data);
        those.map(|segment| segment.end - segment.start).sum()
    }

    /// The same for an image that has no zero clusters: data instead.
    pub fn filled(&self) -> Self {
        let mut result = Self::default();
        for segment in &self.0 {
            result.push(Segment {
                data: true,
                ..*segment
            });
        }
        result
    }

    /// Bytes that clusters of this size take which have some of the data.
    pub fn data_clusters(&self, cluster: u64) -> u64 {
        let (mut bytes, mut next) = (0, 0);
        for segment in self.0.iter().filter(|segment| segment.data) {
            let start = (segment.start / cluster * cluster).max(next);
            let end = segment.end.next_multiple_of(cluster);
            bytes += end.saturating_sub(start);
            next = next.max(end);
        }
        bytes
    }

    /// Without what is from `end` on.
    pub fn up_to(&self, end: u64) -> Self {
        let inside = self.0.iter().filter(|segment| segment.start < end);
        let cut = inside.map(|segment| Segment {
            end: segment.end.min(end),
            ..*segment
        });
        Self(cut.collect())
    }

    /// The same on top of `below`.
    pub fn over(&self, below: &Self) -> Self {
        let mut result = Self(Vec::with_capacity(self.len() + below.len()));
        let mut uppers = self.0.iter().peekable();
        for lower in &below.0 {
            // What is left of this part of the lower layer.
            let mut at = lower.start;
            while at < lower.end {
                match uppers.peek() {
                    Some(upper) if upper.start <= at => {
                        at = at.max(upper.end);
                        // It may reach into further parts.
                        if upper.end <= lower.end {
                            uppers
                                .next()
                                .into_iter()
                                .for_each(|upper| result.push(*upper));
                        } else {
                            break;
                        }
                    }
                    upper => {
                        let end = upper.map_or(lower.end, |upper| upper.start.min(lower.end));
                        result.push(Segment {
                            start: at,
                            end,
                            data: lower.data,
                        });
                        at = end;
                    }
                }
            }
        }
        for upper in uppers {
            result.push(*upper);
        }
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SIZE: usize = 60;

    fn segments(flags: &[Option<bool>]) -> Segments {
        let mut result = Segments::default();
        for (at, flag) in flags.iter().enumerate() {
            if let Some(data) = *flag {
                let start = at as u64;
                result.push(Segment {
                    start,
                    end: start + 1,
                    data,
                });
            }
        }
        result
    }

    #[test]
    fn clusters_are_counted_once() {
        let flags = |data: &[u64]| {
            (0..60)
                .map(|at| data.contains(&at).then_some(true))
                .collect()
        };
        let some: Vec<_> = flags(&[0, 3, 4, 17, 18, 59]);
        assert_eq!(segments(&some).data_clusters(8), 24);
        assert_eq!(segments(&some).data_clusters(1), 6);
        assert_eq!(segments(&some).up_to(18).data_clusters(1), 4);
        assert_eq!(segments(&some).up_to(0), Segments::default());
    }

    proptest! {
        #[test]
        fn like_flags(
            upper in prop::collection::vec(prop::option::of(any::<bool>()), SIZE),
            lower in prop::collection::vec(prop::option::of(any::<bool>()), SIZE),
        ) {
            let both: Vec<_> = upper.iter().zip(&lower).map(|(a, b)| a.or(*b)).collect();
            prop_assert_eq!(segments(&upper).over(&segments(&lower)), segments(&both));
        }
    }
}
