//! The deployment of a command: its events, its socket, and the signals that end it.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::time::Instant;
use vmbus::text::chain;

use super::deploy::{refused, timeline_line};
use super::error::{CliError, Code};
use super::exit::Exit;
use super::interrupt::Interrupts;
use super::meter::Meter;
use super::output::Output;
use super::ticker::Ticker;
use super::watch::{Decision, RunError, Watch};
use crate::api::server::{self, Server};
use crate::service::model::ServiceModel;
use crate::store::deployment::{Retention, random_id};
use crate::supervisor::deploy::{DeployOptions, deploy};
use crate::supervisor::event::TimelineEvent;
use crate::supervisor::host::{DeploymentHandle, Host, HostOptions};
use crate::supervisor::instance::InstanceHandle;
use crate::supervisor::plan::instance_names;
use crate::supervisor::timeline::{Events, Timeline};
use crate::until::until;

/// The deployment that this command runs.
#[derive(Debug)]
pub struct Running {
    host: Host,
    deployment: DeploymentHandle,
    // Its socket goes when this is dropped.
    server: Option<Server>,
    events: Events,
    ended: bool,
    abandoned: bool,
    interrupts: Interrupts,
    /// State of the instances, from the events so far.
    pub watch: Watch,
    /// Names of the instances, in the order of the definition.
    pub names: Vec<String>,
    /// The first [`MAX_EVENTS`] events.
    pub seen: Vec<TimelineEvent>,
    /// When every instance became Ready.
    ready_at: Option<Instant>,
    width: usize,
    stops: u32,
    /// Shows the wait until the service is Ready or has failed, and during the stop.
    ticker: Option<Ticker>,
}

/// Why a wait ended.
#[derive(Debug)]
pub enum WaitEnd {
    /// Every instance became Ready.
    Ready,
    /// An instance failed.
    Failed(RunError),
    /// Every instance has ended.
    Finished,
    /// The deadline passed.
    Deadline,
    /// This signal arrived.
    Signal(u8),
}

/// A role may be Ready as soon as its process runs. One that stays Ready for this
/// long did not fail at once. Not scaled: a wait that always passes in full only makes
/// each run slower.
const STEADY: Duration = Duration::from_secs(1);

/// Most time for the current step to return after the command was interrupted.
const GIVE_UP: Duration = Duration::from_secs(5);

/// Events that are kept for the report of a test.
const MAX_EVENTS: usize = 10_000;

impl Running {
    /// Deploys `model` on a new host and passes events to `show`. A signal ends it with
    /// an error.
    pub async fn start(
        model: ServiceModel,
        options: HostOptions,
        retention: Retention,
        output: &Output,
        mut show: impl FnMut(&TimelineEvent, String) -> Result<(), CliError>,
    ) -> Result<Self, CliError> {
        let mut interrupts = Interrupts::listen()?;
        let names = instance_names(&model);
        let width = names.iter().map(String::len).max().unwrap_or(0);
        let mut watch = Watch::new(names.iter().cloned());
        output.progress(&format!(
            "deploying {}: image {}, {} instance{}",
            model.name,
            model.image,
            names.len(),
            if names.len() == 1 { "" } else { "s" }
        ));
        let meter = Meter::start(output);
        let timeline = Timeline::start();
        let mut events = timeline.subscribe();
        let mut seen = Vec::new();
        let id = random_id();
        let id = id.map_err(|error| CliError::chain(Code::Unclassified, &error))?;
        let how = DeployOptions {
            incarnation: 1,
            id,
            retention,
            address: Ipv4Addr::LOCALHOST.into(),
        };
        let progress = meter.progress().clone();
        let deploying = async {
            let host = Host::open(options, timeline).await?;
            let deployment = deploy(&host, &model, &how, &progress).await?;
            Ok((host, deployment))
        };
        let mut deploying = std::pin::pin!(deploying);
        let stopped = loop {
            tokio::select! {
                biased;
                number = interrupts.next() => break interrupted(number),
                Some(event) = events.next() => {
                    watch.apply(&event);
                    if let Err(error) = show(&event, timeline_line(&event, width)) {
                        break error;
                    }
                    seen.push(event);
                }
                deployed = &mut deploying => {
                    let (host, deployment) = deployed.map_err(|error| refused(&error, &model))?;
                    drop(meter);
                    let server = serve(&host, output);
                    return Ok(Self {
                        deployment,
                        server,
                        host,
                        events,
                        ended: false,
                        abandoned: false,
                        interrupts,
                        watch,
                        names,
                        seen,
                        ready_at: None,
                        width,
                        stops: 0,
                        ticker: Some(Ticker::start(output)),
                    });
                }
            }
        };
        // The current step returns early and removes what the deployment has made. The
        // janitor removes what is left after the limit.
        meter.progress().cancel();
        let _ = tokio::time::timeout(GIVE_UP, deploying).await;
        Err(stopped)
    }

