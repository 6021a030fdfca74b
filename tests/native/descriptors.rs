//! Helper processes keep no descriptor of the command that they inherited.

use std::os::fd::AsFd;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use e2e::{Sandbox, limit};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe;

/// Starts a program with its standard output as descriptor 9 too.
const WITH_A_COPY: &str = r#"exec "$@" 9>&1 >/dev/null"#;

#[test]
fn helper_processes_close_what_they_inherited() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let nowhere = sandbox.file("nowhere").display().to_string();
    let processes: [&[&str]; 2] = [&["vmm"], &["janitor", &nowhere, "owner", &nowhere]];
    for arguments in processes {
        let (ours, theirs) = host_agent::vmm::wire::pair()?;
        let (reader, writer) = pipe()?;
        let mut child = Command::new("sh")
            .args(["-c", WITH_A_COPY, "sh"])
            .arg(e2e::program())
            .args(arguments)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(writer))
            .stderr(Stdio::null())
            .spawn()?;
        // The pipe ends when the process closes its copy.
        let mut ends = [PollFd::new(reader.as_fd(), PollFlags::POLLIN)];
        let closed = poll(&mut ends, PollTimeout::try_from(limit(20))?);
        let running = child.try_wait()?.is_none();
        drop(ours);
        child.wait()?;
        ensure!(closed? == 1, "{arguments:?} keeps an inherited descriptor");
        ensure!(running, "{arguments:?} ended before its standard input");
    }
    Ok(())
}
