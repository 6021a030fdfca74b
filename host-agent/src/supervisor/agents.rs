//! Guest agents: the package that this host offers to its guests, and what each guest runs.

use std::collections::BTreeSet;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use utoipa::ToSchema;
use vmbus::message::AgentOffer;

use crate::digest::Digest;
use crate::store::image::AgentProgram;

/// What is offered now, if anything is. Every guest's channel follows it.
pub type Offers = watch::Receiver<Option<Arc<OfferedAgent>>>;

/// A package that is offered.
#[derive(Debug)]
pub struct OfferedAgent {
    /// What guests are told.
    pub offer: AgentOffer,
    /// The file of the package.
    pub package: AgentProgram,
    /// Deployment and instance of the guests in which it failed.
    pub failed_in: BTreeSet<(String, String)>,
}

/// The guest agent of a guest, as the guest reports it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RunningAgent {
    /// Its version.
    pub version: String,
    /// SHA-256 of its package; absent for the guest agent of the image.
    pub package: Option<Digest>,
    /// Whether it is new: the guest goes back to the one before if it fails.
    pub watched: bool,
    /// Versions that failed in this guest.
    pub failed: Vec<FailedAgent>,
}

/// A version that failed in a guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct FailedAgent {
    /// Its version.
    pub version: String,
    /// SHA-256 of its package.
    pub package: Digest,
    /// How it failed.
    pub reason: String,
}
