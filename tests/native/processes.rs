//! How many processes of the program a command starts.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use e2e::service::Service;
use e2e::{Sandbox, program, text};
use nix::errno::Errno;
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

/// Runs `program` with `arguments` to its end; how often the kernel opened the program,
/// which is once for each process that executes it.
fn executions(sandbox: &Sandbox, program: &Path, arguments: &[&str]) -> Result<usize> {
    let opened = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    // execve(2) reads the file after it has opened it. That event between two others keeps
    // the kernel from merging them.
    opened.add_watch(program, AddWatchFlags::IN_OPEN | AddWatchFlags::IN_ACCESS)?;
    let mut command = Command::new(program);
    sandbox.set_environment(&mut command);
    // `run` and `test` end after they have checked the host, also where guests can run.
    command.env("HOST_AGENT_TIMEOUT_SCALE", "invalid");
    let output = command.args(arguments).output()?;
    let refused = text(&output).contains("HOST_AGENT_TIMEOUT_SCALE");
    ensure!(refused, "{arguments:?}: {}", text(&output));
    let mut count = 0;
    loop {
        match opened.read_events() {
            Ok(events) => {
                let opens = events.iter().map(|event| event.mask);
                count += opens
                    .filter(|mask| mask.contains(AddWatchFlags::IN_OPEN))
                    .count();
            }
            Err(Errno::EAGAIN) => return Ok(count),
            Err(errno) => return Err(errno.into()),
        }
    }
}

#[test]
fn only_commands_that_need_it_start_the_sandbox_probe() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = Service::idle().write(&sandbox.file("service"))?;
    let service = service.to_string_lossy();
    // No other test executes this file.
    let copy: PathBuf = sandbox.file("host-agent");
    fs::copy(program(), &copy)?;
    for (arguments, processes) in [
        (&["run", &service][..], 1),
        (&["test", &service], 1),
        (&["run", "--require-sandbox", &service], 2),
        (&["doctor"], 2),
    ] {
        let count = executions(&sandbox, &copy, arguments)?;
        ensure!(count == processes, "{arguments:?}: {count} processes");
    }
    Ok(())
}
