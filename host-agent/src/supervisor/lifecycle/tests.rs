//! Walks through an instance's life, and a property over every walk.

use super::*;
use proptest::prelude::*;

const LIMITS: Limits = Limits {
    role_stop: Duration::from_secs(30),
    power_off: Duration::from_secs(10),
    begin: Duration::from_secs(3),
    condemned: Duration::from_secs(30),
    vmm_stop: Duration::from_secs(2),
    death: Duration::from_secs(10),
};

const KILLED: [Effect; 2] = [Effect::KillVmm, Effect::Wait(Wait::Death, LIMITS.death)];

fn status(state: RoleState) -> Status {
    Status {
        incarnation: 1,
        state,
        detail: String::new(),
        recycles: 0,
        last_exit: None,
        retry_in_ms: None,
        killed: false,
    }
}

fn ready() -> Lifecycle {
    let mut life = Lifecycle::new(LIMITS);
    assert_eq!(
        life.on(Input::Start, Duration::ZERO, 0.5),
        [Effect::Spawn { generation: 1 }]
    );
    life.on(Input::Spawned { pid: 7 }, Duration::ZERO, 0.5);
    life.on(Input::Connected, Duration::ZERO, 0.5);
    life.on(Input::Beat, Duration::ZERO, 0.5);
    let effects = life.on(Input::Status(status(RoleState::Ready)), Duration::ZERO, 0.5);
    assert!(effects.contains(&Effect::Rotation(true)));
    life
}

fn silent(kernel_alive: bool) -> Input {
    Input::Condemned {
        verdict: Verdict::Silent {
            silence_ms: 600_000,
        },
        evidence: "vCPUs stopped".into(),
        kernel_alive,
    }
}

#[test]
fn a_silent_guest_leaves_rotation_is_killed_and_boots_as_the_next_generation() {
    let mut life = ready();
    let minute = Duration::from_mins(1);
    let effects = life.on(silent(false), minute, 0.5);
    assert_eq!(effects[0], Effect::Rotation(false));
    assert!(effects.contains(&Effect::KillVmm));
    let effects = life.on(Input::Ended(ExitReason::Killed), minute, 0.5);
    let Effect::Tell(told) = &effects[0] else {
        panic!("{effects:?}");
    };
    assert_eq!(
        told.to_string(),
        "guest ended: killed by host-agent, no heartbeat for 600.0 s"
    );
    assert_eq!(
        serde_json::to_value(told).unwrap(),
        serde_json::json!({
            "event": "guest-exited",
            "reason": "killed",
            "because": "no heartbeat for 600.0 s",
        })
    );
    assert!(effects.iter().any(|effect| matches!(effect,
        Effect::Tell(EventKind::Restarting { because, generation: 2, delay_ms: 0 })
            if because.contains("no heartbeat for 600"))));
    assert_eq!(
        life.on(Input::Waited(Wait::Restart), minute, 0.5),
        [Effect::Spawn { generation: 2 }]
    );
}

#[test]
fn silence_before_a_verdict_does_not_count_as_health() {
    let delay_after = |health: Duration| {
        let mut life = ready();
        life.on(Input::Ended(ExitReason::Panic), Duration::ZERO, 0.5);
        life.on(Input::Waited(Wait::Restart), Duration::ZERO, 0.5);
        life.on(Input::Beat, Duration::ZERO, 0.5);
        life.on(Input::Beat, health, 0.5);
        let condemned = health + Duration::from_mins(10);
        life.on(silent(false), condemned, 0.5);
        let effects = life.on(Input::Ended(ExitReason::Killed), condemned, 0.5);
        effects.iter().find_map(|effect| match effect {
            Effect::Wait(Wait::Restart, delay) => Some(*delay),
            _ => None,
        })
    };
    // Half an hour of health forgives the restart before.
    let second = Duration::from_secs(10);
    assert_eq!(delay_after(Duration::from_mins(25)), Some(second));
    assert_eq!(delay_after(Duration::from_mins(30)), Some(Duration::ZERO));
}

