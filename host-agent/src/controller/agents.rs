//! Guest agents: which one is offered to guests, and in which guests one has failed.

use std::collections::BTreeSet;
use std::sync::{Arc, Weak};
use std::time::Duration;

use tokio::time::MissedTickBehavior;
use vmbus::agent_package::Version;
use vmbus::message::{AgentOffer, UpdateStep};
use vmbus::text::chain;

use super::{Controller, ControllerError, State};
use crate::blocking::blocking;
use crate::digest::Digest;
use crate::store::agents::{AgentError, AgentFailure, AgentPackages, OpenAgent, PublishedAgent};
use crate::store::image::AgentProgram;
use crate::supervisor::agents::OfferedAgent;
use crate::supervisor::event::EventKind;
use crate::supervisor::timeline::Events;

/// How often the guests' own lists of failures are read, beside each event of one.
const LOOK_EVERY: Duration = Duration::from_secs(60);

/// What an operator sees of guest agents.
#[derive(Debug, Clone)]
pub struct AgentState {
    /// What was published, the newest first.
    pub published: Vec<PublishedAgent>,
    /// The package that is offered.
    pub offered: Option<Digest>,
    /// What failed where.
    pub failures: Vec<AgentFailure>,
}

impl Controller {
    /// The packages.
    pub fn agent_packages(&self) -> &AgentPackages {
        &self.0.agents
    }

    /// Checks a package that was uploaded and offers it to all guests. Durable when it returns.
    pub async fn publish_agent(
        &self,
        package: Digest,
        signature: String,
        allow_downgrade: bool,
        user: u32,
    ) -> Result<PublishedAgent, ControllerError> {
        let (files, of_check) = (self.0.agents.clone(), signature.clone());
        let opened = blocking(move || files.open(&package, &of_check)).await?;
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) => {
                self.discard(package).await?;
                return Err(error.into());
            }
        };
        let version = opened.checked.head.version;
        let state = self.agents().await?;
        let current = state
            .published
            .iter()
            .find(|it| Some(it.package) == state.offered);
        if let Some(current) = current {
            if current.package == package && current.allow_downgrade == allow_downgrade {
                return Ok(current.clone());
            }
            let offered: Version = current.version.parse().unwrap_or(version);
            if current.package != package && version <= offered && !allow_downgrade {
                self.discard(package).await?;
                return Err(AgentError::Downgrade {
                    version: version.to_string(),
                    offered: current.version.clone(),
                }
                .into());
            }
        }
        let new = PublishedAgent {
            package,
            version: version.to_string(),
            withdrawn: false,
            allow_downgrade,
            user,
            at_ms: 0,
            signature,
        };
        self.with_store(move |store| store.publish_agent(&new))
            .await?;
        self.offer().await?;
        let published = self.agents().await?.published;
        let found = published.into_iter().find(|it| it.package == package);
        found.ok_or_else(|| AgentError::Missing(package.hex()).into())
    }

    /// Stops offering a package. Guests that run it do so on.
    pub async fn withdraw_agent(&self, package: Digest) -> Result<PublishedAgent, ControllerError> {
        self.with_store(move |store| store.withdraw_agent(&package).map(drop))
            .await?;
        self.offer().await?;
        let published = self.agents().await?.published;
        let found = published.into_iter().find(|it| it.package == package);
        found.ok_or_else(|| AgentError::Missing(package.hex()).into())
    }

    /// Everything that is known of guest agents.
    pub async fn agents(&self) -> Result<AgentState, ControllerError> {
        let found = self.with_store(|store| Ok((store.agents()?, store.agent_failures()?)));
        let (published, failures) = found.await?;
        let offered = self.0.host.offered_agent();
        let offered = offered.and_then(|it| Digest::from_hex(&it.offer.sha256));
        Ok(AgentState {
            published,
            offered,
            failures,
        })
    }

    /// Offers the newest package that was not withdrawn, if it is whole and its signature still
    /// trusted, and records failures from now on.
    pub(super) async fn start_agents(&self) -> Result<(), ControllerError> {
        let of_store = self.with_store(|store| {
            store.forget_agent_failures()?;
            store.agents()
        });
        let used: Vec<_> = of_store.await?.iter().map(|it| it.package).collect();
        let files = self.0.agents.clone();
        // Nobody uploads yet. What cannot be removed only takes space.
        let _ = blocking(move || files.sweep(&used)).await?;
        self.offer().await?;
        let events = self.0.host.timeline().subscribe();
        tokio::spawn(record_failures(Arc::downgrade(&self.0), events));
        Ok(())
    }

    /// Offers what is to be offered now.
    async fn offer(&self) -> Result<(), ControllerError> {
        let _one = self.0.offering.lock().await;
        let AgentState {
            published,
            failures,
            ..
        } = self.agents().await?;
        let Some(newest) = published.into_iter().find(|it| !it.withdrawn) else {
            self.0.host.offer_agent(None);
            return Ok(());
        };
        let (files, of_open) = (self.0.agents.clone(), newest.clone());
        let opened = blocking(move || files.open(&of_open.package, &of_open.signature)).await?;
        match opened {
            Ok(opened) => self
                .0
                .host
                .offer_agent(Some(offered(newest, opened, &failures))),
            Err(error) => {
                self.0.host.offer_agent(None);
                let text = format!(
                    "guest agent {} is not offered: {}",
                    newest.version,
                    chain(&error)
                );
                self.0
                    .host
                    .timeline()
                    .report(None, EventKind::Warning { text });
            }
        }
        Ok(())
    }

    /// Removes a package that is not published.
    async fn discard(&self, package: Digest) -> Result<(), ControllerError> {
        let known = self.with_store(|store| store.agents()).await?;
        if known.iter().all(|it| it.package != package) {
            let files = self.0.agents.clone();
            // What cannot be removed only takes space, until the next start.
            let _ = blocking(move || files.remove(&package)).await?;
        }
        Ok(())
    }

    /// What failed in guests, by their own lists.
    fn failures(&self) -> BTreeSet<AgentFailure> {
        let deployments = self.0.host.deployments();
        let instances = deployments.iter().flat_map(|it| it.instances());
        let lists = instances.filter_map(|it| Some((it, it.status().agent?)));
        let failures = lists.flat_map(|(instance, agent)| {
            let spec = instance.spec().clone();
            agent.failed.into_iter().map(move |failed| AgentFailure {
                deployment: spec.deployment().to_owned(),
                instance: spec.name().to_owned(),
                package: failed.package,
                reason: failed.reason,
            })
        });
        failures.collect()
    }
}

