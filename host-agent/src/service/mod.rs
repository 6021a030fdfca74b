//! Service definition, configuration and package: parsed and validated into a
//! [`model::ServiceModel`] that cannot be wrong.

mod archive;
#[cfg(test)]
mod archive_tests;
mod archive_writer;
mod command;
pub mod configuration;
pub mod definition;
mod draft;
mod error;
mod load;
#[cfg(test)]
mod load_tests;
pub mod model;
mod open;
mod pack;
mod package;
#[cfg(test)]
mod package_tests;
pub mod payload;
pub mod size;
mod squashfs;
mod validate;
mod xml;
mod xml_cut;
mod xpath;

pub use error::{Blame, Place, Position, ServiceError};
pub use load::load;
pub use pack::{Packed, pack};
pub use squashfs::{ImageError, build_application_image};
pub use validate::{Validated, validate};
