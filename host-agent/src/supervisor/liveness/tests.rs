//! Pings and probes one by one, then whole boots under random pauses, sleeps
//! and stalls.

use super::*;
use proptest::prelude::*;

const TICK: Duration = Duration::from_secs(1);
const LIMIT_TICKS: u32 = 60;
const PROBE_TICKS: u32 = 3;
/// Ticks between two questions, as in the rule.
const INTERVAL_TICKS: u64 = 5;
const PING_TICKS: u64 = 10;
/// Ticks after which the VMM process gives a dial up.
const DIAL_TICKS: u64 = 2;
const BOOT: &str = "boot";

fn liveness() -> Liveness {
    let limit = TICK * LIMIT_TICKS;
    let rule = HeartbeatRule::with_limit(limit, limit).unwrap();
    assert_eq!(rule.tick(), TICK);
    let mut live = Liveness::new(rule, TICK * PROBE_TICKS);
    live.spawned();
    live
}

fn at(seconds: u32) -> Now {
    Now {
        monotonic: TICK * seconds,
        boottime: TICK * seconds,
    }
}

/// A guest that answered once and then no more, at the tick of its first probe.
fn silent(probe: u64) -> Liveness {
    let mut live = liveness();
    live.asked(1);
    assert!(live.beat(BOOT, 1));
    for tick in 0..LIMIT_TICKS {
        assert_eq!(live.tick(at(tick), 0), None);
    }
    let effect = live.tick(at(LIMIT_TICKS), probe);
    assert_eq!(effect, Some(LivenessEffect::SendProbe { id: probe }));
    live
}

fn condemned(effect: Option<LivenessEffect>) -> LivenessEvidence {
    match effect {
        Some(LivenessEffect::Condemn(evidence)) => evidence,
        other => panic!("no verdict: {other:?}"),
    }
}

#[test]
fn three_unanswered_pings_make_a_vmm_process_hung_once() {
    let mut live = liveness();
    for _ in 0..10 {
        for id in 0..3 {
            assert_eq!(live.ping_due(id), Some(LivenessEffect::SendPing { id }));
        }
        live.pong();
    }
    let effects: Vec<_> = (0..20).map(|id| live.ping_due(id)).collect();
    assert_eq!(condemned(effects[3]).verdict, Verdict::VmmHung);
    let verdicts = effects
        .iter()
        .filter(|effect| matches!(effect, Some(LivenessEffect::Condemn(_))));
    assert_eq!(verdicts.count(), 1);
    live.ended();
    assert_eq!(live.ping_due(20), None);
    // The next boot owes no answer.
    live.spawned();
    assert_eq!(live.ping_due(21), Some(LivenessEffect::SendPing { id: 21 }));
}

#[test]
fn the_answer_to_the_probe_is_the_evidence() {
    for (outcome, kernel_alive) in [
        (DialOutcome::Connected, true),
        (DialOutcome::Refused, true),
        (DialOutcome::TimedOut, false),
        (DialOutcome::Unavailable, false),
    ] {
        let mut live = silent(7);
        assert_eq!(live.dial_answered(6, outcome), None);
        let evidence = condemned(live.dial_answered(7, outcome));
        assert!(matches!(evidence.verdict, Verdict::Silent { .. }));
        assert_eq!(evidence.kernel_alive, kernel_alive);
        assert_eq!(live.dial_answered(7, outcome), None);
    }
}

#[test]
fn a_probe_without_an_answer_runs_out_at_its_limit() {
    let mut live = silent(7);
    for tick in 1..PROBE_TICKS {
        assert_eq!(live.tick(at(LIMIT_TICKS + tick), 8), None);
    }
    let evidence = condemned(live.tick(at(LIMIT_TICKS + PROBE_TICKS), 8));
    assert!(!evidence.kernel_alive);
    // A limit shorter than a tick is one tick.
    let verdict = Verdict::VmmHung;
    assert!(
        KernelProbe::new(verdict, 7, TICK / 9, TICK)
            .tick()
            .is_some()
    );
}

#[test]
fn a_guest_that_the_operator_paused_is_not_probed() {
    let mut live = liveness();
    assert!(live.paused(true));
    assert!(!live.paused(true));
    let effect = (0..=LIMIT_TICKS).find_map(|tick| live.tick(at(tick), 1));
    let evidence = condemned(effect);
    assert!(matches!(evidence.verdict, Verdict::NoContact { .. }));
    assert_eq!(evidence.evidence, "its vCPUs are stopped");
}

