//! What happens to an instance and what is done about it. Pure: each input
//! with the time gives effects; nothing here waits or touches a process.

use std::time::Duration;

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
    /// PID 1 of the guest spoke.
    Connected,
    /// A fresh heartbeat came.
    Beat,
    /// The host has no room for what the guest writes: it stands still.
    NoSpace,
    /// There is room again.
    SpaceBack,
    /// The role's status, of the current boot.
    Status(Status),
    /// The monitor condemned the guest, and this was seen when looking closer.
    Condemned {
        /// The verdict.
        verdict: Verdict,
        /// What was seen, in words.
        evidence: String,
        /// Whether the guest's kernel answered.
        kernel_alive: bool,
    },
    /// The guest has begun to shut down.
    ShutdownBegun,
    /// The VMM process ended.
    Ended(ExitReason),
    /// [`Effect::Wait`] is over.
    Waited(Wait),
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
    /// The VMM process's orderly end.
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
        /// How it ends.
        then: PowerAction,
        /// Time for the role.
        deadline: Duration,
    },
    /// Ask the VMM process to flush and end.
    StopVmm,
    /// End the VMM process by force.
    KillVmm,
    /// Give [`Input::Waited`] after this time.
    Wait(Wait, Duration),
    /// Put the instance in or out of its endpoints' rotation.
    Rotation(bool),
    /// Tell the timeline.
    Tell(EventKind),
    /// The instance is finished.
    Finish,
}

/// The numbers of the rules, scaled for this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Time for a role to stop when the service is stopped.
    pub role_stop: Duration,
    /// Time for the guest beyond that to power off.
    pub power_off: Duration,
    /// Time for a condemned guest whose kernel answers to begin to shut down.
    /// Its agent, which would, is most likely what is dead.
    pub begin: Duration,
    /// Time for a condemned guest that shuts down to do so.
    pub condemned: Duration,
    /// Time for the VMM process to flush and end.
    pub vmm_stop: Duration,
    /// Time for the VMM process to be gone after it was killed.
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
    status: Option<Status>,
    /// The status has changed since it was last told.
    untold: bool,
    quota: TokenBucket<Duration>,
    in_rotation: bool,
    /// The guest stands still for want of room.
    no_space: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum State {
    /// Nothing runs, nothing is wanted yet.
    Idle,
    /// A VMM process runs, or is being started.
    Running,
    /// It is being ended so that it can be started again.
    Ending {
        because: String,
        /// The guest was asked to shut down, and did not begin to so far.
        asked: bool,
    },
    /// Waiting to start again.
    Waiting,
    /// Being stopped for good.
    Stopping,
    /// Over.
    Finished,
}

impl Lifecycle {
    /// An instance that does not run yet.
    pub fn new(limits: Limits) -> Self {
        Self {
            limits,
            state: State::Idle,
            generation: 0,
            budget: RestartBudget::default(),
            beats: None,
            connected: false,
            status: None,
            untold: false,
            quota: TokenBucket::new(TIMELINE),
            in_rotation: false,
            no_space: false,
        }
    }

    /// Number of the current boot, 0 before the first.
    pub const fn generation(&self) -> u64 {
        self.generation
    }

