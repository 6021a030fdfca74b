//! The actor of one instance: takes in what its VMM process, its channels and
//! its owner say, asks the pure policy, and performs the effects.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};
use tokio::net::UnixStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior};
use vmbus::channel::{Channel, EXEC_PORT, tunnel_port};
use vmbus::message::{Goal, Health};

use super::event::{EventKind, TimelineEvent, Verdict, state_name};
use super::guest;
use super::heartbeat::{Finding, HeartbeatRule, Monitor, Now};
use super::lifecycle::{Effect, Input, Lifecycle, Limits, Wait};
use super::process::{Happening, VmmProcess};
use crate::channels::{ChannelEvent, GuestChannels, ShutdownRequest};
use crate::endpoints::{Incoming, Rotation};
use crate::service::model::Role;
use crate::store::image::Image;
use crate::store::log_file::LogFile;
use crate::vmm::chain;
use crate::vmm::control::{Command, DialOutcome, Event, ExitReason, Stats};

/// Events of channels that may wait for the actor.
const CHANNEL_BACKLOG: usize = 256;
/// Connections that may wait for the actor.
const INCOMING_BACKLOG: usize = 256;
/// Time between two pings of the VMM process.
const PING_EVERY: Duration = Duration::from_secs(10);
/// Pings without an answer that make a VMM process hung.
const PINGS_MISSED: u32 = 3;
/// Violations reported per boot; later ones only count.
const MOST_VIOLATIONS_TOLD: u32 = 10;
/// Time for the guest's kernel to answer a probe.
const PROBE_LIMIT: Duration = Duration::from_secs(3);

/// What an instance is made of.
#[derive(Debug)]
pub struct InstanceParts {
    /// Name.
    pub name: String,
    /// Its role.
    pub role: Role,
    /// The guest image.
    pub image: Arc<Image>,
    /// Directory with its disks and logs.
    pub dir: PathBuf,
    /// The goal.
    pub goal: Goal,
    /// Heartbeat rule.
    pub rule: HeartbeatRule,
    /// Limits of its life.
    pub limits: Limits,
    /// Most time for a channel's hello.
    pub hello_limit: Duration,
    /// One rotation per endpoint of the role, all the same.
    pub rotation: Rotation,
    /// The deployment's timeline.
    pub timeline: mpsc::UnboundedSender<TimelineEvent>,
    /// When the deployment was accepted.
    pub accepted: Instant,
}

/// What an owner may ask of an instance.
#[derive(Debug)]
pub enum Request {
    /// Stop cleanly.
    Stop,
    /// Stop now.
    Kill,
    /// Stop or resume the vCPUs.
    Pause(bool, oneshot::Sender<Result<(), String>>),
    /// A connection to the guest agent's exec service.
    Exec(oneshot::Sender<Result<UnixStream, String>>),
    /// Counters of the VMM process.
    Stats(oneshot::Sender<Result<Stats, String>>),
}

/// What can be seen of an instance at any time.
#[derive(Debug, Clone, Default, serde::Serialize)]
pub struct View {
    /// Number of the boot.
    pub generation: u64,
    /// Process id of the VMM, 0 when none runs.
    pub pid: u32,
    /// State in one word.
    pub state: String,
}

/// A handle to a running actor.
#[derive(Debug, Clone)]
pub struct InstanceHandle {
    /// Instance name.
    pub name: String,
    /// Directory with its logs.
    pub dir: PathBuf,
    requests: mpsc::Sender<Request>,
    view: watch::Receiver<View>,
}

impl InstanceHandle {
    /// Puts a request; an actor that is gone has nothing left to stop.
    pub async fn send(&self, request: Request) {
        let _ = self.requests.send(request).await;
    }

    /// The instance as it is now.
    pub fn view(&self) -> View {
        self.view.borrow().clone()
    }

    /// Connects to the guest agent's exec service.
    pub async fn exec(&self) -> Result<UnixStream, String> {
        self.ask(Request::Exec).await
    }

    /// Stops or resumes the vCPUs.
    pub async fn pause(&self, paused: bool) -> Result<(), String> {
        self.ask(|answer| Request::Pause(paused, answer)).await
    }

    /// Counters of the VMM process.
    pub async fn stats(&self) -> Result<Stats, String> {
        self.ask(Request::Stats).await
    }

