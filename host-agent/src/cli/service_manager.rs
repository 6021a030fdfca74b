//! Tells the service manager (systemd) that started this process how it is (`sd_notify(3)`).
//! Without one every call does nothing.

use std::io;
use std::os::unix::net::UnixListener;
use std::time::Duration;

use listenfd::ListenFd;
use sd_notify::{NotifyState, notify};
use tokio::time::{Interval, MissedTickBehavior, interval};

/// The process serves.
pub fn ready() {
    report(&[NotifyState::Ready]);
}

/// The Unix socket that the manager listens on for this process, if it does.
pub fn socket() -> io::Result<Option<UnixListener>> {
    ListenFd::from_env().take_unix_listener(0)
}

/// The process ends.
pub fn stopping() {
    report(&[NotifyState::Stopping]);
}

/// Reports that the loop of this process runs, if the manager kills it otherwise.
#[derive(Debug)]
pub struct Watchdog(Option<Interval>);

impl Watchdog {
    /// As the environment says.
    pub fn from_environment() -> Self {
        Self(sd_notify::watchdog_enabled().map(half).map(|period| {
            let mut reports = interval(period);
            reports.set_missed_tick_behavior(MissedTickBehavior::Delay);
            reports
        }))
    }

    /// Waits until the next report is due, and sends it. Never ends where none is expected.
    /// Cancel safe.
    pub async fn report(&mut self) {
        match &mut self.0 {
            Some(reports) => {
                reports.tick().await;
                report(&[NotifyState::Watchdog]);
            }
            None => std::future::pending().await,
        }
    }
}

/// Two reports fit into the limit, so that one may be late.
fn half(limit: Duration) -> Duration {
    // An interval must not be zero.
    (limit / 2).max(Duration::from_millis(1))
}

/// The manager may be gone: then nobody expects the report.
fn report(states: &[NotifyState<'_>]) {
    let _ = notify(states);
}
