//! Runs commands for an operator: requests from the host, one process each.

use std::io;
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::{Arc, RwLock};

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, ChildStdin, Command};
use tokio::sync::mpsc;
use tokio_vsock::VsockStream;
use vmbus::channel::{EXEC_PORT, HOST_CID};
use vmbus::message::{ExecInput, ExecOutput, ExecRequest, ExitCause};
use vmbus::stream::{FrameReader, StreamError, send};

use crate::bus;

/// Bytes of output per frame.
const CHUNK: usize = 16 * 1024;

/// Variables that commands see: the role's, once it is set up.
pub type Environment = Arc<RwLock<Vec<(String, String)>>>;

/// Serves exec requests for the life of the process.
pub fn serve(environment: Environment) -> io::Result<()> {
    let listener = bus::listen(EXEC_PORT)?;
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) if peer.cid() == HOST_CID => {
                    let environment = Arc::clone(&environment);
                    tokio::spawn(async move {
                        // An operator who went away is no error.
                        let _ = serve_one(stream, &environment).await;
                    });
                }
                Ok(_) => {}
                Err(_) => tokio::task::yield_now().await,
            }
        }
    });
    Ok(())
}

async fn serve_one(stream: VsockStream, environment: &Environment) -> Result<(), StreamError> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = FrameReader::new(reader);
    let Some(request) = reader.next::<ExecRequest>().await? else {
        return Ok(());
    };
    let mut child = match start(&request, environment) {
        Ok(child) => child,
        Err(refusal) => return send(&mut writer, &refusal).await,
    };
    let group = child.id().and_then(|id| i32::try_from(id).ok());
    let (output, mut outputs) = mpsc::channel(8);
    if let Some(stdout) = child.stdout.take() {
        tokio::spawn(pump(stdout, output.clone(), |bytes| ExecOutput::Stdout {
            bytes,
        }));
    }
    if let Some(stderr) = child.stderr.take() {
        tokio::spawn(pump(stderr, output, |bytes| ExecOutput::Stderr { bytes }));
    }
    let mut stdin = child.stdin.take();
    let mut connected = true;
    loop {
        tokio::select! {
            chunk = outputs.recv() => match chunk {
                Some(chunk) => send(&mut writer, &chunk).await?,
                None => break,
            },
            input = reader.next::<ExecInput>(), if connected => match input {
                Ok(Some(input)) => take_input(input, &mut stdin, group).await,
                // Nobody is left who wants the command to go on.
                Ok(None) | Err(_) => {
                    connected = false;
                    signal(group, libc::SIGKILL);
                }
            },
        }
    }
    let status = child.wait().await?;
    let cause = match (status.code(), status.signal()) {
        (_, Some(signal)) => ExitCause::Signal(signal),
        (code, None) => ExitCause::Code(code.unwrap_or(-1)),
    };
    send(&mut writer, &ExecOutput::Exited { cause }).await?;
    writer.shutdown().await?;
    Ok(())
}

fn start(request: &ExecRequest, environment: &Environment) -> Result<Child, ExecOutput> {
    let refuse = |reason: String, code| ExecOutput::NotStarted { reason, code };
    let [program, arguments @ ..] = request.command.as_slice() else {
        return Err(refuse("no command".into(), 125));
    };
    if request.terminal.is_some() {
        let reason = "this guest agent gives commands no terminal";
        return Err(refuse(reason.into(), 125));
    }
    let variables = environment
        .read()
        .map(|variables| variables.clone())
        .unwrap_or_default();
    let mut command = Command::new(program);
    command
        .args(arguments)
        .env_clear()
        .env("PATH", crate::setup::PATH)
        .env("HOME", "/root")
        .envs(variables)
        .envs(request.environment.iter().cloned())
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true);
    command.spawn().map_err(|error| {
        let code = match error.kind() {
            io::ErrorKind::NotFound => 127,
            io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory => 126,
            _ if error.raw_os_error() == Some(libc::ENOEXEC) => 126,
            _ => 125,
        };
        refuse(format!("{program}: {error}"), code)
    })
}

async fn take_input(input: ExecInput, stdin: &mut Option<ChildStdin>, group: Option<i32>) {
    match input {
        ExecInput::Stdin { bytes } => {
            if let Some(pipe) = stdin
                && pipe.write_all(&bytes).await.is_err()
            {
                *stdin = None;
            }
        }
        ExecInput::StdinEnd {} => *stdin = None,
        ExecInput::Signal { number } => signal(group, number),
    }
}

fn signal(group: Option<i32>, number: i32) {
    if let (Some(group), Ok(signal)) = (group, Signal::try_from(number)) {
        // The group is gone when the command has ended.
        let _ = killpg(Pid::from_raw(group), signal);
    }
}

async fn pump(
    mut stream: impl AsyncRead + Unpin,
    output: mpsc::Sender<ExecOutput>,
    wrap: fn(Vec<u8>) -> ExecOutput,
) {
    let mut buffer = vec![0; CHUNK];
    while let Ok(count) = stream.read(&mut buffer).await {
        if count == 0 || output.send(wrap(buffer[..count].to_vec())).await.is_err() {
            return;
        }
    }
}
