//! Spreading what many threads count over several cache lines.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Sets of counters; threads are spread over them.
pub(crate) const SHARDS: usize = 4;

/// Which of [`SHARDS`] sets this thread uses. Never inlined, as the thread may
/// be another one after each call that suspends the caller.
#[inline(never)]
pub(crate) fn number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    thread_local!(static NUMBER: usize = NEXT.fetch_add(1, Ordering::Relaxed) % SHARDS);
    NUMBER.with(|number| *number)
}
