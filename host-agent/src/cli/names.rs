//! `host-agent names`: what the completion scripts of shells complete, quickly or not at all.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::{Args, ValueEnum};

use super::error::CliError;
use super::exit::Exit;
use super::output;
use super::runtime;
use crate::api::client::{self, Client, RunningDeployment};
use crate::api::types::Services;
use crate::printable::printable;
use crate::store::{image, paths};

/// Longest time for answers: a person who presses Tab waits.
const LIMIT: Duration = Duration::from_millis(200);

/// `names`.
#[derive(Debug, Clone, Args)]
pub struct NamesArgs {
    /// Names of what
    pub kind: Kind,
}

/// Kinds of names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Kind {
    /// Instances.
    Instances,
    /// Services that are kept.
    Services,
    /// Both.
    Targets,
    /// Instances with a colon, as `cp` has them.
    Places,
    /// Images.
    Images,
}

/// Prints a name a line. What cannot be found in time is left out.
pub fn run(args: &NamesArgs) -> Result<Exit, CliError> {
    let names = match args.kind {
        Kind::Images => image::names(&paths::data_dir()).unwrap_or_default(),
        kind => runtime()?.block_on(async {
            let asked = tokio::time::timeout(LIMIT, ask(kind)).await;
            asked.unwrap_or_default()
        }),
    };
    let lines: String = names.iter().map(|name| printable(name) + "\n").collect();
    output::write(lines.as_bytes())?;
    Ok(Exit::Success)
}

async fn ask(kind: Kind) -> Vec<String> {
    let mut names = Vec::new();
    if kind != Kind::Services {
        let running = client::list(&paths::runtime_dir()).await;
        names = instances(&running.unwrap_or_default());
    }
    match kind {
        Kind::Services | Kind::Targets => names.extend(services().await),
        Kind::Places => names.iter_mut().for_each(|name| name.push(':')),
        Kind::Instances | Kind::Images => {}
    }
    names
}

/// The shortest name of each instance that is one.
fn instances(running: &[RunningDeployment]) -> Vec<String> {
    let all = running.iter().flat_map(|it| {
        let instances = it.info.instances.iter();
        instances.map(|instance| (it.info.deployment.as_str(), instance.name.as_str()))
    });
    let mut count: BTreeMap<&str, usize> = BTreeMap::new();
    for (_, name) in all.clone() {
        *count.entry(name).or_default() += 1;
    }
    let shortest = all.map(|(deployment, name)| match count[name] {
        1 => name.to_owned(),
        _ => format!("{}/{name}", deployment.get(..8).unwrap_or(deployment)),
    });
    shortest.collect()
}

async fn services() -> Vec<String> {
    let Ok(mut client) = Client::connect(&paths::serve_socket()).await else {
        return Vec::new();
    };
    let found: Result<Services, _> = client.get("services").await;
    let found = found.map(|found| found.services).unwrap_or_default();
    found.into_iter().map(|service| service.name).collect()
}
