//! Starts an instance: for the first time, or in the state in which an earlier host agent
//! left it.

use std::io;
use std::sync::Arc;

use nix::time::ClockId;
use tokio::sync::{mpsc, watch};

use super::super::event::EventKind;
use super::super::lifecycle::{Input, Lifecycle, RestartHistory};
use super::super::liveness::Liveness;
use super::super::process::VmmProcess;
use super::super::status::InstanceStatus;
use super::handle::InstanceHandle;
use super::headroom::Headroom;
use super::record::Records;
use super::space::HeldReports;
use super::space_claim::SpaceClaim;
use super::{CHANNEL_BACKLOG, INCOMING_BACKLOG, Instance, InstanceParts, clock};
use crate::blocking::DropBlocking;
use crate::cgroup::GuestGroup;
use crate::queued_writer::QueuedWriter;
use crate::token_bucket::{TIMELINE, TokenBucket};
use crate::vmm::control::{self, Attached, ExitReason};

/// An instance whose logs are open. Its start cannot fail.
#[derive(Debug)]
pub struct PreparedInstance {
    parts: InstanceParts,
    role_log: QueuedWriter,
    agent_log: QueuedWriter,
    history: RestartHistory,
    origin: Origin,
}

/// The state in which the actor finds the guest.
#[derive(Debug)]
pub(super) enum Origin {
    /// No VMM process runs, and none ended without a supervisor.
    Down,
    /// The VMM process of the last boot ended without a supervisor.
    Ended(Option<ExitReason>),
    /// The VMM process of the last boot runs.
    Attached {
        process: Box<VmmProcess>,
        attached: Box<Attached>,
        group: Option<DropBlocking<GuestGroup>>,
    },
}

impl PreparedInstance {
    /// Opens the logs of an instance without earlier boots. Blocking.
    pub fn new(parts: InstanceParts) -> io::Result<Self> {
        Ok(Self {
            role_log: QueuedWriter::open_log(&parts.dir.join("role.log"))?,
            agent_log: QueuedWriter::open_log(&parts.dir.join("agent.log"))?,
            parts,
            history: RestartHistory::default(),
            origin: Origin::Down,
        })
    }

    /// Adds the history of earlier boots. No VMM process runs.
    #[must_use]
    pub fn restored(mut self, history: RestartHistory) -> Self {
        self.history = history;
        self
    }

    /// Adds the history of earlier boots, of which the last ended without a supervisor for
    /// the reason `exit`.
    #[must_use]
    pub fn ended(mut self, history: RestartHistory, exit: Option<ExitReason>) -> Self {
        self.history = history;
        self.origin = Origin::Ended(exit);
        self
    }

    /// Adds the history of earlier boots, of which the last still runs. Blocking.
    #[must_use]
    pub fn attached(
        mut self,
        history: RestartHistory,
        process: VmmProcess,
        attached: Attached,
    ) -> Self {
        self.history = history;
        self.origin = Origin::Attached {
            group: GuestGroup::of_process(process.pid()).map(DropBlocking::new),
            process: Box::new(process),
            attached: Box::new(attached),
        };
        self
    }

    /// A handle to the instance, and its actor, a future that ends with the instance.
    pub fn start(self) -> (InstanceHandle, impl Future<Output = ()> + Send + 'static) {
        let Self {
            parts,
            role_log,
            agent_log,
            history,
            origin,
        } = self;
        let (requests, request_receiver) = mpsc::channel(16);
        let (channel_sender, channel_receiver) = mpsc::channel(CHANNEL_BACKLOG);
        let (incoming_sender, incoming_receiver) = mpsc::channel(INCOMING_BACKLOG);
        let (status, status_receiver) = watch::channel(InstanceStatus::default());
        let handle = InstanceHandle::new(&parts.spec, &parts.dir, requests, status_receiver);
        let instance = Instance {
            life: Lifecycle::restore(parts.limits, history),
            liveness: Liveness::new(parts.rule, parts.probe_limit),
            records: parts.durable.then(|| Records::new(parts.dir.clone())),
            preparation: None,
            boot: None,
            earlier_group: None,
            headroom: Headroom::default(),
            space_claim: SpaceClaim::default(),
            recording: None,
            wait: None,
            // Larger than the ids of an earlier host agent, so that late answers to its
            // requests match none of ours.
            last_id: u64::try_from(clock(ClockId::CLOCK_MONOTONIC).as_nanos()).unwrap_or(0),
            last_health: None,
            report_limit: TokenBucket::new(TIMELINE),
            held_reports: HeldReports::default(),
            role_log: Arc::new(role_log),
            agent_log: Arc::new(agent_log),
            channel_sender,
            incoming_sender,
            listener_changes: parts.listeners.changes(),
            goal: watch::channel(parts.spec.goal.clone()).0,
            status,
            parts,
        };
        let task = async move {
            let instance = instance
                .run(
                    origin,
                    request_receiver,
                    channel_receiver,
                    incoming_receiver,
                )
                .await;
            instance.flush_logs().await;
        };
        (handle, task)
    }
}

impl Instance {
    /// The first input of the lifecycle.
    pub(super) fn begin(&mut self, origin: Origin) -> bool {
        match origin {
            Origin::Down => self.feed(Input::Start),
            Origin::Ended(exit) => {
                let detail = "VMM process ended while no host agent was attached".into();
                let reason = exit.unwrap_or(ExitReason::Failed { detail });
                self.feed(Input::Ended(reason))
            }
            Origin::Attached {
                process,
                attached,
                group,
            } => self.adopt(*process, *attached, group),
        }
    }

    /// Adopts a running guest in the state that its VMM process reports.
    fn adopt(
        &mut self,
        process: VmmProcess,
        attached: Attached,
        group: Option<DropBlocking<GuestGroup>>,
    ) -> bool {
        let generation = attached.generation;
        let pid = process.pid();
        if attached.fails_when_full {
            // No command takes it back.
            let text = "the guest was being stopped when its host agent ended: until its next \
                        boot a write without disk space fails instead of pausing it";
            self.report(EventKind::Warning { text: text.into() });
        }
        let exit = match attached.exit {
            None if attached.panicked => Some(ExitReason::Panic),
            exit => exit,
        };
        self.begin_boot(generation, process, group, exit);
        if let Some(boot) = &mut self.boot {
            boot.holds_listeners = attached.holds_listeners;
        }
        self.hold_listeners();
        let held = !attached.no_space.is_empty();
        let now = clock(ClockId::CLOCK_MONOTONIC);
        self.liveness.adopted(attached.paused, held, now);
        let mut more = self.feed(Input::Adopted {
            generation,
            pid,
            no_space: held,
        });
        if attached.paused {
            self.report(EventKind::Paused { paused: true });
        }
        for disk in attached.no_space {
            let control::NoSpace {
                disk,
                needed,
                quota,
            } = disk;
            more = more && self.no_space(disk, needed, quota);
        }
        for disk in attached.failed_disks {
            self.disk_failed(disk);
        }
        more
    }
}
