//! State machine of one instance. Pure: each input with the time gives effects;
//! nothing here waits or touches a process.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use vmbus::message::{PowerAction, RoleState, Status};

use super::event::{EventKind, Verdict, exit_text};
use super::restart::{Decision, RestartBudget};
use crate::token_bucket::{TIMELINE, TokenBucket};
use crate::vmm::control::ExitReason;

/// Time between two reminders that a killed process does not end.
const REMIND: Duration = Duration::from_mins(1);

/// Something that happened.
#[derive(Debug, Clone, PartialEq)]
pub enum Input {
    /// The instance shall run.
    Start,
    /// A VMM process was started.
    Spawned {
        /// Its process id.
        pid: u32,
    },
    /// No VMM process could be started.
    SpawnFailed(String),
    /// The VMM process was to end before it was started.
    SpawnCancelled,
    /// This supervisor attached to the VMM process that an earlier one started.
    /// Only before [`Input::Start`], after [`Lifecycle::restore`].
    Adopted {
        /// Number of the guest's boot.
        generation: u64,
        /// Process id.
        pid: u32,
        /// The guest is paused because a disk has no space.
        no_space: bool,
    },
    /// The app agent connected.
    Connected,
    /// A fresh heartbeat came.
    Beat,
    /// The guest is paused because a disk has no space.
    NoSpace,
    /// The guest runs again after [`Input::NoSpace`].
    SpaceBack,
    /// The role's status, of the current boot.
    Status(Status),
    /// The heartbeat rule gave a verdict.
    Condemned {
        /// The verdict.
        verdict: Verdict,
        /// What a probe of the guest found, in words.
        evidence: String,
        /// Whether the guest's kernel answered.
        kernel_alive: bool,
    },
    /// The guest has begun to shut down.
    ShutdownBegun,
    /// The VMM process ended, if before [`Input::Start`] while no supervisor was
    /// attached.
    Ended(ExitReason),
    /// [`Effect::Wait`] is over.
    Waited(Wait),
    /// Leave the rotation until the next status that is Ready.
    Drain,
    /// Stop cleanly.
    Stop,
    /// Stop now.
    Kill,
}

/// What to wait for. A later wait of any kind replaces an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wait {
    /// The delay before a restart.
    Restart,
    /// The guest's own shutdown.
    Shutdown,
    /// The end of the VMM process after it was asked to stop.
    VmmStop,
    /// The end of the VMM process after it was killed.
    Death,
}

/// Something to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Start a VMM process for this boot.
    Spawn {
        /// Number of the boot.
        generation: u64,
    },
    /// Ask the app agent to shut the guest down.
    AskShutdown {
        /// What the guest does at the end.
        then: PowerAction,
        /// Time for the role to stop.
        deadline: Duration,
    },
    /// Ask the VMM process to flush the disks and end.
    StopVmm,
    /// Kill the VMM process.
    KillVmm,
    /// Give [`Input::Waited`] after this time.
    Wait(Wait, Duration),
    /// Put the instance in or out of its endpoints' rotation.
    Rotation(bool),
    /// Report this in the timeline.
    Report(EventKind),
    /// The instance is finished.
    Finish,
}

/// Time limits, scaled for this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Time for a role to stop when the service is stopped.
    pub role_stop: Duration,
    /// Time for the guest beyond that to power off.
    pub power_off: Duration,
    /// Time for a condemned guest whose kernel answers to begin to shut down.
    /// Short, because the agent that would shut it down has probably died.
    pub begin: Duration,
    /// Time for a condemned guest that has begun to shut down.
    pub condemned: Duration,
    /// Time for the VMM process to flush the disks and end.
    pub vmm_stop: Duration,
    /// Time for the VMM process to end after it was killed.
    pub death: Duration,
}

/// One instance.
#[derive(Debug)]
pub struct Lifecycle {
    limits: Limits,
    state: State,
    generation: u64,
    budget: RestartBudget,
    /// When the first and the last heartbeat of this boot came.
    beats: Option<(Duration, Duration)>,
    connected: bool,
    /// In [`State::Idle`]: the boot of the history had not ended.
    unattended: bool,
    /// When the next boot is due, in [`State::Waiting`].
    restart_at: Option<Duration>,
    status: Option<Status>,
    /// The status has changed since it was last reported.
    unreported: bool,
    quota: TokenBucket<Duration>,
    in_rotation: bool,
    /// The guest is paused because a disk has no space.
    no_space: bool,
}

