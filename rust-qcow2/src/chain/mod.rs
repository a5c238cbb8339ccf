//! Many layers that back each other.
//!
//! `walk` finds the layer that has some guest bytes, in a loop over the
//! layers: the stack stays as it is however many there are, and no layer in
//! between costs a request of its own. This is also the place of the index
//! that will make the loop unnecessary (section 3 of the design document).

pub(crate) mod walk;
