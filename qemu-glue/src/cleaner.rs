//! The timer of `cache-clean-interval`.
//!
//! It fires in the event loop of the node, while the node is closed by the main
//! loop: the callback may be on its way when the timer is stopped. So it gets
//! a structure of its own, which goes when the event loop is past that.

use std::ffi::c_void;

use parking_lot::Mutex;

use crate::node::{Access, Node};
use crate::sys;

/// What the callback needs; `None` once the timer is stopped.
type Target = Mutex<Option<(*const Node, *mut sys::QEMUTimer)>>;

/// A timer that runs, or none.
#[derive(Default)]
pub(crate) struct Cleaner(Mutex<Option<Running>>);

struct Running {
    context: *mut sys::AioContext,
    target: *mut Target,
}

// SAFETY: both pointers are only used by functions that may be called from any
// thread, and what `target` points to is behind a lock.
unsafe impl Send for Running {}

impl Cleaner {
    /// Starts the timer for a node, in seconds, where there is none.
    ///
    /// # Safety
    /// `context` is that of the node, which calls [`Cleaner::stop`] before it
    /// goes and before it gets another context.
    pub(crate) unsafe fn start(&self, node: &Node, context: *mut sys::AioContext, seconds: u64) {
        let mut running = self.0.lock();
        if seconds == 0 || running.is_some() {
            return;
        }
        let target: *mut Target = Box::into_raw(Box::new(Mutex::new(None)));
        // SAFETY: the target lives until `forget`, which comes after the last
        // callback; the context is valid, as promised by the caller.
        unsafe {
            let mut state = (*target).lock();
            let timer = sys::rq_timer_new(context, Some(clean), target.cast());
            *state = Some((node, timer));
            sys::rq_timer_arm(timer, interval(seconds));
        }
        *running = Some(Running { context, target });
    }

    /// Stops it. A callback that is running is waited for; it does no I/O.
    pub(crate) fn stop(&self) {
        let Some(Running { context, target }) = self.0.lock().take() else {
            return;
        };
        // SAFETY: the target is there until `forget`. The timer is freed once,
        // as it is taken out; a callback that comes still finds none.
        unsafe {
            if let Some((_, timer)) = (*target).lock().take() {
                sys::rq_timer_free(timer);
            }
            sys::rq_run_after(context, Some(forget), target.cast());
        }
    }
}

/// A number of seconds that QEMU's timers can count.
fn interval(seconds: u64) -> i64 {
    i64::try_from(seconds).unwrap_or(i64::MAX / 1000)
}

unsafe extern "C" fn clean(opaque: *mut c_void) {
    // SAFETY: `forget` has not been called, as that is done by this event loop.
    let target = unsafe { &*opaque.cast_const().cast::<Target>() };
    let state = target.lock();
    let Some((node, timer)) = *state else { return };
    // SAFETY: the node is there until `stop` has returned, which needs the lock.
    let node = unsafe { &*node };
    let done = node.serve(Access::Read, |image| {
        image.clean_caches();
        Ok(image.options().clean_interval)
    });
    if let Ok(seconds @ 1..) = done {
        // SAFETY: it is the timer that has just fired, and not freed: as above.
        unsafe { sys::rq_timer_arm(timer, interval(seconds)) };
    }
}

unsafe extern "C" fn forget(opaque: *mut c_void) {
    // SAFETY: from `start`; the timer is gone, and the event loop in which its
    // callback ran has come to this.
    drop(unsafe { Box::from_raw(opaque.cast::<Target>()) });
}
