//! A deployment while a command owns it: its events, its socket, and the
//! signals that end it.

use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use super::deploy::{refused, timeline_line};
use super::error::{CliError, Code};
use super::exit::Exit;
use super::interrupt::Interrupts;
use super::output::Output;
use super::watch::{News, Watch, instance_names};
use crate::api::server::{self, About, Server};
use crate::service::model::ServiceModel;
use crate::store::paths;
use crate::supervisor::deployment::{Deployment, DeploymentHandle, Options, deploy};
use crate::supervisor::event::TimelineEvent;

/// A deployment in the hands of this command.
#[derive(Debug)]
pub struct Running {
    deployment: Deployment,
    handle: DeploymentHandle,
    // Its socket goes when this is dropped.
    _server: Option<Server>,
    interrupts: Interrupts,
    /// What the events say so far.
    pub watch: Watch,
    /// Names of the instances, in the order of the definition.
    pub names: Vec<String>,
    /// Every event so far.
    pub events: Vec<TimelineEvent>,
    width: usize,
    stops: u32,
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

/// Events that are remembered for the report of a test.
const MOST_EVENTS: usize = 10_000;

impl Running {
    /// Deploys `model`. A signal meanwhile ends it.
    pub async fn start(
        model: ServiceModel,
        options: Options,
        output: &Output,
    ) -> Result<Self, CliError> {
        let mut interrupts = Interrupts::listen()?;
        let names = instance_names(&model);
        let about = model.clone();
        output.progress(&format!(
            "deploying {}: image {}, {} instance{}",
            model.name,
            model.image,
            names.len(),
            if names.len() == 1 { "" } else { "s" }
        ));
        let deployment = tokio::select! {
            deployment = deploy(model, options) => deployment.map_err(|error| refused(&error))?,
            number = interrupts.next() => return Err(interrupted(number)),
        };
        let handle = deployment.handle();
        let about = About {
            service: about.name.clone(),
            endpoints: server::endpoints(&about, deployment.published()),
        };
        let runtime_dir = paths::runtime_dir();
        let server = match server::serve(&runtime_dir, handle.clone(), about) {
            Ok(server) => Some(server),
            Err(error) => {
                let place = runtime_dir.display();
                output.warn(&format!(
                    "exec and logs will not find this deployment: no socket in {place}: {error}"
                ));
                None
            }
        };
        let width = names.iter().map(String::len).max().unwrap_or(0);
        Ok(Self {
            watch: Watch::new(names.iter().cloned()),
            deployment,
            handle,
            _server: server,
            interrupts,
            names,
            events: Vec::new(),
            width,
            stops: 0,
        })
    }

    /// The deployment.
    pub fn deployment(&self) -> &Deployment {
        &self.deployment
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
                event = self.deployment.next_event() => event,
                number = self.interrupts.next() => return Ok(Ended::Signal(number)),
                () = until(deadline) => return Ok(Ended::Deadline),
            };
            let Some(event) = event else {
                return Ok(Ended::Finished);
            };
            let news = self.watch.take(&event);
            tell(&event, timeline_line(&event, self.width))?;
            if self.events.len() < MOST_EVENTS {
                self.events.push(event);
            }
            if news != News::Nothing {
                return Ok(Ended::News(news));
            }
        }
    }

    /// Stops the service; waits until it is down. A signal from here on kills.
    /// Returns how long it took.
    pub async fn stop(
        &mut self,
        output: &Output,
        mut tell: impl FnMut(&TimelineEvent, String) -> Result<(), CliError>,
    ) -> Result<Duration, CliError> {
        let started = Instant::now();
        self.ask_to_stop().await;
        loop {
            match self.wait(None, &mut tell).await? {
                Ended::Finished => return Ok(started.elapsed()),
                Ended::Signal(_) => {
                    output.progress("killing the guests");
                    self.ask_to_stop().await;
                }
                Ended::News(_) | Ended::Deadline => {}
            }
        }
    }

    /// The first time cleanly, then by force.
    async fn ask_to_stop(&mut self) {
        self.watch.stopping();
        self.stops += 1;
        if self.stops == 1 {
            self.handle.stop().await;
        } else {
            self.handle.kill().await;
        }
    }

    /// Whether force was used.
    pub fn was_killed(&self) -> bool {
        self.stops > 1
    }

    /// Waits for the last tasks; files go unless they are kept.
    pub async fn finish(self) {
        self.deployment.finished().await;
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