fn offered(newest: PublishedAgent, opened: OpenAgent, failures: &[AgentFailure]) -> OfferedAgent {
    let failed = failures.iter().filter(|it| it.package == newest.package);
    let sha256 = newest.package.hex();
    OfferedAgent {
        offer: AgentOffer {
            version: newest.version.clone(),
            sha256: sha256.clone(),
            signature: newest.signature,
            keys: opened.keys.texts,
            allow_downgrade: newest.allow_downgrade,
        },
        package: AgentProgram {
            version: newest.version,
            sha256,
            size: opened.length,
            file: Arc::new(opened.file),
        },
        failed_in: failed
            .map(|it| (it.deployment.clone(), it.instance.clone()))
            .collect(),
    }
}

/// Records each failure once, so that a guest whose disks are made anew is not offered again
/// what failed in it. The lists of the guests are level state: an event only says when to look.
/// Ends with the controller, which it does not keep.
async fn record_failures(controller: Weak<State>, mut events: Events) {
    let mut look = tokio::time::interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut recorded = BTreeSet::new();
    loop {
        tokio::select! {
            _ = look.tick() => {}
            reported = events.reported() => match reported {
                None => return,
                Some(Ok(reported)) => {
                    let step = UpdateStep::WentBack;
                    if !matches!(reported.event.kind, EventKind::AgentUpdate { step: it, .. } if it == step) {
                        continue;
                    }
                    // The list follows its event.
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Some(Err(_)) => {}
            },
        }
        let Some(controller) = controller.upgrade().map(Controller) else {
            return;
        };
        let new: Vec<_> = controller
            .failures()
            .difference(&recorded)
            .cloned()
            .collect();
        if new.is_empty() {
            continue;
        }
        let of_store = new.clone();
        let written = controller
            .with_store(move |store| store.agents_failed(&of_store))
            .await;
        let offered = match written {
            Ok(()) => {
                recorded.extend(new);
                controller.offer().await
            }
            Err(error) => Err(error),
        };
        if let Err(error) = offered {
            // The next look tries again.
            tracing::warn!(%error, "cannot record that a guest agent failed");
        }
    }
}
