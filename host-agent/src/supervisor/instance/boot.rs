//! One boot of an instance's guest: the start of its VMM process and that
//! process's events.

use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::mem::Discriminant;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use vmbus::text::chain;

use super::super::event::{EventKind, Verdict};
use super::super::guest;
use super::super::lifecycle::Input;
use super::super::process::{Ending, VmmEvent, VmmProcess};
use super::drain::drain;
use super::prepare::{Prepared, StartedBoot};
use super::requests::PendingExec;
use super::space_claim::SpaceClaim;
use super::{DRAIN_LIMIT, Instance, MAX_CONNECTIONS};
use crate::blocking::DropBlocking;
use crate::cgroup::GuestGroup;
use crate::channels::{ChannelEvent, GuestChannels, ShutdownRequest};
use crate::token_bucket::LogLimit;
use crate::vmm::control::{self, Event, ExitReason};

/// One boot of the guest, from the start of its VMM process to the end of it.
#[derive(Debug)]
pub(super) struct GuestBoot {
    pub(super) process: VmmProcess,
    /// Taken when the process has ended.
    group: Option<DropBlocking<GuestGroup>>,
    /// Taken when the process has ended.
    connections: Option<Connections>,
    pub(super) shutdown: watch::Sender<Option<ShutdownRequest>>,
    exit: Option<ExitReason>,
    /// A pause for space was reported, so that its end is reported too.
    pub(super) no_space_reported: bool,
    pub(super) misbehaviour: HashMap<Discriminant<EventKind>, LogLimit<Duration>>,
    pub(super) execs: BTreeMap<u64, PendingExec>,
    /// The guest is being ended because it floods.
    condemned: bool,
    /// The process can hold listening sockets; one of an earlier version cannot.
    pub(super) holds_listeners: bool,
}

/// The guest's connections to the channels.
#[derive(Debug)]
struct Connections {
    /// Each connection's task shares it.
    channels: Arc<GuestChannels>,
    /// Closes with the last of `channels`.
    open: mpsc::Receiver<Infallible>,
}

impl Instance {
    /// The preparation of a boot has ended, or takes long.
    pub(super) fn prepared(&mut self, prepared: Prepared) -> bool {
        match prepared {
            Prepared::Ended(generation, Ok(started)) => {
                let pid = self.started(generation, started);
                self.feed(Input::Spawned { pid })
            }
            Prepared::Ended(_, Err(error)) => self.feed(Input::SpawnFailed(error)),
            Prepared::Late(generation) => {
                let seconds = self.parts.prepare_limit.as_secs();
                let text = format!(
                    "the files of generation {generation} are not ready after {seconds} s: the \
                     file system of {} is slow or hangs",
                    self.parts.dir.display()
                );
                self.report(EventKind::Warning { text });
                true
            }
        }
    }

    /// A VMM process was started; its process id.
    fn started(&mut self, generation: u64, mut started: Box<StartedBoot>) -> u32 {
        if let Some(error) = started.not_limited.take() {
            let text = format!("memory limit is not enforced: {}", chain(&error));
            self.report(EventKind::Warning { text });
        }
        let process = started.claim();
        let pid = process.pid();
        self.begin_boot(generation, process, started.group.take(), None);
        self.hold_listeners();
        self.liveness.spawned();
        pid
    }

    /// A VMM process runs, whose guest has ended if there is an `exit`.
    pub(super) fn begin_boot(
        &mut self,
        generation: u64,
        process: VmmProcess,
        group: Option<DropBlocking<GuestGroup>>,
        exit: Option<ExitReason>,
    ) {
        self.space_claim = SpaceClaim::default();
        let (shutdown, shutdown_receiver) = watch::channel(None);
        let (alive, open) = mpsc::channel(1);
        let parts = &self.parts;
        let channels = Arc::new(GuestChannels {
            generation,
            interval: parts.rule.interval(),
            hello_limit: parts.hello_limit,
            events: self.channel_sender.clone(),
            goal: self.goal.subscribe(),
            shutdown: shutdown_receiver,
            program: Arc::clone(&parts.image.agent),
            offers: parts.offers.clone(),
            role_log: Arc::clone(&self.role_log),
            agent_log: Arc::clone(&self.agent_log),
            alive,
            sequence: AtomicU64::new(0),
            budget: Arc::clone(process.budget()),
            closer: process.closer().clone(),
        });
        self.boot = Some(GuestBoot {
            process,
            group,
            connections: Some(Connections { channels, open }),
            shutdown,
            exit,
            no_space_reported: false,
            misbehaviour: HashMap::new(),
            execs: BTreeMap::new(),
            condemned: false,
            holds_listeners: true,
        });
    }

    /// The VMM process sent an event or ended.
    pub(super) async fn vmm_event(
        &mut self,
        event: VmmEvent,
        channels: &mut mpsc::Receiver<(u64, ChannelEvent)>,
    ) -> bool {
        match event {
            VmmEvent::Event(event, file) => self.event(event, file) && self.judge_flood(),
            VmmEvent::Garbled(error) => {
                // Limited like everything that a guest can cause: its VMM process
                // is restarted only if it does not answer pings either.
                let text = format!("VMM process sent an invalid event: {}", chain(&error));
                self.report_limited(EventKind::Warning { text });
                self.judge_flood()
            }
            VmmEvent::Ended(ending) => self.drain(channels).await && self.ended(ending).await,
        }
    }

