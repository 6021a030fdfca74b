//! The log of this process: one line for each event on standard error, for people or as JSON.
//! Level and format of `serve` change while it runs.

use std::fmt::{self, Write as _};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::{Format, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::prelude::*;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Registry, reload};

use super::output::Output;
use crate::config::{Config, LogFormat};
use crate::printable::printable;
use crate::wall_clock::{now_ms, rfc3339};

/// Variable with a filter such as `info` or `host_agent::supervisor=debug,warn`.
pub const FILTER_VARIABLE: &str = "HOST_AGENT_LOG";

/// Changes the log of this process.
#[derive(Debug, Clone)]
pub struct LogControl {
    filter: reload::Handle<Targets, Registry>,
    json: Arc<AtomicBool>,
    /// Of the flags, which win over files.
    verbose: u8,
}

impl LogControl {
    /// Starts the log: warnings, more with `-v`, or by [`FILTER_VARIABLE`]. VMM processes get
    /// no environment, so they always log warnings and errors.
    pub fn start(verbose: u8, output: &Output) -> Self {
        let mut targets = by_flags(verbose);
        if let Ok(text) = std::env::var(FILTER_VARIABLE)
            && !text.is_empty()
        {
            match text.parse() {
                Ok(parsed) => targets = parsed,
                Err(error) => {
                    output.warn(&format!("{FILTER_VARIABLE}={text} is ignored: {error}"));
                }
            }
        }
        let json = Arc::new(AtomicBool::new(false));
        let (filter, handle) = reload::Layer::new(targets);
        let lines = tracing_subscriber::fmt::layer()
            .with_writer(|| PrintableLines(std::io::stderr()))
            .with_ansi(false)
            .event_format(Lines {
                text: Format::default().with_ansi(false).with_target(verbose > 1),
                json: Arc::clone(&json),
            });
        tracing_subscriber::registry()
            .with(filter)
            .with(lines)
            .init();
        Self {
            filter: handle,
            json,
            verbose,
        }
    }

    /// Logs as `config` says.
    pub fn configure(&self, config: &Config) {
        self.json.store(
            config.log_format.value == LogFormat::Json,
            Ordering::Relaxed,
        );
        let by_file = config.log_level.value.parse();
        let targets = match (self.verbose, by_file) {
            (0, Ok(targets)) => targets,
            (verbose, _) => by_flags(verbose),
        };
        // The subscriber lives as long as the process.
        let _ = self.filter.reload(targets);
    }
}

fn by_flags(verbose: u8) -> Targets {
    Targets::new().with_default(match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    })
}

/// Writes an event as a line of text or of JSON.
struct Lines {
    text: Format<Full>,
    json: Arc<AtomicBool>,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        if !self.json.load(Ordering::Relaxed) {
            return self.text.format_event(context, writer, event);
        }
        let mut fields = Fields::default();
        event.record(&mut fields);
        let metadata = event.metadata();
        let line = json!({
            "at": rfc3339(now_ms()),
            "level": metadata.level().as_str().to_ascii_lowercase(),
            "target": metadata.target(),
            "message": fields.message,
            "fields": fields.others,
        });
        writeln!(writer, "{line}")
    }
}

/// The fields of an event.
#[derive(Default)]
struct Fields {
    message: String,
    others: Map<String, Value>,
}

impl Fields {
    fn add(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            (name, value) => {
                self.others.insert(name.to_owned(), value);
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let mut text = String::new();
        let _ = write!(text, "{value:?}");
        self.add(field, text.into());
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value.into());
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }
}

/// Writes log lines, whose fields may quote guests and files, in printable characters. The
/// subscriber writes each line as a whole.
struct PrintableLines(std::io::Stderr);

impl Write for PrintableLines {
    fn write(&mut self, line: &[u8]) -> std::io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        let shown = printable(text.trim_end_matches('\n')) + "\n";
        self.0.write_all(shown.as_bytes()).map(|()| line.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.flush()
    }
}
