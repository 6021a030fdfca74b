//! Decides from the timeline whether a service is Ready or has failed. Pure.

use std::collections::BTreeMap;

use vmbus::message::{ExitCause, RoleState};

use super::deploy::MORE_SPACE;
use super::error::{CliError, Code};
use crate::supervisor::event::{EventKind, TimelineEvent, Verdict, exit_text};
use crate::supervisor::status::{InstanceStatus, Phase};
use crate::vmm::control::ExitReason;

/// What an event decides about a service.
#[derive(Debug)]
pub enum Decision {
    /// Every instance is Ready, and at least one of them was not since the last time.
    Ready,
    /// An instance failed before or after it was Ready.
    Failed(RunError),
}

/// An error of a service that was deployed.
#[derive(Debug)]
pub struct RunError {
    /// The error.
    pub error: CliError,
    /// The instance whose logs may explain it.
    pub instance: Option<String>,
}

impl From<CliError> for RunError {
    fn from(error: CliError) -> Self {
        let instance = None;
        Self { error, instance }
    }
}

/// Follows one deployment.
#[derive(Debug)]
pub struct Watch {
    instances: BTreeMap<String, Instance>,
    /// Every instance is Ready.
    ready: bool,
    stopping: bool,
}

#[derive(Debug, Default)]
struct Instance {
    status: InstanceStatus,
    /// Its phase before the service was stopped, which a report shows.
    before_stop: Option<Phase>,
}

impl Watch {
    /// Expects events of the instances called `names`.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let fresh = |name| (name, Instance::default());
        Self {
            instances: names.into_iter().map(fresh).collect(),
            ready: false,
            stopping: false,
        }
    }

    /// The service is being stopped: from now on no event is a failure.
    pub fn stopping(&mut self) {
        self.stopping = true;
        for instance in self.instances.values_mut() {
            instance.before_stop.get_or_insert(instance.status.phase);
        }
    }

    /// State of an instance in one word; after a stop, its last state before it.
    pub fn state(&self, name: &str) -> &'static str {
        self.instances.get(name).map_or("Unknown", |instance| {
            let phase = instance.before_stop.unwrap_or(instance.status.phase);
            phase.word()
        })
    }

    /// Whether an instance is Ready.
    pub fn is_ready(&self, name: &str) -> bool {
        let instance = self.instances.get(name);
        instance.is_some_and(|instance| instance.status.is_ready())
    }

    /// Whether every instance is Ready.
    pub const fn all_ready(&self) -> bool {
        self.ready
    }

    /// Instances that are not Ready, with their state; during a stop those that have
    /// not stopped.
    pub fn waiting(&self) -> Vec<String> {
        let instances = self.instances.iter();
        if self.stopping {
            let up = instances.filter(|(_, instance)| instance.clean().is_none());
            return up.map(|(name, _)| format!("{name} is stopping")).collect();
        }
        let waiting = instances.filter(|(_, instance)| !instance.status.is_ready());
        waiting
            .map(|(name, instance)| match &instance.status.no_space {
                Some(why) => format!("{name}: {why}"),
                None => format!("{name} is {}", instance.status.phase),
            })
            .collect()
    }

    /// Whether an instance is paused because the host's disk is full.
    pub fn lacks_space(&self) -> bool {
        let mut instances = self.instances.values();
        instances.any(|instance| instance.status.no_space.is_some())
    }

    /// Instances that did not stop cleanly.
    pub fn unclean(&self) -> Vec<String> {
        let instances = self.instances.iter();
        let unclean = instances.filter(|(_, instance)| instance.clean() != Some(true));
        unclean.map(|(name, _)| name.clone()).collect()
    }

    /// Takes in one event; returns what it decides.
    pub fn apply(&mut self, event: &TimelineEvent) -> Option<Decision> {
        let name = event.instance.as_ref()?;
        let instance = self.instances.get_mut(name)?;
        let recycles = instance.status.recycles;
        instance.status.apply(&event.kind);
        if instance.status.recycles > recycles {
            // The role ended and started again between two reports.
            self.ready = false;
        }
        if self.stopping {
            return None;
        }
        if let Some(error) = failure(name, &event.kind) {
            let instance = Some(name.clone());
            return Some(Decision::Failed(RunError { error, instance }));
        }
        let was_ready = self.ready;
        let mut instances = self.instances.values();
        self.ready = instances.all(|instance| instance.status.is_ready());
        (self.ready && !was_ready).then_some(Decision::Ready)
    }
}

