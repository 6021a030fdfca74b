//! Version negotiation: the first frame of every channel, each way.
//!
//! The guest sends the versions that it speaks. The host picks the highest that both know, or
//! refuses with both lists.

use serde::{Deserialize, Serialize};

use crate::channel::Channel;
use crate::frame::Message;

/// The protocol versions that this build speaks, lowest first.
///
/// 2: a goal carries the role's definition whole; bytes of `exec` travel raw.
/// 3: one port for all tunnels, with a request as the first frame of each.
pub const SUPPORTED: &[u32] = &[3];

/// The guest's first frame on a channel that it dials.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Versions that the guest speaks.
    pub versions: Vec<u32>,
    /// Which channel the guest believes it opened.
    pub channel: Channel,
    /// The guest kernel's random boot id (`/proc/sys/kernel/random/boot_id`).
    pub boot_id: String,
    /// Name and version of the guest's program, for people.
    pub agent: String,
}

/// The host's answer to a [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Welcome {
    /// The channel is open.
    Accepted {
        /// The version both sides speak from here on.
        version: u32,
    },
    /// The channel is not opened; the host closes after this frame.
    Refused {
        /// Why, for the guest's log.
        reason: String,
    },
}

impl Message for Hello {}
impl Message for Welcome {}

/// Picks the highest version in both lists, or explains why there is none.
pub fn negotiate(ours: &[u32], theirs: &[u32]) -> Result<u32, String> {
    ours.iter()
        .copied()
        .filter(|version| theirs.contains(version))
        .max()
        .ok_or_else(|| format!("no common version: host speaks {ours:?}, guest speaks {theirs:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_highest_common_version_wins() {
        assert_eq!(negotiate(&[1, 2, 3], &[2, 3, 9]), Ok(3));
        assert_eq!(negotiate(&[1], &[1]), Ok(1));
        let refusal = negotiate(&[1, 2], &[7]).unwrap_err();
        assert!(refusal.contains("[1, 2]") && refusal.contains("[7]"));
        assert!(negotiate(&[1], &[]).is_err());
    }
}
