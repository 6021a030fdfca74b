//! Which layers of the sandbox are in force.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A part of the sandbox. The order is that of reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Layer {
    /// `no_new_privs`, no capabilities, not dumpable.
    NoPrivileges,
    /// A user of its own, if the host agent runs as root.
    OwnUser,
    /// Its own mount (with an empty root), network, IPC and UTS namespaces.
    Namespaces,
    /// A Landlock ruleset without rules.
    Landlock,
    /// A seccomp filter in each thread.
    Filters,
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoPrivileges => "no privileges",
            Self::OwnUser => "own user",
            Self::Namespaces => "namespaces",
            Self::Landlock => "Landlock",
            Self::Filters => "seccomp",
        })
    }
}

/// A layer and its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerState {
    /// The layer.
    pub layer: Layer,
    /// Why the layer is not in force, or not all of it; `None` if it is.
    pub missing: Option<String>,
    /// What the layer consists of on this kernel, if kernels differ.
    pub detail: Option<String>,
}

/// The sandbox of a VMM process.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct SandboxReport(Vec<LayerState>);

impl SandboxReport {
    /// Adds a layer: its detail, or why it is missing.
    pub(super) fn add(&mut self, layer: Layer, state: Result<Option<String>, String>) {
        let (detail, missing) = match state {
            Ok(detail) => (detail, None),
            Err(why) => (None, Some(why)),
        };
        self.0.push(LayerState {
            layer,
            missing,
            detail,
        });
    }

    /// A layer that seemed to be in force is not.
    pub(super) fn fail(&mut self, layer: Layer, why: &str) {
        for state in self.0.iter_mut().filter(|state| state.layer == layer) {
            state.missing = Some(why.to_owned());
        }
    }

    /// Every layer.
    pub fn layers(&self) -> &[LayerState] {
        &self.0
    }

    /// Whether every layer is in force.
    pub fn is_complete(&self) -> bool {
        !self.0.is_empty() && self.missing().next().is_none()
    }

    /// The layers that are not in force.
    pub fn missing(&self) -> impl Iterator<Item = &LayerState> {
        self.0.iter().filter(|state| state.missing.is_some())
    }
}

/// `no privileges, own user, namespaces, Landlock (ABI 7)`, and what is missing.
impl fmt::Display for SandboxReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let list = |states: &mut dyn Iterator<Item = &LayerState>| {
            let texts = states.map(|state| {
                let note = state.missing.as_ref().or(state.detail.as_ref());
                match note {
                    Some(note) => format!("{} ({note})", state.layer),
                    None => state.layer.to_string(),
                }
            });
            texts.collect::<Vec<_>>().join(", ")
        };
        let missing = list(&mut self.missing());
        let mut in_force = self.0.iter().filter(|state| state.missing.is_none());
        match list(&mut in_force) {
            none if none.is_empty() => f.write_str("nothing")?,
            in_force => f.write_str(&in_force)?,
        }
        if !missing.is_empty() {
            write!(f, "; missing: {missing}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_names_what_is_in_force_and_what_is_missing() {
        let mut report = SandboxReport::default();
        assert_eq!(
            (report.is_complete(), report.to_string()),
            (false, "nothing".into())
        );
        report.add(Layer::NoPrivileges, Ok(None));
        report.add(Layer::Landlock, Ok(Some("ABI 7".into())));
        assert!(report.is_complete());
        assert_eq!(report.to_string(), "no privileges, Landlock (ABI 7)");
        report.add(Layer::Namespaces, Err("unshare: EPERM".into()));
        assert!(!report.is_complete());
        let text = "no privileges, Landlock (ABI 7); missing: namespaces (unshare: EPERM)";
        assert_eq!(report.to_string(), text);
        let json = serde_json::to_string(&report).unwrap();
        assert_eq!(
            serde_json::from_str::<SandboxReport>(&json).unwrap(),
            report
        );
    }
}
