//! `host-agent wait`: until an instance or a service is in a state, or never will be.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use serde_json::json;
use vmbus::message::RoleState;

use super::args::duration;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::interrupt::Interrupts;
use super::output::Output;
use super::running::interrupted;
use super::runtime;
use crate::api::client::{self, Client, ClientError};
use crate::api::types::{InstanceInfo, RefusalKind, ServiceInfo};
use crate::store::paths;
use crate::store::services::{Operation, OperationState};
use crate::supervisor::status::Phase;

/// How often the host agent is asked: a fifth of the second within which a person expects
/// an answer.
const POLL: Duration = Duration::from_millis(200);

/// How long roles must stay Ready: one that is Ready when its process starts may exit at once.
const STEADY: Duration = Duration::from_secs(1);

/// `wait`.
#[derive(Debug, Clone, Args)]
pub struct WaitArgs {
    /// Instance, DEPLOYMENT/INSTANCE, or service
    #[arg(id = "target_name", value_name = "NAME")]
    pub name: String,
    /// Until when
    #[arg(long = "for", value_name = "STATE", default_value = "ready")]
    pub condition: Condition,
    /// Give up waiting after this time
    #[arg(long, value_name = "S", value_parser = duration)]
    pub timeout: Option<Duration>,
}

/// Until when; of a service: until all of its instances are so.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Condition {
    /// The guest agent answers: exec and cp work.
    Agent,
    /// The role is Ready.
    Ready,
    /// It exists no more.
    Gone,
    /// The guest has applied the newest goal.
    Applied,
}

impl Condition {
    const fn name(self) -> &'static str {
        match self {
            Self::Agent => "agent",
            Self::Ready => "ready",
            Self::Gone => "gone",
            Self::Applied => "applied",
        }
    }
}

/// What there is under a name.
#[derive(Debug, Default)]
struct Found {
    /// The socket of its host agent.
    socket: PathBuf,
    instances: Vec<InstanceInfo>,
    /// Of a service that is kept.
    operation: Option<Operation>,
}

impl Found {
    /// Of each instance the boots of its guest and the ends of its role.
    fn boots(&self) -> Vec<(u64, u32)> {
        let instances = self.instances.iter();
        instances
            .map(|it| (it.generation, it.status.recycles))
            .collect()
    }
}

/// Waits.
pub fn run(args: &WaitArgs, output: &Output) -> Result<Exit, CliError> {
    runtime()?.block_on(async {
        let mut interrupts = Interrupts::listen()?;
        tokio::select! {
            done = wait(args, output) => done,
            number = interrupts.next() => Err(interrupted(number)),
        }
    })
}

async fn wait(args: &WaitArgs, output: &Output) -> Result<Exit, CliError> {
    let (name, condition, started) = (&args.name, args.condition, Instant::now());
    let mut last: Option<Found> = None;
    let mut met: Option<(Instant, Vec<(u64, u32)>)> = None;
    let mut said = String::new();
    loop {
        match (look(name).await?, &last) {
            (Some(found), _) => {
                if is_met(condition, name, &found)? {
                    let boots = found.boots();
                    if met.as_ref().is_none_or(|(_, before)| *before != boots) {
                        met = Some((Instant::now(), boots));
                    }
                    let lasted = met
                        .as_ref()
                        .is_some_and(|(since, _)| since.elapsed() >= STEADY);
                    if condition != Condition::Ready || lasted {
                        return answer(args, &found.instances, started, output);
                    }
                } else {
                    met = None;
                }
                let states = found.instances.iter();
                let states: Vec<_> = states
                    .map(|it| format!("{} {}", it.name, it.state))
                    .collect();
                let text = states.join(", ");
                if text != said && !text.is_empty() {
                    output.progress(&text);
                    said = text;
                }
                last = Some(found);
            }
            (None, Some(before)) if is_away(&before.socket).await => {}
            (None, _) if condition == Condition::Gone => {
                return answer(args, &[], started, output);
            }
            (None, Some(_)) => {
                let what = format!("{name} is gone");
                let cause = format!(
                    "it was removed or stopped before it was {}",
                    condition.name()
                );
                return Err(CliError::new(Code::NoInstance, what).cause(cause));
            }
            (None, None) => {
                let what = format!("no running instance and no service is named {name}");
                return Err(CliError::new(Code::NoInstance, what).hint("host-agent ps"));
            }
        }
        if args.timeout.is_some_and(|limit| started.elapsed() >= limit) {
            let what = format!("{name} is not {} in time", condition.name());
            let mut error = CliError::new(Code::Timeout, what);
            if !said.is_empty() {
                error = error.cause(said);
            }
            return Err(error.hint("host-agent ps"));
        }
        tokio::time::sleep(POLL).await;
    }
}