    /// The deployment.
    pub fn deployment(&self) -> &DeploymentHandle {
        &self.deployment
    }

    /// Public address of an endpoint of a role.
    pub fn address(&self, role: &str, endpoint: &str) -> Option<SocketAddr> {
        let specs = self.deployment.instances().iter().map(InstanceHandle::spec);
        let of_role = specs.filter(|spec| spec.role() == role);
        let mut endpoints = of_role.flat_map(|spec| &spec.endpoints);
        let found = endpoints.find(|found| found.name == endpoint)?;
        Some(found.address)
    }

    /// Passes every event to `show` until one of the reasons of [`WaitEnd`].
    pub async fn wait(
        &mut self,
        deadline: Option<Instant>,
        mut show: impl FnMut(&TimelineEvent, String) -> Result<(), CliError>,
    ) -> Result<WaitEnd, CliError> {
        loop {
            let event = tokio::select! {
                biased;
                event = self.events.next() => event,
                // Biased: only when every event has been read.
                () = self.deployment.ended() => None,
                () = due(self.ticker.as_ref()) => {
                    self.show_waiting();
                    continue;
                }
                number = self.interrupts.next() => return Ok(WaitEnd::Signal(number)),
                () = until(deadline) => return Ok(WaitEnd::Deadline),
            };
            let Some(event) = event else {
                self.ticker = None;
                self.ended = true;
                return Ok(WaitEnd::Finished);
            };
            if let Some(ticker) = &mut self.ticker {
                ticker.postpone();
            }
            let decision = self.watch.apply(&event);
            if decision.is_some() {
                self.ticker = None;
            }
            show(&event, timeline_line(&event, self.width))?;
            if self.seen.len() < MAX_EVENTS {
                self.seen.push(event);
            }
            match decision {
                None => {}
                Some(Decision::Ready) => {
                    self.ready_at = Some(Instant::now());
                    return Ok(WaitEnd::Ready);
                }
                Some(Decision::Failed(error)) => return Ok(WaitEnd::Failed(error)),
            }
        }
    }

    fn show_waiting(&mut self) {
        let waiting = self.watch.waiting().join(", ");
        if let Some(ticker) = &mut self.ticker {
            ticker.show(&format!("waiting: {waiting}"));
        }
    }

    /// The instance whose logs may explain why an endpoint of `role` does not answer:
    /// one that is not Ready, or else the first.
    pub fn suspect(&self, role: &str) -> Option<&String> {
        let of_role = |name: &&String| {
            let split = name.rsplit_once("_IN_");
            split.is_some_and(|(of, _)| of == role)
        };
        let instances = || self.names.iter().filter(of_role);
        instances()
            .find(|name| !self.watch.is_ready(name))
            .or_else(|| instances().next())
    }

    /// The first instance that is not Ready.
    pub fn not_ready(&self) -> Option<&String> {
        self.names.iter().find(|name| !self.watch.is_ready(name))
    }

