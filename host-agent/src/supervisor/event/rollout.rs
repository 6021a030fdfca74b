//! Steps of the update of a service.

use std::fmt;

use serde::Serialize;

/// A step of the update of a service.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum RolloutStep {
    /// An update takes the instances of a service to another revision.
    Started {
        /// The revision to which a rollback leads.
        from: u64,
        /// The revision.
        to: u64,
    },
    /// The instances of an upgrade domain are taken down and changed.
    DomainBegun {
        /// The domain.
        domain: u32,
        /// The instances.
        instances: Vec<String>,
    },
    /// Every instance of an upgrade domain is Ready in the new revision.
    DomainDone {
        /// The domain.
        domain: u32,
    },
    /// The rollout waits between two domains, as was asked for.
    Paused {
        /// Domains that are done.
        done: u32,
    },
    /// The rollout waits for a decision.
    Halted {
        /// Why.
        because: String,
    },
    /// Every instance is taken back.
    GoesBack {
        /// The revision.
        to: u64,
        /// Why.
        because: String,
    },
    /// Every instance is back at the revision before.
    Back {
        /// The revision.
        to: u64,
    },
    /// Every instance is Ready in the new revision.
    Done {
        /// The revision.
        to: u64,
    },
}

impl fmt::Display for RolloutStep {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Started { from, to } => {
                write!(f, "update from generation {from} to {to} started")
            }
            Self::DomainBegun { domain, instances } => {
                write!(f, "upgrade domain {domain} begun: {}", instances.join(", "))
            }
            Self::DomainDone { domain } => write!(f, "upgrade domain {domain} done"),
            Self::Paused { done } => {
                let s = if *done == 1 { "" } else { "s" };
                write!(f, "update paused, {done} upgrade domain{s} done")
            }
            Self::Halted { because } => write!(f, "update halted: {because}"),
            Self::GoesBack { to, because } => {
                write!(f, "update goes back to generation {to}: {because}")
            }
            Self::Back { to } => write!(f, "rolled back to generation {to}"),
            Self::Done { to } => write!(f, "update to generation {to} done"),
        }
    }
}
