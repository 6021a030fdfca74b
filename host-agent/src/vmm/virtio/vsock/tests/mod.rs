//! The vsock device against a driver that fills real rings.

mod credit;
mod driver;
mod endurance;
mod hostile;
mod limits;
mod protocol;
