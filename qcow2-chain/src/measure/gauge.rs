//! How fast the machine is at the moment.
//!
//! A virtual CPU that shares its core with somebody else's is half as fast
//! while that one is busy, for tenths of a second at a time. What is measured
//! runs on one CPU, on which a thread also does a little arithmetic every few
//! milliseconds; a time is divided by how much longer the arithmetic took
//! meanwhile than it takes at the least. On a machine of one's own that is 1.

use std::collections::VecDeque;
use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Steps of arithmetic: some 50 microseconds.
const STEPS: u32 = 40_000;
/// How often.
const EVERY: Duration = Duration::from_millis(4);
/// What is kept: some minutes.
const KEPT: usize = 200_000;
/// How far around a moment it is looked.
const AROUND: Duration = Duration::from_millis(6);

/// Watches the speed of one CPU, on which those who ask run as well.
pub struct Gauge {
    shared: Arc<Shared>,
    watcher: Option<JoinHandle<()>>,
    all: Option<CpuSet>,
    one: Option<CpuSet>,
}

#[derive(Default)]
struct Shared {
    stop: AtomicBool,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    least: f64,
    /// When, and what the arithmetic took.
    samples: VecDeque<(Instant, f64)>,
}

impl Gauge {
    /// Begins to watch.
    pub fn start() -> Self {
        let all = sched_getaffinity(None).ok();
        let one = all.as_ref().and_then(|all| {
            let last = (0..CpuSet::MAX_CPU).rev().find(|cpu| all.is_set(*cpu))?;
            let mut one = CpuSet::new();
            one.set(last);
            Some(one)
        });
        let shared = Arc::new(Shared::default());
        // Enough to see full speed once.
        let begin = Instant::now();
        let mut gauge = Self {
            shared: Arc::clone(&shared),
            watcher: None,
            all,
            one,
        };
        gauge.on_one_cpu();
        let watcher = std::thread::Builder::new()
            .name("gauge".into())
            .spawn(move || {
                while !shared.stop.load(Ordering::Relaxed) {
                    shared.look();
                    std::thread::sleep(EVERY);
                }
            });
        std::thread::sleep(Duration::from_millis(500).saturating_sub(begin.elapsed()));
        gauge.watcher = watcher.ok();
        gauge
    }

    /// The caller and what it starts run on the CPU that is watched.
    pub fn on_one_cpu(&self) {
        if let Some(one) = &self.one {
            let _ = sched_setaffinity(None, one);
        }
    }

    /// They run on all CPUs.
    pub fn on_all_cpus(&self) {
        if let Some(all) = &self.all {
            let _ = sched_setaffinity(None, all);
        }
    }

    /// How many times slower than at its best the CPU was, from 1 up.
    pub fn slowdown(&self, from: Instant, upto: Instant) -> f64 {
        let Ok(seen) = self.shared.seen.lock() else {
            return 1.0;
        };
        let recent = seen.samples.iter().rev();
        let recent = recent.skip_while(|(when, _)| *when > upto + AROUND);
        let (mut count, mut sum) = (0, 0.0);
        for (when, took) in recent {
            // One at least, from right before.
            if count > 0 && *when + AROUND < from {
                break;
            }
            count += 1;
            sum += took;
        }
        if count == 0 || seen.least <= 0.0 {
            return 1.0;
        }
        (sum / f64::from(count) / seen.least).max(1.0)
    }
}

impl Shared {
    fn look(&self) {
        let took = arithmetic();
        if let Ok(mut seen) = self.seen.lock() {
            if seen.least == 0.0 || took < seen.least {
                seen.least = took;
            }
            if seen.samples.len() >= KEPT {
                seen.samples.pop_front();
            }
            seen.samples.push_back((Instant::now(), took));
        }
    }
}

/// Seconds of CPU time, in which nobody else's turns are.
fn arithmetic() -> f64 {
    let now = || {
        let time = clock_gettime(ClockId::ThreadCPUTime);
        time.tv_sec as f64 + time.tv_nsec as f64 / 1e9
    };
    let begin = now();
    let mut value = black_box(1u64);
    for _ in 0..STEPS {
        value = black_box(value.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ value >> 31);
    }
    now() - begin
}

impl Drop for Gauge {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
        self.on_all_cpus();
    }
}
