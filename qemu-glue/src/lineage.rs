//! Chains that bite their tail, or are deeper than a stack.
//!
//! An image that says it is its own backing file, or that of one above it,
//! would be opened again and again until there are no more files or no more
//! stack. QEMU opens the backing file of a node right after the node, with the
//! node as the one it inherits options from, so each node can look at the one
//! it is opened for. It compares its file with that of a single node above,
//! the last one whose depth is a power of two (Brent's way to find a cycle):
//! a loop is found before it was gone through three times, at a cost that
//! does not grow with depth.
//!
//! QEMU opens backing files by recursion, the only one over layers there is.
//! Where it would end in the guard page behind the stack the chain is refused.

use std::cell::OnceCell;
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::ops::Range;
use std::ptr;
use std::sync::Arc;

use rust_qcow2::{Error, Result};

use crate::driver;
use crate::node::Node;
use crate::sys;

/// Bytes of the stack that are left for what is not done layer by layer.
const RESERVE: usize = 48 << 10;

/// Where a node is among those that were opened one for the other.
pub(crate) struct Lineage {
    /// Counted from the node that was opened by itself.
    depth: u32,
    /// What those below compare with: a depth, and the name of the file there.
    anchor: Arc<(u32, CString)>,
}

impl Lineage {
    /// The place of a node that is being opened.
    ///
    /// # Errors
    /// `ELOOP` if its file was opened for a node above, `E2BIG` if the stack
    /// may not do for one more.
    ///
    /// # Safety
    /// Called in the driver's open callback for `bs`, which has its file.
    pub(crate) unsafe fn of(bs: *mut sys::BlockDriverState) -> Result<Self> {
        // SAFETY: promised by the caller. The node that options are inherited
        // from is open and waits for this one; names end with a NUL.
        let (name, above) = unsafe {
            let file = (*(*bs).file).bs;
            let name = CStr::from_ptr((*file).filename.as_ptr());
            let above = (*bs).inherits_from;
            let ours = !above.is_null() && driver::is_ours((*above).drv);
            (name, if ours { Node::of(above) } else { None })
        };
        let Some(above) = above.map(Node::lineage) else {
            return Ok(Self::new(0, name));
        };
        let depth = above.depth.saturating_add(1);
        let (from, anchor) = &*above.anchor;
        if anchor.as_c_str() == name {
            return Err(infinite(name, depth - from));
        }
        if let Some(taken) = too_much_stack() {
            return Err(too_deep(depth, taken));
        }
        if depth.is_power_of_two() {
            return Ok(Self::new(depth, name));
        }
        Ok(Self {
            depth,
            anchor: above.anchor.clone(),
        })
    }

    fn new(depth: u32, name: &CStr) -> Self {
        Self {
            depth,
            anchor: Arc::new((depth, name.to_owned())),
        }
    }
}

/// The bytes of the stack that are taken, where that is too many to go on. What
/// a layer takes depends on the compiler: 401 bytes with gcc 12 and -O2, more
/// than 512 without. A quarter more is for whatever goes down a chain with
/// frames a little larger.
fn too_much_stack() -> Option<usize> {
    thread_local! {
        // To find it out takes a look through all mappings of the process.
        static STACK: OnceCell<Range<usize>> = const { OnceCell::new() };
    }
    STACK.with(|stack| {
        let stack = stack.get_or_init(stack_of_thread);
        let here = 0u8;
        let here = ptr::from_ref(&here).addr();
        // Not so on the stack of a coroutine, which nothing is known of.
        let taken = stack.contains(&here).then(|| stack.end - here)?;
        (taken + taken / 4 + RESERVE > stack.len()).then_some(taken)
    })
}

/// Where the stack of this thread may be; nowhere if that cannot be found out.
fn stack_of_thread() -> Range<usize> {
    let mut attributes = MaybeUninit::<libc::pthread_attr_t>::uninit();
    let (mut low, mut size) = (ptr::null_mut(), 0);
    // SAFETY: the first call fills `attributes` in or fails, in which case they
    // are not looked at; the others get what it has filled in, once each.
    unsafe {
        if libc::pthread_getattr_np(libc::pthread_self(), attributes.as_mut_ptr()) != 0 {
            return 0..0;
        }
        if libc::pthread_attr_getstack(attributes.as_ptr(), &mut low, &mut size) != 0 {
            size = 0;
        }
        libc::pthread_attr_destroy(attributes.as_mut_ptr());
    }
    low.addr()..low.addr().saturating_add(size)
}

fn too_deep(layers: u32, taken: usize) -> Error {
    Error::new(
        libc::E2BIG,
        format!(
            "The chain has more than {layers} layers, and to open more takes more stack than \
             the process may have; raise the limit with ulimit -s (those opened took {} KiB), \
             or merge layers",
            taken >> 10
        ),
    )
}

fn infinite(name: &CStr, layers: u32) -> Error {
    let how = match layers {
        1 => "it is its own backing file".to_owned(),
        _ => format!("it is below itself again after {layers} layers"),
    };
    let name = name.to_string_lossy();
    Error::new(
        libc::ELOOP,
        format!("Backing file '{name}' creates an infinite loop: {how}"),
    )
}
