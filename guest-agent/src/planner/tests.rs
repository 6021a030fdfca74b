//! The planner with a clock of its own.

use super::*;
use vmbus::role::{EntryPoint, RoleDefinition};

fn goal(incarnation: u64, expected: ExpectedState) -> Goal {
    Goal {
        incarnation,
        expected,
        deployment_id: String::new(),
        instance: String::new(),
        update_domain: 0,
        fault_domain: 0,
        role: RoleDefinition {
            name: String::new(),
            entry_point: EntryPoint::Program {
                command: Vec::new(),
                ready_on_start: true,
            },
            elevated: false,
            settings: std::collections::BTreeMap::new(),
            environment: Vec::new(),
            local_storage: Vec::new(),
            endpoints: Vec::new(),
        },
        application_disk: String::new(),
        resource_disk: String::new(),
        stop_timeout_ms: 0,
    }
}

fn started(incarnation: u64) -> Goal {
    goal(incarnation, ExpectedState::Started)
}

fn stopped(incarnation: u64) -> Goal {
    goal(incarnation, ExpectedState::Stopped)
}

fn passing() -> Result<(), Failure> {
    Err(Failure::passing("EAGAIN".into()))
}

/// A planner and the time.
struct Guest {
    planner: Planner,
    now: Instant,
    role: Role,
}

impl Guest {
    fn new() -> Self {
        Self {
            planner: Planner::new(),
            now: Instant::now(),
            role: Role {
                state: RoleState::Ready,
                ..Role::unknown()
            },
        }
    }

    /// A guest in which the role of goal 1 runs.
    fn running() -> Self {
        let mut guest = Self::new();
        guest.planner.goal(started(1));
        guest.perform(&[Effect::SetUp, Effect::Serve, Effect::Start]);
        guest.idle();
        guest
    }

    /// The next effect is `effect`, and has this result.
    fn step(&mut self, effect: Effect, result: Result<(), Failure>) {
        let Next::Do(next, _) = self.planner.next(self.now) else {
            panic!("not {effect:?}: {:?}", self.planner);
        };
        assert_eq!(next, effect);
        self.planner.finished(result, self.now);
    }

    fn perform(&mut self, effects: &[Effect]) {
        for effect in effects {
            self.step(*effect, Ok(()));
        }
    }

    /// Nothing is to be done, whatever the time.
    fn idle(&mut self) {
        assert_eq!(self.planner.next(self.now), Next::Wait(None));
    }

    /// Seconds until the next attempt; then they are over.
    fn wait(&mut self) -> u64 {
        let Next::Wait(Some(at)) = self.planner.next(self.now) else {
            panic!("no attempt is due: {:?}", self.planner);
        };
        let seconds = (at - self.now).as_secs();
        self.now = at;
        seconds
    }

    /// Incarnation, applied incarnation and state of the status.
    fn status(&self) -> (u64, u64, RoleState) {
        let status = self.planner.status(&self.role);
        (status.incarnation, status.applied, status.state)
    }
}

#[test]
fn a_goal_is_applied_when_its_last_step_succeeded() {
    let mut guest = Guest::new();
    guest.idle();
    assert_eq!(guest.status(), (0, 0, RoleState::Ready));
    assert!(guest.planner.goal(started(1)));
    for effect in [Effect::SetUp, Effect::Serve, Effect::Start] {
        assert_eq!(guest.status(), (1, 0, RoleState::Creating));
        guest.step(effect, Ok(()));
    }
    assert_eq!(guest.status(), (1, 1, RoleState::Ready));
    guest.idle();
}

#[test]
fn one_effect_is_performed_at_a_time() {
    let mut guest = Guest::new();
    guest.planner.goal(started(1));
    assert!(matches!(
        guest.planner.next(guest.now),
        Next::Do(Effect::SetUp, _)
    ));
    guest.idle();
    guest.planner.finished(Ok(()), guest.now);
    guest.perform(&[Effect::Serve]);
}

#[test]
fn only_a_newer_goal_changes_anything() {
    let mut guest = Guest::running();
    for old in [started(1), stopped(1), stopped(0)] {
        assert!(!guest.planner.goal(old));
        guest.idle();
    }
    assert!(guest.planner.goal(started(2)));
    // Until the old role is stopped the state is that of the old goal.
    assert_eq!(guest.status(), (1, 1, RoleState::Ready));
    guest.perform(&[Effect::Stop]);
    assert_eq!(guest.status(), (2, 1, RoleState::Creating));
    guest.perform(&[Effect::SetUp, Effect::Serve, Effect::Start]);
    assert_eq!(guest.status(), (2, 2, RoleState::Ready));
}

#[test]
fn a_goal_without_a_role_is_applied_when_nothing_runs() {
    let mut guest = Guest::running();
    guest.planner.goal(stopped(2));
    assert_eq!(guest.status(), (1, 1, RoleState::Ready));
    guest.perform(&[Effect::Stop]);
    assert_eq!(guest.status(), (2, 2, RoleState::Stopped));
    guest.idle();
    let mut fresh = Guest::new();
    fresh.planner.goal(stopped(1));
    assert_eq!(fresh.status(), (1, 1, RoleState::Stopped));
    fresh.idle();
}

