//! `host-agent events`: what happened to services and instances, from the store of `serve`.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use clap::Args;
use serde_json::{Value, json};

use super::error::{CliError, Code};
use super::exit::Exit;
use super::interrupt::Interrupts;
use super::lossless_output::LosslessOutput;
use super::output::Output;
use super::{runtime, service};
use crate::api::client::{Client, ClientError};
use crate::api::event_stream::EventStream;
use crate::api::types::{EventInfo, EventQuery, RefusalKind};
use crate::store::paths;

/// First delay before a daemon that is gone is called again, doubled each time.
const RETRY: Duration = Duration::from_millis(100);
/// Longest delay.
const RETRY_MOST: Duration = Duration::from_secs(2);

/// `events`.
#[derive(Debug, Clone, Args)]
pub struct EventsArgs {
    /// Keep printing new events, over restarts of serve too
    #[arg(short, long)]
    pub follow: bool,
    /// Only events with larger numbers
    #[arg(long, value_name = "N")]
    pub after: Option<u64>,
    /// Only events of this service, which may be deleted
    #[arg(long, value_name = "NAME")]
    pub service: Option<String>,
    /// Only events of this instance, or DEPLOYMENT/INSTANCE
    #[arg(long, value_name = "INSTANCE")]
    pub instance: Option<String>,
}

impl EventsArgs {
    fn query(&self) -> EventQuery {
        let (deployment, instance) = match self.instance.as_deref() {
            None => (None, None),
            Some(name) => match name.split_once('/') {
                None => (None, Some(name.to_owned())),
                Some((deployment, name)) => (Some(deployment.to_owned()), Some(name.to_owned())),
            },
        };
        EventQuery {
            after: self.after,
            follow: self.follow,
            service: self.service.clone(),
            deployment,
            instance,
        }
    }
}

/// Prints the events.
pub fn run(args: &EventsArgs, output: &Output) -> Result<Exit, CliError> {
    runtime()?.block_on(async {
        let mut interrupts = Interrupts::listen()?;
        let stdout = LosslessOutput::to(io::stdout());
        let stdout = stdout.map_err(|error| CliError::chain(Code::Unclassified, &error))?;
        let socket = paths::serve_socket();
        let printed = async {
            let read = tokio::select! {
                read = read(&socket, args.query(), &stdout, output) => read,
                // Noticed without another event.
                () = stdout.reader_gone() => Ok(()),
            };
            stdout.finish().await?;
            read
        };
        tokio::select! {
            printed = printed => printed.map(|()| Exit::Success),
            // A signal is the normal end of `-f`.
            number = interrupts.next() => {
                Ok(if args.follow { Exit::Success } else { Exit::Signal(number) })
            }
        }
    })
}

/// Prints the events that `query` names. A query that follows goes on with the next daemon.
async fn read(
    socket: &Path,
    mut query: EventQuery,
    stdout: &LosslessOutput,
    output: &Output,
) -> Result<(), CliError> {
    let mut connected = false;
    // Of a daemon that is lost.
    let mut delay = None;
    loop {
        let (before, started) = (query.after, Instant::now());
        let opened = match Client::connect(socket).await {
            Ok(client) => client.events(&query).await,
            Err(error) => Err(error),
        };
        let end = match opened {
            Ok(mut events) => {
                connected = true;
                copy(&mut events, &mut query.after, stdout, output).await
            }
            Err(error) if !connected && matches!(error, ClientError::Unreachable { .. }) => {
                return Err(service::not_serving(&error));
            }
            Err(error) => Err(error),
        };
        match end {
            Ok(End::ReaderGone) => return Ok(()),
            Ok(End::Answered) if !query.follow => return Ok(()),
            Err(error) if !query.follow || !is_passing(&error) => return Err(error.into()),
            Ok(End::Answered) | Err(_) => {}
        }
        if query.after != before || started.elapsed() > RETRY_MOST {
            delay = None;
        }
        if delay.is_none() {
            output.warn(&waiting(query.after));
        }
        let now = delay.unwrap_or(RETRY);
        tokio::time::sleep(now).await;
        delay = Some(RETRY_MOST.min(2 * now));
    }
}

/// How an answer ended.
enum End {
    /// It is whole.
    Answered,
    /// The reader of standard output has closed it.
    ReaderGone,
}

/// Prints an answer; `last` becomes the number of the last event.
async fn copy(
    events: &mut EventStream,
    last: &mut Option<u64>,
    stdout: &LosslessOutput,
    output: &Output,
) -> Result<End, ClientError> {
    while let Some(event) = events.next().await? {
        let Some(slot) = stdout.reserve().await else {
            return Ok(End::ReaderGone);
        };
        let line = output.rendered(&text(&event), || line(&event));
        slot.send(line.into_bytes());
        *last = Some(event.number);
    }
    Ok(End::Answered)
}

