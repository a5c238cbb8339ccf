//! One CPU for what is measured.
//!
//! A program that wanders from one CPU to another finds nothing in its caches
//! each time it arrives.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Holds the caller, and what it starts, on the last CPU that it may use.
pub struct Pin {
    all: Option<CpuSet>,
}

impl Pin {
    /// From now on.
    pub fn new() -> Self {
        let all = sched_getaffinity(None).ok();
        let last = all
            .as_ref()
            .and_then(|all| (0..CpuSet::MAX_CPU).rev().find(|cpu| all.is_set(*cpu)));
        if let Some(last) = last {
            let mut one = CpuSet::new();
            one.set(last);
            // Where that is not allowed it is measured all the same.
            let _ = sched_setaffinity(None, &one);
        }
        Self { all }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        if let Some(all) = &self.all {
            let _ = sched_setaffinity(None, all);
        }
    }
}
