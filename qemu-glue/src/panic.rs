//! No panic crosses into C.
//!
//! A panic is a defect of this driver. It is caught where C called Rust, the
//! request fails with `EIO`, and the node refuses to write from then on, as
//! what it has in memory may be half changed. The guest goes on.

use std::any::Any;
use std::panic::{AssertUnwindSafe, catch_unwind};

/// What a panic carried.
pub(crate) type Payload = Box<dyn Any + Send + 'static>;

/// Calls `f`; a panic becomes an error.
///
/// The standard library's hook has told the place and the message on standard
/// error by the time this returns.
#[inline]
pub(crate) fn catch<T>(f: impl FnOnce() -> T) -> Result<T, Payload> {
    // What the closure has borrowed is not trusted afterwards: the callers
    // mark the node as failed, or have nothing that outlives the call.
    catch_unwind(AssertUnwindSafe(f))
}

/// Calls `f`, which has no node to mark; `otherwise` is returned after a panic.
pub(crate) fn contain<T>(what: &str, otherwise: T, f: impl FnOnce() -> T) -> T {
    catch(f).unwrap_or_else(|_payload| {
        crate::error::report_text(&format!("rqcow2: internal error in {what}"));
        otherwise
    })
}
