//! Guests outlive a killed host agent, and the next one goes on with them.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};

use anyhow::{Context, Result, ensure};
use e2e::Sandbox;
use e2e::run::{Run, eventually};
use e2e::service::Service;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

fn adopt(sandbox: &Sandbox) -> Result<Run<'_>> {
    let mut command = sandbox.command();
    command.args(["adopt", "--format", "jsonl"]);
    Run::from_command(sandbox, command)
}

fn echo(port: u16) -> Result<bool> {
    let Ok(mut stream) = TcpStream::connect((Ipv4Addr::LOCALHOST, port)) else {
        return Ok(false);
    };
    stream.set_read_timeout(Some(e2e::limit(5)))?;
    stream.write_all(b"hello")?;
    let mut answer = [0; 5];
    // An instance that is not Ready yet closes the connection.
    Ok(stream.read_exact(&mut answer).is_ok() && answer == *b"hello")
}

#[test]
fn a_killed_host_agent_finds_its_guests_again() -> Result<()> {
    let sandbox = Sandbox::new()?;
    sandbox.vmm_is_killed();
    let (service, port) = Service::echo()?;
    let service = service.write(&sandbox.file("service"))?;
    let mut run = Run::start(&sandbox, &service, &["--outlive"])?;
    let started = run.event("guest-starting", |_| true)?;
    let vmm = started["pid"].as_i64().context("a process id")?;
    run.ready()?;
    run.shell("echo kept > /run/mark")?;
    run.signal(Signal::SIGKILL)?;
    let (_, seen) = run.wait()?;
    ensure!(!seen.contains("guest-exited"), "{seen}");

    // The same guest, in the same boot.
    let mut adopted = adopt(&sandbox)?;
    let event = adopted.event("guest-adopted", |_| true)?;
    ensure!(event["generation"] == 1 && event["pid"] == vmm, "{event}");
    adopted.ready()?;
    eventually("the endpoint leads to the adopted guest", || echo(port))?;
    ensure!(adopted.shell("cat /run/mark")? == "kept\n");
    let rival = sandbox.output(&["adopt"])?;
    ensure!(rival.status.success(), "{}", e2e::text(&rival));
    adopted.signal(Signal::SIGKILL)?;
    drop(adopted);

    // A guest that ended while no host agent ran is restarted, by its history.
    kill(Pid::from_raw(i32::try_from(vmm)?), Signal::SIGKILL)?;
    let mut adopted = adopt(&sandbox)?;
    let event = adopted.event("restarting", |_| true)?;
    ensure!(event["generation"] == 2, "{event}");
    adopted.ready()?;
    eventually("the endpoint leads to the new boot", || echo(port))?;
    let seen = adopted.stop()?;
    ensure!(seen.contains(r#""clean":true"#), "{seen}");
    sandbox.assert_nothing_left()
}