#[test]
fn a_failed_step_is_tried_again_with_back_off() {
    let mut guest = Guest::new();
    guest.planner.goal(started(1));
    for expected in [1, 2, 4, 8, 16, 32, 60, 60] {
        guest.step(Effect::SetUp, passing());
        assert_eq!(guest.status(), (1, 0, RoleState::Creating));
        let status = guest.planner.status(&guest.role);
        assert_eq!(status.retry_in_ms, Some(expected * 1000));
        assert_eq!(
            status.detail,
            format!("EAGAIN; next attempt in {expected} s")
        );
        assert_eq!(guest.wait(), expected);
    }
    guest.step(Effect::SetUp, Ok(()));
    assert_eq!(guest.planner.failure(), None);
    // The set-up stands: it is the start that is tried again.
    guest.perform(&[Effect::Serve]);
    guest.step(Effect::Start, passing());
    assert_eq!(guest.wait(), 60);
    guest.perform(&[Effect::Start]);
    assert_eq!(guest.status(), (1, 1, RoleState::Ready));
}

#[test]
fn a_permanent_failure_ends_the_attempts_until_the_next_goal() {
    let mut guest = Guest::new();
    guest.planner.goal(started(1));
    let failure = Failure::permanent("bad format".into());
    guest.step(Effect::SetUp, Err(failure));
    assert_eq!(guest.status(), (1, 0, RoleState::Failed));
    assert_eq!(guest.planner.status(&guest.role).detail, "bad format");
    guest.now += Duration::from_secs(1000);
    guest.idle();
    guest.planner.goal(started(2));
    assert_eq!(guest.status(), (2, 0, RoleState::Creating));
    guest.perform(&[Effect::SetUp, Effect::Serve, Effect::Start]);
    assert_eq!(guest.status(), (2, 2, RoleState::Ready));
}

#[test]
fn a_goal_that_comes_during_an_effect_discards_its_result() {
    for result in [Ok(()), passing()] {
        let mut guest = Guest::new();
        guest.planner.goal(started(1));
        assert!(matches!(
            guest.planner.next(guest.now),
            Next::Do(Effect::SetUp, _)
        ));
        guest.planner.goal(started(2));
        guest.planner.finished(result, guest.now);
        assert_eq!(guest.planner.failure(), None);
        assert_eq!(guest.status(), (2, 0, RoleState::Creating));
        guest.perform(&[Effect::SetUp, Effect::Serve, Effect::Start]);
        assert_eq!(guest.status(), (2, 2, RoleState::Ready));
    }
}

#[test]
fn a_role_that_started_although_another_goal_came_is_stopped() {
    let mut guest = Guest::new();
    guest.planner.goal(started(1));
    guest.perform(&[Effect::SetUp, Effect::Serve]);
    assert!(matches!(
        guest.planner.next(guest.now),
        Next::Do(Effect::Start, _)
    ));
    guest.planner.goal(stopped(2));
    guest.planner.finished(Ok(()), guest.now);
    assert_eq!(guest.status(), (1, 0, RoleState::Ready));
    guest.perform(&[Effect::Stop]);
    assert_eq!(guest.status(), (2, 2, RoleState::Stopped));
}

#[test]
fn a_bootstrapper_that_ends_is_started_again_with_back_off() {
    let mut guest = Guest::running();
    for expected in [1, 2, 4] {
        guest.planner.bootstrapper_ended(guest.now);
        assert_eq!(guest.status(), (1, 1, RoleState::Recycling));
        assert_eq!(guest.wait(), expected);
        guest.perform(&[Effect::Start]);
        assert_eq!(guest.status(), (1, 1, RoleState::Ready));
    }
    // One that ran for long enough is not counted with those before.
    guest.now += LONGEST_DELAY;
    guest.planner.bootstrapper_ended(guest.now);
    assert_eq!(guest.wait(), 1);
    // The end of the bootstrapper of an old goal delays nothing.
    guest.perform(&[Effect::Start]);
    guest.planner.goal(stopped(2));
    guest.planner.bootstrapper_ended(guest.now);
    assert_eq!(guest.status(), (2, 2, RoleState::Stopped));
    guest.idle();
}

#[test]
fn an_adopted_role_is_served_and_not_started_again() {
    let mut guest = Guest::new();
    guest.planner.adopted(Box::new(started(7)), guest.now);
    assert_eq!(guest.status(), (7, 7, RoleState::Ready));
    assert!(!guest.planner.goal(started(7)));
    guest.step(Effect::Serve, passing());
    // Its clients cannot reach it.
    assert_eq!(guest.status(), (7, 7, RoleState::Recycling));
    assert_eq!(guest.wait(), 1);
    guest.perform(&[Effect::Serve]);
    assert_eq!(guest.status(), (7, 7, RoleState::Ready));
    guest.idle();
}

#[test]
fn a_role_that_does_not_end_is_stopped_again() {
    let mut guest = Guest::running();
    guest.planner.goal(stopped(2));
    guest.step(Effect::Stop, passing());
    assert_eq!(guest.status(), (2, 1, RoleState::Stopping));
    assert_eq!(guest.wait(), 1);
    guest.perform(&[Effect::Stop]);
    assert_eq!(guest.status(), (2, 2, RoleState::Stopped));
}
