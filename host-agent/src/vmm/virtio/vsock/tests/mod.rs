//! The vsock device and a driver that fills real rings.

mod clients;
mod credit;
mod driver;
mod endurance;
mod hostile;
mod limits;
mod protocol;
