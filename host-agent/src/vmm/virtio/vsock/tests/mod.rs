//! The device against a driver that fills real rings.

mod driver;
mod protocol;