#[test]
fn a_probe_cut_off_by_a_pause_for_space_is_sent_again() {
    let mut live = silent(7);
    let mut now = LIMIT_TICKS;
    live.no_space(at(now).monotonic);
    // The VMM process gives the dial up, since a paused kernel does not answer.
    assert_eq!(live.dial_answered(7, DialOutcome::TimedOut), None);
    for _ in 0..1000 {
        now += 1;
        assert_eq!(live.tick(at(now), 8), None);
    }
    let paused = live.space_back(at(now).monotonic);
    assert_eq!(paused, Some(TICK * 1000));
    now += 1;
    let again = live.tick(at(now), 8);
    assert_eq!(again, Some(LivenessEffect::SendProbe { id: 8 }));
    assert_eq!(live.dial_answered(7, DialOutcome::TimedOut), None);
    assert!(condemned(live.dial_answered(8, DialOutcome::Refused)).kernel_alive);
}

#[test]
fn a_probe_timeout_across_a_pause_for_space_is_no_evidence() {
    let mut live = silent(7);
    let now = at(LIMIT_TICKS).monotonic;
    live.no_space(now);
    assert_eq!(live.space_back(now), Some(Duration::ZERO));
    assert_eq!(live.space_back(now), None);
    assert_eq!(live.dial_answered(7, DialOutcome::TimedOut), None);
    let again = live.tick(at(LIMIT_TICKS + 1), 8);
    assert_eq!(again, Some(LivenessEffect::SendProbe { id: 8 }));
    assert!(!condemned(live.dial_answered(8, DialOutcome::TimedOut)).kernel_alive);
}

#[test]
fn an_adopted_guest_begins_with_the_state_it_reports() {
    let mut live = silent(7);
    live.adopted(false, true, at(100).monotonic);
    assert_eq!(live.dial_answered(7, DialOutcome::TimedOut), None);
    for tick in 100..1000 {
        assert_eq!(live.tick(at(tick), 8), None);
    }
    assert_eq!(live.space_back(at(1000).monotonic), Some(TICK * 900));
    let ticks = 1000..1000 + LIMIT_TICKS;
    assert!(ticks.clone().all(|tick| live.tick(at(tick), 8).is_none()));
    let effect = live.tick(at(ticks.end), 9);
    assert_eq!(effect, Some(LivenessEffect::SendProbe { id: 9 }));
}

#[test]
fn silence_of_a_guest_that_is_taken_down_is_not_judged() {
    let mut live = silent(7);
    live.taken_down();
    assert_eq!(live.dial_answered(7, DialOutcome::TimedOut), None);
    let mut ticks = LIMIT_TICKS + 1..LIMIT_TICKS * 10;
    assert!(ticks.all(|tick| live.tick(at(tick), 8).is_none()));
}

/// A stretch of time in a guest's boot.
#[derive(Debug, Clone)]
enum Stretch {
    Run {
        ticks: u32,
    },
    OperatorPause {
        ticks: u32,
    },
    SpacePause {
        ticks: u32,
    },
    /// The host sleeps, then the guest runs for a tick.
    Sleep {
        millis: u64,
    },
    /// This process is not scheduled for so long.
    Stall {
        millis: u64,
    },
}

fn any_stretch(longest_pause: u32) -> impl Strategy<Value = Stretch> {
    prop_oneof![
        (1u32..100).prop_map(|ticks| Stretch::Run { ticks }),
        (1..=longest_pause).prop_map(|ticks| Stretch::OperatorPause { ticks }),
        (1u32..400).prop_map(|ticks| Stretch::SpacePause { ticks }),
        (0u64..100_000_000).prop_map(|millis| Stretch::Sleep { millis }),
        (0u64..20_000_000).prop_map(|millis| Stretch::Stall { millis }),
    ]
}

/// A host with one guest: what the actor, the VMM process and the guest do.
struct World {
    live: Liveness,
    now: Now,
    ticks: u64,
    agent_alive: bool,
    kernel_alive: bool,
    sequence: u64,
    ids: u64,
    probe: Option<(u64, u64)>,
    paused: bool,
    held: bool,
    /// Most silence that the rule may have counted since the agent died.
    counted: Duration,
    /// Ticks since then in which the guest ran from begin to end.
    whole_ticks: u32,
    pauses_for_space: u32,
    verdicts: Vec<LivenessEvidence>,
}

