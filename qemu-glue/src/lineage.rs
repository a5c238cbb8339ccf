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

use std::ffi::{CStr, CString};
use std::sync::{Arc, OnceLock};

use rust_qcow2::{Error, Result};

use crate::driver;
use crate::node::Node;
use crate::sys;

/// What QEMU takes of the stack to open one backing file for another, in bytes,
/// rounded up: 401 when QEMU is compiled with gcc 12 and -O2.
const STACK_PER_LAYER: u64 = 512;

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
        if depth >= deepest() {
            return Err(too_deep(depth));
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

/// How many layers can be opened one for the other. They are opened by the
/// main thread, whose stack grows up to a limit of the process.
fn deepest() -> u32 {
    static DEEPEST: OnceLock<u32> = OnceLock::new();
    *DEEPEST.get_or_init(|| {
        let mut limit = libc::rlimit {
            rlim_cur: libc::RLIM_INFINITY,
            rlim_max: libc::RLIM_INFINITY,
        };
        // SAFETY: writes to `limit` only; if it fails, that stays as it is.
        unsafe { libc::getrlimit(libc::RLIMIT_STACK, &mut limit) };
        if limit.rlim_cur == libc::RLIM_INFINITY {
            return u32::MAX;
        }
        u32::try_from(limit.rlim_cur / STACK_PER_LAYER).unwrap_or(u32::MAX)
    })
}

fn too_deep(layers: u32) -> Error {
    Error::new(
        libc::E2BIG,
        format!(
            "The chain has more than {layers} layers, and to open more takes more stack than \
             the process may have; raise the limit with ulimit -s (1 MiB for each {}), or merge \
             layers",
            (1 << 20) / STACK_PER_LAYER
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