impl Instance {
    /// Whether it stopped cleanly, once it has stopped.
    const fn clean(&self) -> Option<bool> {
        match self.status.phase {
            Phase::Stopped { clean } => Some(clean),
            _ => None,
        }
    }
}

/// The error of instance `name` for an event that is a failure.
fn failure(name: &str, kind: &EventKind) -> Option<CliError> {
    let (code, what, cause) = match kind {
        EventKind::Role {
            state: state @ (RoleState::Failed | RoleState::Cycling),
            detail,
            recycles,
            last_exit,
            ..
        } => {
            let what = match (state, last_exit) {
                (RoleState::Failed, _) => format!("role of {name} cannot be started"),
                (_, Some(exit)) => {
                    format!(
                        "role of {name} ended {recycles} times, {}",
                        exit_cause(*exit)
                    )
                }
                (_, None) => format!("role of {name} ended {recycles} times"),
            };
            (Code::Role, what, some(detail))
        }
        EventKind::GuestAgent { error: Some(error) } => (
            Code::Boot,
            format!("guest agent of {name} does not run"),
            some(error),
        ),
        EventKind::Verdict { verdict, evidence } => {
            let code = match verdict {
                Verdict::NoContact { .. } => Code::Boot,
                _ => Code::Role,
            };
            (code, format!("guest of {name}: {verdict}"), some(evidence))
        }
        EventKind::GuestExited { reason, because } => {
            let hint = match reason {
                ExitReason::Panic | ExitReason::TripleFault => {
                    Some("see the serial console".into())
                }
                _ => because.clone(),
            };
            let what = format!("guest of {name} ended: {}", exit_text(reason));
            (Code::Boot, what, hint)
        }
        EventKind::DiskFailed {
            disk,
            file,
            error,
            full,
        } => {
            let code = if *full { Code::HostFull } else { Code::Start };
            let what = format!("the host cannot serve disk {disk} of {name}");
            (code, what, Some(format!("{}: {error}", file.display())))
        }
        EventKind::Faulted { because, .. } => {
            (Code::Boot, format!("{name} does not boot"), some(because))
        }
        EventKind::Failed { error } => (
            Code::Start,
            format!("the host cannot run {name}"),
            some(error),
        ),
        _ => return None,
    };
    let mut failure = CliError::new(code, what);
    if let Some(cause) = cause {
        failure = failure.cause(cause);
    }
    if code == Code::HostFull {
        failure = failure.hint(MORE_SPACE);
    }
    Some(failure)
}

fn exit_cause(exit: ExitCause) -> String {
    match exit {
        ExitCause::Code(code) => format!("last with exit code {code}"),
        ExitCause::Signal(number) => format!("last by signal {number}"),
    }
}