    async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, String>>) -> Request,
    ) -> Result<T, String> {
        let (answer, answered) = oneshot::channel();
        self.send(request(answer)).await;
        answered
            .await
            .unwrap_or_else(|_| Err("the instance ended".into()))
    }
}

/// What an answer to a dial is for.
#[derive(Debug)]
enum Dialed {
    Endpoint,
    Exec(UnixStream, oneshot::Sender<Result<UnixStream, String>>),
    Probe(Verdict),
}

/// One boot of the guest.
#[derive(Debug)]
struct Boot {
    process: VmmProcess,
    channels: Arc<GuestChannels>,
    shutdown: watch::Sender<Option<ShutdownRequest>>,
    exit: Option<ExitReason>,
    pings: u32,
    violations: u32,
    dials: BTreeMap<u64, Dialed>,
    stats: VecDeque<oneshot::Sender<Result<Stats, String>>>,
}

struct Instance {
    parts: InstanceParts,
    life: Lifecycle,
    monitor: Monitor,
    boot: Option<Boot>,
    paused: bool,
    ran_whole_tick: bool,
    wait: Option<(Instant, Wait)>,
    probe_deadline: Option<(Instant, Verdict)>,
    next_dial: u64,
    last_health: Option<Health>,
    role_log: Arc<Mutex<LogFile>>,
    agent_log: Arc<Mutex<LogFile>>,
    channel_sender: mpsc::Sender<(u64, ChannelEvent)>,
    incoming_sender: mpsc::Sender<Incoming>,
    goal: watch::Sender<Goal>,
    view: watch::Sender<View>,
}

/// Starts the actor; the task ends when the instance is finished.
pub fn start(parts: InstanceParts) -> io::Result<(InstanceHandle, tokio::task::JoinHandle<()>)> {
    let (requests, request_receiver) = mpsc::channel(16);
    let (channel_sender, channel_receiver) = mpsc::channel(CHANNEL_BACKLOG);
    let (incoming_sender, incoming_receiver) = mpsc::channel(INCOMING_BACKLOG);
    let (view, view_receiver) = watch::channel(View::default());
    let role_log = Arc::new(Mutex::new(LogFile::open(&parts.dir.join("role.log"))?));
    let agent_log = Arc::new(Mutex::new(LogFile::open(&parts.dir.join("agent.log"))?));
    let handle = InstanceHandle {
        name: parts.name.clone(),
        dir: parts.dir.clone(),
        requests,
        view: view_receiver,
    };
    let instance = Instance {
        life: Lifecycle::new(parts.limits),
        monitor: Monitor::new(parts.rule),
        boot: None,
        paused: false,
        ran_whole_tick: false,
        wait: None,
        probe_deadline: None,
        next_dial: 0,
        last_health: None,
        role_log,
        agent_log,
        channel_sender,
        incoming_sender,
        goal: watch::channel(parts.goal.clone()).0,
        view,
        parts,
    };
    let task = tokio::spawn(instance.run(request_receiver, channel_receiver, incoming_receiver));
    Ok((handle, task))
}

impl Instance {
    async fn run(
        mut self,
        mut requests: mpsc::Receiver<Request>,
        mut channels: mpsc::Receiver<(u64, ChannelEvent)>,
        mut incoming: mpsc::Receiver<Incoming>,
    ) {
        let mut tick = tokio::time::interval(self.parts.rule.tick());
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut ping = tokio::time::interval(PING_EVERY);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut running = self.feed(Input::Start);
        while running {
            let wait = self.wait;
            let probe = self.probe_deadline;
            running = tokio::select! {
                happening = next_happening(&mut self.boot) => self.happened(happening),
                Some((generation, event)) = channels.recv() => self.channel(generation, event),
                Some(connection) = incoming.recv() => {
                    self.connect(connection);
                    true
                }
                Some(request) = requests.recv() => self.request(request),
                () = until(wait.map(|(at, _)| at)) => {
                    let (_, wait) = self.wait.take().expect("the branch waits for it");
                    self.feed(Input::Waited(wait))
                }
                () = until(probe.map(|(at, _)| at)) => {
                    let (_, verdict) = self.probe_deadline.take().expect("the branch waits for it");
                    self.condemn(verdict, "the guest's kernel does not answer a probe", false)
                }
                _ = tick.tick() => {
                    let mut more = true;
                    while more && let Ok((generation, event)) = channels.try_recv() {
                        more = self.channel(generation, event);
                    }
                    more && self.tick()
                }
                _ = ping.tick() => self.ping(),
            };
        }
    }

