//! Sequences of inputs, and a property over random ones.

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
        applied: 1,
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
fn silent_guest_is_killed_and_boots_as_next_generation() {
    let mut life = ready();
    let minute = Duration::from_mins(1);
    let effects = life.on(silent(false), minute, 0.5);
    assert_eq!(effects[0], Effect::Rotation(false));
    assert!(effects.contains(&Effect::KillVmm));
    let effects = life.on(Input::Ended(ExitReason::Killed), minute, 0.5);
    let Effect::Report(reported) = &effects[0] else {
        panic!("{effects:?}");
    };
    assert_eq!(
        reported.to_string(),
        "guest ended: killed by host-agent, no heartbeat for 600.0 s"
    );
    assert_eq!(
        serde_json::to_value(reported).unwrap(),
        serde_json::json!({
            "event": "guest-exited",
            "reason": "killed",
            "because": "no heartbeat for 600.0 s",
        })
    );
    assert!(effects.iter().any(|effect| matches!(effect,
        Effect::Report(EventKind::Restarting { because, generation: 2, delay_ms: 0 })
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
fn an_exit_by_the_guest_is_reported_without_a_verdict() {
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
        let exited = Effect::Report(EventKind::GuestExited { reason, because });
        assert_eq!(effects[0], exited);
    }
    // A stop on request has no verdict either.
    let mut life = ready();
    life.on(Input::Kill, Duration::ZERO, 0.5);
    let effects = life.on(Input::Ended(ExitReason::Killed), Duration::ZERO, 0.5);
    assert!(matches!(&effects[0],
        Effect::Report(kind) if kind.to_string() == "guest ended: killed by host-agent"));
}

#[test]
fn condemned_guest_must_begin_its_shutdown_at_once() {
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
fn a_killed_process_that_does_not_end_is_reported_repeatedly() {
    let mut life = ready();
    assert!(life.on(Input::Kill, Duration::ZERO, 0.5).ends_with(&KILLED));
    for _ in 0..3 {
        let effects = life.on(Input::Waited(Wait::Death), Duration::ZERO, 0.5);
        assert!(matches!(&effects[0],
            Effect::Report(EventKind::Warning { text }) if text.contains("does not end")));
        assert_eq!(effects[1], Effect::KillVmm);
        assert!(matches!(effects[2], Effect::Wait(Wait::Death, _)));
    }
}

#[test]
fn a_stop_before_the_agent_connects_is_clean() {
    for connected in [false, true] {
        let mut life = Lifecycle::new(LIMITS);
        life.on(Input::Start, Duration::ZERO, 0.5);
        if connected {
            life.on(Input::Connected, Duration::ZERO, 0.5);
        }
        life.on(Input::Stop, Duration::ZERO, 0.5);
        let effects = life.on(Input::Ended(ExitReason::Stopped), Duration::ZERO, 0.5);
        let clean = !connected;
        assert!(effects.contains(&Effect::Report(EventKind::Stopped { clean })));
    }
}

#[test]
fn a_stop_while_waiting_for_a_restart_finishes_at_once() {
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
fn status_reports_are_rate_limited_and_the_last_is_reported() {
    let mut life = ready();
    let reported = |effects: &[Effect]| {
        let roles = effects.iter().filter_map(|effect| match effect {
            Effect::Report(EventKind::Role { state, .. }) => Some(*state),
            _ => None,
        });
        roles.collect::<Vec<_>>()
    };
    let mut lines = 0;
    for change in 0..1000u64 {
        let now = Duration::from_millis(10 * change);
        let state = [RoleState::Busy, RoleState::Ready][change as usize % 2];
        let effects = life.on(Input::Status(status(state)), now, 0.5);
        lines += reported(&effects).len();
        // The rotation follows every change.
        let rotation = Effect::Rotation(state == RoleState::Ready);
        assert!(effects.contains(&rotation));
    }
    assert!((20..=45).contains(&lines), "{lines}");
    let last = Input::Status(status(RoleState::Busy));
    let mut effects = life.on(last, Duration::from_secs(10), 0.5);
    effects.extend(life.on(Input::Beat, Duration::from_secs(11), 0.5));
    assert_eq!(reported(&effects), [RoleState::Busy]);
    let effects = life.on(Input::Beat, Duration::from_secs(12), 0.5);
    assert!(reported(&effects).is_empty());
}

#[test]
fn a_guest_paused_for_space_is_out_of_rotation() {
    for after in [RoleState::Ready, RoleState::Recycling] {
        let mut life = ready();
        let mut on = |input| life.on(input, Duration::ZERO, 0.5);
        assert_eq!(on(Input::NoSpace), [Effect::Rotation(false)]);
        // A second disk, and a status from before the pause.
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
    // The next boot starts with space.
    let mut life = ready();
    life.on(Input::NoSpace, Duration::ZERO, 0.5);
    life.on(Input::Ended(ExitReason::Panic), Duration::ZERO, 0.5);
    life.on(Input::Waited(Wait::Restart), Duration::ZERO, 0.5);
    let effects = life.on(Input::Status(status(RoleState::Ready)), Duration::ZERO, 0.5);
    assert!(effects.contains(&Effect::Rotation(true)));
}

#[test]
fn a_stop_before_the_vmm_process_starts_is_clean() {
    for stop in [Input::Stop, Input::Kill] {
        let mut life = Lifecycle::new(LIMITS);
        life.on(Input::Start, Duration::ZERO, 0.5);
        let effects = life.on(stop, Duration::ZERO, 0.5);
        let ends = |effect: &Effect| matches!(effect, Effect::StopVmm | Effect::KillVmm);
        assert!(effects.iter().any(ends));
        let effects = life.on(Input::SpawnCancelled, Duration::ZERO, 0.5);
        let stopped = Effect::Report(EventKind::Stopped { clean: true });
        assert_eq!(effects, [stopped, Effect::Finish]);
    }
}

#[test]
fn a_power_off_after_a_stop_is_a_clean_end() {
    let mut life = ready();
    let effects = life.on(Input::Stop, Duration::ZERO, 0.5);
    assert!(matches!(effects[2], Effect::AskShutdown { .. }));
    assert!(life.on(Input::Stop, Duration::ZERO, 0.5).is_empty());
    let effects = life.on(Input::Ended(ExitReason::PowerOff), Duration::ZERO, 0.5);
    assert!(effects.contains(&Effect::Report(EventKind::Stopped { clean: true })));
    assert_eq!(effects.last(), Some(&Effect::Finish));
}

#[test]
fn a_stop_that_kills_the_role_is_not_clean() {
    let mut life = ready();
    life.on(Input::Stop, Duration::ZERO, 0.5);
    let killed = Status {
        killed: true,
        ..status(RoleState::Stopped)
    };
    life.on(Input::Status(killed), Duration::ZERO, 0.5);
    let effects = life.on(Input::Ended(ExitReason::PowerOff), Duration::ZERO, 0.5);
    assert!(effects.contains(&Effect::Report(EventKind::Stopped { clean: false })));
}

#[test]
fn an_unknown_status_is_not_reported() {
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
        [Effect::Report(EventKind::Role {
            state: RoleState::Creating,
            ..
        })]
    ));
}

#[test]
fn an_unrequested_power_off_restarts_the_guest() {
    let mut life = ready();
    let effects = life.on(Input::Ended(ExitReason::PowerOff), Duration::ZERO, 0.5);
    assert!(effects.iter().any(|effect| matches!(effect,
        Effect::Report(EventKind::Restarting { because, .. }) if because == "power-off")));
}

#[test]
fn five_boots_without_a_heartbeat_fault_the_instance() {
    let mut life = Lifecycle::new(LIMITS);
    life.on(Input::Start, Duration::ZERO, 0.5);
    for boot in 1..=5 {
        let effects = life.on(Input::Ended(ExitReason::Panic), Duration::ZERO, 0.5);
        let faulted = effects
            .iter()
            .any(|effect| matches!(effect, Effect::Report(EventKind::Faulted { .. })));
        assert_eq!(faulted, boot == 5);
        life.on(Input::Waited(Wait::Restart), Duration::ZERO, 0.5);
    }
}

fn adoption(generation: u64) -> Input {
    Input::Adopted {
        generation,
        pid: 7,
        no_space: false,
    }
}

/// The lifecycle of the next supervisor.
fn restored(life: &Lifecycle) -> Lifecycle {
    let text = serde_json::to_string(&life.history()).unwrap();
    Lifecycle::restore(LIMITS, serde_json::from_str(&text).unwrap())
}

#[test]
fn an_adopted_guest_enters_rotation_with_its_first_status() {
    let mut life = restored(&ready());
    assert_eq!(life.history(), ready().history());
    let mut on = |input| life.on(input, Duration::ZERO, 0.5);
    let adopted = EventKind::GuestAdopted {
        generation: 1,
        pid: 7,
    };
    assert_eq!(on(adoption(1)), [Effect::Report(adopted)]);
    assert_eq!(on(Input::Beat), []);
    let effects = on(Input::Status(status(RoleState::Ready)));
    assert!(effects.contains(&Effect::Rotation(true)));
    // It is the boot from before: the next is generation 2.
    on(Input::Ended(ExitReason::Panic));
    assert_eq!(
        on(Input::Waited(Wait::Restart)),
        [Effect::Spawn { generation: 2 }]
    );
}

#[test]
fn a_guest_adopted_without_space_waits_for_it() {
    let mut life = restored(&ready());
    let mut on = |input| life.on(input, Duration::ZERO, 0.5);
    on(Input::Adopted {
        generation: 1,
        pid: 7,
        no_space: true,
    });
    let effects = on(Input::Status(status(RoleState::Ready)));
    assert!(!effects.contains(&Effect::Rotation(true)));
    assert_eq!(on(Input::SpaceBack), [Effect::Rotation(true)]);
}

#[test]
fn stopping_an_adopted_guest_asks_its_agent() {
    let mut life = restored(&ready());
    life.on(adoption(1), Duration::ZERO, 0.5);
    let effects = life.on(Input::Stop, Duration::ZERO, 0.5);
    assert!(matches!(effects[1], Effect::AskShutdown { .. }));
    // Nothing is known of the agent of another boot than the recorded one.
    let mut life = restored(&ready());
    life.on(adoption(2), Duration::ZERO, 0.5);
    let effects = life.on(Input::Stop, Duration::ZERO, 0.5);
    assert!(effects.contains(&Effect::StopVmm));
}

#[test]
fn health_counts_from_the_first_beat_across_supervisors() {
    let minutes = Duration::from_mins;
    let delay_after = |health: Duration| {
        let mut life = ready();
        life.on(Input::Ended(ExitReason::Panic), Duration::ZERO, 0.5);
        life.on(Input::Waited(Wait::Restart), Duration::ZERO, 0.5);
        life.on(Input::Beat, Duration::ZERO, 0.5);
        let mut life = restored(&life);
        life.on(adoption(2), minutes(20), 0.5);
        life.on(Input::Beat, health, 0.5);
        let effects = life.on(Input::Ended(ExitReason::Panic), health, 0.5);
        effects.iter().find_map(|effect| match effect {
            Effect::Wait(Wait::Restart, delay) => Some(*delay),
            _ => None,
        })
    };
    assert_eq!(delay_after(minutes(25)), Some(Duration::from_secs(10)));
    assert_eq!(delay_after(minutes(30)), Some(Duration::ZERO));
}

#[test]
fn a_guest_that_ended_unattended_costs_a_restart() {
    let mut life = ready();
    life.on(Input::Ended(ExitReason::Panic), Duration::ZERO, 0.5);
    life.on(Input::Waited(Wait::Restart), Duration::ZERO, 0.5);
    let mut life = restored(&life);
    assert!(life.history().running);
    let effects = life.on(Input::Ended(ExitReason::TripleFault), Duration::ZERO, 0.5);
    assert!(matches!(
        &effects[..],
        [
            Effect::Report(EventKind::GuestExited { reason: ExitReason::TripleFault, .. }),
            Effect::Report(EventKind::Restarting { generation: 3, .. }),
            Effect::Wait(Wait::Restart, delay),
        ] if *delay == Duration::from_secs(10)
    ));
}

#[test]
fn a_restart_delay_goes_on_across_supervisors() {
    let mut life = Lifecycle::new(LIMITS);
    life.on(Input::Start, Duration::ZERO, 0.5);
    for _ in 0..5 {
        life.on(Input::Ended(ExitReason::Panic), Duration::ZERO, 0.5);
        life.on(Input::Waited(Wait::Restart), Duration::ZERO, 0.5);
    }
    life.on(Input::Ended(ExitReason::Panic), Duration::ZERO, 0.5);
    let history = life.history();
    assert!(history.budget.is_faulted() && !history.running);
    let minute = Duration::from_mins(1);
    let mut life = restored(&life);
    let rest = [Effect::Wait(Wait::Restart, Duration::from_mins(59))];
    assert_eq!(life.on(Input::Start, minute, 0.5), rest);
    // A delay that is over, or of another boot of the host, does not delay.
    for (history, now) in [
        (history.clone(), Duration::from_hours(2)),
        (history.after_host_boot(), minute),
    ] {
        let mut life = Lifecycle::restore(LIMITS, history);
        let boot = [Effect::Spawn { generation: 7 }];
        assert_eq!(life.on(Input::Start, now, 0.5), boot);
    }
}

fn any_input() -> impl Strategy<Value = Input> {
    prop_oneof![
        Just(Input::Start),
        Just(adoption(9)),
        Just(Input::Spawned { pid: 1 }),
        Just(Input::SpawnFailed("no".into())),
        Just(Input::SpawnCancelled),
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
    /// Holds for every order of inputs: one VMM process at a time, the rotation
    /// flag alternates, no effects after the end, and a time limit on everything
    /// that is to end.
    #[test]
    fn no_order_of_inputs_runs_two_guests_at_once(
        adopted in any::<bool>(),
        inputs in proptest::collection::vec(any_input(), 0..80)
    ) {
        let mut life = Lifecycle::new(LIMITS);
        let mut running = adopted;
        let mut ending = false;
        let mut rotation = false;
        let mut finished = false;
        let mut stopping = false;
        let mut wait = None;
        let mut feed = vec![if adopted { adoption(7) } else { Input::Start }];
        feed.extend(inputs);
        for input in feed {
            // Only a running process can end or fail to start; only the start of
            // one that is to end is cancelled.
            if matches!(input, Input::Ended(_) | Input::SpawnFailed(_) | Input::SpawnCancelled) {
                let cancelled = input == Input::SpawnCancelled;
                if !running || cancelled && !ending { continue; }
                running = false;
                wait = None;
            }
            // Only a wait that is under way can be over.
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
                        ending = false;
                        wait = None;
                    }
                    Effect::StopVmm | Effect::KillVmm => ending = true,
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
            prop_assert_eq!(life.history().running, running && !finished);
            if stopping {
                prop_assert!(finished || wait.is_some());
            }
            if !running {
                prop_assert!(finished || wait == Some(Wait::Restart));
            }
        }
    }
}
