//! One command of an operator: its process, its standard streams or terminal.

use std::io;
use std::os::fd::OwnedFd;
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use vmbus::message::{EXEC_PIECE, EXEC_WINDOW, ExecOutput, ExecRequest};

use crate::clock;
use crate::environment::Variables;
use crate::os::cgroup::Group;
use crate::os::child;
use crate::os::terminal::{self, Size};

/// After the end of the command its output counts as complete once it was silent for this
/// long: a background process may hold the stream open.
const SILENCE: Duration = Duration::from_millis(200);

type Frames = mpsc::Sender<ExecOutput>;

/// A command that runs.
pub struct Program {
    /// Its first process.
    pub child: Child,
    stdin: Option<mpsc::Sender<Vec<u8>>>,
    /// The guest agent's end of its terminal.
    terminal: Option<OwnedFd>,
    ended: watch::Sender<bool>,
    pumps: JoinSet<()>,
    /// Aborted when this value is dropped.
    _feeder: JoinSet<()>,
}

impl Program {
    /// Starts the command in `group`; its output goes to `frames`.
    pub fn start(
        request: &ExecRequest,
        variables: Variables,
        group: &Group,
        frames: &Frames,
    ) -> Result<Self, ExecOutput> {
        let [program, arguments @ ..] = request.command.as_slice() else {
            return Err(refuse("no command".into(), 125));
        };
        let failed = |error: io::Error| refuse(format!("{program}: {error}"), code(&error));
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .envs(variables)
            // The operator's own, such as TERM.
            .envs(request.environment.iter().cloned())
            .current_dir("/")
            .kill_on_drop(true);
        let host_side = |error: io::Error| refuse(error.to_string(), 125);
        child::join(&mut command, group).map_err(host_side)?;
        child::drop_agent_privileges(&mut command);
        let terminal = match request.terminal {
            Some(size) => Some(give_terminal(&mut command, size).map_err(host_side)?),
            None => {
                command
                    .process_group(0)
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped());
                None
            }
        };
        let mut child = command.spawn().map_err(failed)?;
        // Closes this process's last copy of the program's end of the terminal.
        drop(command);

        let (ended, end) = watch::channel(false);
        let mut pumps = JoinSet::new();
        let mut feeder = JoinSet::new();
        let (stdin, pieces) = mpsc::channel(EXEC_WINDOW);
        if let Some(ours) = &terminal {
            let (reader, writer) = ends(ours).map_err(host_side)?;
            pumps.spawn(pump(reader, frames.clone(), end, stdout));
            feeder.spawn(feed(writer, pieces, frames.clone()));
        } else {
            if let Some(stream) = child.stdout.take() {
                pumps.spawn(pump(stream, frames.clone(), end.clone(), stdout));
            }
            if let Some(stream) = child.stderr.take() {
                pumps.spawn(pump(stream, frames.clone(), end, stderr));
            }
            if let Some(stream) = child.stdin.take() {
                feeder.spawn(feed(stream, pieces, frames.clone()));
            }
        }
        Ok(Self {
            child,
            stdin: Some(stdin),
            terminal,
            ended,
            pumps,
            _feeder: feeder,
        })
    }

    /// Bytes for its standard input. Does not wait: the host keeps to `EXEC_WINDOW`, and
    /// what is beyond it is dropped.
    pub fn input(&mut self, bytes: Vec<u8>) {
        if let Some(stdin) = &self.stdin {
            let _ = stdin.try_send(bytes);
        }
    }

    /// Its standard input ends after the bytes that are queued.
    pub fn end_input(&mut self) {
        self.stdin = None;
    }

    /// Sends a signal to its process group.
    pub fn signal(&self, number: i32) {
        // A child that was not waited for keeps its process id, and so the id of the group
        // that it leads.
        let group = self.child.id().and_then(|id| i32::try_from(id).ok());
        if let (Some(group), Ok(signal)) = (group, Signal::try_from(number)) {
            let _ = killpg(Pid::from_raw(group), signal);
        }
    }

    /// Gives its terminal another size, if it has one.
    pub fn resize(&self, size: Size) {
        if let Some(ours) = &self.terminal {
            // Fails only when the program has closed its end.
            let _ = terminal::resize(ours, size);
        }
    }

    /// After the end of the first process: waits until all output was read.
    pub async fn drain(&mut self) {
        self.ended.send_replace(true);
        while self.pumps.join_next().await.is_some() {}
    }
}

