//! Runs commands for an operator: requests from the host, one process each.

mod program;

use std::io;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_vsock::{OwnedReadHalf, VsockStream};
use vmbus::channel::{EXEC_PORT, HOST_CID};
use vmbus::message::{ExecInput, ExecOutput, ExecRequest};
use vmbus::stream::{FrameReader, StreamError, send};

use crate::bus;
use crate::environment::Variables;
use crate::os::cgroup::{self, Group};
use crate::os::child;
use program::Program;

/// Frames of output that wait for the host.
const BACKLOG: usize = 8;
/// Most time for commands of an earlier guest agent to end.
const KILL_LIMIT: Duration = Duration::from_secs(5);

/// The variables of commands, which describe the role once it is set up.
pub type Environment = Arc<RwLock<Variables>>;

/// Serves exec requests for the life of the process. Kills commands of an earlier guest
/// agent first: their connections to the operator are gone.
pub async fn serve(environment: Environment) -> io::Result<()> {
    let group = Group::at(cgroup::EXEC)?;
    group.clear(KILL_LIMIT).await?;
    tokio::spawn(async move {
        let listener = bus::listen_when_free(EXEC_PORT).await;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) if peer.cid() == HOST_CID => {
                    let environment = Arc::clone(&environment);
                    let group = group.clone();
                    tokio::spawn(async move {
                        // An error here means that the operator closed the connection.
                        let _ = serve_one(stream, &environment, &group).await;
                    });
                }
                Ok(_) => {}
                Err(_) => tokio::time::sleep(bus::ACCEPT_PAUSE).await,
            }
        }
    });
    Ok(())
}

async fn serve_one(
    stream: VsockStream,
    environment: &Environment,
    group: &Group,
) -> Result<(), StreamError> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = FrameReader::new(reader);
    let Some(request) = reader.next::<ExecRequest>().await? else {
        return Ok(());
    };
    let variables = environment
        .read()
        .map(|variables| variables.clone())
        .unwrap_or_default();
    let (frames, mut queue) = mpsc::channel(BACKLOG);
    let started = Program::start(&request, variables, group, &frames);
    let program = match started {
        Ok(program) => program,
        Err(refusal) => return send(&mut writer, &refusal).await,
    };
    // A task of its own: when the host does not read output, input and signals still reach
    // the program.
    let send_output = async move {
        while let Some(frame) = queue.recv().await {
            send(&mut writer, &frame).await?;
        }
        // Closes one half only, so that everything sent arrives.
        tokio::io::AsyncWriteExt::shutdown(&mut writer).await?;
        Ok(())
    };
    let ((), sent) = tokio::join!(attend(program, reader, frames), send_output);
    sent
}

/// Passes input from the host to the program until the program ended and all of its output
/// is in `frames`.
async fn attend(
    mut program: Program,
    mut reader: FrameReader<OwnedReadHalf>,
    frames: mpsc::Sender<ExecOutput>,
) {
    let mut connected = true;
    let status = loop {
        tokio::select! {
            status = program.child.wait() => break status,
            input = reader.next::<ExecInput>(), if connected => match input {
                Ok(Some(ExecInput::Stdin { bytes })) => program.input(bytes),
                Ok(Some(ExecInput::StdinEnd {})) => program.end_input(),
                Ok(Some(ExecInput::Signal { number })) => program.signal(number),
                Ok(Some(ExecInput::Resize { rows, columns })) => program.resize((rows, columns)),
                // The operator is gone: the command must not go on without one.
                Ok(None) | Err(_) => {
                    connected = false;
                    program.signal(libc::SIGKILL);
                }
            },
        }
    };
    program.drain().await;
    let last = match status {
        Ok(status) => ExecOutput::Exited {
            cause: child::exit_cause(status),
        },
        Err(error) => ExecOutput::NotStarted {
            reason: format!("cannot wait for the command: {error}"),
            code: 125,
        },
    };
    // Fails when the connection is closed.
    let _ = frames.send(last).await;
}
