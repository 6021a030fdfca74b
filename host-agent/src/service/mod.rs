//! Parses and validates the definition, configuration and package of a service
//! into a [`model::ServiceModel`], which is valid by construction.

mod archive;
mod archive_policy;
#[cfg(test)]
mod archive_tests;
mod archive_writer;
mod command;
pub mod configuration;
pub mod definition;
mod error;
#[cfg(test)]
mod limits_tests;
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
#[cfg(test)]
mod policy_tests;
mod publish;
mod rules;
pub mod size;
mod squashfs;
mod validate;
mod xml;
mod xml_chunks;
mod xml_tokens;
mod xpath;

pub use archive::MAX_PACKED;
pub(crate) use error::nearest;
pub use error::{Blame, Position, ServiceError, SourceLocation};
pub use load::{configuration_text, load};
pub use pack::{Packed, pack};
pub use publish::{PublishError, PublishedPort, publish};
pub use rules::{DEFAULT_IMAGE, ServiceRules, is_image_name};
pub use squashfs::{ImageError, build_application_image};
pub use validate::{Validated, validate};

/// The directory of a service that tests load.
#[cfg(test)]
pub const SAMPLE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/services/redis");