/// Makes a terminal the command's standard streams; the guest agent's end of it.
fn give_terminal(command: &mut Command, size: Size) -> io::Result<OwnedFd> {
    let terminal = terminal::open(size)?;
    command
        .stdin(Stdio::from(terminal.theirs.try_clone()?))
        .stdout(Stdio::from(terminal.theirs.try_clone()?))
        .stderr(Stdio::from(terminal.theirs));
    child::take_terminal(command);
    Ok(terminal.ours)
}

/// The guest agent's end of a terminal, to read and to write: it is polled like a pipe.
fn ends(ours: &OwnedFd) -> io::Result<(pipe::Receiver, pipe::Sender)> {
    let reader = pipe::Receiver::from_owned_fd_unchecked(ours.try_clone()?)?;
    let writer = pipe::Sender::from_owned_fd_unchecked(ours.try_clone()?)?;
    Ok((reader, writer))
}

fn refuse(reason: String, code: i32) -> ExecOutput {
    ExecOutput::NotStarted { reason, code }
}

/// The exit code of a shell for a program that could not be started.
fn code(error: &io::Error) -> i32 {
    match error.kind() {
        io::ErrorKind::NotFound => 127,
        io::ErrorKind::PermissionDenied | io::ErrorKind::IsADirectory => 126,
        _ if error.raw_os_error() == Some(libc::ENOEXEC) => 126,
        _ => 125,
    }
}

const fn stdout(bytes: Vec<u8>) -> ExecOutput {
    ExecOutput::Stdout { bytes }
}

const fn stderr(bytes: Vec<u8>) -> ExecOutput {
    ExecOutput::Stderr { bytes }
}

/// Passes output on until the stream ends, the connection is closed, or the stream is silent
/// after the end of the command. The stream of a terminal ends with an error.
async fn pump(
    mut stream: impl AsyncRead + Unpin,
    frames: Frames,
    mut ended: watch::Receiver<bool>,
    wrap: fn(Vec<u8>) -> ExecOutput,
) {
    let mut buffer = vec![0; EXEC_PIECE];
    loop {
        let read = tokio::select! {
            biased;
            read = stream.read(&mut buffer) => read,
            () = async {
                let _ = ended.wait_for(|ended| *ended).await;
                clock::deadline(SILENCE).passed().await;
            } => return,
        };
        match read {
            Ok(count @ 1..) => {
                if frames.send(wrap(buffer[..count].to_vec())).await.is_err() {
                    return;
                }
            }
            Ok(0) | Err(_) => return,
        }
    }
}

