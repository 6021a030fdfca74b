//! VMM processes that outlive their supervisor, with guests of a few instructions.

use std::fs;
use std::io::Write as _;
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::process::Child;
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use e2e::bare::{BareGuest, CONSOLE, elf};
use e2e::run::eventually;
use e2e::{limit, program};
use host_agent::endpoints::{HandedOver, listen};
use host_agent::supervisor::process::{AttachError, Expected, ProcessId, VmmEvent, VmmProcess};
use host_agent::vmm::control::{Attached, Command, Event, ExitReason};
use host_agent::vmm::wire;

/// Writes a dot to the serial port now and then, for ever.
pub const DOTS: &[u8] = &[
    0x66, 0xba, 0xf8, 0x03, // mov dx, 0x3f8
    0xb0, 0x2e, // mov al, '.'
    0xee, // out dx, al
    0xb9, 0x00, 0x00, 0x04, 0x00, // mov ecx, 0x40000
    0xf3, 0x90, // pause
    0xff, 0xc9, // dec ecx
    0x75, 0xfa, // jnz (pause)
    0xeb, 0xec, // jmp (start)
];
/// Powers off: sleep type 5 and SLP_EN in the ACPI sleep control register.
const POWER_OFF: &[u8] = &[
    0x66, 0xba, 0x00, 0x06, // mov dx, 0x600
    0xb0, 0x34, // mov al, 0x34
    0xee, // out dx, al
    0xeb, 0xfe, // jmp (here)
];

/// Records that name no process.
fn expected() -> Expected {
    Expected {
        name: "bare".into(),
        generation: 1,
        process: None,
    }
}

