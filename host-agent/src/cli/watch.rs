//! From the timeline to a judgement: is the service Ready, or can it not be?
//! Pure.

use std::collections::BTreeMap;

use vmbus::message::{ExitCause, RoleState};

use super::deploy::MORE_SPACE;
use super::error::{CliError, Code};
use crate::supervisor::event::{EventKind, TimelineEvent, Verdict, exit_text};
use crate::supervisor::status::{InstanceStatus, Phase};
use crate::vmm::control::ExitReason;

/// What an event means for the whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum News {
    /// Nothing is decided.
    Nothing,
    /// Every instance is Ready, which they were not before, or not without a break.
    Ready,
    /// Not on the way to Ready, or no longer Ready.
    Trouble(Trouble),
}

/// Why a service is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Trouble {
    /// The instance.
    pub instance: String,
    /// Class.
    pub code: Code,
    /// What happened.
    pub what: String,
    /// Why, as far as it is known.
    pub cause: Option<String>,
}

impl From<Trouble> for CliError {
    fn from(trouble: Trouble) -> Self {
        let mut error = Self::new(trouble.code, trouble.what);
        if let Some(cause) = trouble.cause {
            error = error.cause(cause);
        }
        if trouble.code == Code::HostFull {
            error = error.hint(MORE_SPACE);
        }
        error
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
    /// Nothing has happened yet to the instances called `names`.
    pub fn new(names: impl IntoIterator<Item = String>) -> Self {
        let fresh = |name| (name, Instance::default());
        Self {
            instances: names.into_iter().map(fresh).collect(),
            ready: false,
            stopping: false,
        }
    }

    /// From here on the service is being stopped: what ends, ends on request.
    pub fn stopping(&mut self) {
        self.stopping = true;
        for instance in self.instances.values_mut() {
            instance.before_stop.get_or_insert(instance.status.phase);
        }
    }

    /// State of an instance in a word, the last one before the stop.
    pub fn state(&self, name: &str) -> &'static str {
        self.instances.get(name).map_or("Unknown", |instance| {
            let phase = instance.before_stop.unwrap_or(instance.status.phase);
            phase.word()
        })
    }

    /// Whether an instance is Ready.
    pub fn serves(&self, name: &str) -> bool {
        let instance = self.instances.get(name);
        instance.is_some_and(|instance| instance.status.is_ready())
    }

    /// Whether every instance is Ready.
    pub const fn is_ready(&self) -> bool {
        self.ready
    }

    /// Instances that are not Ready, with their state; during the stop those
    /// that are not down.
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

    /// Instances that did not end by themselves when they were stopped.
    pub fn unclean(&self) -> Vec<String> {
        let instances = self.instances.iter();
        let unclean = instances.filter(|(_, instance)| instance.clean() != Some(true));
        unclean.map(|(name, _)| name.clone()).collect()
    }

    /// Takes one event.
    pub fn take(&mut self, event: &TimelineEvent) -> News {
        let Some((name, instance)) = event
            .instance
            .as_ref()
            .and_then(|name| self.instances.get_mut(name).map(|found| (name, found)))
        else {
            return News::Nothing;
        };
        let recycles = instance.status.recycles;
        instance.status.apply(&event.kind);
        if instance.status.recycles > recycles {
            // The role ended in between, whether or not the guest reported it.
            self.ready = false;
        }
        if self.stopping {
            return News::Nothing;
        }
        if let Some((code, what, cause)) = trouble(name, &event.kind) {
            return News::Trouble(Trouble {
                instance: name.clone(),
                code,
                what,
                cause,
            });
        }
        let was_ready = self.ready;
        let mut instances = self.instances.values();
        self.ready = instances.all(|instance| instance.status.is_ready());
        if self.ready && !was_ready {
            return News::Ready;
        }
        News::Nothing
    }
}

impl Instance {
    /// Whether it ended by itself when it was stopped, once it has ended.
    const fn clean(&self) -> Option<bool> {
        match self.status.phase {
            Phase::Stopped { clean } => Some(clean),
            _ => None,
        }
    }
}

