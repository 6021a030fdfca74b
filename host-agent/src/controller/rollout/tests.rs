//! Rollouts over instances whose states a test sets.

use std::collections::BTreeMap;

use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn rollout(policy: RolloutPolicy) -> Rollout {
    Rollout {
        from: 1,
        to: 2,
        incarnation: 2,
        policy,
        stage: Stage::First,
        done: 0,
        paused: false,
        halted: None,
        rolling_back: None,
    }
}

fn seen(name: &str, domain: u32, state: SeenState) -> Seen {
    Seen {
        name: name.into(),
        domain,
        state,
    }
}

const READY: SeenState = SeenState::New(Progress::Ready(Duration::from_secs(60)));
const STARTING: SeenState = SeenState::New(Progress::Starting("Booting"));
const OLD: SeenState = SeenState::Old { ready: true };
const DOWN: SeenState = SeenState::Old { ready: false };

fn change(names: &[&str]) -> Step {
    Step::Change(names.iter().map(|name| (*name).to_owned()).collect())
}

#[test]
fn the_table_of_steps() {
    use Stage::{Domain, First, Last};
    let first = rollout(RolloutPolicy {
        limit_ms: 10_000,
        ..RolloutPolicy::default()
    });
    let at = |stage, done| Rollout {
        stage,
        done,
        ..first.clone()
    };
    let on = |stage, done| Step::Move(at(stage, done), Moved::On);
    let rows: [(Stage, &[SeenState], Step); 9] = [
        // Those that are down first, and those that do not exist; they are waited for.
        (First, &[OLD, DOWN, SeenState::Missing], change(&["b", "c"])),
        (
            First,
            &[OLD, STARTING, READY],
            Step::Wait(Some(Duration::from_secs(6))),
        ),
        (First, &[OLD, READY, OLD], on(Domain(0), 0)),
        (Domain(0), &[OLD, READY, OLD], change(&["a"])),
        // No other one while an instance that was changed is down.
        (
            Domain(0),
            &[READY, STARTING, OLD],
            Step::Wait(Some(Duration::from_secs(6))),
        ),
        (Domain(0), &[READY, READY, OLD], on(Domain(2), 1)),
        (Domain(2), &[SeenState::Same, READY, READY], on(Last, 1)),
        (
            Last,
            &[READY, SeenState::Surplus, READY],
            Step::Retire(vec!["b".into()]),
        ),
        (Last, &[READY, READY, READY], Step::Finish),
    ];
    for (stage, states, step) in rows {
        let instances = ["a", "b", "c"].iter().zip(0..).zip(states);
        let instances: Vec<_> = instances
            .map(|((name, domain), state)| seen(name, domain, state.clone()))
            .collect();
        let next = at(stage, 0).next(&instances, Duration::from_secs(4));
        assert_eq!(next, step, "{stage:?} {states:?}");
    }
}

#[test]
fn an_instance_that_fails_halts_or_goes_back() {
    let failed = [seen("a", 0, SeenState::New(Progress::Failed("Cycling")))];
    let halts = rollout(RolloutPolicy::default());
    let Step::Move(halted, Moved::Halted(why)) = halts.next(&failed, Duration::ZERO) else {
        panic!("not halted");
    };
    assert_eq!(why, "a is Cycling");
    assert_eq!(halted.next(&failed, Duration::ZERO), Step::Rest);
    let policy = RolloutPolicy {
        on_failure: OnFailure::Rollback,
        limit_ms: 5000,
        pause_after: Some(1),
        ..RolloutPolicy::default()
    };
    let late = [seen("a", 0, STARTING)];
    let limit = Duration::from_secs(5);
    let Step::Move(back, Moved::Back(why)) = rollout(policy).next(&late, limit) else {
        panic!("not taken back");
    };
    assert_eq!(why, "a is Booting after 5 s");
    assert_eq!(
        (back.to, back.incarnation, back.stage),
        (1, 3, Stage::First)
    );
    // The one instance is down, so it is taken back at once.
    assert_eq!(
        back.next(&[seen("a", 0, DOWN)], Duration::ZERO),
        change(&["a"])
    );
    // Nothing pauses on the way back, and what fails there halts.
    let domain = Rollout {
        stage: Stage::Domain(0),
        ..back
    };
    let next = domain.next(&[seen("a", 0, READY), seen("b", 1, OLD)], Duration::ZERO);
    assert!(matches!(next, Step::Move(_, Moved::On)), "{next:?}");
    let next = domain.next(&failed, Duration::ZERO);
    assert!(matches!(next, Step::Move(_, Moved::Halted(_))), "{next:?}");
}

