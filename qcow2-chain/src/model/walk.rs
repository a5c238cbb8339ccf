//! How far a request goes through a chain.

use super::shape::{Served, Shape};

/// What a request meets on its way down, or the mean of many.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Walk {
    /// Layers it goes through, each of which makes it a request of its own.
    pub levels: f64,
    /// Of these the ones with an L2 table there.
    pub lookups: f64,
    /// Nodes that unpatched QEMU asks whether there is a medium: before each
    /// of the levels all layers from there on.
    pub visits: f64,
    /// The same, each multiplied with the number of layers from there on, in
    /// thousands: the more nodes there are the less of them is in the CPU's
    /// caches.
    pub far_visits: f64,
}

/// The walks to every depth of a chain.
pub struct Walks {
    /// By depth; one more for what no layer has.
    walks: Vec<Walk>,
}

impl Walks {
    pub fn of(shape: &Shape) -> Self {
        let all = shape.depth() as f64;
        // Who submits the request asks once as well.
        let mut walk = Walk {
            visits: all,
            far_visits: all * all / 1000.0,
            ..Walk::default()
        };
        let mut walks = Vec::with_capacity(shape.depth() + 1);
        for (depth, layer) in shape.layers.iter().enumerate() {
            let left = all - depth as f64;
            walk.levels += 1.0;
            walk.lookups += layer.table_share;
            walk.visits += left;
            walk.far_visits += left * left / 1000.0;
            walks.push(walk);
        }
        walks.push(walk);
        Self { walks }
    }

    /// To what no layer has.
    pub fn hole(&self) -> Walk {
        self.walks.last().copied().unwrap_or_default()
    }

    /// The sum over all parts of the disk that `part` chooses from each layer,
    /// and from what no layer has, each walk as often as `count` says.
    fn sum(&self, parts: impl Iterator<Item = (usize, f64)>) -> (f64, Walk) {
        let (mut total, mut sum) = (0.0, Walk::default());
        for (depth, count) in parts {
            let walk = self.walks[depth];
            total += count;
            sum.levels += count * walk.levels;
            sum.lookups += count * walk.lookups;
            sum.visits += count * walk.visits;
            sum.far_visits += count * walk.far_visits;
        }
        (total, sum)
    }

    /// All walks that a count of the data asks for, and their number.
    pub fn data(&self, shape: &Shape, count: fn(&Served) -> u64) -> (f64, Walk) {
        let layers = shape.layers.iter().enumerate();
        self.sum(layers.map(|(depth, layer)| (depth, count(&layer.data) as f64)))
    }

    /// The same for the whole disk.
    pub fn disk(&self, shape: &Shape, count: fn(&Served) -> u64) -> (f64, Walk) {
        let layers = shape.layers.iter().enumerate();
        let layers = layers.map(|(depth, layer)| {
            let both = count(&layer.data) + count(&layer.zeroes);
            (depth, both as f64)
        });
        let holes = (shape.depth(), count(&shape.holes) as f64);
        self.sum(layers.chain([holes]))
    }
}

impl Walk {
    /// The mean of so many.
    pub fn mean(self, count: f64) -> Self {
        let count = count.max(1.0);
        Self {
            levels: self.levels / count,
            lookups: self.lookups / count,
            visits: self.visits / count,
            far_visits: self.far_visits / count,
        }
    }
}
