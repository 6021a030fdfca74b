//! One boot of an instance's guest: its VMM process is started, its events are
//! taken in.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::mem::Discriminant;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use tokio::sync::{oneshot, watch};
use vmbus::text::chain;

use super::super::event::EventKind;
use super::super::guest;
use super::super::lifecycle::Input;
use super::super::process::{Launch, VmmEvent, VmmProcess};
use super::dial::Dialed;
use super::{Instance, MOST_CHANNELS};
use crate::cgroup::{self, GroupError, GuestGroup};
use crate::channels::{GuestChannels, ShutdownRequest};
use crate::store::deployment::short_id;
use crate::token_bucket::LogLimit;
use crate::vmm::control::{self, Event, ExitReason, Stats};
use crate::vmm::spec::GuestSpec;

/// One boot of the guest.
#[derive(Debug)]
pub(super) struct Boot {
    pub(super) process: VmmProcess,
    // Goes after the process, which is in it.
    group: Option<GuestGroup>,
    pub(super) channels: Arc<GuestChannels>,
    pub(super) shutdown: watch::Sender<Option<ShutdownRequest>>,
    pub(super) exit: Option<ExitReason>,
    /// A pause for space was reported, so that its end is reported too.
    pub(super) no_space_reported: bool,
    pub(super) trouble: HashMap<Discriminant<EventKind>, LogLimit<Duration>>,
    pub(super) dials: BTreeMap<u64, Dialed>,
    pub(super) stats: VecDeque<oneshot::Sender<Result<Stats, String>>>,
}

impl Instance {
    pub(super) fn spawn(&mut self, generation: u64) -> Result<u32, String> {
        self.wait = None;
        let (shutdown, shutdown_receiver) = watch::channel(None);
        let parts = &self.parts;
        let (spec, files) = guest::prepare(&parts.dir, &parts.spec, &parts.image, parts.dial_limit)
            .map_err(|e| chain(&e))?;
        let log = guest::vmm_log(&parts.dir).map_err(|e| chain(&e))?;
        let group = self.limited(&spec);
        let launch = Launch {
            generation,
            guest: spec,
            files,
            log,
            outlive_in: None,
        };
        let process = VmmProcess::spawn(launch, |pid| {
            if let Some(group) = &group
                && let Err(error) = group.enter(pid)
            {
                self.not_limited(&error);
            }
        })
        .map_err(|e| chain(&e))?;
        let pid = process.pid();
        let channels = Arc::new(GuestChannels {
            generation,
            interval: parts.rule.interval(),
            hello_limit: parts.hello_limit,
            events: self.channel_sender.clone(),
            goal: self.goal.subscribe(),
            shutdown: shutdown_receiver,
            program: Arc::clone(&parts.image.agent),
            role_log: Arc::clone(&self.role_log),
            agent_log: Arc::clone(&self.agent_log),
            alive: self.alive.clone(),
            sequence: AtomicU64::new(0),
        });
        self.boot = Some(Boot {
            process,
            group,
            channels,
            shutdown,
            exit: None,
            no_space_reported: false,
            trouble: HashMap::new(),
            dials: BTreeMap::new(),
            stats: VecDeque::new(),
        });
        self.liveness.spawned();
        Ok(pid)
    }

    /// The cgroup for the process of this boot, where there can be one.
    fn limited(&self, spec: &GuestSpec) -> Option<GuestGroup> {
        let group = self.parts.group.as_ref()?;
        let disks = guest::disks_in_memory(&self.parts.dir, &self.parts.image);
        let limits = cgroup::GuestLimits::of(spec.vcpus, spec.memory_mib, disks);
        let instance = &self.parts.spec;
        let name = format!("{}.{}", short_id(instance.deployment()), instance.name());
        group
            .guest(&name, limits)
            .inspect_err(|error| self.not_limited(error))
            .ok()
    }

    fn not_limited(&self, error: &GroupError) {
        let text = format!("memory limit is not enforced: {}", chain(error));
        self.tell(EventKind::Warning { text });
    }

    pub(super) fn vmm_event(&mut self, event: VmmEvent) -> bool {
        let Some(boot) = &mut self.boot else {
            return true;
        };
        match event {
            VmmEvent::Event(event, files) => self.event(event, files),
            VmmEvent::Garbled(error) => {
                // Limited like everything that a guest can cause: its VMM process
                // is restarted only if it does not answer pings either.
                let text = format!("VMM process sent an invalid event: {}", chain(&error));
                self.trouble(EventKind::Warning { text });
                true
            }
            VmmEvent::Ended(ending) => {
                let group = boot.group.as_ref();
                let why = group.and_then(GuestGroup::killed_for_memory);
                let killed = boot.process.was_killed();
                let reason = boot
                    .exit
                    .take()
                    .unwrap_or_else(|| ending.reason(why, killed));
                let untold = boot.trouble.values().map(LogLimit::suppressed);
                let untold = untold.fold(0, u64::saturating_add);
                self.tell_untold(untold);
                self.boot = None;
                self.liveness.ended();
                self.wait = None;
                self.last_health = None;
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
                // Each connection's task has a share of the channels.
                if Arc::strong_count(&boot.channels) > MOST_CHANNELS {
                    let text = "more connections to channels than there can be".into();
                    self.trouble(EventKind::Warning { text });
                } else if let Some(socket) = files.into_iter().next() {
                    boot.channels.accept(port, source_port, socket);
                }
            }
            Event::Dialed { id, outcome } => return self.dialed(id, outcome),
            Event::Paused { paused } => {
                if self.liveness.paused(paused) {
                    self.tell(EventKind::Paused { paused });
                }
            }
            Event::NoSpace(control::NoSpace {
                disk,
                needed,
                quota,
            }) => return self.no_space(disk, needed, quota),
            Event::SpaceBack {} => return self.space_back(),
            Event::Pong { .. } => self.liveness.pong(),
            Event::Stats(stats) => {
                if let Some(answer) = boot.stats.pop_front() {
                    let _ = answer.send(Ok(stats));
                }
            }
            Event::DeviceNeedsReset { device, reason } => {
                self.trouble(EventKind::DeviceNeedsReset { device, reason });
            }
            Event::DiskFailed(control::DiskFailed { disk, error, full }) => {
                let file = guest::disk_file(&disk).unwrap_or("disk");
                let file = self.parts.dir.join(file);
                self.trouble(EventKind::DiskFailed {
                    disk,
                    file,
                    error,
                    full,
                });
            }
            Event::GuestPanicked {} => boot.exit = Some(ExitReason::Panic),
            // Answers to Attach alone, and events of another build.
            Event::Attached(_) | Event::Refused { .. } | Event::Unknown => {}
            Event::Exited(reason) => {
                let panicked = boot.exit == Some(ExitReason::Panic);
                if !(panicked && reason == ExitReason::Reboot) {
                    boot.exit = Some(reason);
                }
            }
        }
        true
    }
}

pub(super) async fn next_vmm_event(boot: &mut Option<Boot>) -> VmmEvent {
    match boot {
        Some(boot) => boot.process.next().await,
        None => std::future::pending().await,
    }
}