/// The part of a [`Lifecycle`] that a store keeps for the next supervisor. It
/// changes a few times a boot, never with a heartbeat.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct RestartHistory {
    /// Number of the last boot, 0 before the first.
    pub generation: u64,
    /// Whether that boot has not ended: its VMM process may still run.
    pub running: bool,
    /// Delays, and whether the instance is faulted.
    pub budget: RestartBudget,
    /// Whether the app agent connected in that boot.
    pub connected: bool,
    /// When the first heartbeat of that boot came (`CLOCK_MONOTONIC`).
    pub first_beat: Option<Duration>,
    /// When the next boot is due (`CLOCK_MONOTONIC`).
    pub restart_at: Option<Duration>,
}

impl RestartHistory {
    /// Forgets what a boot of the host ends: the VMM process, and the times.
    #[must_use]
    pub fn after_host_boot(self) -> Self {
        Self {
            generation: self.generation,
            budget: self.budget,
            ..Self::default()
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Before [`Input::Start`] or [`Input::Adopted`].
    Idle,
    /// A VMM process runs, or is being started.
    Running,
    /// The guest is being ended for a restart.
    Ending {
        because: String,
        /// The guest was asked to shut down and has not begun to.
        asked: bool,
    },
    /// Waiting for the restart.
    Waiting,
    /// Being stopped for good.
    Stopping,
    /// Stopped for good.
    Finished,
}

impl Lifecycle {
    /// An instance that never ran.
    pub fn new(limits: Limits) -> Self {
        Self::restore(limits, RestartHistory::default())
    }

    /// An instance that an earlier supervisor had, before [`Input::Adopted`],
    /// [`Input::Start`], or [`Input::Ended`] for a guest that has ended since.
    pub fn restore(limits: Limits, history: RestartHistory) -> Self {
        Self {
            limits,
            state: State::Idle,
            generation: history.generation,
            budget: history.budget,
            beats: history.first_beat.map(|first| (first, first)),
            connected: history.connected,
            unattended: history.running,
            restart_at: history.restart_at,
            status: None,
            unreported: false,
            quota: TokenBucket::new(TIMELINE),
            in_rotation: false,
            no_space: false,
        }
    }

    /// The part that a store keeps. Worth a comparison after each input.
    pub fn history(&self) -> RestartHistory {
        RestartHistory {
            generation: self.generation,
            running: match self.state {
                State::Idle => self.unattended,
                State::Running | State::Ending { .. } | State::Stopping => true,
                State::Waiting | State::Finished => false,
            },
            budget: self.budget.clone(),
            connected: self.connected,
            first_beat: self.beats.map(|(first, _)| first),
            restart_at: self.restart_at,
        }
    }

    /// Number of the current boot, 0 before the first.
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// Handles an input at `now` (`CLOCK_MONOTONIC`). `jitter` in 0..=1 spreads
    /// restart delays.
    pub fn on(&mut self, input: Input, now: Duration, jitter: f64) -> Vec<Effect> {
        let mut effects = Vec::new();
        match (input, self.state.clone()) {
            (_, State::Finished) => {}
            (Input::Start, State::Idle) => {
                let rest = self.restart_at.and_then(|at| at.checked_sub(now));
                match rest.filter(|rest| !rest.is_zero()) {
                    // The delay of the earlier supervisor goes on.
                    Some(rest) => {
                        self.state = State::Waiting;
                        effects.push(Effect::Wait(Wait::Restart, rest));
                    }
                    None => self.boot(&mut effects),
                }
            }
            (Input::Waited(Wait::Restart), State::Waiting) => self.boot(&mut effects),
            (
                Input::Adopted {
                    generation,
                    pid,
                    no_space,
                },
                State::Idle,
            ) => self.adopt(generation, pid, no_space, &mut effects),
            (Input::Spawned { pid }, _) => effects.push(Effect::Report(EventKind::GuestStarting {
                generation: self.generation,
                pid,
            })),
            (Input::SpawnFailed(error), State::Stopping) => {
                self.finish(false, Some(error), &mut effects);
            }
            (Input::SpawnFailed(error), _) => {
                effects.push(Effect::Report(EventKind::Failed {
                    error: error.clone(),
                }));
                self.plan_restart(error, now, jitter, &mut effects);
            }
            (Input::SpawnCancelled, State::Stopping) => self.finish(true, None, &mut effects),
            (Input::SpawnCancelled, State::Ending { because, .. }) => {
                self.plan_restart(because, now, jitter, &mut effects);
            }
            (Input::Connected, _) => self.connected = true,
            (Input::Drain, _) => self.rotate(false, &mut effects),
            (Input::Beat, State::Running) => {
                self.beats.get_or_insert((now, now)).1 = now;
                self.report_status(now, &mut effects);
            }
            (Input::NoSpace, _) => {
                self.no_space = true;
                self.rotate(false, &mut effects);
            }
            (Input::SpaceBack, state) => {
                self.no_space = false;
                self.rotate_by_status(&state, &mut effects);
            }
            (Input::Status(status), state) => self.status(status, &state, now, &mut effects),
            (
                Input::Condemned {
                    verdict,
                    evidence,
                    kernel_alive,
                },
                State::Running,
            ) => {
                self.rotate(false, &mut effects);
                let because = verdict.to_string();
                effects.push(Effect::Report(EventKind::Verdict { verdict, evidence }));
                let asked = kernel_alive && self.connected;
                self.state = State::Ending { because, asked };
                if asked {
                    effects.push(Effect::AskShutdown {
                        then: PowerAction::PowerOff,
                        deadline: self.limits.condemned / 2,
                    });
                    effects.push(Effect::Wait(Wait::Shutdown, self.limits.begin));
                } else {
                    self.kill_vmm(&mut effects);
                }
            }
            // Only once, so that a repeated message gains no time.
            (
                Input::ShutdownBegun,
                State::Ending {
                    because,
                    asked: true,
                },
            ) => {
                let asked = false;
                self.state = State::Ending { because, asked };
                effects.push(Effect::Wait(Wait::Shutdown, self.limits.condemned));
            }
            (Input::Ended(reason), State::Running | State::Idle) => {
                self.rotate(false, &mut effects);
                let because = exit_text(&reason);
                effects.push(exited(reason, None));
                self.plan_restart(because, now, jitter, &mut effects);
            }
            (Input::Ended(reason), State::Ending { because, .. }) => {
                effects.push(exited(reason, Some(&because)));
                self.plan_restart(because, now, jitter, &mut effects);
            }
            (Input::Ended(reason), State::Stopping) => {
                // Before the app agent connects there is no role to stop.
                let clean = match reason {
                    ExitReason::PowerOff => !self.status.as_ref().is_some_and(|it| it.killed),
                    ExitReason::Stopped => !self.connected,
                    _ => false,
                };
                effects.push(exited(reason, None));
                self.finish(clean, None, &mut effects);
            }
            (Input::Stop, State::Running | State::Ending { .. }) => {
                self.rotate(false, &mut effects);
                effects.push(Effect::Report(EventKind::Stopping));
                self.state = State::Stopping;
                if self.connected {
                    effects.push(Effect::AskShutdown {
                        then: PowerAction::PowerOff,
                        deadline: self.limits.role_stop,
                    });
                    let limit = self.limits.role_stop + self.limits.power_off;
                    effects.push(Effect::Wait(Wait::Shutdown, limit));
                } else {
                    self.stop_vmm(&mut effects);
                }
            }
            (Input::Stop | Input::Kill, State::Idle | State::Waiting) => {
                self.finish(true, None, &mut effects);
            }
            (Input::Kill, _) => {
                self.rotate(false, &mut effects);
                self.state = State::Stopping;
                self.kill_vmm(&mut effects);
            }
            (Input::Waited(Wait::Shutdown), state @ (State::Stopping | State::Ending { .. })) => {
                if let State::Ending { because, .. } = state {
                    let asked = false;
                    self.state = State::Ending { because, asked };
                }
                self.stop_vmm(&mut effects);
            }
            (Input::Waited(Wait::VmmStop), State::Stopping | State::Ending { .. }) => {
                self.kill_vmm(&mut effects);
            }
            (Input::Waited(Wait::Death), State::Stopping | State::Ending { .. }) => {
                let text = "the VMM process was killed and does not end: it hangs in the \
                            kernel, most likely on a disk"
                    .into();
                effects.push(Effect::Report(EventKind::Warning { text }));
                effects.push(Effect::KillVmm);
                effects.push(Effect::Wait(Wait::Death, REMIND));
            }
            // A second stop, or a late input of a boot that has ended.
            _ => {}
        }
        effects
    }

    fn boot(&mut self, effects: &mut Vec<Effect>) {
        self.generation += 1;
        self.state = State::Running;
        self.beats = None;
        self.connected = false;
        self.restart_at = None;
        self.no_space = false;
        self.status = None;
        self.unreported = false;
        effects.push(Effect::Spawn {
            generation: self.generation,
        });
    }

    /// Goes on with a guest that runs. It gets connections once its status arrives.
    fn adopt(&mut self, generation: u64, pid: u32, no_space: bool, effects: &mut Vec<Effect>) {
        if self.generation != generation {
            // The history is of another boot.
            self.generation = generation;
            self.beats = None;
            self.connected = false;
        }
        self.state = State::Running;
        self.restart_at = None;
        self.no_space = no_space;
        effects.push(Effect::Report(EventKind::GuestAdopted { generation, pid }));
    }

    fn status(&mut self, status: Status, state: &State, now: Duration, effects: &mut Vec<Effect>) {
        if self.status.as_ref() == Some(&status) {
            return;
        }
        // A guest agent reports Unknown until it has started the role.
        self.unreported = status.state != RoleState::Unknown;
        self.status = Some(status);
        self.report_status(now, effects);
        self.rotate_by_status(state, effects);
    }

    /// A guest that runs is in rotation while its role is Ready.
    fn rotate_by_status(&mut self, state: &State, effects: &mut Vec<Effect>) {
        if *state == State::Running {
            let ready = self.status.as_ref().map(|status| status.state) == Some(RoleState::Ready);
            self.rotate(ready && !self.no_space, effects);
        }
    }

    /// Reports the newest status at a limited rate. One that a newer status
    /// replaces before it can be reported is skipped.
    fn report_status(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let Some(status) = self.status.as_ref().filter(|_| self.unreported) else {
            return;
        };
        if !self.quota.take(now) {
            return;
        }
        self.unreported = false;
        effects.push(Effect::Report(EventKind::Role {
            state: status.state,
            detail: status.detail.clone(),
            recycles: status.recycles,
            last_exit: status.last_exit,
            retry_in_ms: status.retry_in_ms,
        }));
    }

    fn kill_vmm(&self, effects: &mut Vec<Effect>) {
        effects.push(Effect::KillVmm);
        effects.push(Effect::Wait(Wait::Death, self.limits.death));
    }

    fn rotate(&mut self, ready: bool, effects: &mut Vec<Effect>) {
        if self.in_rotation != ready {
            self.in_rotation = ready;
            effects.push(Effect::Rotation(ready));
        }
    }

    fn stop_vmm(&mut self, effects: &mut Vec<Effect>) {
        effects.push(Effect::StopVmm);
        effects.push(Effect::Wait(Wait::VmmStop, self.limits.vmm_stop));
    }

    fn plan_restart(
        &mut self,
        because: String,
        now: Duration,
        jitter: f64,
        effects: &mut Vec<Effect>,
    ) {
        // Up to the last heartbeat: the silence before a verdict does not count.
        let healthy = self.beats.map(|(first, last)| last.saturating_sub(first));
        self.state = State::Waiting;
        let delay = match self.budget.boot_ended(healthy, jitter) {
            Decision::After(delay) => {
                effects.push(Effect::Report(EventKind::Restarting {
                    because,
                    generation: self.generation + 1,
                    delay_ms: u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
                }));
                delay
            }
            Decision::Faulted(delay) => {
                effects.push(Effect::Report(EventKind::Faulted {
                    because,
                    retry_in_ms: u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
                }));
                delay
            }
        };
        self.restart_at = Some(now + delay);
        effects.push(Effect::Wait(Wait::Restart, delay));
    }

    fn finish(&mut self, clean: bool, error: Option<String>, effects: &mut Vec<Effect>) {
        self.rotate(false, effects);
        if let Some(error) = error {
            effects.push(Effect::Report(EventKind::Failed { error }));
        }
        self.state = State::Finished;
        self.restart_at = None;
        effects.push(Effect::Report(EventKind::Stopped { clean }));
        effects.push(Effect::Finish);
    }
}

/// Reports how a guest ended, and why if host-agent ended it.
fn exited(reason: ExitReason, because: Option<&String>) -> Effect {
    let ours = matches!(reason, ExitReason::Killed | ExitReason::Stopped);
    let because = because.filter(|_| ours).cloned();
    Effect::Report(EventKind::GuestExited { reason, because })
}

#[cfg(test)]
mod tests;
