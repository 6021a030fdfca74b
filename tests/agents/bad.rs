//! A guest agent that fails in the way that the last line of its own file names.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::thread;
use std::time::Duration;

/// Where guest agents report to the app agent.
const REPORTS: &str = "/run/host-agent/app-agent.sock";

fn main() -> ExitCode {
    let program = fs::read("/proc/self/exe").unwrap_or_default();
    let last = program.rsplit(|byte| *byte == b'\n').next();
    match last.unwrap_or_default() {
        // Works for a moment, then hangs.
        b"hang" => {
            if let Ok(mut socket) = UnixStream::connect(REPORTS) {
                let report = br#"{"role":"ready"}"#;
                let length = u32::try_from(report.len()).unwrap_or(0).to_le_bytes();
                let _ = socket.write_all(&length);
                let _ = socket.write_all(report);
                for_ever();
            }
            ExitCode::FAILURE
        }
        // Never sends a report.
        b"silent" => for_ever(),
        _ => ExitCode::FAILURE,
    }
}

fn for_ever() -> ! {
    loop {
        thread::sleep(Duration::from_secs(1000));
    }
}
