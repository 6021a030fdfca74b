//! The actor of one instance: gives the events of its VMM process, its channels
//! and its owner to the pure policy, and performs the effects.

mod agents;
mod boot;
mod drain;
mod handle;
mod headroom;
mod prepare;
pub mod record;
mod requests;
mod space;
mod space_claim;
mod start;
#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::mem::discriminant;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use vmbus::channel::{Channel, EXEC_PORT};
use vmbus::message::{Goal, Health, RoleState};

use super::agents::Offers;
use super::event::EventKind;
use super::lifecycle::{Effect, Input, Lifecycle, Limits, Wait};
use super::liveness::heartbeat::{HeartbeatRule, Now};
use super::liveness::{Liveness, LivenessEffect};
use super::spec::InstanceSpec;
use super::status::{InstanceStatus, Phase, is_outdated};
use super::timeline::Timeline;
use crate::blocking::DropBlocking;
use crate::cgroup::{GuestGroup, HostGroup};
use crate::channels::{ChannelEvent, ShutdownRequest};
use crate::endpoints::{HeldListeners, Incoming, ListenerChanges, Rotation};
use crate::queued_writer::QueuedWriter;
use crate::store::image::Image;
use crate::token_bucket::{LogLimit, MISBEHAVIOUR, TokenBucket};
use crate::until::until;
use crate::vmm::control::Command;
use boot::{GuestBoot, next_vmm_event};
pub use handle::{InstanceHandle, Request};
use headroom::Headroom;
use prepare::{Preparation, next_prepared};
use record::{InstanceRecord, PendingRecord, Records};
use space::{DiskSpace, HeldReports};
use space_claim::SpaceClaim;
use start::Origin;
pub use start::PreparedInstance;

/// Events of channels that may wait for the actor.
const CHANNEL_BACKLOG: usize = 256;
/// Connections that may wait for the actor.
const INCOMING_BACKLOG: usize = 256;
/// Requests to a VMM process that may wait for an answer.
const MAX_OPEN_REQUESTS: usize = 64;
/// Connections to the channels of one boot: two for each channel, for an agent
/// that dials again before the end of its old connection is known. Each may hold
/// an incomplete frame of 1 MiB.
const MAX_CONNECTIONS: usize = 2 * Channel::ALL.len();

/// Most time for the last messages of a guest to be read, and at the end of the
/// instance to be written to its logs.
const DRAIN_LIMIT: Duration = Duration::from_secs(1);

/// An instance and everything that it needs.
#[derive(Debug)]
pub struct InstanceParts {
    /// What it is.
    pub spec: InstanceSpec,
    /// The guest image.
    pub image: Arc<Image>,
    /// Directory with its disks and logs.
    pub dir: PathBuf,
    /// Heartbeat rule.
    pub rule: HeartbeatRule,
    /// Limits of its shutdown.
    pub limits: Limits,
    /// The host's cgroup, if guests can be limited.
    pub group: Option<Arc<DropBlocking<HostGroup>>>,
    /// Most time for a channel's hello.
    pub hello_limit: Duration,
    /// Most time for the guest's kernel to answer a dial.
    pub dial_limit: Duration,
    /// Most time for the answer to a probe of the guest's kernel, which is a dial.
    pub probe_limit: Duration,
    /// Time between two pings of the VMM process.
    pub ping_every: Duration,
    /// Time after which a boot whose files are not ready is reported.
    pub prepare_limit: Duration,
    /// One rotation per endpoint of the role, all the same.
    pub rotation: Rotation,
    /// The listening sockets of the role.
    pub listeners: HeldListeners,
    /// The deployment's timeline.
    pub timeline: Timeline,
    /// The guest agent that is offered.
    pub offers: Offers,
    /// The guest outlives this process, and its state is recorded for the next.
    pub durable: bool,
    /// Start no guest whose VMM process lacks a layer of the sandbox.
    pub require_sandbox: bool,
}

