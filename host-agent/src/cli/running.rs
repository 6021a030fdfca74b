//! A deployment while a command owns it: its events, its socket, and the
//! signals that end it.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use tokio::time::{Instant, sleep_until};
use vmbus::text::chain;

use super::deploy::{refused, timeline_line};
use super::error::{CliError, Code};
use super::exit::Exit;
use super::interrupt::Interrupts;
use super::meter::Meter;
use super::output::Output;
use super::ticker::Ticker;
use super::watch::{News, Watch};
use crate::api::server::{self, Server};
use crate::service::model::ServiceModel;
use crate::store::deployment::Retention;
use crate::supervisor::deploy::{DeployOptions, deploy};
use crate::supervisor::event::TimelineEvent;
use crate::supervisor::host::{DeploymentHandle, Host, HostOptions};
use crate::supervisor::instance::InstanceHandle;
use crate::supervisor::plan::instance_names;
use crate::supervisor::timeline::{Events, Timeline};

/// A deployment in the hands of this command.
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
    /// What the events say so far.
    pub watch: Watch,
    /// Names of the instances, in the order of the definition.
    pub names: Vec<String>,
    /// Every event so far.
    pub seen: Vec<TimelineEvent>,
    /// When every instance became Ready.
    ready_at: Option<Instant>,
    width: usize,
    stops: u32,
    /// Tells of the wait, until the service is Ready or cannot be, and again
    /// while it is stopped.
    ticker: Option<Ticker>,
}

/// What a wait ended with.
#[derive(Debug)]
pub enum Ended {
    /// By news of the service.
    News(News),
    /// Every instance has ended.
    Finished,
    /// The time is up.
    Deadline,
    /// By this signal.
    Signal(u8),
}

/// A role is Ready when its process runs. One that stays so for this long, times
/// the slowness of the host, did not fail at once.
pub const STEADY: Duration = Duration::from_secs(1);

/// Time for the step in hand to give up when the command is interrupted.
const GIVE_UP: Duration = Duration::from_secs(5);

/// Events that are remembered for the report of a test.
const MOST_EVENTS: usize = 10_000;

