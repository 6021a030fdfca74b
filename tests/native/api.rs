//! The API of a running `serve` as tools of others read it: promtool and schemathesis.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, ensure};
use e2e::run::Run;
use e2e::{Sandbox, limit, text};
use serde_json::Value;

fn serve(sandbox: &Sandbox) -> Result<(Run<'_>, PathBuf)> {
    let mut command = sandbox.command();
    command.args(["serve", "--format", "jsonl"]);
    let mut daemon = Run::from_command(sandbox, command)?;
    let line = daemon.line_with("serving ")?;
    let (_, socket) = line.split_once("serving ").context("a socket")?;
    Ok((daemon, socket.into()))
}

/// Head and body of the answer to a `GET`.
fn get(socket: &Path, path: &str) -> Result<(String, String)> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(limit(10)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").context("a body")?;
    Ok((head.to_ascii_lowercase(), body.to_owned()))
}

/// A tool that scripts/test installs.
fn tool(variable: &str) -> Result<Command> {
    let program = std::env::var_os(variable);
    let program = program.with_context(|| format!("{variable} is not set: run scripts/test"))?;
    Ok(Command::new(program))
}

#[test]
fn promtool_finds_no_fault_in_the_metrics() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let (daemon, socket) = serve(&sandbox)?;
    let (head, metrics) = get(&socket, "/metrics")?;
    ensure!(
        head.starts_with("http/1.1 200 ")
            && head.contains("content-type: text/plain; version=0.0.4"),
        "{head}"
    );
    for name in [
        "host_agent_build_info",
        "host_agent_services",
        "host_agent_operations",
        "host_agent_api_connections",
        "process_cpu_seconds_total",
        "process_resident_memory_bytes",
        "process_open_fds",
    ] {
        ensure!(metrics.contains(&format!("# TYPE {name} ")), "{metrics}");
    }
    let mut checker = tool("HOST_AGENT_TEST_PROMTOOL")?
        .args(["check", "metrics"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut input = checker.stdin.take().context("stdin is piped")?;
    input.write_all(metrics.as_bytes())?;
    drop(input);
    let checked = checker.wait_with_output()?;
    let silent = checked.stdout.is_empty() && checked.stderr.is_empty();
    ensure!(checked.status.success() && silent, "{}", text(&checked));
    daemon.stop()?;
    Ok(())
}

/// Passes connections to a TCP port on to `socket`, until this process ends.
fn proxy(socket: PathBuf) -> Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // A client of a daemon that is gone gets the end of its connection.
            if let Ok(server) = UnixStream::connect(&socket) {
                let _ = pass(&client, &server);
            }
        }
    });
    Ok(address)
}

fn pass(client: &TcpStream, server: &UnixStream) -> Result<()> {
    let (mut from_client, mut to_server) = (client.try_clone()?, server.try_clone()?);
    let (mut from_server, mut to_client) = (server.try_clone()?, client.try_clone()?);
    thread::spawn(move || {
        let _ = std::io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Write);
    });
    thread::spawn(move || {
        let _ = std::io::copy(&mut from_server, &mut to_client);
        let _ = to_client.shutdown(Shutdown::Both);
    });
    Ok(())
}

#[test]
fn schemathesis_gets_no_undocumented_answer() -> Result<()> {
    let sandbox = Sandbox::new()?;
    // It asks for the removal of unused images too, and these are those of all tests.
    let images = sandbox.data().join("images");
    std::fs::remove_file(&images)?;
    std::fs::create_dir(&images)?;
    let (daemon, socket) = serve(&sandbox)?;
    let (_, document) = get(&socket, "/v1/openapi.json")?;
    let document: Value = serde_json::from_str(&document)?;
    let operations = document["paths"].as_object().context("paths")?.values();
    let operations: usize = operations
        .filter_map(Value::as_object)
        .map(|it| it.len())
        .sum();
    // Without it the answer has no end.
    let config = sandbox.file("schemathesis.toml");
    let of_events = "[[operations]]\ninclude-path = \"/v1/events\"\n";
    let without_end = "parameters = { \"query.follow\" = false }\n";
    std::fs::write(&config, format!("{of_events}{without_end}"))?;
    let address = proxy(socket)?;
    let output = tool("HOST_AGENT_TEST_SCHEMATHESIS")?
        .args([
            "-c",
            "from schemathesis.cli import schemathesis; schemathesis()",
        ])
        .arg("--config-file")
        .arg(config)
        .args(["run", &format!("http://{address}/v1/openapi.json")])
        .args(["--checks", "all"])
        // The digest of a package is that of its body, which no schema can say.
        .args(["--exclude-checks", "positive_data_acceptance"])
        .args(["--phases", "examples,coverage,fuzzing"])
        .args(["--max-examples", "15", "--max-time", "25"])
        .args(["--request-timeout", "20", "--seed", "1", "--no-color"])
        .current_dir(sandbox.file(""))
        .env("HOME", sandbox.file(""))
        .output()?;
    let printed = text(&output);
    ensure!(output.status.success(), "{printed}");
    // The document's own path is not tested.
    let tested = format!("Tested: {}", operations - 1);
    ensure!(printed.contains(&tested), "not {tested}: {printed}");
    daemon.stop()?;
    Ok(())
}
