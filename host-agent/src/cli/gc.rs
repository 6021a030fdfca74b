//! `host-agent gc`: removes what nothing needs any more, by the daemon if one runs.

use std::path::Path;

use clap::Args;
use serde_json::json;

use super::args::BeginArgs;
use super::config;
use super::error::{CliError, Code};
use super::exit::Exit;
use super::instances::columns;
use super::output::Output;
use super::runtime;
use super::service::confirm;
use crate::api::client::{Client, ClientError};
use crate::api::gc::{GcAnswer, GcRequest};
use crate::controller::garbage::of_store;
use crate::doctor::iec;
use crate::printable::printable;
use crate::store::garbage::{Garbage, Needed, collect};
use crate::store::paths;
use crate::store::services::ServiceStore;

/// `gc`.
#[derive(Debug, Clone, Args)]
pub struct GcArgs {
    /// Remove images too that no instance and no service uses
    #[arg(long)]
    pub images: bool,
    /// Only show what would be removed
    #[arg(long)]
    pub dry_run: bool,
    /// Do not ask on a terminal
    #[arg(short, long)]
    pub yes: bool,
}

/// Shows what is not needed, and removes it.
pub fn run(args: &GcArgs, no_input: bool, output: &Output) -> Result<Exit, CliError> {
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let found = ask(args.images, true).await?;
        if args.dry_run || found.is_empty() {
            return answer(&found, true, output);
        }
        for line in table(&found).lines() {
            output.progress(line);
        }
        let begin = BeginArgs {
            yes: args.yes,
            wait: false,
            timeout: None,
        };
        confirm(&format!("remove {}?", total(&found)), &begin, no_input).await?;
        let removed = ask(args.images, false).await?;
        answer(&removed, false, output)
    });
    // A thread may still wait for standard input.
    runtime.shutdown_background();
    result
}

/// Asks the daemon, or looks into the data directory if none runs.
pub(super) async fn ask(images: bool, dry_run: bool) -> Result<Vec<Garbage>, CliError> {
    match Client::connect(&paths::serve_socket()).await {
        Ok(mut client) => {
            let request = GcRequest { images, dry_run };
            let answer: GcAnswer = client.post("gc", &request).await?;
            Ok(answer.garbage)
        }
        Err(ClientError::Unreachable { .. }) => of_directory(&paths::data_dir(), images, dry_run),
        Err(error) => Err(error.into()),
    }
}

/// The garbage of a data directory that no daemon serves.
fn of_directory(data_dir: &Path, images: bool, dry_run: bool) -> Result<Vec<Garbage>, CliError> {
    let failed = |error: &dyn std::error::Error| CliError::chain(Code::Unclassified, error);
    if data_dir.join("state").exists() {
        // Its lock keeps a daemon from starting meanwhile.
        let store = ServiceStore::open(data_dir);
        let store = store.map_err(|error| CliError::chain(Code::Store, &error))?;
        let rules = config::load(None)?.rules();
        let rules = images.then_some(&rules);
        return of_store(&store, data_dir, rules, dry_run).map_err(|error| failed(&error));
    }
    let needed = Needed {
        packages: Vec::new(),
        images: images.then(Default::default),
    };
    collect(data_dir, &needed, dry_run).map_err(|error| failed(&error))
}

fn answer(found: &[Garbage], asked: bool, output: &Output) -> Result<Exit, CliError> {
    let text = match (found.is_empty(), asked) {
        (true, _) => "nothing to remove".to_owned(),
        (false, true) => format!("{}\nwould remove {}", table(found), total(found)),
        (false, false) => format!("removed {}", total(found)),
    };
    let bytes: u64 = found.iter().map(|it| it.bytes).sum();
    output.answer(
        &text,
        || json!({"schema": "host-agent.gc/1", "dry_run": asked, "bytes": bytes, "garbage": found}),
    )?;
    Ok(Exit::Success)
}

fn table(found: &[Garbage]) -> String {
    let rows = found.iter().map(|it| {
        [
            it.kind.name().to_owned(),
            printable(&it.name),
            iec(it.bytes),
        ]
    });
    columns(&rows.collect::<Vec<_>>())
}

/// In words: how many things, how many bytes.
fn total(found: &[Garbage]) -> String {
    let bytes: u64 = found.iter().map(|it| it.bytes).sum();
    let plural = if found.len() == 1 { "" } else { "s" };
    format!("{} thing{plural}, {}", found.len(), iec(bytes))
}
