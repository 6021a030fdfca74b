//! `host-agent serve`: keeps the services of this user running. Their guests outlive it, and
//! the next one takes them over.

use std::net::SocketAddr;

use vmbus::text::chain;

use super::args::ServeArgs;
use super::config;
use super::deploy::{self, timeline_line};
use super::error::{CliError, Code};
use super::exit::Exit;
use super::interrupt::Interrupts;
use super::log::LogControl;
use super::output::Output;
use super::runtime;
use super::service_manager::{self, Watchdog};
use crate::api::guard::Guard;
use crate::api::server::{self, Access, Server};
use crate::blocking::blocking;
use crate::config::{Config, Entry};
use crate::controller::{Controller, Policy};
use crate::doctor::Scope;
use crate::page;
use crate::page::tcp::TcpPage;
use crate::store::audit::AuditLog;
use crate::store::database::StoreError;
use crate::store::paths;
use crate::store::services::ServiceStore;
use crate::supervisor::event::{TimelineEvent, missed};
use crate::supervisor::host::Host;
use crate::supervisor::timeline::Timeline;

/// Serves until a signal ends it.
pub fn run(args: &ServeArgs, log: &LogControl, output: &Output) -> Result<Exit, CliError> {
    let unblocked = output.never_block();
    unblocked.map_err(|error| CliError::chain(Code::Unclassified, &error))?;
    let mut config = config::load(args.config.file.as_deref())?;
    log.configure(&config);
    let machine = deploy::host(
        &config,
        if args.require_sandbox {
            Scope::GuestsAndSandbox
        } else {
            Scope::Guests
        },
    )?;
    let unable = machine.failure().map(|check| check.text.clone());
    if let Some(why) = &unable {
        output.warn(&format!("services cannot be started on this host: {why}"));
    }
    let mut options = deploy::options(&machine, &config, args.heartbeat_limit)?;
    if args.require_sandbox && !machine.has_sandbox() {
        return Err(CliError::sandbox(&machine));
    }
    options.require_sandbox = args.require_sandbox;
    options.socket = Some(paths::SERVE);
    let store = ServiceStore::open(&options.data_dir).map_err(refused)?;
    let audit = AuditLog::open(&options.data_dir.join("state")).map_err(|error| {
        CliError::chain(Code::Store, &error).cause("audit log (state/audit.jsonl)")
    })?;
    runtime()?.block_on(async {
        let mut interrupts = Interrupts::listen()?;
        let mut watchdog = Watchdog::from_environment();
        let timeline = Timeline::start();
        let mut events = timeline.subscribe();
        let recorded = timeline.subscribe();
        let failed = |error: &dyn std::error::Error| CliError::chain(Code::Start, error);
        let host = Host::open(options, timeline);
        let host = host.await.map_err(|error| failed(&error))?;
        let controller = Controller::start(host.clone(), store, recorded, policy(&config), unable);
        let controller = controller.await.map_err(|error| failed(&error))?;
        let pages = page::router(controller.clone());
        let access = Access {
            guard: Guard::audited(audit),
            group: config.api_group.value.as_ref().map(|group| group.id),
            activated: service_manager::socket().map_err(|error| failed(&error))?,
        };
        let server = server::serve_with(&host, controller.clone(), pages, access);
        let server = server.map_err(|error| {
            let what = format!("cannot serve {}", host.socket().display());
            CliError::new(Code::RuntimeDirectory, what).cause(chain(&error))
        })?;
        output.progress(&format!("host-agent: serving {}", host.socket().display()));
        let page = match args.page {
            Some(address) => Some(serve_page(address, &server, output).await?),
            None => None,
        };
        service_manager::ready();
        loop {
            tokio::select! {
                biased;
                Some(event) = events.next() => show(output, &event)?,
                () = watchdog.report() => {}
                number = interrupts.next() => {
                    if i32::from(number) != libc::SIGHUP {
                        break;
                    }
                    let file = args.config.file.clone();
                    let read = blocking(move || config::load(file.as_deref())).await;
                    match read.unwrap_or_else(|error| Err(failed(&error))) {
                        Ok(new) => {
                            reload(&config, &new, output);
                            log.configure(&new);
                            controller.set_policy(policy(&new));
                            let limited = host.limit(new.admission()).await;
                            limited.map_err(|error| failed(&error))?;
                            config = new;
                            tracing::info!("configuration read again");
                        }
                        Err(error) => {
                            output.warn("the configuration stays as it was");
                            output.error(&error);
                            tracing::error!(
                                code = error.code().name(),
                                error = error.what(),
                                "configuration refused; the old one stays"
                            );
                        }
                    }
                }
            }
        }
        service_manager::stopping();
        // Clients that follow events get the last ones.
        controller.close().await;
        drop(page);
        server.close().await;
        output.progress("host-agent: ended; guests run on, the next serve takes them over");
        output.finish();
        // Drops of the host's instances would end their guests.
        std::process::exit(0)
    })
}

/// Keys that only a new daemon takes.
const OF_THE_START: [&str; 4] = [
    "directories.data",
    "directories.runtime",
    "guests.heartbeat_limit",
    "api.group",
];

/// Says what of `new` does not count before the next start.
fn reload(old: &Config, new: &Config, output: &Output) {
    let (old, new) = (old.entries(), new.entries());
    for key in OF_THE_START {
        let value = |entries: &[Entry]| {
            let found = entries.iter().find(|entry| entry.key == key);
            found.map(|entry| (entry.value.clone(), entry.origin.clone()))
        };
        if let (Some((old, _)), Some((new, origin))) = (value(&old), value(&new))
            && old != new
        {
            let text =
                format!("{key} = {new} ({origin}) counts from the next start on: it is {old}");
            output.warn(&text);
            tracing::warn!("{text}");
        }
    }
}

/// What the operator decides about services.
fn policy(config: &Config) -> Policy {
    Policy {
        rules: config.rules(),
        max_services: config.max_services.value,
    }
}

async fn serve_page(
    address: SocketAddr,
    server: &Server,
    output: &Output,
) -> Result<TcpPage, CliError> {
    let page = TcpPage::start(address, server).await.map_err(|error| {
        let what = format!("cannot serve the page on {address}");
        let this = CliError::new(Code::Page, what).cause(chain(&error));
        this.hint("host-agent serve --page 127.0.0.1:0")
    })?;
    output.progress(&format!("host-agent: page {}", page.url()));
    Ok(page)
}

fn show(output: &Output, event: &TimelineEvent) -> Result<(), CliError> {
    let width = event.instance.as_ref().map_or(0, String::len);
    let line = timeline_line(event, width);
    output.line(&line, || event.json(), |count| missed(event.at, count))
}

fn refused(error: StoreError) -> CliError {
    let this = CliError::chain(Code::Store, &error);
    match error {
        StoreError::InUse { .. } => this
            .exit_with(Exit::Conflict)
            .hint("host-agent service list"),
        StoreError::Newer { .. } => this.hint("start the newer host-agent that wrote it"),
        StoreError::Damaged { path, .. } => {
            let path = path.display();
            this.hint(format!(
                "keep {path} aside, and put a copy of it in its place"
            ))
        }
        StoreError::File { .. } | StoreError::Sqlite(_) => this,
    }
}