#[test]
fn an_end_that_was_not_our_doing_is_told_without_our_reason() {
    let reasons = [
        ExitReason::PowerOff,
        ExitReason::Panic,
        ExitReason::Failed {
            detail: "its cgroup's memory limit".into(),
        },
    ];
    for reason in reasons {
        let mut life = ready();
        life.on(silent(true), Duration::ZERO, 0.5);
        let effects = life.on(Input::Ended(reason.clone()), Duration::ZERO, 0.5);
        let because = None;
        let told = Effect::Tell(EventKind::GuestExited { reason, because });
        assert_eq!(effects[0], told);
    }
    // And a stop on request needs none.
    let mut life = ready();
    life.on(Input::Kill, Duration::ZERO, 0.5);
    let effects = life.on(Input::Ended(ExitReason::Killed), Duration::ZERO, 0.5);
    assert!(matches!(&effects[0],
        Effect::Tell(told) if told.to_string() == "guest ended: killed by host-agent"));
}

#[test]
fn a_condemned_guest_whose_kernel_answers_may_shut_down_if_it_begins_to_at_once() {
    for begins in [false, true] {
        let mut life = ready();
        let mut on = |input| life.on(input, Duration::ZERO, 0.5);
        let effects = on(silent(true));
        assert!(effects.contains(&Effect::Wait(Wait::Shutdown, LIMITS.begin)));
        assert!(!effects.contains(&Effect::KillVmm));
        if begins {
            let longer = [Effect::Wait(Wait::Shutdown, LIMITS.condemned)];
            assert_eq!(on(Input::ShutdownBegun), longer);
            assert_eq!(on(Input::ShutdownBegun), []);
        }
        assert_eq!(on(Input::Waited(Wait::Shutdown))[0], Effect::StopVmm);
        // Too late.
        assert_eq!(on(Input::ShutdownBegun), []);
        assert_eq!(on(Input::Waited(Wait::VmmStop)), KILLED);
    }
}

#[test]
fn a_killed_process_that_does_not_end_is_told_of_again_and_again() {
    let mut life = ready();
    assert!(life.on(Input::Kill, Duration::ZERO, 0.5).ends_with(&KILLED));
    for _ in 0..3 {
        let effects = life.on(Input::Waited(Wait::Death), Duration::ZERO, 0.5);
        assert!(matches!(&effects[0],
            Effect::Tell(EventKind::Warning { text }) if text.contains("does not end")));
        assert_eq!(effects[1], Effect::KillVmm);
        assert!(matches!(effects[2], Effect::Wait(Wait::Death, _)));
    }
}

#[test]
fn a_guest_stopped_before_anything_of_ours_ran_in_it_ended_cleanly() {
    for connected in [false, true] {
        let mut life = Lifecycle::new(LIMITS);
        life.on(Input::Start, Duration::ZERO, 0.5);
        if connected {
            life.on(Input::Connected, Duration::ZERO, 0.5);
        }
        life.on(Input::Stop, Duration::ZERO, 0.5);
        let effects = life.on(Input::Ended(ExitReason::Stopped), Duration::ZERO, 0.5);
        let clean = !connected;
        assert!(effects.contains(&Effect::Tell(EventKind::Stopped { clean })));
    }
}

#[test]
fn a_stop_while_a_restart_is_waited_for_is_the_end_at_once() {
    let mut life = ready();
    life.on(Input::Ended(ExitReason::Panic), Duration::ZERO, 0.5);
    let effects = life.on(Input::Stop, Duration::ZERO, 0.5);
    assert_eq!(effects.last(), Some(&Effect::Finish));
    assert!(
        life.on(Input::Waited(Wait::Restart), Duration::ZERO, 0.5)
            .is_empty()
    );
}