/// What is wrong with `name` after an event that a sound service never has.
fn trouble(name: &str, kind: &EventKind) -> Option<(Code, String, Option<String>)> {
    Some(match kind {
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
                    Some("the serial console says more".into())
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
    })
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

    #[test]
    fn ready_is_said_when_all_are_and_again_only_after_one_was_not() {
        let mut watch = watch();
        let mut take = |name, state| watch.take(&event(name, role(state)));
        assert_eq!(take("A_IN_0", RoleState::Ready), News::Nothing);
        assert_eq!(take("A_IN_0", RoleState::Ready), News::Nothing);
        assert_eq!(take("A_IN_1", RoleState::Ready), News::Ready);
        assert_eq!(take("A_IN_1", RoleState::Ready), News::Nothing);
        assert_eq!(take("A_IN_0", RoleState::Recycling), News::Nothing);
        assert_eq!(take("A_IN_1", RoleState::Ready), News::Nothing);
        assert_eq!(take("A_IN_0", RoleState::Ready), News::Ready);
        assert!(watch.waiting().is_empty() && watch.is_ready());
    }

    #[test]
    fn a_role_that_ended_and_was_ready_again_before_that_was_told_is_news() {
        let mut watch = Watch::new(["A_IN_0".into()]);
        let mut take = |recycles| {
            watch.take(&event(
                "A_IN_0",
                EventKind::Role {
                    state: RoleState::Ready,
                    detail: String::new(),
                    recycles,
                    last_exit: None,
                    retry_in_ms: None,
                },
            ))
        };
        assert_eq!(take(0), News::Ready);
        assert_eq!(take(0), News::Nothing);
        assert_eq!(take(1), News::Ready);
    }

    #[test]
    fn an_instance_that_restarts_is_not_ready_any_more() {
        let mut watch = watch();
        watch.take(&event("A_IN_0", role(RoleState::Ready)));
        let starting = EventKind::GuestStarting {
            generation: 2,
            pid: 1,
        };
        watch.take(&event("A_IN_0", starting));
        let last = watch.take(&event("A_IN_1", role(RoleState::Ready)));
        assert_eq!(last, News::Nothing);
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
    fn what_ends_the_way_to_ready_is_told_at_once_with_its_class() {
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
            let News::Trouble(trouble) = watch().take(&event("A_IN_1", kind.clone())) else {
                panic!("no trouble: {kind:?}");
            };
            assert_eq!((trouble.code, trouble.instance.as_str()), (code, "A_IN_1"));
            assert!(trouble.what.contains(words), "{}", trouble.what);
        }
        let once = watch().take(&event("A_IN_0", role(RoleState::Recycling)));
        assert_eq!(once, News::Nothing);
    }

    #[test]
    fn an_instance_without_space_is_no_trouble_but_not_ready_until_it_goes_on() {
        let no_space = || EventKind::NoSpace {
            disk: "os".into(),
            file: "/data/diff.qcow2".into(),
            mount: "/data".into(),
            needed_bytes: 3 << 20,
            free_bytes: Some(0),
            quota: false,
        };
        let mut watch = Watch::new(["A_IN_0".into()]);
        assert_eq!(
            watch.take(&event("A_IN_0", role(RoleState::Ready))),
            News::Ready
        );
        assert_eq!(watch.take(&event("A_IN_0", no_space())), News::Nothing);
        assert!(!watch.is_ready() && !watch.serves("A_IN_0") && watch.lacks_space());
        let waiting = watch.waiting();
        let wanted = "A_IN_0: guest paused: no space for disk os (/data/diff.qcow2); \
                      free at least 3 MiB on /data (0 B free): it goes on by itself";
        assert_eq!(waiting, [wanted]);
        let back = EventKind::SpaceBack { paused_ms: 10 };
        assert_eq!(watch.take(&event("A_IN_0", back)), News::Ready);
        watch.take(&event("A_IN_0", no_space()));
        let ended = EventKind::GuestExited {
            reason: ExitReason::Stopped,
            because: None,
        };
        watch.take(&event("A_IN_0", ended));
        assert!(!watch.lacks_space());
    }

    #[test]
    fn a_guest_that_ends_on_request_is_no_trouble_and_force_is_remembered() {
        let mut watch = watch();
        watch.stopping();
        let ended = EventKind::GuestExited {
            reason: ExitReason::PowerOff,
            because: None,
        };
        assert_eq!(watch.take(&event("A_IN_0", ended)), News::Nothing);
        watch.take(&event("A_IN_0", EventKind::Stopped { clean: true }));
        assert_eq!(watch.waiting(), ["A_IN_1 is stopping"]);
        watch.take(&event("A_IN_1", EventKind::Stopped { clean: false }));
        assert_eq!(watch.unclean(), ["A_IN_1"]);
        assert!(watch.waiting().is_empty());
    }
}