struct Instance {
    parts: InstanceParts,
    life: Lifecycle,
    liveness: Liveness,
    records: Option<Records>,
    /// The next boot, until its VMM process can be started.
    preparation: Option<Preparation>,
    boot: Option<GuestBoot>,
    /// The cgroup of an ended boot, which keeps its name until the next one.
    earlier_group: Option<DropBlocking<GuestGroup>>,
    headroom: Headroom,
    space_claim: SpaceClaim,
    /// The write of the last record.
    recording: Option<JoinHandle<()>>,
    wait: Option<(Instant, Wait)>,
    last_id: u64,
    last_health: Option<Health>,
    /// Limits the reports that the guest can cause.
    report_limit: TokenBucket<Duration>,
    held_reports: HeldReports,
    role_log: Arc<QueuedWriter>,
    agent_log: Arc<QueuedWriter>,
    channel_sender: mpsc::Sender<(u64, ChannelEvent)>,
    incoming_sender: mpsc::Sender<Incoming>,
    listener_changes: ListenerChanges,
    goal: watch::Sender<Goal>,
    status: watch::Sender<InstanceStatus>,
}

impl Instance {
    async fn run(
        mut self,
        origin: Origin,
        mut requests: mpsc::Receiver<Request>,
        mut channels: mpsc::Receiver<(u64, ChannelEvent)>,
        mut incoming: mpsc::Receiver<Incoming>,
    ) -> Self {
        let mut tick = tokio::time::interval(self.parts.rule.tick());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ping = tokio::time::interval(self.parts.ping_every);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut running = self.begin(origin);
        while running {
            let wait = self.wait;
            running = tokio::select! {
                event = next_vmm_event(&mut self.boot) => {
                    self.vmm_event(event, &mut channels).await
                }
                prepared = next_prepared(&mut self.preparation) => self.prepared(prepared),
                is_false = self.space_claim.checked() => {
                    self.space_checked(is_false);
                    true
                }
                measured = self.held_reports.measured() => {
                    self.release_reports(measured);
                    true
                }
                Some((generation, event)) = channels.recv() => self.channel(generation, event),
                Some(connection) = incoming.recv() => {
                    self.connect(connection);
                    true
                }
                Some(request) = requests.recv() => self.request(request),
                Ok(()) = self.listener_changes.changed() => {
                    self.hold_listeners();
                    true
                }
                () = until(wait.map(|(at, _)| at)) => {
                    let (_, wait) = self.wait.take().expect("the branch waits for it");
                    self.feed(Input::Waited(wait))
                }
                _ = tick.tick() => {
                    let mut more = true;
                    while more && let Ok((generation, event)) = channels.try_recv() {
                        more = self.channel(generation, event);
                    }
                    more && self.tick() && self.judge_flood()
                }
                _ = ping.tick() => self.ping(),
            };
        }
        self
    }

    /// Waits until the guest's last lines are in its logs, where the owner, for whom the
    /// timeline ends with this task, looks for the reason; and until the directory is as it
    /// stays.
    async fn flush_logs(self) {
        let (recording, dir) = (self.recording, self.parts.dir.clone());
        let released = tokio::task::spawn_blocking(move || headroom::release(&dir));
        let written = async {
            let _ = released.await;
            if let Some(recording) = recording {
                let _ = recording.await;
            }
            self.role_log.written().await;
            self.agent_log.written().await;
        };
        let _ = tokio::time::timeout(DRAIN_LIMIT, written).await;
    }

