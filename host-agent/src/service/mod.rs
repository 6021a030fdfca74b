//! Service definition, configuration and package: parsed and validated into a
//! [`model::ServiceModel`] that cannot be wrong.

mod command;
pub mod configuration;
pub mod definition;
mod error;
mod load;
#[cfg(test)]
mod load_tests;
pub mod model;
pub mod payload;
pub mod size;
mod squashfs;
mod xml;
mod xpath;

pub use error::{Position, ServiceError};
pub use load::load;
pub use squashfs::{ImageError, build_application_image};
