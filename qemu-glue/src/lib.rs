//! The rqcow2 block driver.
