//! The monitor against clocks that run, sleep and stall.

use super::*;
use proptest::prelude::*;

const RULE: HeartbeatRule = HeartbeatRule::DEFAULT;

struct Clock(Now);

impl Clock {
    fn new() -> Self {
        Self(Now {
            monotonic: Duration::from_secs(1000),
            boottime: Duration::from_secs(5000),
        })
    }
    fn run(&mut self, time: Duration) -> Now {
        self.0.monotonic += time;
        self.0.boottime += time;
        self.0
    }
    fn sleep(&mut self, time: Duration) {
        self.0.boottime += time;
    }
}

fn alive(clock: &Clock) -> Monitor {
    let mut monitor = Monitor::new(RULE);
    assert_eq!(monitor.tick(clock.0, true), None);
    monitor.asked(1);
    assert!(monitor.beat("boot", 1));
    monitor
}

fn ticks_until_condemned(monitor: &mut Monitor, clock: &mut Clock) -> Option<u32> {
    (1..=5000).find(|_| {
        matches!(
            monitor.tick(clock.run(RULE.tick()), true),
            Some(Finding::Condemned(_))
        )
    })
}

#[test]
fn a_silent_guest_is_condemned_once_exactly_at_the_limit() {
    let mut clock = Clock::new();
    let mut monitor = alive(&clock);
    assert_eq!(ticks_until_condemned(&mut monitor, &mut clock), Some(600));
    assert_eq!(ticks_until_condemned(&mut monitor, &mut clock), None);
}

#[test]
fn a_guest_without_contact_is_condemned_at_the_boot_limit() {
    let mut clock = Clock::new();
    let mut monitor = Monitor::new(RULE);
    monitor.tick(clock.0, true);
    let mut verdict = None;
    for _ in 0..600 {
        assert_eq!(verdict, None);
        verdict = monitor.tick(clock.run(RULE.tick()), true);
    }
    assert!(matches!(
        verdict,
        Some(Finding::Condemned(Verdict::NoContact {
            waited_ms: 600_000
        }))
    ));
}

#[test]
fn only_a_fresh_answer_of_this_boot_ends_the_silence() {
    let mut clock = Clock::new();
    let mut monitor = alive(&clock);
    monitor.asked(5);
    assert!(monitor.beat("boot", 4));
    for _ in 0..10 {
        monitor.tick(clock.run(RULE.tick()), true);
    }
    for (boot, sequence) in [("boot", 4), ("boot", 3), ("other", 5), ("boot", 6)] {
        assert!(!monitor.beat(boot, sequence), "{boot} {sequence}");
    }
    assert_eq!(monitor.silence(), Duration::from_secs(10));
    assert!(monitor.beat("boot", 5));
    assert_eq!(monitor.silence(), Duration::ZERO);
}

#[test]
fn pause_for_space_sleep_and_stall_condemn_no_guest() {
    let mut clock = Clock::new();
    let mut monitor = alive(&clock);
    for _ in 0..2000 {
        assert_eq!(monitor.tick(clock.run(RULE.tick()), false), None);
    }
    clock.sleep(Duration::from_hours(8));
    assert_eq!(
        monitor.tick(clock.run(RULE.tick()), true),
        Some(Finding::Resumed)
    );
    monitor.tick(clock.run(Duration::from_mins(15)), true);
    assert!(monitor.silence() <= RULE.tick() * 2);
}

#[test]
fn a_monitor_that_is_always_late_finds_a_dead_guest() {
    let mut clock = Clock::new();
    let mut monitor = alive(&clock);
    let found = (0..10_000).find(|_| {
        matches!(
            monitor.tick(clock.run(RULE.tick() * 6), true),
            Some(Finding::Condemned(_))
        )
    });
    assert!(found.is_some());
}

#[test]
fn a_resume_extends_the_limit_by_a_tenth_once_per_limit() {
    let mut clock = Clock::new();
    let mut monitor = alive(&clock);
    clock.sleep(Duration::from_secs(10));
    assert_eq!(
        monitor.tick(clock.run(RULE.tick()), true),
        Some(Finding::Resumed)
    );
    clock.sleep(Duration::from_secs(10));
    assert_eq!(monitor.tick(clock.run(RULE.tick()), true), None);
    let rest = ticks_until_condemned(&mut monitor, &mut clock);
    assert_eq!(rest, Some(659));
}

#[test]
fn a_reboot_is_never_silence() {
    let mut clock = Clock::new();
    let mut monitor = alive(&clock);
    for round in 0..50u64 {
        for _ in 0..599 {
            assert_eq!(monitor.tick(clock.run(RULE.tick()), true), None);
        }
        monitor.booting();
        monitor.asked(round + 2);
        assert!(monitor.beat(&format!("boot {round}"), round + 2));
    }
}

#[test]
fn a_limit_under_four_intervals_is_refused() {
    let second = Duration::from_secs(1);
    assert!(HeartbeatRule::new(second, second * 3, second).is_err());
    assert!(HeartbeatRule::new(second, second * 4, second).is_ok());
    let short = HeartbeatRule::with_limit(second, second).unwrap();
    assert_eq!(short.interval(), second / 4);
}

proptest! {
    /// A guest that is paused for space is not silent: it is condemned when
    /// it has run for the limit, whenever and however long it was paused.
    #[test]
    fn only_ticks_in_which_the_guest_ran_count_as_silence(
        phases in proptest::collection::vec((0u32..300, 1u32..3_000), 1..20)
    ) {
        let mut clock = Clock::new();
        let mut monitor = alive(&clock);
        let mut ran = 0;
        for (runs, pauses) in phases {
            for _ in 0..runs.min(599 - ran) {
                ran += 1;
                prop_assert_eq!(monitor.tick(clock.run(RULE.tick()), true), None);
            }
            for _ in 0..pauses {
                prop_assert_eq!(monitor.tick(clock.run(RULE.tick()), false), None);
            }
            prop_assert_eq!(monitor.silence(), RULE.tick() * ran);
        }
        let rest = ticks_until_condemned(&mut monitor, &mut clock);
        prop_assert_eq!(rest, Some(600 - ran));
    }

    #[test]
    fn no_clock_condemns_a_guest_that_answers(
        steps in proptest::collection::vec(
            (0u64..4_000, 0u64..100_000_000, any::<bool>()), 1..400)
    ) {
        let mut clock = Clock::new();
        let mut monitor = alive(&clock);
        for (sequence, (run, sleep, ran)) in (2u64..).zip(steps) {
            clock.sleep(Duration::from_millis(sleep));
            monitor.asked(sequence);
            let found = monitor.tick(clock.run(Duration::from_millis(run)), ran);
            prop_assert!(!matches!(found, Some(Finding::Condemned(_))));
            prop_assert!(monitor.beat("boot", sequence));
        }
    }
}
