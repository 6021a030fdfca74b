//! `host-agent doctor`: whether this machine can run guests, and what would help.

mod facts;
mod kvm_probe;
mod verdict;

use std::fmt;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;

pub use verdict::{Check, Level, SERVICE, TimeoutScale, Verdict, iec};
use verdict::{Facts, KvmFact};

use crate::vmm::sandbox::SandboxReport;

use kvm_probe::KvmProbe;

/// The result of all checks.
#[derive(Debug, Clone, Serialize)]
pub struct HostReport {
    /// Always `host-agent.doctor/1`.
    schema: &'static str,
    /// Whether guests can run.
    pub verdict: Verdict,
    /// Microseconds for an exit from a guest to this process and back, if measured.
    pub exit_us: Option<f64>,
    /// Millions of guest instructions per second, if measured.
    pub guest_mips: Option<f64>,
    /// `bare metal`, `nested`, …, if measured.
    pub kind: Option<&'static str>,
    /// The factor of every timeout.
    pub timeout_scale: TimeoutScale,
    /// Why `HOST_AGENT_TIMEOUT_SCALE` is invalid and ignored.
    #[serde(skip)]
    pub scale_refused: Option<String>,
    /// Free memory in bytes.
    pub memory_bytes: u64,
    /// Free bytes of the data directory's file system.
    pub disk_bytes: u64,
    /// The sandbox of a VMM process; null if it is not known.
    pub sandbox: Option<SandboxReport>,
    /// The checks, one per line of the report.
    pub checks: Vec<Check>,
}

/// What is checked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Whether this host can run guests.
    Guests,
    /// The sandbox of their VMM processes too, which starts a process that enters it.
    GuestsAndSandbox,
}

/// Checks this host. `data_dir` is the directory for guests' files.
pub fn check(data_dir: &Path, scope: Scope) -> HostReport {
    HostReport::from_facts(&facts::gather(data_dir.to_owned(), scope))
}

impl HostReport {
    fn from_facts(facts: &Facts) -> Self {
        let measured = match &facts.kvm {
            KvmFact::Opened(KvmProbe::Ran(measured)) => Some(*measured),
            _ => None,
        };
        let tenth = |value: f64| (value * 10.0).round() / 10.0;
        Self {
            schema: "host-agent.doctor/1",
            verdict: verdict::verdict(facts),
            exit_us: measured.map(|m| tenth(m.exit_us)),
            guest_mips: measured.map(|m| tenth(m.loop_mips)),
            kind: measured.as_ref().map(verdict::kind_of_host),
            timeout_scale: verdict::timeout_scale(facts),
            scale_refused: verdict::scale_refused(facts),
            memory_bytes: facts.memory,
            disk_bytes: facts.disk,
            sandbox: facts.sandbox.clone().and_then(Result::ok),
            checks: verdict::checks(facts),
        }
    }

    /// Whether guests can run.
    pub fn is_usable(&self) -> bool {
        self.verdict == Verdict::Usable
    }

    /// Whether a VMM process has every layer of the sandbox.
    pub fn has_sandbox(&self) -> bool {
        self.sandbox
            .as_ref()
            .is_some_and(SandboxReport::is_complete)
    }

    /// The check of the sandbox.
    pub fn sandbox_check(&self) -> Option<&Check> {
        self.checks.iter().find(|check| check.name == "sandbox")
    }

    /// The factor of every timeout.
    pub fn timeout_scale(&self) -> u32 {
        self.timeout_scale.factor
    }

    /// `timeout` multiplied by the factor.
    pub fn scaled(&self, timeout: Duration) -> Duration {
        timeout.saturating_mul(self.timeout_scale.factor)
    }

    /// The first check that failed.
    pub fn failure(&self) -> Option<&Check> {
        self.checks.iter().find(|check| check.level == Level::Fail)
    }

    /// One line about the kind of host, its exits and the timeouts.
    pub fn summary(&self) -> String {
        let scale = self.timeout_scale;
        let why = match (scale.from_environment, scale.factor) {
            (true, _) => " by HOST_AGENT_TIMEOUT_SCALE",
            (false, 1) => "",
            (false, _) => "; set HOST_AGENT_TIMEOUT_SCALE to change",
        };
        match (self.kind, self.exit_us) {
            (Some(kind), Some(us)) => {
                format!(
                    "kvm {kind} ({us:.1} us per exit), timeouts x{}{why}",
                    scale.factor
                )
            }
            _ => "kvm not usable".into(),
        }
    }
}

impl fmt::Display for HostReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for check in &self.checks {
            let level = match check.level {
                Level::Ok => "ok",
                Level::Warn => "warn",
                Level::Fail => "fail",
            };
            writeln!(f, "{level:<5} {:<10} {}", check.name, check.text)?;
            if let Some(hint) = &check.hint {
                writeln!(f, "      {:<10} {hint}", "hint:")?;
            }
        }
        match self.verdict {
            Verdict::Usable => write!(f, "ready"),
            Verdict::NoDevice => write!(f, "not usable: no /dev/kvm"),
            Verdict::NoPermission => write!(f, "not usable: no permission to open /dev/kvm"),
            Verdict::CannotRunKernel => {
                write!(f, "not usable: /dev/kvm cannot run an unmodified kernel")
            }
            Verdict::NoMemory => write!(f, "not usable: not enough free memory"),
            Verdict::NoDisk => write!(f, "not usable: not enough free disk space"),
        }
    }
}