pub struct Guest {
    dir: tempfile::TempDir,
    pub child: Child,
    /// End of the first supervisor.
    pub control: OwnedFd,
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Guest {
    pub fn start(code: &[u8]) -> Result<Self> {
        Self::start_by(code, &program(), false)
    }

    /// The same, of a VMM process that `program` becomes, which needs the whole
    /// sandbox if `require_sandbox`.
    pub fn start_by(code: &[u8], program: &Path, require_sandbox: bool) -> Result<Self> {
        let dir = tempfile::Builder::new()
            // Longer than a socket's address may be.
            .prefix(&"long".repeat(40))
            .tempdir()?;
        let (kernel, initrd) = (dir.path().join("kernel"), dir.path().join("initrd"));
        fs::write(&kernel, elf(code))?;
        fs::write(&initrd, "")?;
        let guest = BareGuest {
            kernel,
            initrd,
            command_line: String::new(),
            vcpus: 1,
            memory_mib: 64,
            disks: vec![],
        };
        let mut prepared = guest.prepare(dir.path())?;
        prepared.require_sandbox = require_sandbox;
        let (child, control) = prepared.spawn_in(program, dir.path())?;
        Ok(Self {
            dir,
            child,
            control,
        })
    }

    fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Bytes on the console.
    fn output(&self) -> usize {
        fs::read(self.path().join(CONSOLE)).map_or(0, |bytes| bytes.len())
    }

    pub fn runs_on(&self) -> Result<()> {
        let before = self.output();
        eventually("the guest writes on", || Ok(self.output() > before))
    }

    async fn attach(&self) -> Result<(VmmProcess, Attached)> {
        let (process, attached, _) = self.attach_and_take().await?;
        Ok((process, attached))
    }

    /// The same, and the listening sockets that the process held.
    async fn attach_and_take(&self) -> Result<(VmmProcess, Attached, HandedOver)> {
        let attached = VmmProcess::attach(self.path(), &expected()).await;
        attached
            .with_context(|| fs::read_to_string(self.path().join("messages")).unwrap_or_default())
    }
}

async fn event(process: &mut VmmProcess, wanted: impl Fn(&Event) -> bool) -> Result<Event> {
    let next = async {
        loop {
            match process.next().await {
                VmmEvent::Event(event, _) if wanted(&event) => return Ok(event),
                VmmEvent::Event(..) => {}
                other => bail!("{other:?}"),
            }
        }
    };
    tokio::time::timeout(limit(30), next).await?
}

async fn end(mut process: VmmProcess) -> Result<ExitReason> {
    let killed = process.was_killed();
    let next = async {
        loop {
            if let VmmEvent::Ended(ending) = process.next().await {
                return ending.reason(None, killed);
            }
        }
    };
    Ok(tokio::time::timeout(limit(30), next).await?)
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_runs_on_without_a_supervisor_and_is_attached() -> Result<()> {
    let mut guest = Guest::start(DOTS)?;
    let (running, _) = wire::recv::<Event>(guest.control.as_fd())?.context("an event")?;
    ensure!(matches!(running, Event::Running { .. }), "{running:?}");

    // While the first supervisor lives another one is refused.
    let busy = VmmProcess::attach(guest.path(), &expected()).await;
    ensure!(matches!(busy, Err(AttachError::Busy)), "{busy:?}");

    guest.control = wire::pair()?.0;
    guest.runs_on()?;
    let began = Instant::now();
    let (mut second, attached) = guest.attach().await?;
    ensure!(began.elapsed() < limit(2), "{:?}", began.elapsed());
    ensure!(second.pid() == guest.child.id());
    ensure!((attached.generation, attached.paused) == (1, false));
    ensure!(attached.setup_us > 0 && attached.exit.is_none());
    let exits = attached.stats.exits[0];
    ensure!(exits > 0);
    second.send(&Command::Ping { id: 7 }, vec![])?;
    event(&mut second, |event| *event == Event::Pong { id: 7 }).await?;
    ensure!(!attached.fails_when_full);
    second.send(&Command::FailWhenFull {}, vec![])?;
    second.send(&Command::Pause {}, vec![])?;
    event(&mut second, |event| {
        *event == Event::Paused { paused: true }
    })
    .await?;

    // Commands change the state that the next supervisor gets, and the counters go on from
    // where they were.
    let process = Some(second.id());
    drop(second);
    let expected = Expected {
        process,
        ..expected()
    };
    let (mut third, attached, _) = VmmProcess::attach(guest.path(), &expected).await?;
    ensure!(attached.paused && attached.fails_when_full);
    ensure!(attached.stats.exits[0] > exits);
    let output = guest.output();
    third.send(&Command::Resume {}, vec![])?;
    event(&mut third, |event| {
        *event == Event::Paused { paused: false }
    })
    .await?;
    eventually("the guest writes again", || Ok(guest.output() > output))?;

    third.send(&Command::Stop {}, vec![])?;
    let exited = event(&mut third, |event| matches!(event, Event::Exited(_))).await?;
    ensure!(exited == Event::Exited(ExitReason::Stopped));
    ensure!(end(third).await? == ExitReason::Stopped);
    ensure!(guest.child.wait()?.success());
    // A supervisor that comes later reads the reason.
    let gone = VmmProcess::attach(guest.path(), &expected).await;
    ensure!(
        matches!(
            gone,
            Err(AttachError::Gone {
                exit: Some(ExitReason::Stopped)
            })
        ),
        "{gone:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "current_thread")]
async fn a_client_waits_for_the_next_supervisor() -> Result<()> {
    let mut guest = Guest::start(DOTS)?;
    guest.control = wire::pair()?.0;
    let listener = listen("web", (Ipv4Addr::LOCALHOST, 0).into())?;
    let address = listener.local_addr()?;
    let (mut process, attached, handed_over) = guest.attach_and_take().await?;
    ensure!(attached.holds_listeners && handed_over.foreign(&[]) == 0);
    let held = vec![listener.as_fd().try_clone_to_owned()?];
    process.send(&Command::HoldListeners {}, held)?;
    process.send(&Command::Ping { id: 1 }, vec![])?;
    event(&mut process, |event| *event == Event::Pong { id: 1 }).await?;
    drop((listener, process));

    // No supervisor: the client is not refused, and its bytes are kept.
    for _ in 0..2 {
        let mut client = TcpStream::connect(address)?;
        client.write_all(b"hello")?;
        let (process, _, mut handed_over) = guest.attach_and_take().await?;
        ensure!(handed_over.foreign(&[address]) == 0);
        let listener = handed_over.take(address).context("the socket")?;
        let (mut stream, from) = listener.accept().await?;
        ensure!(from == client.local_addr()?);
        let mut bytes = [0; 5];
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut bytes).await?;
        ensure!(bytes == *b"hello");
        drop(process);
    }

    // The socket closes with the process.
    let (mut process, _) = guest.attach().await?;
    process.kill();
    end(process).await?;
    guest.child.wait()?;
    ensure!(TcpStream::connect(address).is_err());
    Ok(())
}

#[tokio::test(flavor = "current_thread")]
async fn a_guest_that_ends_unattended_leaves_its_reason() -> Result<()> {
    let mut guest = Guest::start(POWER_OFF)?;
    guest.control = wire::pair()?.0;
    ensure!(guest.child.wait()?.success());
    let gone = VmmProcess::attach(guest.path(), &expected()).await;
    ensure!(
        matches!(
            gone,
            Err(AttachError::Gone {
                exit: Some(ExitReason::PowerOff)
            })
        ),
        "{gone:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "current_thread")]
async fn a_killed_vmm_process_leaves_no_reason() -> Result<()> {
    let mut guest = Guest::start(DOTS)?;
    guest.control = wire::pair()?.0;
    let (mut process, _) = guest.attach().await?;
    process.kill();
    ensure!(end(process).await? == ExitReason::Killed);
    guest.child.wait()?;
    let gone = VmmProcess::attach(guest.path(), &expected()).await;
    ensure!(
        matches!(gone, Err(AttachError::Gone { exit: None })),
        "{gone:?}"
    );
    Ok(())
}

#[tokio::test(flavor = "current_thread")]
async fn another_guest_than_the_recorded_one_is_left_alone() -> Result<()> {
    let mut guest = Guest::start(DOTS)?;
    guest.control = wire::pair()?.0;
    let (process, _) = guest.attach().await?;
    let ProcessId { pid, start_ticks } = process.id();
    drop(process);
    let other_process = Expected {
        process: Some(ProcessId {
            pid,
            start_ticks: start_ticks + 1,
        }),
        ..expected()
    };
    let result = VmmProcess::attach(guest.path(), &other_process).await;
    ensure!(
        matches!(result, Err(AttachError::WrongProcess { .. })),
        "{result:?}"
    );
    let other_boot = Expected {
        generation: 2,
        ..expected()
    };
    let result = VmmProcess::attach(guest.path(), &other_boot).await;
    ensure!(
        matches!(
            result,
            Err(AttachError::WrongGuest {
                found_generation: 1,
                ..
            })
        ),
        "{result:?}"
    );
    let elsewhere = tempfile::tempdir()?;
    let result = VmmProcess::attach(elsewhere.path(), &other_boot).await;
    ensure!(
        matches!(result, Err(AttachError::NoSocket(_))),
        "{result:?}"
    );
    guest.runs_on()?;
    guest.attach().await?;
    Ok(())
}

#[tokio::test(flavor = "current_thread")]
async fn a_stopped_vmm_process_does_not_hold_up_its_supervisor() -> Result<()> {
    use nix::sys::signal::{Signal, kill};
    let mut guest = Guest::start(DOTS)?;
    guest.control = wire::pair()?.0;
    drop(guest.attach().await?);
    let pid = nix::unistd::Pid::from_raw(i32::try_from(guest.child.id())?);
    kill(pid, Signal::SIGSTOP)?;
    let result = VmmProcess::attach(guest.path(), &expected()).await;
    kill(pid, Signal::SIGCONT)?;
    ensure!(matches!(result, Err(AttachError::NoAnswer)), "{result:?}");
    guest.attach().await?;
    Ok(())
}