    /// Ends a guest that has caused too many events for too long.
    pub(super) fn judge_flood(&mut self) -> bool {
        let Some(boot) = &mut self.boot else {
            return true;
        };
        if boot.condemned || !boot.process.budget().floods() {
            return true;
        }
        boot.condemned = true;
        self.feed(Input::Condemned {
            verdict: Verdict::Floods,
            evidence: "its events exceeded their limit for seconds".into(),
            kernel_alive: false,
        })
    }

    /// Takes in the guest's last channel events, so that its end is judged by its
    /// last status.
    async fn drain(&mut self, channels: &mut mpsc::Receiver<(u64, ChannelEvent)>) -> bool {
        let boot = self.boot.as_mut();
        let Some(mut connections) = boot.and_then(|boot| boot.connections.take()) else {
            return true;
        };
        drop(connections.channels);
        drain(
            channels,
            &mut connections.open,
            DRAIN_LIMIT,
            |generation, event| self.channel(generation, event),
        )
        .await
    }

    async fn ended(&mut self, ending: Ending) -> bool {
        let Some(mut boot) = self.boot.take() else {
            return true;
        };
        let group = boot.group.take();
        let look = move || {
            (
                group.as_ref().and_then(|group| group.killed_for_memory()),
                group,
            )
        };
        let looked = tokio::task::spawn_blocking(look).await;
        let (why, group) = looked.unwrap_or_default();
        self.earlier_group = group;
        let killed = boot.process.was_killed();
        let reason = boot
            .exit
            .take()
            .unwrap_or_else(|| ending.reason(why, killed));
        let suppressed = boot.misbehaviour.values().map(LogLimit::suppressed);
        self.report_suppressed(suppressed.fold(0, u64::saturating_add));
        drop(boot);
        self.liveness.ended();
        self.wait = None;
        self.last_health = None;
        self.feed(Input::Ended(reason))
    }

    fn event(&mut self, event: Event, file: Option<OwnedFd>) -> bool {
        let Some(boot) = &mut self.boot else {
            return true;
        };
        match event {
            Event::Running { setup_us, sandbox } => {
                self.report(EventKind::GuestRunning { setup_us, sandbox });
            }
            Event::StartFailed { reason } => {
                boot.exit = Some(ExitReason::Failed { detail: reason });
            }
            Event::Opened { port, source_port } => self.opened(port, source_port, file),
            Event::Dialed { id, outcome } => return self.dialed(id, outcome),
            Event::Paused { paused } => {
                if self.liveness.paused(paused) {
                    self.report(EventKind::Paused { paused });
                }
            }
            Event::NoSpace(control::NoSpace {
                disk,
                needed,
                quota,
            }) => return self.no_space(disk, needed, quota),
            Event::SpaceBack {} => return self.space_back(),
            Event::Pong { .. } => self.liveness.pong(),
            Event::DeviceNeedsReset { device, reason } => {
                self.report_limited(EventKind::DeviceNeedsReset { device, reason });
            }
            Event::DiskFailed(failed) => self.disk_failed(failed),
            Event::GuestPanicked {} => boot.exit = Some(ExitReason::Panic),
            // Answers to commands that an instance does not send, and events of another build.
            Event::Stats(_) | Event::Attached(_) | Event::Refused { .. } | Event::Unknown => {}
            Event::Exited(reason) => {
                let panicked = boot.exit == Some(ExitReason::Panic);
                if !(panicked && reason == ExitReason::Reboot) {
                    boot.exit = Some(reason);
                }
            }
        }
        true
    }

    /// The host cannot serve the file behind a disk.
    pub(super) fn disk_failed(&mut self, failed: control::DiskFailed) {
        let control::DiskFailed { disk, error, full } = failed;
        let file = guest::disk_file(&disk).unwrap_or("disk");
        let file = self.parts.dir.join(file);
        self.report_limited(EventKind::DiskFailed {
            disk,
            file,
            error,
            full,
        });
    }

    /// The guest opened a connection to a channel.
    fn opened(&mut self, port: u32, source_port: u32, socket: Option<OwnedFd>) {
        let (Some(boot), Some(socket)) = (&self.boot, socket) else {
            return;
        };
        match &boot.connections {
            // One share is ours.
            Some(connections) if Arc::strong_count(&connections.channels) <= MAX_CONNECTIONS => {
                connections.channels.accept(port, source_port, socket);
            }
            connections => {
                boot.process.closer().close([socket]);
                if connections.is_some() {
                    let text = "too many connections to channels".into();
                    self.report_limited(EventKind::Warning { text });
                }
            }
        }
    }
}

pub(super) async fn next_vmm_event(boot: &mut Option<GuestBoot>) -> VmmEvent {
    match boot {
        Some(boot) => boot.process.next().await,
        None => std::future::pending().await,
    }
}