fn some(text: &str) -> Option<String> {
    (!text.is_empty()).then(|| text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn watch() -> Watch {
        Watch::new(["A_IN_0".into(), "A_IN_1".into()])
    }

    fn event(instance: &str, kind: EventKind) -> TimelineEvent {
        TimelineEvent {
            at: Duration::ZERO,
            deployment: None,
            instance: Some(instance.into()),
            kind,
        }
    }

    fn role(state: RoleState) -> EventKind {
        EventKind::Role {
            state,
            detail: "run.sh: not executable".into(),
            recycles: 3,
            last_exit: Some(ExitCause::Code(1)),
            retry_in_ms: None,
        }
    }

    fn becomes_ready(watch: &mut Watch, instance: &str, kind: EventKind) -> bool {
        let decision = watch.apply(&event(instance, kind));
        matches!(decision, Some(Decision::Ready))
    }

    #[test]
    fn a_service_is_ready_each_time_that_all_instances_become_so() {
        let mut watch = watch();
        for (name, state, ready) in [
            ("A_IN_0", RoleState::Ready, false),
            ("A_IN_0", RoleState::Ready, false),
            ("A_IN_1", RoleState::Ready, true),
            ("A_IN_1", RoleState::Ready, false),
            ("A_IN_0", RoleState::Recycling, false),
            ("A_IN_1", RoleState::Ready, false),
            ("A_IN_0", RoleState::Ready, true),
        ] {
            assert_eq!(becomes_ready(&mut watch, name, role(state)), ready);
        }
        assert!(watch.waiting().is_empty() && watch.all_ready());
    }

    #[test]
    fn a_role_that_ended_between_two_reports_becomes_ready_again() {
        let mut watch = Watch::new(["A_IN_0".into()]);
        for (recycles, ready) in [(0, true), (0, false), (1, true)] {
            let role = EventKind::Role {
                state: RoleState::Ready,
                detail: String::new(),
                recycles,
                last_exit: None,
                retry_in_ms: None,
            };
            assert_eq!(becomes_ready(&mut watch, "A_IN_0", role), ready);
        }
    }

    #[test]
    fn an_instance_that_restarts_is_no_longer_ready() {
        let mut watch = watch();
        watch.apply(&event("A_IN_0", role(RoleState::Ready)));
        let starting = EventKind::GuestStarting {
            generation: 2,
            pid: 1,
        };
        watch.apply(&event("A_IN_0", starting));
        let ready = role(RoleState::Ready);
        assert!(!becomes_ready(&mut watch, "A_IN_1", ready));
        assert_eq!(watch.waiting(), ["A_IN_0 is Booting"]);
    }

    fn disk_failed(full: bool) -> EventKind {
        EventKind::DiskFailed {
            disk: "os".into(),
            file: "/data/diff.qcow2".into(),
            error: "no".into(),
            full,
        }
    }

    #[test]
    fn each_failure_has_its_code_and_its_instance() {
        let exited = |reason| EventKind::GuestExited {
            reason,
            because: None,
        };
        let verdict = |verdict| EventKind::Verdict {
            verdict,
            evidence: "serial silent".into(),
        };
        let cases = [
            (role(RoleState::Failed), Code::Role, "cannot be started"),
            (role(RoleState::Cycling), Code::Role, "3 times, last with"),
            (exited(ExitReason::Panic), Code::Boot, "kernel panic"),
            (exited(ExitReason::TripleFault), Code::Boot, "triple fault"),
            (exited(ExitReason::PowerOff), Code::Boot, "power-off"),
            (
                verdict(Verdict::NoContact { waited_ms: 9 }),
                Code::Boot,
                "no contact",
            ),
            (verdict(Verdict::VmmHung), Code::Role, "does not answer"),
            (disk_failed(true), Code::HostFull, "disk os of A_IN_1"),
            (disk_failed(false), Code::Start, "disk os of A_IN_1"),
        ];
        for (kind, code, words) in cases {
            let decision = watch().apply(&event("A_IN_1", kind.clone()));
            let Some(Decision::Failed(RunError { error, instance })) = decision else {
                panic!("no failure: {kind:?}");
            };
            assert_eq!((error.code(), instance.as_deref()), (code, Some("A_IN_1")));
            assert!(error.what().contains(words), "{}", error.what());
        }
        let once = watch().apply(&event("A_IN_0", role(RoleState::Recycling)));
        assert!(once.is_none());
    }

    #[test]
    fn a_guest_paused_for_space_is_not_ready_but_has_not_failed() {
        let no_space = || EventKind::NoSpace {
            disk: "os".into(),
            file: "/data/diff.qcow2".into(),
            mount: "/data".into(),
            needed_bytes: 3 << 20,
            free_bytes: Some(0),
            quota: false,
        };
        let mut watch = Watch::new(["A_IN_0".into()]);
        let ready = role(RoleState::Ready);
        assert!(becomes_ready(&mut watch, "A_IN_0", ready));
        assert!(watch.apply(&event("A_IN_0", no_space())).is_none());
        assert!(!watch.all_ready() && !watch.is_ready("A_IN_0") && watch.lacks_space());
        let waiting = watch.waiting();
        let wanted = "A_IN_0: guest paused: no space for disk os (/data/diff.qcow2); \
                      free at least 3 MiB on /data (0 B free): it continues by itself";
        assert_eq!(waiting, [wanted]);
        let back = EventKind::SpaceBack { paused_ms: 10 };
        assert!(becomes_ready(&mut watch, "A_IN_0", back));
        watch.apply(&event("A_IN_0", no_space()));
        let ended = EventKind::GuestExited {
            reason: ExitReason::Stopped,
            because: None,
        };
        watch.apply(&event("A_IN_0", ended));
        assert!(!watch.lacks_space());
    }

    #[test]
    fn a_stopped_service_has_no_failures_but_unclean_instances() {
        let mut watch = watch();
        watch.stopping();
        let ended = EventKind::GuestExited {
            reason: ExitReason::PowerOff,
            because: None,
        };
        assert!(watch.apply(&event("A_IN_0", ended)).is_none());
        watch.apply(&event("A_IN_0", EventKind::Stopped { clean: true }));
        assert_eq!(watch.waiting(), ["A_IN_1 is stopping"]);
        watch.apply(&event("A_IN_1", EventKind::Stopped { clean: false }));
        assert_eq!(watch.unclean(), ["A_IN_1"]);
        assert!(watch.waiting().is_empty());
    }
}
