//! VMM processes and the janitor ignore a signal to every process of a session or
//! unit, so that the command can stop the roles while their guests run.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use e2e::Sandbox;
use e2e::run::eventually;
use e2e::signal_masks::{mask, mask_of};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

const ENDS: [Signal; 3] = [Signal::SIGHUP, Signal::SIGINT, Signal::SIGTERM];

#[test]
fn guests_and_janitor_ignore_signals_and_end_with_the_command() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let nowhere = sandbox.file("nowhere").display().to_string();
    let processes: [&[&str]; 2] = [&["vmm"], &["janitor", &nowhere, "owner", &nowhere]];
    for arguments in processes {
        let (ours, theirs) = host_agent::vmm::wire::pair()?;
        // As from a background job of a script, and worse.
        let mut child = Command::new("env")
            .args([
                "--ignore-signal=INT,QUIT,CHLD,USR2",
                "--block-signal=USR1,CHLD",
            ])
            .arg(e2e::program())
            .args(arguments)
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let pid = child.id();
        let inherited = mask_of(&[
            Signal::SIGQUIT,
            Signal::SIGCHLD,
            Signal::SIGUSR1,
            Signal::SIGUSR2,
        ]);
        let ignored = eventually("the process ignores these signals and no others", || {
            let ignored = mask(pid, "SigBlk")? | mask(pid, "SigIgn")?;
            Ok(ignored & (inherited | mask_of(&ENDS)) == mask_of(&ENDS))
        });
        for end in ENDS {
            kill(Pid::from_raw(i32::try_from(pid)?), end)?;
        }
        drop(ours);
        let status = child.wait()?;
        ignored?;
        // An exit code: no signal ended it.
        ensure!(status.code().is_some(), "{arguments:?}: {status}");
    }
    Ok(())
}

/// Some parents start programs with signals blocked or SIGCHLD ignored.
#[test]
fn a_command_gets_signals_and_children_whatever_it_inherits() -> Result<()> {
    let sandbox = Sandbox::new()?;
    // A host agent that does not answer, so that the command waits.
    let sockets = sandbox.file("run/host-agent");
    fs::create_dir(&sockets)?;
    fs::set_permissions(&sockets, Permissions::from_mode(0o700))?;
    let listener = UnixListener::bind(sockets.join("0.sock"))?;
    let mut command = Command::new("env");
    command
        .args(["--ignore-signal=CHLD", "--block-signal=TERM,USR1"])
        .arg(e2e::program())
        .arg("ps")
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    sandbox.set_environment(&mut command);
    let mut child = command.spawn()?;
    let _connection = listener.accept()?;
    let blocked = mask(child.id(), "SigBlk");
    let ignored = mask(child.id(), "SigIgn");
    child.kill()?;
    child.wait()?;
    let (blocked, ignored) = (blocked?, ignored?);
    ensure!(blocked == 0, "{blocked:x} is blocked");
    ensure!(
        ignored & mask_of(&[Signal::SIGCHLD]) == 0,
        "{ignored:x} is ignored"
    );
    Ok(())
}
