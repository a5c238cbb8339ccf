//! What a chain costs, from its metadata and a few measurements on the machine.

pub mod calibration;
pub mod figure;
pub mod fit;
pub mod shape;
pub mod terms;
mod walk;