    /// Gives one input to the policy and performs its effects, and the inputs
    /// that these give. False when the instance is finished.
    fn feed(&mut self, input: Input) -> bool {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let effects = self
                .life
                .on(input, clock(ClockId::CLOCK_MONOTONIC), random_part());
            for effect in effects {
                match self.perform(effect) {
                    Performed::Done => {}
                    Performed::Then(input) => inputs.push_back(input),
                    Performed::Finished => {
                        self.record();
                        return false;
                    }
                }
            }
        }
        self.record();
        true
    }

    /// Writes the record of this instance if it has changed.
    fn record(&mut self) {
        if let Some(record) = self.changed_record() {
            let name = self.parts.spec.name().to_owned();
            let recording = tokio::task::spawn_blocking(move || {
                // A supervisor that adopts by an older record finds less, and the
                // next change is recorded again.
                if let Err(error) = record.write() {
                    tracing::warn!(instance = name, %error, "cannot record the state");
                }
            });
            self.recording = Some(recording);
        }
    }

    /// What is to be recorded of this instance, if that has changed.
    fn changed_record(&mut self) -> Option<PendingRecord> {
        let records = self.records.as_mut()?;
        let mut spec = self.parts.spec.clone();
        spec.goal = self.goal.borrow().clone();
        records.update(InstanceRecord {
            spec,
            history: self.life.history(),
            process: self.boot.as_ref().map(|boot| boot.process.id()),
        })
    }

    fn perform(&mut self, effect: Effect) -> Performed {
        match effect {
            Effect::Spawn { generation } => {
                self.wait = None;
                let record = self.changed_record();
                self.preparation = Some(Preparation::start(
                    generation,
                    &self.parts,
                    record,
                    self.earlier_group.take().map(DropBlocking::into_inner),
                ));
            }
            Effect::AskShutdown { then, deadline } => {
                self.liveness.taken_down();
                // A guest that is paused for space cannot shut down: its writes
                // get errors instead.
                let _ = self.command(&Command::FailWhenFull {}, Vec::new());
                if self.liveness.is_paused_by_operator() {
                    // If this fails, the limit of the shutdown ends the process.
                    let _ = self.command(&Command::Resume {}, Vec::new());
                }
                if let Some(boot) = &self.boot {
                    boot.shutdown
                        .send_replace(Some(ShutdownRequest { then, deadline }));
                }
            }
            Effect::StopVmm | Effect::KillVmm if self.preparation.take().is_some() => {
                return Performed::Then(Input::SpawnCancelled);
            }
            Effect::StopVmm => {
                self.liveness.taken_down();
                if self.command(&Command::Stop {}, Vec::new()).is_err() {
                    self.kill();
                }
            }
            Effect::KillVmm => self.kill(),
            Effect::Wait(wait, time) => self.wait = Some((Instant::now() + time, wait)),
            Effect::Rotation(ready) => {
                let sender = ready.then(|| self.incoming_sender.clone());
                self.parts.rotation.set(self.parts.spec.name(), sender);
                if !ready && self.report_limit.take(clock(ClockId::CLOCK_MONOTONIC)) {
                    self.report(EventKind::OutOfRotation);
                }
            }
            Effect::Report(kind) => self.report(kind),
            Effect::Finish => {
                self.release_reports(None);
                return Performed::Finished;
            }
        }
        Performed::Done
    }

    fn channel(&mut self, generation: u64, event: ChannelEvent) -> bool {
        if generation != self.life.generation() || self.boot.is_none() {
            return true;
        }
        match event {
            ChannelEvent::Booted { init_ms, agent } => {
                let connected = EventKind::AgentConnected { init_ms, agent };
                self.observe(&connected);
                if self.report_limit.take(clock(ClockId::CLOCK_MONOTONIC)) {
                    self.report(connected);
                }
                self.feed(Input::Connected)
            }
            ChannelEvent::Asked(sequence) => {
                self.liveness.asked(sequence);
                true
            }
            ChannelEvent::Beat(beat) => {
                let fresh = self.liveness.beat(&beat.boot_id, beat.sequence);
                if fresh {
                    self.status.send_if_modified(|status| {
                        status.last_heartbeat = Some(clock(ClockId::CLOCK_MONOTONIC));
                        // The age of a heartbeat is read at need; it wakes no watcher.
                        false
                    });
                }
                if fresh && self.last_health != Some(beat.health) {
                    self.last_health = Some(beat.health);
                    if beat.health == Health::Critical {
                        self.report_limited(EventKind::GuestAgent {
                            error: Some("is down or keeps dying".into()),
                        });
                    }
                }
                if fresh && beat.health == Health::Stopped {
                    self.liveness.booting_again();
                }
                !fresh || self.feed(Input::Beat)
            }
            ChannelEvent::Status(status)
                if is_outdated(&status, self.goal.borrow().incarnation) =>
            {
                true
            }
            ChannelEvent::Status(status) => {
                self.status.send_modify(|known| {
                    if status.state != RoleState::Unknown {
                        known.phase = Phase::Role(status.state);
                    }
                    known.recycles = status.recycles;
                    known.applied = status.applied;
                });
                self.feed(Input::Status(status))
            }
            ChannelEvent::AgentResult { error } => {
                self.report_limited(EventKind::GuestAgent { error });
                true
            }
            ChannelEvent::Agent(event) => {
                self.agent(event);
                true
            }
            ChannelEvent::ShutdownBegun => {
                self.liveness.booting_again();
                self.feed(Input::ShutdownBegun)
            }
            ChannelEvent::Violation { channel, reason } => {
                self.report_limited(EventKind::Warning {
                    text: format!("channel {}: {reason}", channel_name(channel)),
                });
                true
            }
        }
    }

    fn tick(&mut self) -> bool {
        let id = self.next_id();
        let now = Now {
            monotonic: clock(ClockId::CLOCK_MONOTONIC),
            boottime: clock(ClockId::CLOCK_BOOTTIME),
        };
        let effect = self.liveness.tick(now, id);
        if self.boot.is_some() {
            self.headroom.extend(&self.parts.dir);
        }
        self.check_space_claim(now.monotonic);
        self.perform_liveness(effect)
    }

    fn ping(&mut self) -> bool {
        let id = self.next_id();
        let effect = self.liveness.ping_due(id);
        self.perform_liveness(effect)
    }

    fn perform_liveness(&mut self, effect: Option<LivenessEffect>) -> bool {
        // A probe or ping that cannot be sent has no answer either.
        match effect {
            Some(LivenessEffect::SendProbe { id }) => {
                let port = EXEC_PORT;
                let _ = self.command(&Command::Probe { id, port }, Vec::new());
            }
            Some(LivenessEffect::SendPing { id }) => {
                let _ = self.command(&Command::Ping { id }, Vec::new());
            }
            Some(LivenessEffect::ReportResumed) => self.report(EventKind::Resumed),
            Some(LivenessEffect::Condemn(evidence)) => {
                return self.feed(Input::Condemned {
                    verdict: evidence.verdict,
                    evidence: evidence.evidence.to_owned(),
                    kernel_alive: evidence.kernel_alive,
                });
            }
            None => {}
        }
        true
    }

    fn kill(&mut self) {
        self.liveness.taken_down();
        if let Some(boot) = &mut self.boot {
            boot.process.kill();
        }
    }

    /// Reports what a guest can cause at will, at a limited rate.
    fn report_limited(&mut self, kind: EventKind) {
        let Some(boot) = &mut self.boot else { return };
        let now = clock(ClockId::CLOCK_MONOTONIC);
        let limit = boot.misbehaviour.entry(discriminant(&kind));
        let limit = limit.or_insert_with(|| LogLimit::new(MISBEHAVIOUR));
        if let Some(suppressed) = limit.allow(now) {
            self.report_suppressed(suppressed);
            self.report(kind);
        }
    }

    fn report_suppressed(&mut self, suppressed: u64) {
        if suppressed > 0 {
            let text = format!("{suppressed} more warnings about this guest were suppressed");
            self.report(EventKind::Warning { text });
        }
    }

    /// Takes an event into the status, whether or not it is reported.
    fn observe(&self, kind: &EventKind) {
        self.status.send_modify(|status| status.apply(kind));
    }

    fn report(&mut self, kind: EventKind) {
        self.observe(&kind);
        if let Some(kind) = self.held_reports.pass(kind) {
            self.parts
                .timeline
                .report(Some(self.parts.spec.name()), kind);
        }
    }

    fn release_reports(&mut self, measured: Option<DiskSpace>) {
        for kind in self.held_reports.release(measured) {
            if matches!(kind, EventKind::NoSpace { .. }) && self.liveness.is_paused_for_space() {
                self.observe(&kind);
            }
            self.parts
                .timeline
                .report(Some(self.parts.spec.name()), kind);
        }
    }
}

enum Performed {
    Done,
    Then(Input),
    Finished,
}

fn clock(id: ClockId) -> Duration {
    clock_gettime(id).map_or(Duration::ZERO, Duration::from)
}

/// A number in 0..1 that differs between instances and calls. Not for secrets.
fn random_part() -> f64 {
    f64::from(clock(ClockId::CLOCK_MONOTONIC).subsec_nanos() % 1000) / 1000.0
}

/// Name of a channel as in the protocol.
fn channel_name(channel: Channel) -> String {
    serde_json::to_string(&channel)
        .unwrap_or_default()
        .trim_matches('"')
        .to_owned()
}