    /// Like [`Running::wait`], but returns Ready only when every instance has been Ready
    /// for a second without a break. The time before this call counts.
    pub async fn steady(
        &mut self,
        deadline: Option<Instant>,
        mut show: impl FnMut(&TimelineEvent, String) -> Result<(), CliError>,
    ) -> Result<WaitEnd, CliError> {
        loop {
            let steady_at = self
                .ready_at
                .filter(|_| self.watch.all_ready())
                .map(|ready| ready + STEADY);
            let limit = [steady_at, deadline].into_iter().flatten().min();
            let ended = self.wait(limit, &mut show).await?;
            let passed = |time: Option<Instant>| time.is_some_and(|time| time <= Instant::now());
            match ended {
                WaitEnd::Ready => {}
                WaitEnd::Deadline if self.watch.all_ready() && passed(steady_at) => {
                    return Ok(WaitEnd::Ready);
                }
                WaitEnd::Deadline if !passed(deadline) => {}
                other => return Ok(other),
            }
        }
    }

    /// Stops the service and waits until it has ended. A signal meanwhile kills the
    /// guests, and the next one ends the wait; SIGHUP does not, because a closing
    /// terminal sends it twice. Returns how long the stop took.
    pub async fn stop(
        &mut self,
        output: &Output,
        mut show: impl FnMut(&TimelineEvent, String) -> Result<(), CliError>,
    ) -> Result<Duration, CliError> {
        let started = Instant::now();
        self.ask_to_stop().await;
        self.ticker = Some(Ticker::start(output));
        let mut result = Ok(());
        loop {
            // The stop goes on if the output cannot be written.
            let show_event = |event: &TimelineEvent, line: String| match &result {
                Ok(()) => show(event, line),
                Err(_) => Ok(()),
            };
            match self.wait(None, show_event).await {
                Ok(WaitEnd::Finished) => return result.map(|()| started.elapsed()),
                Ok(WaitEnd::Signal(number)) if i32::from(number) == libc::SIGHUP => {}
                Ok(WaitEnd::Signal(number)) if self.was_killed() => {
                    // A killed process that does not end is blocked in the kernel.
                    output.warn("not waiting any longer; what is left is removed later");
                    self.ended = true;
                    self.abandoned = true;
                    return Err(interrupted(number));
                }
                Ok(WaitEnd::Signal(_)) => {
                    output.progress("killing the guests; once more does not wait for them");
                    self.ask_to_stop().await;
                }
                Ok(WaitEnd::Ready | WaitEnd::Failed(_) | WaitEnd::Deadline) => {}
                Err(error) => result = Err(error),
            }
        }
    }

    /// The first call stops cleanly, the next ones by force.
    async fn ask_to_stop(&mut self) {
        self.watch.stopping();
        self.stops += 1;
        if self.stops == 1 {
            self.deployment.stop().await;
        } else {
            self.deployment.kill().await;
        }
    }

    /// Whether force was used.
    pub fn was_killed(&self) -> bool {
        self.stops > 1
    }

    /// Stops what still runs, waits for the last tasks, and removes the files unless
    /// they are kept.
    pub async fn finish(mut self, output: &Output) {
        if !self.ended {
            // The error that led here has been reported.
            let _ = self.stop(output, |_, _| Ok(())).await;
        }
        // Before the logs are removed, which clients may follow.
        if let Some(server) = self.server {
            server.close().await;
        }
        if !self.abandoned
            && let Err(error) = self.host.remove(self.deployment.id()).await
        {
            output.warn(&format!("{}; removed later", chain(&error)));
        }
    }
}

/// Serves the API of `host`. Without it only `ps`, `exec`, `logs` and the like do not work.
fn serve(host: &Host, output: &Output) -> Option<Server> {
    match server::serve(host, None) {
        Ok(server) => Some(server),
        Err(error) => {
            let place = host.options().runtime_dir.display();
            output.warn(&format!(
                "exec and logs will not find this deployment: no socket in {place}: {error}"
            ));
            None
        }
    }
}

async fn due(ticker: Option<&Ticker>) {
    match ticker {
        Some(ticker) => ticker.due().await,
        None => std::future::pending().await,
    }
}

/// The error of a command that a signal ended.
pub fn interrupted(number: u8) -> CliError {
    CliError::new(Code::Interrupted, "interrupted").exit_with(Exit::Signal(number))
}
