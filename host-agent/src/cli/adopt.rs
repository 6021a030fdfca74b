//! `host-agent adopt`: takes over guests that outlived their host agent, until a signal
//! stops them.

use vmbus::text::chain;

use super::deploy::{self, timeline_line};
use super::error::{CliError, Code};
use super::exit::Exit;
use super::interrupt::Interrupts;
use super::output::Output;
use super::runtime;
use crate::api::server;
use crate::doctor::Scope;
use crate::supervisor::event::{TimelineEvent, missed};
use crate::supervisor::host::{Host, HostError};
use crate::supervisor::timeline::Timeline;

/// Adopts every durable deployment of this data directory.
pub fn run(output: &Output) -> Result<Exit, CliError> {
    let unblocked = output.never_block();
    unblocked.map_err(|error| CliError::chain(Code::Unclassified, &error))?;
    let machine = deploy::host(Scope::Guests)?;
    let options = deploy::options(&machine, None)?;
    let runtime = runtime()?;
    let result = runtime.block_on(async {
        let mut interrupts = Interrupts::listen()?;
        let timeline = Timeline::start();
        let mut events = timeline.subscribe();
        let failed = |error: HostError| CliError::chain(Code::Start, &error);
        let host = Host::open(options, timeline).await.map_err(failed)?;
        let adopted = host.adopt(|_| true).await.map_err(failed)?;
        let count = adopted.len();
        output.progress(&format!("adopted {count} deployments; Ctrl-C stops them"));
        let server = server::serve(&host, None);
        let server = server.map_err(|error| CliError::chain(Code::Start, &error))?;
        let ended = async {
            for deployment in &adopted {
                deployment.ended().await;
            }
        };
        let mut ended = std::pin::pin!(ended);
        let mut signals = 0;
        loop {
            tokio::select! {
                biased;
                Some(event) = events.next() => show(output, &event)?,
                number = interrupts.next() => {
                    // A closing terminal sends SIGHUP twice.
                    if signals > 0 && i32::from(number) == libc::SIGHUP {
                        continue;
                    }
                    signals += 1;
                    for deployment in &adopted {
                        if signals == 1 {
                            deployment.stop().await;
                        } else {
                            deployment.kill().await;
                        }
                    }
                }
                () = &mut ended => break,
            }
        }
        server.close().await;
        for deployment in &adopted {
            if let Err(error) = host.remove(deployment.id()).await {
                output.warn(&format!("{}; removed later", chain(&error)));
            }
        }
        Ok(Exit::Success)
    });
    runtime.shutdown_background();
    result
}

fn show(output: &Output, event: &TimelineEvent) -> Result<(), CliError> {
    let width = event.instance.as_ref().map_or(0, String::len);
    let line = timeline_line(event, width);
    output.line(&line, || event.json(), |count| missed(event.at, count))
}