impl World {
    fn new() -> Self {
        Self {
            live: liveness(),
            now: at(1000),
            ticks: 0,
            agent_alive: true,
            kernel_alive: true,
            sequence: 0,
            ids: 0,
            probe: None,
            paused: false,
            held: false,
            counted: Duration::ZERO,
            whole_ticks: 0,
            pauses_for_space: 0,
            verdicts: Vec::new(),
        }
    }

    fn take(&mut self, stretch: &Stretch) {
        match *stretch {
            Stretch::Run { ticks } => self.run(ticks),
            Stretch::OperatorPause { ticks } => {
                self.paused = true;
                self.live.paused(true);
                self.run(ticks);
                self.paused = false;
                self.live.paused(false);
            }
            Stretch::SpacePause { ticks } => {
                self.held = true;
                self.pauses_for_space += 1;
                self.live.no_space(self.now.monotonic);
                self.run(ticks);
                self.live.space_back(self.now.monotonic);
                self.held = false;
                // What ran of the next tick is a part.
                self.whole_ticks = self.whole_ticks.saturating_sub(1);
            }
            Stretch::Sleep { millis } => {
                self.now.boottime += Duration::from_millis(millis);
                self.run(1);
            }
            Stretch::Stall { millis } => self.tick(Duration::from_millis(millis)),
        }
        // An answer ends what was silent so far.
        self.run(1);
    }

    fn run(&mut self, ticks: u32) {
        for _ in 0..ticks {
            self.tick(TICK);
        }
    }

    fn tick(&mut self, elapsed: Duration) {
        self.ticks += 1;
        self.now.monotonic += elapsed;
        self.now.boottime += elapsed;
        let runs = !self.paused && !self.held;
        if self.ticks.is_multiple_of(INTERVAL_TICKS) {
            self.sequence += 1;
            self.live.asked(self.sequence);
        }
        if runs && self.agent_alive {
            self.live.beat(BOOT, self.sequence);
        }
        if let Some((id, since)) = self.probe {
            let outcome = if runs && self.kernel_alive {
                Some(DialOutcome::Refused)
            } else {
                (self.ticks - since >= DIAL_TICKS).then_some(DialOutcome::TimedOut)
            };
            if let Some(outcome) = outcome {
                self.probe = None;
                let effect = self.live.dial_answered(id, outcome);
                self.perform(effect);
            }
        }
        self.ids += 2;
        let effect = self.live.tick(self.now, self.ids);
        self.perform(effect);
        if self.ticks.is_multiple_of(PING_TICKS) {
            let effect = self.live.ping_due(self.ids + 1);
            self.perform(effect);
        }
        if !self.agent_alive && !self.held {
            self.counted += elapsed.min(TICK * 2);
            self.whole_ticks += 1;
        }
    }

    fn perform(&mut self, effect: Option<LivenessEffect>) {
        match effect {
            Some(LivenessEffect::SendProbe { id }) => self.probe = Some((id, self.ticks)),
            Some(LivenessEffect::SendPing { .. }) => self.live.pong(),
            Some(LivenessEffect::Condemn(evidence)) => self.verdicts.push(evidence),
            Some(LivenessEffect::ReportResumed) | None => {}
        }
    }
}

/// Any input, in any order.
#[derive(Debug, Clone)]
enum AnyInput {
    Spawned,
    Adopted(bool, bool),
    Ended,
    BootingAgain,
    TakenDown,
    Asked,
    Beat,
    Paused(bool),
    NoSpace,
    SpaceBack,
    Pong,
    PingDue,
    Dialed(DialOutcome),
    Ticks(u32),
}

fn any_input() -> impl Strategy<Value = AnyInput> {
    let outcome = prop_oneof![
        Just(DialOutcome::Refused),
        Just(DialOutcome::TimedOut),
        Just(DialOutcome::Unavailable),
    ];
    prop_oneof![
        Just(AnyInput::Spawned),
        any::<(bool, bool)>().prop_map(|(paused, held)| AnyInput::Adopted(paused, held)),
        Just(AnyInput::Ended),
        Just(AnyInput::BootingAgain),
        Just(AnyInput::TakenDown),
        Just(AnyInput::Asked),
        Just(AnyInput::Beat),
        any::<bool>().prop_map(AnyInput::Paused),
        Just(AnyInput::NoSpace),
        Just(AnyInput::SpaceBack),
        Just(AnyInput::Pong),
        Just(AnyInput::PingDue),
        outcome.prop_map(AnyInput::Dialed),
        (1u32..100).prop_map(AnyInput::Ticks),
    ]
}

