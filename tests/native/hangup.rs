//! Commands that start with SIGHUP ignored, as by `nohup`, continue after a hang-up.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Stdio;
use std::sync::mpsc::{Sender, channel};

use anyhow::{Context as _, Result, ensure};
use e2e::run::{INSTANCE, end};
use e2e::signal_masks::{mask, mask_of};
use e2e::{Sandbox, limit};
use host_agent::api::types::{DeploymentInfo, Deployments, EXEC_PROTOCOL, InstanceInfo};
use host_agent::supervisor::status::InstanceStatus;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use vmbus::frame::{HEADER, Message};
use vmbus::message::ExecInput;

fn read<T: Message>(stream: &mut UnixStream) -> Result<T> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header)?;
    let mut body = vec![0; usize::try_from(u32::from_le_bytes(header))?];
    stream.read_exact(&mut body)?;
    Ok(T::read(&body)?)
}

/// The only deployment of the host agent that this test stands for.
fn deployment() -> DeploymentInfo {
    DeploymentInfo {
        deployment: "0123456789abcdef".into(),
        service: "Test".into(),
        pid: std::process::id(),
        instances: vec![InstanceInfo {
            name: INSTANCE.into(),
            state: "Ready".into(),
            status: InstanceStatus::default(),
            generation: 1,
            incarnation: 1,
            uptime_ms: 1,
            vmm_pid: None,
            endpoints: vec![],
        }],
    }
}

/// Reads a request with its body; its first line.
fn request(stream: &mut UnixStream) -> Result<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        stream.read_exact(&mut byte)?;
        head.extend(byte);
    }
    let head = String::from_utf8(head)?.to_lowercase();
    let length = head
        .lines()
        .find_map(|line| line.strip_prefix("content-length: "));
    let mut body = vec![0; length.unwrap_or("0").parse()?];
    stream.read_exact(&mut body)?;
    Ok(head.lines().next().context("a first line")?.to_owned())
}

/// Accepts the next request that is not `ps`; its connection.
fn accept(listener: &UnixListener) -> Result<UnixStream> {
    loop {
        let (mut stream, _) = listener.accept()?;
        stream.set_read_timeout(Some(limit(10)))?;
        let line = request(&mut stream)?;
        if line.contains("/exec ") {
            let answer = format!(
                "HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\n\
                 upgrade: {EXEC_PROTOCOL}\r\n\r\n"
            );
            stream.write_all(answer.as_bytes())?;
            return Ok(stream);
        }
        if line.contains("/logs?") {
            stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")?;
            return Ok(stream);
        }
        ensure!(line.contains("/v1/deployments "), "{line}");
        let body = serde_json::to_string(&Deployments {
            deployments: vec![deployment()],
        })?;
        let length = body.len();
        write!(
            stream,
            "HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}"
        )?;
    }
}

fn serve(listener: &UnixListener, accepted: &Sender<Result<UnixStream>>) {
    while accepted.send(accept(listener)).is_ok() {}
}

#[test]
fn only_a_hangup_that_is_not_ignored_reaches_a_command() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let directory = sandbox.file("run/host-agent");
    fs::create_dir(&directory)?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
    let listener = UnixListener::bind(directory.join("0123.sock"))?;
    let (sender, accepted) = channel();
    std::thread::spawn(move || serve(&listener, &sender));
    let commands: [&[&str]; 2] = [&["logs", "-f", INSTANCE], &["exec", INSTANCE, "--", "true"]];
    for arguments in commands {
        for (option, ignored) in [
            ("--ignore-signal=HUP", true),
            ("--default-signal=HUP", false),
        ] {
            let mut child = sandbox
                .command_by_env(&[option])
                .args(arguments)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()?;
            let pid = Pid::from_raw(i32::try_from(child.id())?);
            let mut stream = accepted.recv_timeout(limit(10))??;
            let is_exec = arguments[0] == "exec";
            // `logs` handles signals before its request, `exec` before its first frame.
            if is_exec {
                ensure!(read::<ExecInput>(&mut stream)? == (ExecInput::StdinEnd {}));
            }
            let ignores = mask(child.id(), "SigIgn")? & mask_of(&[Signal::SIGHUP]) != 0;
            ensure!(ignores == ignored, "{arguments:?} {option}: {ignores}");
            kill(pid, Signal::SIGHUP)?;
            let number = if ignored {
                kill(pid, Signal::SIGTERM)?;
                Signal::SIGTERM as i32
            } else {
                Signal::SIGHUP as i32
            };
            if is_exec {
                let input: ExecInput = read(&mut stream).context(option)?;
                ensure!(input == ExecInput::Signal { number }, "{option}: {input:?}");
                drop(stream);
                end(&mut child)?;
            } else {
                let status = end(&mut child)?;
                ensure!(status.success(), "{option}: {status}");
            }
        }
    }
    Ok(())
}
