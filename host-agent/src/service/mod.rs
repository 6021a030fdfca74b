//! Service definition, configuration and package: parsed and validated into a
//! [`model::ServiceModel`] that cannot be wrong.

pub mod model;