    /// Gives one input to the policy and performs what it wants, until it
    /// wants nothing more. False when the instance is finished.
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
                    Performed::Finished => return false,
                }
            }
        }
        true
    }

    fn perform(&mut self, effect: Effect) -> Performed {
        match effect {
            Effect::Spawn { generation } => {
                return Performed::Then(match self.spawn(generation) {
                    Ok(pid) => Input::Spawned { pid },
                    Err(error) => Input::SpawnFailed(error),
                });
            }
            Effect::AskShutdown { then, deadline } => {
                self.monitor.settle();
                if let Some(boot) = &self.boot {
                    boot.shutdown
                        .send_replace(Some(ShutdownRequest { then, deadline }));
                }
            }
            Effect::StopVmm => {
                self.monitor.settle();
                if self.command(&Command::Stop {}, Vec::new()).is_err() {
                    self.kill();
                }
            }
            Effect::KillVmm => self.kill(),
            Effect::Wait(wait, time) => self.wait = Some((Instant::now() + time, wait)),
            Effect::Rotation(ready) => {
                let sender = ready.then(|| self.incoming_sender.clone());
                self.parts.rotation.set(&self.parts.name, sender);
                if !ready {
                    self.tell(EventKind::OutOfRotation);
                }
            }
            Effect::Tell(kind) => self.tell(kind),
            Effect::Finish => return Performed::Finished,
        }
        Performed::Done
    }

    fn spawn(&mut self, generation: u64) -> Result<u32, String> {
        self.monitor.booting();
        self.paused = false;
        self.wait = None;
        self.probe_deadline = None;
        let (shutdown, shutdown_receiver) = watch::channel(None);
        let parts = &self.parts;
        let (spec, files) = guest::prepare(&parts.dir, &parts.name, &parts.role, &parts.image)
            .map_err(|e| chain(&e))?;
        let log = guest::vmm_log(&parts.dir).map_err(|e| chain(&e))?;
        let process = VmmProcess::spawn(spec, &files, log).map_err(|e| chain(&e))?;
        let pid = process.pid();
        let channels = Arc::new(GuestChannels {
            generation,
            interval: parts.rule.interval(),
            hello_limit: parts.hello_limit,
            events: self.channel_sender.clone(),
            goal: self.goal.subscribe(),
            shutdown: shutdown_receiver,
            program: Arc::new(parts.image.agent.clone()),
            role_log: Arc::clone(&self.role_log),
            agent_log: Arc::clone(&self.agent_log),
            sequence: AtomicU64::new(0),
        });
        self.monitor = Monitor::new(parts.rule);
        self.boot = Some(Boot {
            process,
            channels,
            shutdown,
            exit: None,
            pings: 0,
            violations: 0,
            dials: BTreeMap::new(),
            stats: VecDeque::new(),
        });
        self.view.send_modify(|view| {
            view.generation = generation;
            view.pid = pid;
            "Booting".clone_into(&mut view.state);
        });
        Ok(pid)
    }

    fn happened(&mut self, happening: Happening) -> bool {
        let Some(boot) = &mut self.boot else {
            return true;
        };
        match happening {
            Happening::Event(event, files) => self.event(event, files),
            Happening::Garbled(error) => {
                self.tell(EventKind::Warning {
                    text: format!("VMM process sent what is no event: {}", chain(&error)),
                });
                self.kill();
                true
            }
            Happening::Ended(how) => {
                let reason = boot.exit.take().unwrap_or_else(|| Happening::died(how));
                self.boot = None;
                self.wait = None;
                self.probe_deadline = None;
                self.last_health = None;
                self.view.send_modify(|view| {
                    view.pid = 0;
                    "Down".clone_into(&mut view.state);
                });
                self.feed(Input::Ended(reason))
            }
        }
    }

    fn event(&mut self, event: Event, files: Vec<OwnedFd>) -> bool {
        let Some(boot) = &mut self.boot else {
            return true;
        };
        match event {
            Event::Running { setup_us } => self.tell(EventKind::GuestRunning { setup_us }),
            Event::StartFailed { reason } => {
                boot.exit = Some(ExitReason::Failed { detail: reason });
            }
            Event::Opened { port, source_port } => {
                if let Some(socket) = files.into_iter().next() {
                    boot.channels.accept(port, source_port, socket);
                }
            }
            Event::Dialed { id, outcome } => match boot.dials.remove(&id) {
                None | Some(Dialed::Endpoint) => {}
                Some(Dialed::Exec(stream, answer)) => {
                    let result = match outcome {
                        DialOutcome::Connected => Ok(stream),
                        other => Err(format!("guest agent does not take exec: {other:?}")),
                    };
                    let _ = answer.send(result);
                }
                Some(Dialed::Probe(verdict)) => {
                    if self.probe_deadline.take().is_some() {
                        let alive =
                            matches!(outcome, DialOutcome::Connected | DialOutcome::Refused);
                        let evidence = if alive {
                            "the guest's kernel answers: its agent is dead or hung"
                        } else {
                            "the guest's kernel does not answer a probe"
                        };
                        return self.condemn(verdict, evidence, alive);
                    }
                }
            },
            Event::Paused { paused } => {
                self.paused = paused;
                self.tell(EventKind::Paused { paused });
            }
            Event::Pong { .. } => boot.pings = 0,
            Event::Stats(stats) => {
                if let Some(answer) = boot.stats.pop_front() {
                    let _ = answer.send(Ok(stats));
                }
            }
            Event::DeviceNeedsReset { device, reason } => {
                self.violation(EventKind::DeviceNeedsReset { device, reason });
            }
            Event::GuestPanicked {} => boot.exit = Some(ExitReason::Panic),
            Event::Exited(reason) => {
                let panicked = boot.exit == Some(ExitReason::Panic);
                if !(panicked && reason == ExitReason::Reboot) {
                    boot.exit = Some(reason);
                }
            }
        }
        true
    }

    fn channel(&mut self, generation: u64, event: ChannelEvent) -> bool {
        if generation != self.life.generation() || self.boot.is_none() {
            return true;
        }
        match event {
            ChannelEvent::Booted { init_ms, agent } => {
                self.tell(EventKind::AgentConnected { init_ms, agent });
                self.feed(Input::Connected)
            }
            ChannelEvent::Asked(sequence) => {
                self.monitor.asked(sequence);
                true
            }
            ChannelEvent::Beat(beat) => {
                let fresh = self.monitor.beat(&beat.boot_id, beat.sequence);
                if fresh && self.last_health != Some(beat.health) {
                    self.last_health = Some(beat.health);
                    if beat.health == Health::Critical {
                        self.violation(EventKind::GuestAgent {
                            error: Some("is down or keeps dying".into()),
                        });
                    }
                }
                if fresh && beat.health == Health::Stopped {
                    self.monitor.booting();
                }
                !fresh || self.feed(Input::Beat)
            }
            ChannelEvent::Status(status) => {
                let name = state_name(status.state).to_owned();
                self.view.send_modify(|view| view.state = name);
                self.feed(Input::Status(status))
            }
            ChannelEvent::AgentResult { error } => {
                self.violation(EventKind::GuestAgent { error });
                true
            }
            ChannelEvent::ShutdownBegun => {
                self.monitor.booting();
                true
            }
            ChannelEvent::Violation { channel, reason } => {
                self.violation(EventKind::Warning {
                    text: format!("channel {}: {reason}", channel_name(channel)),
                });
                true
            }
        }
    }

    fn tick(&mut self) -> bool {
        let now = Now {
            monotonic: clock(ClockId::CLOCK_MONOTONIC),
            boottime: clock(ClockId::CLOCK_BOOTTIME),
        };
        // A pause that an operator asked for, to try the rule out, is what a
        // frozen guest looks like: it counts as silence.
        let ran = std::mem::replace(&mut self.ran_whole_tick, self.boot.is_some());
        match self.monitor.tick(now, ran) {
            None => true,
            Some(Finding::Resumed) => {
                self.tell(EventKind::Resumed);
                true
            }
            Some(Finding::Condemned(verdict)) => {
                if self.paused {
                    return self.condemn(verdict, "its vCPUs are stopped", false);
                }
                let id = self.dial_id();
                self.probe_deadline = Some((Instant::now() + PROBE_LIMIT, verdict));
                let port = EXEC_PORT;
                if self
                    .command(&Command::Probe { id, port }, Vec::new())
                    .is_ok()
                    && let Some(boot) = &mut self.boot
                {
                    boot.dials.insert(id, Dialed::Probe(verdict));
                }
                true
            }
        }
    }

    fn condemn(&mut self, verdict: Verdict, evidence: &str, kernel_alive: bool) -> bool {
        self.probe_deadline = None;
        self.feed(Input::Condemned {
            verdict,
            evidence: evidence.to_owned(),
            kernel_alive,
        })
    }

    fn ping(&mut self) -> bool {
        let id = self.dial_id();
        let Some(boot) = &mut self.boot else {
            return true;
        };
        boot.pings += 1;
        if boot.pings > PINGS_MISSED {
            boot.pings = 0;
            return self.condemn(
                Verdict::VmmHung,
                "three pings of its control socket unanswered",
                false,
            );
        }
        let _ = self.command(&Command::Ping { id }, Vec::new());
        true
    }

    fn request(&mut self, request: Request) -> bool {
        match request {
            Request::Stop => return self.feed(Input::Stop),
            Request::Kill => return self.feed(Input::Kill),
            Request::Pause(paused, answer) => {
                let command = if paused {
                    Command::Pause {}
                } else {
                    Command::Resume {}
                };
                let _ = answer.send(
                    self.command(&command, Vec::new())
                        .map_err(|e| e.to_string()),
                );
            }
            Request::Exec(answer) => self.exec(answer),
            Request::Stats(answer) => match self.command(&Command::Stats {}, Vec::new()) {
                Ok(()) => {
                    if let Some(boot) = &mut self.boot {
                        boot.stats.push_back(answer);
                    }
                }
                Err(error) => {
                    let _ = answer.send(Err(error.to_string()));
                }
            },
        }
        true
    }

    fn exec(&mut self, answer: oneshot::Sender<Result<UnixStream, String>>) {
        let result = (|| {
            let (ours, theirs) = UnixStream::pair()?;
            let theirs = OwnedFd::from(theirs.into_std()?);
            let id = self.dial_id();
            let port = EXEC_PORT;
            self.command(&Command::Dial { id, port }, vec![theirs])?;
            Ok::<_, io::Error>((id, ours))
        })();
        match (result, &mut self.boot) {
            (Ok((id, stream)), Some(boot)) => {
                boot.dials.insert(id, Dialed::Exec(stream, answer));
            }
            (Err(error), _) => {
                let _ = answer.send(Err(error.to_string()));
            }
            (Ok(_), None) => {
                let _ = answer.send(Err("no guest runs".into()));
            }
        }
    }

    fn connect(&mut self, connection: Incoming) {
        let id = self.dial_id();
        let port = tunnel_port(connection.local_port);
        let sent = self.command(&Command::Dial { id, port }, vec![connection.socket]);
        if sent.is_ok()
            && let Some(boot) = &mut self.boot
        {
            boot.dials.insert(id, Dialed::Endpoint);
        }
    }

    fn command(&mut self, command: &Command, files: Vec<OwnedFd>) -> io::Result<()> {
        match &mut self.boot {
            Some(boot) => boot.process.send(command, files),
            None => Err(io::Error::new(io::ErrorKind::NotConnected, "no guest runs")),
        }
    }

    fn kill(&mut self) {
        self.monitor.settle();
        if let Some(boot) = &mut self.boot {
            boot.process.kill();
        }
    }

    fn dial_id(&mut self) -> u64 {
        self.next_dial += 1;
        self.next_dial
    }

    /// Tells of something that a guest can cause at will: a few times a boot.
    fn violation(&mut self, kind: EventKind) {
        let Some(boot) = &mut self.boot else { return };
        boot.violations += 1;
        if boot.violations <= MOST_VIOLATIONS_TOLD {
            self.tell(kind);
        }
    }

    fn tell(&self, kind: EventKind) {
        let event = TimelineEvent {
            at: self.parts.accepted.elapsed(),
            instance: Some(self.parts.name.clone()),
            kind,
        };
        // Nobody listens only when the command is ending.
        let _ = self.parts.timeline.send(event);
    }
}

enum Performed {
    Done,
    Then(Input),
    Finished,
}

async fn next_happening(boot: &mut Option<Boot>) -> Happening {
    match boot {
        Some(boot) => boot.process.next().await,
        None => std::future::pending().await,
    }
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

fn clock(id: ClockId) -> Duration {
    clock_gettime(id).map_or(Duration::ZERO, Duration::from)
}

/// A number in 0..1 that differs between instances and calls; nothing secret
/// hangs on it.
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
