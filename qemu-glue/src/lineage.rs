//! Chains that bite their tail.
//!
//! An image that says it is its own backing file, or that of one above it,
//! would be opened again and again until there are no more files or no more
//! stack. QEMU opens the backing file of a node right after the node, with the
//! node as the one it inherits options from, so each node can look at the one
//! it is opened for. It compares its file with that of a single node above,
//! the last one whose depth is a power of two (Brent's way to find a cycle):
//! a loop is found before it was gone through three times, at a cost that
//! does not grow with depth.

use std::ffi::{CStr, CString};
use std::sync::Arc;

use rust_qcow2::{Error, Result};

use crate::driver;
use crate::node::Node;
use crate::sys;

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
    /// `ELOOP` if its file was opened for a node above.
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