    /// Takes in what happened at `now` (monotonic). `jitter` in 0..=1 spreads
    /// restart delays.
    pub fn on(&mut self, input: Input, now: Duration, jitter: f64) -> Vec<Effect> {
        let mut effects = Vec::new();
        match (input, self.state.clone()) {
            (_, State::Finished) => {}
            (Input::Start, State::Idle) | (Input::Waited(Wait::Restart), State::Waiting) => {
                self.boot(&mut effects);
            }
            (Input::Spawned { pid }, _) => effects.push(Effect::Tell(EventKind::GuestStarting {
                generation: self.generation,
                pid,
            })),
            (Input::SpawnFailed(error), State::Stopping) => {
                self.finish(false, Some(error), &mut effects);
            }
            (Input::SpawnFailed(error), _) => {
                effects.push(Effect::Tell(EventKind::Failed {
                    error: error.clone(),
                }));
                self.plan_restart(error, jitter, &mut effects);
            }
            (Input::Connected, _) => self.connected = true,
            (Input::Beat, State::Running) => {
                self.beats.get_or_insert((now, now)).1 = now;
                self.tell_status(now, &mut effects);
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
                effects.push(Effect::Tell(EventKind::Verdict { verdict, evidence }));
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
            // Once: a guest that says so again gets no more time.
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
            (Input::Ended(reason), State::Running) => {
                self.rotate(false, &mut effects);
                let because = exit_text(&reason);
                effects.push(exited(reason, None));
                self.plan_restart(because, jitter, &mut effects);
            }
            (Input::Ended(reason), State::Ending { because, .. }) => {
                effects.push(exited(reason, Some(&because)));
                self.plan_restart(because, jitter, &mut effects);
            }
            (Input::Ended(reason), State::Stopping) => {
                // A guest in which nothing of ours ran yet has nothing to stop.
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
                effects.push(Effect::Tell(EventKind::Stopping));
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
                effects.push(Effect::Tell(EventKind::Warning { text }));
                effects.push(Effect::KillVmm);
                effects.push(Effect::Wait(Wait::Death, REMIND));
            }
            // A second stop, and what belongs to a boot that is over.
            _ => {}
        }
        effects
    }

    fn boot(&mut self, effects: &mut Vec<Effect>) {
        self.generation += 1;
        self.state = State::Running;
        self.beats = None;
        self.connected = false;
        self.no_space = false;
        self.status = None;
        self.untold = false;
        effects.push(Effect::Spawn {
            generation: self.generation,
        });
    }

    fn status(&mut self, status: Status, state: &State, now: Duration, effects: &mut Vec<Effect>) {
        if self.status.as_ref() == Some(&status) {
            return;
        }
        // A guest agent that has just begun knows nothing of a role: no news.
        self.untold = status.state != RoleState::Unknown;
        self.status = Some(status);
        self.tell_status(now, effects);
        self.rotate_by_status(state, effects);
    }

    /// A guest that runs is in rotation while its role is Ready.
    fn rotate_by_status(&mut self, state: &State, effects: &mut Vec<Effect>) {
        if *state == State::Running {
            let ready = self.status.as_ref().map(|status| status.state) == Some(RoleState::Ready);
            self.rotate(ready && !self.no_space, effects);
        }
    }

    /// Tells the newest status. A guest that changes it all the time is told of
    /// now and then: what came between is passed over.
    fn tell_status(&mut self, now: Duration, effects: &mut Vec<Effect>) {
        let Some(status) = self.status.as_ref().filter(|_| self.untold) else {
            return;
        };
        if !self.quota.take(now) {
            return;
        }
        self.untold = false;
        effects.push(Effect::Tell(EventKind::Role {
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

    fn plan_restart(&mut self, because: String, jitter: f64, effects: &mut Vec<Effect>) {
        // The silence before a verdict is no health.
        let healthy = self.beats.map(|(first, last)| last.saturating_sub(first));
        self.state = State::Waiting;
        let delay = match self.budget.boot_ended(healthy, jitter) {
            Decision::After(delay) => {
                effects.push(Effect::Tell(EventKind::Restarting {
                    because,
                    generation: self.generation + 1,
                    delay_ms: u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
                }));
                delay
            }
            Decision::Faulted(delay) => {
                effects.push(Effect::Tell(EventKind::Faulted {
                    because,
                    retry_in_ms: u64::try_from(delay.as_millis()).unwrap_or(u64::MAX),
                }));
                delay
            }
        };
        effects.push(Effect::Wait(Wait::Restart, delay));
    }

    fn finish(&mut self, clean: bool, error: Option<String>, effects: &mut Vec<Effect>) {
        self.rotate(false, effects);
        if let Some(error) = error {
            effects.push(Effect::Tell(EventKind::Failed { error }));
        }
        self.state = State::Finished;
        effects.push(Effect::Tell(EventKind::Stopped { clean }));
        effects.push(Effect::Finish);
    }
}

/// Tells how a guest ended, and why if it was our doing.
fn exited(reason: ExitReason, because: Option<&String>) -> Effect {
    let ours = matches!(reason, ExitReason::Killed | ExitReason::Stopped);
    let because = because.filter(|_| ours).cloned();
    Effect::Tell(EventKind::GuestExited { reason, because })
}

#[cfg(test)]
mod tests;
