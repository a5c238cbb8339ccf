//! Coroutine code, called from where there is none.

use std::ffi::c_void;
use std::panic::resume_unwind;

use crate::panic::{Payload, catch};
use crate::sys;

/// A closure on its way into a coroutine, and what came of it.
struct Call<F, T> {
    f: Option<F>,
    result: Option<Result<T, Payload>>,
}

/// Calls `f` in a coroutine in the `AioContext` of `bs`, under the graph's
/// read lock, and handles events until it is done. In a coroutine (which holds
/// that lock already) `f` is just called. A panic in `f` goes on here.
///
/// # Safety
/// `bs` is a node, and the caller is in the main loop, or in the home thread
/// of the node's `AioContext`, or in a coroutine that holds the graph lock.
pub(crate) unsafe fn run<T, F: FnOnce() -> T>(bs: *mut sys::BlockDriverState, f: F) -> T {
    let mut call = Call {
        f: Some(f),
        result: None,
    };
    // SAFETY: the caller vouches for the place; `call` outlives the coroutine,
    // which is the only one to use it until the function returns.
    unsafe {
        sys::rq_run_in_coroutine(bs, Some(enter::<F, T>), (&raw mut call).cast());
    }
    match call.result {
        Some(Ok(value)) => value,
        Some(Err(payload)) => resume_unwind(payload),
        None => unreachable!("the coroutine has ended"),
    }
}

unsafe extern "C" fn enter<F: FnOnce() -> T, T>(opaque: *mut c_void) {
    // SAFETY: the pointer is that of `run`, whose frame waits for this.
    let call = unsafe { &mut *opaque.cast::<Call<F, T>>() };
    if let Some(f) = call.f.take() {
        call.result = Some(catch(f));
    }
}