/// Writes pieces to the program and reports their bytes as consumed. When the program no
/// longer reads, the rest is discarded and reported too, so that the host does not wait.
async fn feed(
    stream: impl AsyncWrite + Unpin,
    mut pieces: mpsc::Receiver<Vec<u8>>,
    frames: Frames,
) {
    let mut stream = Some(stream);
    while let Some(piece) = pieces.recv().await {
        if let Some(open) = &mut stream
            && open.write_all(&piece).await.is_err()
        {
            stream = None;
        }
        let bytes = piece.len();
        if frames.send(ExecOutput::Consumed { bytes }).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::environment::of_command;

    async fn outcome(
        command: &[&str],
        size: Option<Size>,
        act: impl AsyncFnOnce(&mut Program, &mut mpsc::Receiver<ExecOutput>) -> String,
    ) -> (String, std::process::ExitStatus) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("cgroup.procs"), "").unwrap();
        let group = Group::at(directory.path().to_str().unwrap()).unwrap();
        let request = ExecRequest {
            command: command.iter().map(ToString::to_string).collect(),
            environment: vec![("TERM".to_owned(), "dumb".to_owned())],
            terminal: size,
        };
        let (frames, mut queue) = mpsc::channel(1024);
        let mut program = Program::start(&request, of_command(None), &group, &frames).unwrap();
        drop(frames);
        let mut text = act(&mut program, &mut queue).await;
        let status = program.child.wait().await.unwrap();
        program.drain().await;
        drop(program);
        while let Some(frame) = queue.recv().await {
            text.push_str(&stdout_text(&frame));
        }
        (text, status)
    }

    fn stdout_text(frame: &ExecOutput) -> String {
        match frame {
            ExecOutput::Stdout { bytes } => String::from_utf8_lossy(bytes).into_owned(),
            _ => String::new(),
        }
    }

    async fn until(wanted: &str, queue: &mut mpsc::Receiver<ExecOutput>) -> String {
        let mut text = String::new();
        while !text.contains(wanted) {
            text.push_str(&stdout_text(&queue.recv().await.unwrap()));
        }
        text
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_terminal_has_its_size_and_turns_keys_into_signals() {
        let script = "tty; stty size; trap 'stty size' WINCH; trap 'exit 7' INT; echo up; \
            while :; do sleep 0.05; done";
        let act = async |program: &mut Program, queue: &mut mpsc::Receiver<ExecOutput>| {
            let mut text = until("up", queue).await;
            program.resize((50, 132));
            text.push_str(&until("50 132", queue).await);
            program.input(vec![3]);
            text
        };
        let (text, status) = outcome(&["sh", "-c", script], Some((33, 99)), act).await;
        assert!(text.starts_with("/dev/pts/"), "{text}");
        assert!(text.contains("33 99\r\n"), "{text}");
        assert_eq!(status.code(), Some(7), "{text}");
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_background_process_does_not_delay_the_end_of_output() {
        let script = "sleep 100 & head -c 100000 /dev/zero | tr '\\0' x; echo $!";
        let act = async |_: &mut Program, _: &mut mpsc::Receiver<ExecOutput>| String::new();
        let (text, status) = outcome(&["sh", "-c", script], None, act).await;
        let pid: i32 = text.trim_start_matches('x').trim().parse().unwrap();
        nix::sys::signal::kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        assert!(status.success());
        assert_eq!(text.matches('x').count(), 100_000);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_signal_passes_input_that_waits() {
        let act = async |program: &mut Program, queue: &mut mpsc::Receiver<ExecOutput>| {
            for _ in 0..EXEC_WINDOW / EXEC_PIECE {
                program.input(vec![b'x'; EXEC_PIECE]);
            }
            let consumed = queue.recv().await.unwrap();
            assert_eq!(consumed, ExecOutput::Consumed { bytes: EXEC_PIECE });
            program.signal(libc::SIGTERM);
            String::new()
        };
        let (_, status) = outcome(&["sleep", "100"], None, act).await;
        use std::os::unix::process::ExitStatusExt;
        assert_eq!(status.signal(), Some(libc::SIGTERM));
    }

    #[tokio::test(flavor = "current_thread")]
    async fn a_command_has_the_variables_given_to_it_and_no_other() {
        let act = async |_: &mut Program, _: &mut mpsc::Receiver<ExecOutput>| String::new();
        let (text, status) = outcome(&["env"], None, act).await;
        assert!(status.success());
        let mut seen: Vec<&str> = text.lines().collect();
        seen.sort_unstable();
        let path = format!("PATH={}", crate::environment::PATH);
        assert_eq!(seen, ["HOME=/root", &path, "TERM=dumb"]);
    }
}