proptest! {
    #[test]
    fn a_guest_that_answers_is_never_condemned(
        stretches in proptest::collection::vec(any_stretch(LIMIT_TICKS * 2 / 3), 1..60)
    ) {
        let mut world = World::new();
        for stretch in &stretches {
            world.take(stretch);
            prop_assert_eq!(&world.verdicts, &[]);
        }
    }

    #[test]
    fn a_guest_that_stops_answering_is_condemned_in_time(
        before in proptest::collection::vec(any_stretch(LIMIT_TICKS * 2 / 3), 0..10),
        after in proptest::collection::vec(any_stretch(200), 0..30),
        kernel_alive in any::<bool>(),
    ) {
        let mut world = World::new();
        for stretch in &before {
            world.take(stretch);
        }
        world.agent_alive = false;
        world.kernel_alive = kernel_alive;
        world.pauses_for_space = 0;
        let rest = Stretch::Run { ticks: LIMIT_TICKS * 2 };
        for stretch in after.iter().chain([&rest]) {
            world.take(stretch);
            if let Some(evidence) = world.verdicts.first() {
                let silent = matches!(evidence.verdict, Verdict::Silent { .. } | Verdict::NoContact { .. });
                prop_assert!(silent);
                // Silence since the last answer, which came before the death.
                let earlier = TICK * (INTERVAL_TICKS as u32 + 2);
                prop_assert!(world.counted + earlier >= TICK * LIMIT_TICKS);
            } else {
                // Two graces and the ticks that found the stall; each pause for
                // space costs a tick at either end and a probe.
                let grace = 2 * (LIMIT_TICKS / 10 + 1);
                let probes = (PROBE_TICKS + 2) * (world.pauses_for_space + 1);
                prop_assert!(world.whole_ticks <= LIMIT_TICKS + grace + probes);
            }
        }
        prop_assert_eq!(world.verdicts.len(), 1);
    }

    #[test]
    fn no_order_of_inputs_gives_two_verdicts_in_a_boot(
        inputs in proptest::collection::vec(any_input(), 1..200)
    ) {
        let mut live = liveness();
        let mut now = at(1000);
        let (mut id, mut sequence, mut probe, mut verdicts) = (0, 0, 0, 0);
        let mut has_process = true;
        for input in inputs {
            let mut effects = Vec::new();
            match input {
                AnyInput::Spawned => {
                    live.spawned();
                    (verdicts, has_process) = (0, true);
                }
                AnyInput::Adopted(paused, held) => {
                    live.adopted(paused, held, now.monotonic);
                    (verdicts, has_process) = (0, true);
                }
                AnyInput::Ended => {
                    live.ended();
                    has_process = false;
                }
                AnyInput::BootingAgain => live.booting_again(),
                AnyInput::TakenDown => live.taken_down(),
                AnyInput::Asked => {
                    sequence += 1;
                    live.asked(sequence);
                }
                AnyInput::Beat => {
                    live.beat(BOOT, sequence);
                }
                AnyInput::Paused(paused) => {
                    live.paused(paused);
                }
                AnyInput::NoSpace => live.no_space(now.monotonic),
                AnyInput::SpaceBack => {
                    live.space_back(now.monotonic);
                }
                AnyInput::Pong => live.pong(),
                AnyInput::PingDue => effects.extend(live.ping_due(id)),
                AnyInput::Dialed(outcome) => effects.extend(live.dial_answered(probe, outcome)),
                AnyInput::Ticks(ticks) => {
                    for _ in 0..ticks {
                        id += 1;
                        now.monotonic += TICK;
                        now.boottime += TICK;
                        effects.extend(live.tick(now, id));
                    }
                }
            }
            for effect in effects {
                match effect {
                    LivenessEffect::SendProbe { id } => probe = id,
                    LivenessEffect::Condemn(_) => verdicts += 1,
                    LivenessEffect::SendPing { .. } | LivenessEffect::ReportResumed => {}
                }
                let sends = !matches!(effect, LivenessEffect::ReportResumed);
                prop_assert!(has_process || !sends);
            }
            prop_assert!(verdicts <= 1);
        }
    }
}
