//! Messages of channel *agent*: which guest agent runs, what the host offers, what became of
//! an offer.

use serde::{Deserialize, Serialize};

/// Most versions in [`AgentVersions::bad`]; the guest forgets the oldest beyond it.
pub const MAX_BAD: usize = 64;

/// The first message of the app agent on the channel, and repeated when it changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentVersions {
    /// Version of the guest agent that runs, or is started next.
    pub version: String,
    /// SHA-256 of its package; absent for the guest agent of the image.
    pub sha256: Option<String>,
    /// Whether it is still watched, and given up if it fails.
    pub watched: bool,
    /// Versions that failed in this guest, which it never takes again.
    pub bad: Vec<BadAgent>,
}

/// A version that failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BadAgent {
    /// Its version.
    pub version: String,
    /// SHA-256 of its package.
    pub sha256: String,
    /// How it failed.
    pub reason: String,
}

/// A package that the guest may take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentOffer {
    /// Version, as in the package.
    pub version: String,
    /// SHA-256 of the package in lower-case hexadecimal.
    pub sha256: String,
    /// Its minisign signature, as in the file `.minisig`.
    pub signature: String,
    /// The public keys that the host trusts, as in files `.pub`.
    pub keys: Vec<String>,
    /// Take it though it is not newer than what runs.
    pub allow_downgrade: bool,
}

/// What became of a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UpdateStep {
    /// It is not valid, and nothing was changed.
    Refused,
    /// It is installed, and replaces the guest agent that runs.
    Installed,
    /// It has run well for long enough.
    Confirmed,
    /// It failed and is bad from now on; the one before it is started again.
    WentBack,
}

/// Tells the host what became of a package.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentUpdate {
    /// Its version.
    pub version: String,
    /// Its SHA-256.
    pub sha256: String,
    /// What happened.
    pub step: UpdateStep,
    /// Why, if something is wrong.
    pub detail: String,
}