#[test]
fn a_rollout_pauses_between_domains_and_waits_until_instances_are_stable() {
    let policy = RolloutPolicy {
        pause_after: Some(1),
        stable_ms: 2000,
        ..RolloutPolicy::default()
    };
    let domain = Rollout {
        stage: Stage::Domain(0),
        ..rollout(policy)
    };
    let ready = |ms| SeenState::New(Progress::Ready(Duration::from_millis(ms)));
    let instances = |ms| [seen("a", 0, ready(ms)), seen("b", 1, OLD)];
    let next = domain.next(&instances(500), Duration::ZERO);
    assert_eq!(next, Step::Wait(Some(Duration::from_millis(1500))));
    let Step::Move(paused, Moved::Paused) = domain.next(&instances(2000), Duration::ZERO) else {
        panic!("not paused");
    };
    assert_eq!(paused.next(&instances(2000), Duration::ZERO), Step::Rest);
    let resumed = Rollout {
        paused: false,
        ..paused
    };
    assert_eq!(
        resumed.next(&instances(2000), Duration::ZERO),
        change(&["b"])
    );
}

/// A host whose instances are Ready one look after they were changed, or never.
#[derive(Debug, Clone)]
struct World {
    /// Domain, revision, whether it is Ready, of each instance.
    instances: BTreeMap<String, (u32, u64, bool)>,
    /// Instances that are never Ready in revision 2.
    broken: Vec<bool>,
}

impl World {
    fn seen(&self, rollout: &Rollout) -> Vec<Seen> {
        let states = self
            .instances
            .iter()
            .map(|(name, (domain, revision, ready))| {
                let state = match (*revision == rollout.to, *ready) {
                    (true, true) => READY,
                    (true, false) => STARTING,
                    (false, ready) => SeenState::Old { ready },
                };
                seen(name, *domain, state)
            });
        states.collect()
    }

    fn boot(&mut self) {
        for ((_, revision, ready), broken) in self.instances.values_mut().zip(&self.broken) {
            *ready |= *revision == 1 || !broken;
        }
    }
}

/// Walks to the end; `killed` says after which steps the host agent dies, so that it begins
/// again from the stored cursor. The end, and the world.
fn walk(mut world: World, mut cursor: Rollout, killed: &[bool]) -> (Rollout, World) {
    let mut lasted = Duration::ZERO;
    for number in 0..1000 {
        match cursor.next(&world.seen(&cursor), lasted) {
            Step::Change(names) => {
                let ready: Vec<u32> = names
                    .iter()
                    .filter(|name| world.instances[*name].2)
                    .map(|name| world.instances[name].0)
                    .collect();
                assert!(ready.iter().all(|domain| *domain == ready[0]), "{ready:?}");
                let others = world
                    .instances
                    .iter()
                    .filter(|(name, _)| !names.contains(name));
                let down: Vec<u32> = others.filter(|(_, it)| !it.2).map(|(_, it)| it.0).collect();
                assert!(
                    ready.is_empty() || down.iter().all(|domain| *domain == ready[0]),
                    "{down:?}"
                );
                for (index, name) in names.iter().enumerate() {
                    let instance = world.instances.get_mut(name).unwrap();
                    (instance.1, instance.2) = (cursor.to, false);
                    if killed.get(number).copied().unwrap_or(false) && index == 0 {
                        // It dies when the first one is changed.
                        break;
                    }
                }
            }
            Step::Wait(due) => {
                lasted += due.unwrap_or_default();
                world.boot();
            }
            Step::Move(next, _) => (cursor, lasted) = (next, Duration::ZERO),
            Step::Retire(_) => panic!("none is surplus"),
            Step::Finish | Step::Rest => return (cursor, world),
        }
        if killed.get(number).copied().unwrap_or(false) {
            let stored = serde_json::to_string(&cursor).unwrap();
            (cursor, lasted) = (serde_json::from_str(&stored).unwrap(), Duration::ZERO);
        }
    }
    panic!("it does not end: {cursor:?}");
}

proptest! {
    #[test]
    fn a_rollout_ends_the_same_whenever_the_host_agent_dies(
        instances in vec((0_u32..5, any::<bool>(), any::<bool>()), 1..12),
        killed in vec(any::<bool>(), 0..60),
        back in any::<bool>(),
    ) {
        let policy = RolloutPolicy {
            on_failure: if back { OnFailure::Rollback } else { OnFailure::Halt },
            ..RolloutPolicy::default()
        };
        let named = instances.iter().enumerate();
        let world = World {
            instances: named.map(|(n, (domain, ready, _))| (format!("A_IN_{n:02}"), (*domain, 1, *ready))).collect(),
            broken: instances.iter().map(|(_, _, broken)| *broken).collect(),
        };
        let (quiet, calm) = walk(world.clone(), rollout(policy.clone()), &[]);
        let (cursor, world) = walk(world, rollout(policy), &killed);
        prop_assert_eq!(&cursor.rolling_back.is_some(), &quiet.rolling_back.is_some());
        prop_assert_eq!(&cursor, &quiet);
        prop_assert_eq!(&world.instances, &calm.instances);
        let broken = world.broken.iter().any(|broken| *broken);
        let revisions = world.instances.values().map(|it| it.1);
        if back || !broken {
            let end = if broken { 1 } else { 2 };
            prop_assert!(revisions.into_iter().all(|it| it == end));
            prop_assert!(world.instances.values().all(|it| it.2));
        } else {
            prop_assert!(cursor.halted.is_some());
        }
    }
}