impl Running {
    /// Deploys `model` on a host of its own, passing events to `tell`. A signal meanwhile
    /// ends it.
    pub async fn start(
        model: ServiceModel,
        options: HostOptions,
        retention: Retention,
        output: &Output,
        mut tell: impl FnMut(&TimelineEvent, String) -> Result<(), CliError>,
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
        let how = DeployOptions {
            retention,
            address: Ipv4Addr::LOCALHOST.into(),
        };
        let progress = meter.progress().clone();
        let deploying = async {
            let host = Host::open(options, timeline).await?;
            let deployment = deploy(&host, &model, how, &progress).await?;
            Ok((host, deployment))
        };
        let mut deploying = std::pin::pin!(deploying);
        let stopped = loop {
            tokio::select! {
                biased;
                number = interrupts.next() => break interrupted(number),
                Some(event) = events.next() => {
                    watch.take(&event);
                    if let Err(error) = tell(&event, timeline_line(&event, width)) {
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
        // What the step in hand has made goes when it gives up. What is not
        // gone in time is left to the janitor.
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

    /// Passes every event to `tell` until something decides. The first signal
    /// asks for a stop, the next one for a quick one; both end the wait.
    pub async fn wait(
        &mut self,
        deadline: Option<Instant>,
        mut tell: impl FnMut(&TimelineEvent, String) -> Result<(), CliError>,
    ) -> Result<Ended, CliError> {
        loop {
            let event = tokio::select! {
                biased;
                event = self.events.next() => event,
                // After the last event.
                () = self.deployment.ended() => None,
                () = due(self.ticker.as_ref()) => {
                    self.tell_of_wait();
                    continue;
                }
                number = self.interrupts.next() => return Ok(Ended::Signal(number)),
                () = until(deadline) => return Ok(Ended::Deadline),
            };
            let Some(event) = event else {
                self.ticker = None;
                self.ended = true;
                return Ok(Ended::Finished);
            };
            if let Some(ticker) = &mut self.ticker {
                ticker.postpone();
            }
            let news = self.watch.take(&event);
            if news != News::Nothing {
                self.ticker = None;
            }
            if news == News::Ready {
                self.ready_at = Some(Instant::now());
            }
            tell(&event, timeline_line(&event, self.width))?;
            if self.seen.len() < MOST_EVENTS {
                self.seen.push(event);
            }
            if news != News::Nothing {
                return Ok(Ended::News(news));
            }
        }
    }

    fn tell_of_wait(&mut self) {
        let waiting = self.watch.waiting().join(", ");
        if let Some(ticker) = &mut self.ticker {
            ticker.show(&format!("waiting: {waiting}"));
        }
    }

    /// The instance to look at when an endpoint of `role` does not answer: one
    /// that does not serve, or else the first.
    pub fn behind(&self, role: &str) -> Option<&String> {
        let of_role = |name: &&String| {
            let split = name.rsplit_once("_IN_");
            split.is_some_and(|(of, _)| of == role)
        };
        let instances = || self.names.iter().filter(of_role);
        instances()
            .find(|name| !self.watch.serves(name))
            .or_else(|| instances().next())
    }

    /// The first instance that does not serve.
    pub fn idle(&self) -> Option<&String> {
        self.names.iter().find(|name| !self.watch.serves(name))
    }

    /// As [`Running::wait`], but Ready is news only when every instance has been
    /// so for `steady` without a break, be it before this call.
    pub async fn steady(
        &mut self,
        steady: Duration,
        deadline: Option<Instant>,
        mut tell: impl FnMut(&TimelineEvent, String) -> Result<(), CliError>,
    ) -> Result<Ended, CliError> {
        loop {
            let steady_at = self
                .ready_at
                .filter(|_| self.watch.is_ready())
                .map(|ready| ready + steady);
            let limit = [steady_at, deadline].into_iter().flatten().min();
            let ended = self.wait(limit, &mut tell).await?;
            let passed = |time: Option<Instant>| time.is_some_and(|time| time <= Instant::now());
            match ended {
                Ended::News(News::Ready) => {}
                Ended::Deadline if self.watch.is_ready() && passed(steady_at) => {
                    return Ok(Ended::News(News::Ready));
                }
                Ended::Deadline if !passed(deadline) => {}
                other => return Ok(other),
            }
        }
    }

    /// Stops the service; waits until it is down. A signal from here on kills,
    /// and one more waits no longer; but a hang-up, which a closing terminal
    /// sends twice, only ever asks. Returns how long it took.
    pub async fn stop(
        &mut self,
        output: &Output,
        mut tell: impl FnMut(&TimelineEvent, String) -> Result<(), CliError>,
    ) -> Result<Duration, CliError> {
        let started = Instant::now();
        self.ask_to_stop().await;
        self.ticker = Some(Ticker::start(output));
        let mut result = Ok(());
        loop {
            // A reader that went away keeps no guest running.
            let told = |event: &TimelineEvent, line: String| match &result {
                Ok(()) => tell(event, line),
                Err(_) => Ok(()),
            };
            match self.wait(None, told).await {
                Ok(Ended::Finished) => return result.map(|()| started.elapsed()),
                Ok(Ended::Signal(number)) if i32::from(number) == libc::SIGHUP => {}
                Ok(Ended::Signal(number)) if self.was_killed() => {
                    // A killed process that does not end hangs in the kernel.
                    output.warn("not waiting any longer; what is left is removed later");
                    self.ended = true;
                    self.abandoned = true;
                    return Err(interrupted(number));
                }
                Ok(Ended::Signal(_)) => {
                    output.progress("killing the guests; once more does not wait for them");
                    self.ask_to_stop().await;
                }
                Ok(Ended::News(_) | Ended::Deadline) => {}
                Err(error) => result = Err(error),
            }
        }
    }

    /// The first time cleanly, then by force.
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

    /// The end, whatever came before: stops what still runs and waits for the
    /// last tasks. Files go unless they are kept.
    pub async fn finish(mut self, output: &Output) {
        if !self.ended {
            // Whatever made this necessary has been told already.
            let _ = self.stop(output, |_, _| Ok(())).await;
        }
        // While the logs are there to be read.
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

/// The socket of `host`; without it only other commands are worse off.
fn serve(host: &Host, output: &Output) -> Option<Server> {
    match server::serve(host) {
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

/// The command was ended by a signal.
pub fn interrupted(number: u8) -> CliError {
    CliError::new(Code::Interrupted, "interrupted").exit_with(Exit::Signal(number))
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(at) => sleep_until(at).await,
        None => std::future::pending().await,
    }
}