#[test]
fn a_status_that_changes_all_the_time_is_told_now_and_then_and_last_as_it_is() {
    let mut life = ready();
    let told = |effects: &[Effect]| {
        let roles = effects.iter().filter_map(|effect| match effect {
            Effect::Tell(EventKind::Role { state, .. }) => Some(*state),
            _ => None,
        });
        roles.collect::<Vec<_>>()
    };
    let mut lines = 0;
    for change in 0..1000u64 {
        let now = Duration::from_millis(10 * change);
        let state = [RoleState::Busy, RoleState::Ready][change as usize % 2];
        let effects = life.on(Input::Status(status(state)), now, 0.5);
        lines += told(&effects).len();
        // Who gets connections follows every change.
        let rotation = Effect::Rotation(state == RoleState::Ready);
        assert!(effects.contains(&rotation));
    }
    assert!((20..=45).contains(&lines), "{lines}");
    let last = Input::Status(status(RoleState::Busy));
    let mut effects = life.on(last, Duration::from_secs(10), 0.5);
    effects.extend(life.on(Input::Beat, Duration::from_secs(11), 0.5));
    assert_eq!(told(&effects), [RoleState::Busy]);
    let effects = life.on(Input::Beat, Duration::from_secs(12), 0.5);
    assert!(told(&effects).is_empty());
}

#[test]
fn a_guest_without_space_is_out_of_rotation_until_it_goes_on_if_it_is_ready_then() {
    for after in [RoleState::Ready, RoleState::Recycling] {
        let mut life = ready();
        let mut on = |input| life.on(input, Duration::ZERO, 0.5);
        assert_eq!(on(Input::NoSpace), [Effect::Rotation(false)]);
        // A second disk, and what the guest said before it stood still.
        assert_eq!(on(Input::NoSpace), []);
        let effects = on(Input::Status(status(after)));
        assert!(!effects.contains(&Effect::Rotation(true)));
        let back = [Effect::Rotation(true)];
        let back: &[Effect] = if after == RoleState::Ready {
            &back
        } else {
            &[]
        };
        assert_eq!(on(Input::SpaceBack), back);
    }
    // The next boot begins without.
    let mut life = ready();
    life.on(Input::NoSpace, Duration::ZERO, 0.5);
    life.on(Input::Ended(ExitReason::Panic), Duration::ZERO, 0.5);
    life.on(Input::Waited(Wait::Restart), Duration::ZERO, 0.5);
    let effects = life.on(Input::Status(status(RoleState::Ready)), Duration::ZERO, 0.5);
    assert!(effects.contains(&Effect::Rotation(true)));
}

#[test]
fn a_stop_asks_the_guest_and_a_power_off_then_is_a_clean_end() {
    let mut life = ready();
    let effects = life.on(Input::Stop, Duration::ZERO, 0.5);
    assert!(matches!(effects[2], Effect::AskShutdown { .. }));
    assert!(life.on(Input::Stop, Duration::ZERO, 0.5).is_empty());
    let effects = life.on(Input::Ended(ExitReason::PowerOff), Duration::ZERO, 0.5);
    assert!(effects.contains(&Effect::Tell(EventKind::Stopped { clean: true })));
    assert_eq!(effects.last(), Some(&Effect::Finish));
}

#[test]
fn a_stop_for_which_the_role_had_to_be_killed_is_not_clean() {
    let mut life = ready();
    life.on(Input::Stop, Duration::ZERO, 0.5);
    let killed = Status {
        killed: true,
        ..status(RoleState::Stopped)
    };
    life.on(Input::Status(killed), Duration::ZERO, 0.5);
    let effects = life.on(Input::Ended(ExitReason::PowerOff), Duration::ZERO, 0.5);
    assert!(effects.contains(&Effect::Tell(EventKind::Stopped { clean: false })));
}

#[test]
fn that_nothing_is_known_of_a_role_yet_is_not_told() {
    let mut life = ready();
    let unknown = life.on(
        Input::Status(status(RoleState::Unknown)),
        Duration::ZERO,
        0.5,
    );
    assert_eq!(unknown, [Effect::Rotation(false)]);
    let creating = life.on(
        Input::Status(status(RoleState::Creating)),
        Duration::ZERO,
        0.5,
    );
    assert!(matches!(
        &creating[..],
        [Effect::Tell(EventKind::Role {
            state: RoleState::Creating,
            ..
        })]
    ));
}