fn answer(
    args: &WaitArgs,
    instances: &[InstanceInfo],
    started: Instant,
    output: &Output,
) -> Result<Exit, CliError> {
    let waited = started.elapsed();
    let text = format!(
        "{}: {} after {:.1} s",
        args.name,
        args.condition.name(),
        waited.as_secs_f64()
    );
    output.answer(&text, || {
        json!({
            "schema": "host-agent.wait/1",
            "name": args.name,
            "for": args.condition.name(),
            "waited_ms": u64::try_from(waited.as_millis()).unwrap_or(u64::MAX),
            "instances": instances,
        })
    })?;
    Ok(Exit::Success)
}

/// What runs or is kept under `name`: an instance, else a service.
async fn look(name: &str) -> Result<Option<Found>, CliError> {
    let running = client::list(&paths::runtime_dir()).await?;
    match client::find(&running, name) {
        Ok(target) => {
            let of_target = running
                .into_iter()
                .find(|it| it.socket == target.socket && it.info.deployment == target.deployment);
            let all = of_target.map(|it| it.info.instances).unwrap_or_default();
            let instances = all.into_iter().filter(|it| it.name == target.instance);
            return Ok(Some(Found {
                socket: target.socket,
                instances: instances.collect(),
                operation: None,
            }));
        }
        Err(ClientError::NotFound { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    if let Some(found) = service(name).await? {
        return Ok(Some(found));
    }
    // The service of a host agent that keeps none.
    let mut deployments = running.into_iter().filter(|it| it.info.service == name);
    Ok(deployments.next().map(|first| Found {
        socket: first.socket,
        instances: first.info.instances,
        operation: None,
    }))
}

/// The service that `serve` keeps under this name.
async fn service(name: &str) -> Result<Option<Found>, CliError> {
    let socket = paths::serve_socket();
    let Ok(mut client) = Client::connect(&socket).await else {
        return Ok(None);
    };
    match client.get::<ServiceInfo>(&format!("services/{name}")).await {
        Ok(info) => Ok(Some(Found {
            socket,
            instances: info.deployment.map(|it| it.instances).unwrap_or_default(),
            operation: info.operation,
        })),
        // A name that no service can have is refused as invalid.
        Err(ClientError::Refused {
            kind: RefusalKind::NotFound | RefusalKind::Invalid,
            ..
        }) => Ok(None),
        Err(ClientError::Unreachable { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Whether the guests of the host agent behind `socket` outlive it, and it does not answer.
async fn is_away(socket: &Path) -> bool {
    socket == paths::serve_socket() && Client::connect(socket).await.is_err()
}

/// Whether the condition holds; an error if it will not without the operator.
fn is_met(condition: Condition, name: &str, found: &Found) -> Result<bool, CliError> {
    // Else it is tried again, and the instances tell how it goes.
    if let Some(operation) = &found.operation
        && operation.state == OperationState::Failed
        && found.instances.is_empty()
    {
        let what = format!("operation {} of service {name} failed", operation.id);
        let cause = operation.error.clone().unwrap_or_default();
        return Err(CliError::new(Code::Operation, what)
            .cause(cause)
            .hint(format!("host-agent service show {name}")));
    }
    if condition == Condition::Gone {
        return Ok(false);
    }
    let mut met = !found.instances.is_empty();
    for instance in &found.instances {
        met &= holds(condition, instance)?;
    }
    Ok(met)
}

fn holds(condition: Condition, instance: &InstanceInfo) -> Result<bool, CliError> {
    let status = &instance.status;
    let name = &instance.name;
    let met = match condition {
        Condition::Agent => matches!(status.phase, Phase::Role(_)),
        Condition::Ready => status.is_ready(),
        Condition::Applied => {
            matches!(status.phase, Phase::Role(_)) && status.applied >= instance.incarnation
        }
        Condition::Gone => false,
    };
    if met {
        return Ok(true);
    }
    // States that last until an operator acts, or for longer than one waits.
    let (code, what) = match status.phase {
        Phase::Role(RoleState::Failed) => (Code::Role, "the role cannot be started"),
        Phase::Role(RoleState::Cycling) => (Code::Role, "the role ends again and again"),
        Phase::Role(RoleState::Stopped) => (Code::Role, "the role is stopped"),
        Phase::Faulted => (Code::Boot, "the guest does not boot"),
        Phase::Failed => (Code::Start, "the host cannot run it"),
        Phase::Stopped { .. } => (Code::Role, "it is stopped"),
        _ => return Ok(false),
    };
    let mut error = CliError::new(code, format!("{name} is {}: {what}", instance.state));
    if let Some(cause) = &status.cause {
        error = error.cause(cause.clone());
    }
    Err(error.logs(format!("host-agent logs {name}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::supervisor::status::InstanceStatus;

    fn instance(phase: Phase) -> InstanceInfo {
        let status = InstanceStatus {
            phase,
            cause: Some("why".into()),
            applied: 1,
            ..InstanceStatus::default()
        };
        InstanceInfo {
            name: "A_IN_0".into(),
            state: status.word().to_owned(),
            status,
            generation: 1,
            incarnation: 2,
            uptime_ms: 1,
            vmm_pid: None,
            endpoints: Vec::new(),
        }
    }

    fn found(phases: &[Phase]) -> Found {
        Found {
            instances: phases.iter().map(|phase| instance(*phase)).collect(),
            ..Found::default()
        }
    }

    #[test]
    fn a_service_is_so_when_all_of_its_instances_are() {
        use Condition::{Agent, Applied, Gone, Ready};
        let (ready, starting) = (
            Phase::Role(RoleState::Ready),
            Phase::Role(RoleState::Starting),
        );
        for (condition, phases, met) in [
            (Ready, &[ready, ready][..], true),
            (Ready, &[ready, starting], false),
            (Ready, &[], false),
            (Agent, &[ready, starting], true),
            (Agent, &[ready, Phase::Booted], false),
            (Applied, &[ready], false),
            (Gone, &[ready], false),
            (Gone, &[], false),
            // The next boot is tried by itself.
            (Ready, &[ready, Phase::Restarting], false),
        ] {
            let seen = is_met(condition, "shop", &found(phases)).unwrap();
            assert_eq!(seen, met, "{condition:?} {phases:?}");
        }
        let mut applied = found(&[ready]);
        applied.instances[0].status.applied = 2;
        assert!(is_met(Applied, "shop", &applied).unwrap());
    }

    #[test]
    fn a_wait_ends_early_with_the_cause_where_the_state_will_not_come() {
        for (phase, exit) in [
            (Phase::Role(RoleState::Failed), Exit::Role),
            (Phase::Role(RoleState::Cycling), Exit::Role),
            (Phase::Faulted, Exit::Boot),
            (Phase::Failed, Exit::Unclassified),
            (Phase::Stopped { clean: true }, Exit::Role),
        ] {
            let all = found(&[Phase::Role(RoleState::Ready), phase]);
            let error = is_met(Condition::Ready, "shop", &all).unwrap_err();
            assert_eq!(error.exit(), exit, "{phase:?}");
            assert!(error.human(false).contains("why"), "{phase:?}");
            // What is to go may be in any state.
            assert!(!is_met(Condition::Gone, "shop", &all).unwrap());
        }
    }
}