/// Whether a daemon that is started again may answer.
fn is_passing(error: &ClientError) -> bool {
    matches!(
        error,
        ClientError::Unreachable { .. }
            | ClientError::Refused {
                kind: RefusalKind::Unreachable | RefusalKind::Busy,
                ..
            }
    )
}

fn waiting(last: Option<u64>) -> String {
    let lost = "host-agent serve has ended; waiting for the next one";
    match last {
        Some(last) => format!("{lost}, to go on after event {last}"),
        None => lost.to_owned(),
    }
}

/// Schema `host-agent.stored-event/1`.
fn line(event: &EventInfo) -> Value {
    let mut line = json!(event);
    line["schema"] = json!("host-agent.stored-event/1");
    line
}

fn text(event: &EventInfo) -> String {
    let about = [event.service.as_deref(), event.instance.as_deref()];
    let about: Vec<_> = about.into_iter().flatten().collect();
    let about = match about.len() {
        0 => "host".to_owned(),
        _ => about.join("/"),
    };
    format!("{}  {:>5}  {about}  {}", event.at, event.number, event.text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::server::{self, Server};
    use crate::controller::{Controller, Policy};
    use crate::store::services::ServiceStore;
    use crate::supervisor::event::EventKind;
    use crate::supervisor::host::{Host, tests::empty};
    use std::io::{BufRead as _, BufReader};
    use std::os::unix::fs::PermissionsExt as _;

    /// A served host, as of `host-agent serve`, whose events begin with `texts`.
    async fn daemon(dir: &Path, texts: &[&str]) -> (Host, Controller, Server) {
        let host = empty(dir, dir);
        let store = ServiceStore::open(dir).unwrap();
        let events = host.timeline().subscribe();
        for text in texts {
            let text = (*text).to_owned();
            host.timeline().report(None, EventKind::Warning { text });
        }
        let controller =
            Controller::start(host.clone(), store, events, Policy::default(), None).await;
        let controller = controller.unwrap();
        let server = server::serve(&host, Some(controller.clone())).unwrap();
        (host, controller, server)
    }

    #[tokio::test(flavor = "current_thread")]
    async fn events_are_followed_over_a_restart_of_the_daemon() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let socket = empty(dir.path(), dir.path()).socket();
        let (reader, writer) = io::pipe().unwrap();
        let (lines, mut printed) = tokio::sync::mpsc::unbounded_channel();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines() {
                lines.send(line.unwrap()).unwrap();
            }
        });
        let output = Output::before_flags(false);
        let stdout = LosslessOutput::to(writer).unwrap();
        let query = EventQuery {
            after: None,
            follow: true,
            service: None,
            deployment: None,
            instance: None,
        };
        let refused = read(&socket, query.clone(), &stdout, &output).await;
        assert_eq!(refused.unwrap_err().code(), Code::NotServing);

        let (first, controller, server) = daemon(dir.path(), &["a", "b"]).await;
        let path = socket.clone();
        let following = tokio::spawn(async move { read(&path, query, &stdout, &output).await });
        for (number, text) in [(1, "a"), (2, "b")] {
            let line = printed.recv().await.unwrap();
            assert!(
                line.ends_with(&format!("{number}  host  warning: {text}")),
                "{line}"
            );
        }
        let text = "c".to_owned();
        first.timeline().report(None, EventKind::Warning { text });
        controller.close().await;
        server.close().await;
        drop((first, controller));
        // The client finds no daemon, then the next one, whose store is the same.
        while ServiceStore::open(dir.path()).is_err() {
            tokio::task::yield_now().await;
        }
        tokio::time::timeout(RETRY, std::future::pending::<()>())
            .await
            .unwrap_err();
        let (_second, _controller, _server) = daemon(dir.path(), &["d", "e"]).await;
        for (number, text) in [(3, "c"), (4, "d"), (5, "e")] {
            let line = printed.recv().await.unwrap();
            assert!(
                line.ends_with(&format!("{number}  host  warning: {text}")),
                "{line}"
            );
        }
        following.abort();
    }

    #[test]
    fn an_event_is_one_line_with_time_number_and_instance() {
        let event = EventInfo {
            number: 12,
            at_ms: 1,
            at: "2026-12-01T05:00:38.123Z".into(),
            service: Some("shop".into()),
            deployment: Some("d".into()),
            instance: Some("A_IN_0".into()),
            text: "role Ready".into(),
            event: json!({"event": "role"}),
        };
        assert_eq!(
            text(&event),
            "2026-12-01T05:00:38.123Z     12  shop/A_IN_0  role Ready"
        );
        assert_eq!(line(&event)["event"]["event"], "role");
        let of_host = EventInfo {
            service: None,
            instance: None,
            ..event
        };
        assert!(text(&of_host).contains("  12  host  role"));
    }
}