#[test]
fn a_power_off_that_nobody_asked_for_restarts_the_guest_and_says_so() {
    let mut life = ready();
    let effects = life.on(Input::Ended(ExitReason::PowerOff), Duration::ZERO, 0.5);
    assert!(effects.iter().any(|effect| matches!(effect,
        Effect::Tell(EventKind::Restarting { because, .. }) if because == "power-off")));
}

#[test]
fn a_guest_that_never_beats_is_faulted_after_five_boots() {
    let mut life = Lifecycle::new(LIMITS);
    life.on(Input::Start, Duration::ZERO, 0.5);
    for boot in 1..=5 {
        let effects = life.on(Input::Ended(ExitReason::Panic), Duration::ZERO, 0.5);
        let faulted = effects
            .iter()
            .any(|effect| matches!(effect, Effect::Tell(EventKind::Faulted { .. })));
        assert_eq!(faulted, boot == 5);
        life.on(Input::Waited(Wait::Restart), Duration::ZERO, 0.5);
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    prop_oneof![
        Just(Input::Spawned { pid: 1 }),
        Just(Input::SpawnFailed("no".into())),
        Just(Input::Connected),
        Just(Input::Beat),
        Just(Input::NoSpace),
        Just(Input::SpaceBack),
        Just(Input::ShutdownBegun),
        Just(Input::Status(status(RoleState::Ready))),
        Just(Input::Status(status(RoleState::Recycling))),
        any::<bool>().prop_map(silent),
        Just(Input::Ended(ExitReason::Reboot)),
        Just(Input::Ended(ExitReason::PowerOff)),
        Just(Input::Ended(ExitReason::Killed)),
        Just(Input::Waited(Wait::Restart)),
        Just(Input::Waited(Wait::Shutdown)),
        Just(Input::Waited(Wait::VmmStop)),
        Just(Input::Waited(Wait::Death)),
        Just(Input::Stop),
        Just(Input::Kill),
    ]
}

proptest! {
    /// Whatever comes in whatever order: one VMM process at a time, the
    /// rotation flag alternates, after the end nothing more is done, and what
    /// shall end is always waited for with a limit.
    #[test]
    fn no_order_of_inputs_starts_two_guests_or_revives_a_finished_one(
        inputs in proptest::collection::vec(any_input(), 0..80)
    ) {
        let mut life = Lifecycle::new(LIMITS);
        let mut running = false;
        let mut rotation = false;
        let mut finished = false;
        let mut stopping = false;
        let mut wait = None;
        let mut feed = vec![Input::Start];
        feed.extend(inputs);
        for input in feed {
            // Only a process that runs can end or fail to start.
            if matches!(input, Input::Ended(_) | Input::SpawnFailed(_)) {
                if !running { continue; }
                running = false;
                wait = None;
            }
            // Only what is waited for can be over.
            if let Input::Waited(over) = input {
                if wait != Some(over) { continue; }
                wait = None;
            }
            stopping |= matches!(input, Input::Stop | Input::Kill);
            for effect in life.on(input, Duration::ZERO, 0.5) {
                prop_assert!(!finished);
                match effect {
                    Effect::Spawn { generation } => {
                        prop_assert!(!running);
                        prop_assert_eq!(generation, life.generation());
                        running = true;
                        wait = None;
                    }
                    Effect::Wait(wanted, _) => wait = Some(wanted),
                    Effect::Rotation(ready) => {
                        prop_assert_ne!(ready, rotation);
                        rotation = ready;
                    }
                    Effect::Finish => {
                        prop_assert!(!running && !rotation);
                        finished = true;
                    }
                    _ => {}
                }
            }
            if stopping {
                prop_assert!(finished || wait.is_some());
            }
            if !running {
                prop_assert!(finished || wait == Some(Wait::Restart));
            }
        }
    }
}
