//! The daemon's configuration while it runs, its log, and who can reach its API.

use std::fs;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use e2e::mount_namespace::MountNamespace;
use e2e::run::{end, eventually};
use e2e::{Sandbox, limit, text};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;

/// A daemon whose output is in files.
struct Daemon {
    child: Child,
    log: PathBuf,
    socket: PathBuf,
}

impl Daemon {
    fn start(sandbox: &Sandbox, mut command: Command) -> Result<Self> {
        let log = sandbox.file("daemon.log");
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)?;
        let socket = sandbox.file("run/host-agent/serve.sock");
        let child = command
            .arg("serve")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()?;
        let this = Self { child, log, socket };
        eventually("the daemon serves", || {
            Ok(request(&this.socket, "GET", "/healthz", "").is_ok())
        })?;
        Ok(this)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id())?);
        Ok(kill(pid, signal)?)
    }

    fn logged(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.log)?)
    }

    fn wait_for(&self, wanted: &str) -> Result<()> {
        eventually(wanted, || Ok(self.logged()?.contains(wanted)))
    }

    fn stop(mut self) -> Result<()> {
        self.signal(Signal::SIGTERM)?;
        let status = end(&mut self.child)?;
        ensure!(status.success(), "{status}: {}", self.logged()?);
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The whole answer.
fn request(socket: &Path, method: &str, path: &str, headers: &str) -> Result<String> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(limit(10)))?;
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{headers}\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

fn audit_lines(data: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(data.join("state/audit.jsonl"))?;
    let lines = text.lines().map(serde_json::from_str);
    Ok(lines.collect::<Result<_, _>>()?)
}

#[test]
fn a_hangup_reads_the_configuration_again_and_a_bad_file_changes_nothing() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let file = sandbox.file("config.toml");
    fs::write(&file, "[log]\nlevel = \"info\"\n")?;
    let mut command = sandbox.command();
    command.env("HOST_AGENT_CONFIG", &file);
    let daemon = Daemon::start(&sandbox, command)?;
    fs::write(&file, "[log]\nlevel = \"info\"\n[quotas]\nservice = 1\n")?;
    daemon.signal(Signal::SIGHUP)?;
    daemon.wait_for("the configuration stays as it was")?;
    daemon.wait_for("config.toml:4:1")?;
    let later = "[log]\nlevel = \"info\"\nformat = \"json\"\n[guests]\nheartbeat_limit = \"5m\"\n";
    fs::write(&file, later)?;
    daemon.signal(Signal::SIGHUP)?;
    daemon.wait_for("counts from the next start on")?;
    daemon.wait_for("\"message\":\"configuration read again\"")?;
    ensure!(daemon.logged()?.contains("guests.heartbeat_limit"));
    daemon.stop()
}

#[test]
fn each_line_of_a_json_log_is_one_document_with_the_request() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let mut command = sandbox.command();
    command
        .env("HOST_AGENT_LOG", "info")
        .env("HOST_AGENT_LOG_FORMAT", "json")
        .arg("--quiet");
    let daemon = Daemon::start(&sandbox, command)?;
    let headers = "x-request-id: of-the-client.7\r\n";
    let answer = request(&daemon.socket, "DELETE", "/v1/services/no", headers)?;
    ensure!(answer.contains("x-request-id: of-the-client.7"), "{answer}");
    ensure!(
        answer.contains("\"request\":\"of-the-client.7\""),
        "{answer}"
    );
    let answer = request(
        &daemon.socket,
        "DELETE",
        "/v1/services/no",
        "x-request-id: a b\r\n",
    )?;
    ensure!(!answer.contains("a b"), "{answer}");
    daemon.wait_for("of-the-client.7")?;
    for line in daemon.logged()?.lines() {
        let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
        ensure!(
            line["at"].is_string() && line["level"].is_string(),
            "{line}"
        );
    }
    let logged = daemon.logged()?;
    let mut lines = logged.lines().map(serde_json::from_str::<Value>);
    let line = lines.find(|line| {
        line.as_ref()
            .is_ok_and(|line| line["fields"]["request"] == "of-the-client.7")
    });
    let line = line.context("a line of the request")??;
    ensure!(line["fields"]["status"] == 404 && line["fields"]["method"] == "DELETE");
    daemon.stop()
}

#[test]
fn each_mutation_has_two_audit_lines_which_outlive_a_kill() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let daemon = Daemon::start(&sandbox, sandbox.command())?;
    let id = "x-request-id: first\r\n";
    request(&daemon.socket, "DELETE", "/v1/services/no?x=secret", id)?;
    request(&daemon.socket, "GET", "/v1/services", "")?;
    daemon.signal(Signal::SIGKILL)?;
    drop(daemon);
    let daemon = Daemon::start(&sandbox, sandbox.command())?;
    request(&daemon.socket, "DELETE", "/v1/services/no", "")?;
    let lines = audit_lines(&sandbox.data())?;
    ensure!(lines.len() == 4, "{lines:?}");
    for (number, line) in lines.iter().enumerate() {
        ensure!(line["sequence"] == number as u64 + 1, "{lines:?}");
    }
    let uid = nix::unistd::Uid::effective();
    ensure!(lines[0]["who"] == format!("uid:{uid}") && lines[0]["path"] == "/v1/services/no");
    ensure!(
        lines[0]["status"].is_null() && lines[1]["status"] == 404,
        "{lines:?}"
    );
    ensure!(lines[0]["request"] == "first" && lines[1]["request"] == "first");
    daemon.stop()
}

#[test]
fn a_full_disk_refuses_mutations_but_neither_reads_nor_deletions() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let data = sandbox.file("small");
    let disk = MountNamespace::with_tmpfs(&data, "8m")?;
    let mut command = disk.command(&sandbox, true);
    command.env("HOST_AGENT_DATA_DIR", &data);
    let daemon = Daemon::start(&sandbox, command)?;
    let outside = disk.outside(&data);
    // The rest of the page that the log has is taken too.
    let mut filler = fs::File::create(outside.join("filler"))?;
    while filler.write_all(&[0; 4096]).is_ok() {}
    let put = || {
        request(
            &daemon.socket,
            "PUT",
            "/v1/packages/none",
            "content-length: 0\r\n",
        )
    };
    eventually("a mutation is refused", || {
        Ok(put()?.starts_with("HTTP/1.1 507 "))
    })?;
    let refused = put()?;
    ensure!(refused.contains("\"kind\":\"no-space\""), "{refused}");
    ensure!(refused.contains("audit log cannot be written"), "{refused}");
    let read = request(&daemon.socket, "GET", "/v1/services", "")?;
    ensure!(read.starts_with("HTTP/1.1 200 "), "{read}");
    let deleted = request(&daemon.socket, "DELETE", "/v1/services/no", "")?;
    ensure!(deleted.starts_with("HTTP/1.1 404 "), "{deleted}");
    // An open file keeps its space.
    drop(filler);
    fs::remove_file(outside.join("filler"))?;
    ensure!(put()?.starts_with("HTTP/1.1 400 "), "{}", put()?);
    let lines = audit_lines(&outside)?;
    ensure!(lines.iter().any(|line| line["status"] == 404), "{lines:?}");
    eventually("the reserve is back", || {
        let reserve = fs::metadata(outside.join("state/audit.reserve"));
        Ok(reserve.is_ok_and(|found| found.len() == 1 << 20))
    })?;
    daemon.stop()
}

#[test]
fn only_a_group_that_is_configured_gets_the_socket() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let daemon = Daemon::start(&sandbox, sandbox.command())?;
    let mode = |path: &Path| -> Result<(u32, u32)> {
        let found = fs::metadata(path)?;
        Ok((found.permissions().mode() & 0o7777, found.gid()))
    };
    let directory = sandbox.file("run/host-agent");
    ensure!(mode(&daemon.socket)?.0 == 0o600 && mode(&directory)?.0 == 0o700);
    daemon.stop()?;
    // Root may give a file to any group, others only to one of theirs.
    let gid = if nix::unistd::Uid::effective().is_root() {
        nix::unistd::Gid::from_raw(12)
    } else {
        nix::unistd::Gid::effective()
    };
    let group = nix::unistd::Group::from_gid(gid)?.context("a group")?;
    let file = sandbox.file("config.toml");
    fs::write(&file, format!("[api]\ngroup = \"{}\"\n", group.name))?;
    let mut command = sandbox.command();
    command.env("HOST_AGENT_CONFIG", &file);
    let daemon = Daemon::start(&sandbox, command)?;
    ensure!(mode(&daemon.socket)? == (0o660, gid.as_raw()));
    ensure!(mode(&directory)? == (0o710, gid.as_raw()));
    let listed = sandbox.output(&["service", "list"])?;
    ensure!(listed.status.success(), "{}", text(&listed));
    if nix::unistd::Uid::effective().is_root() {
        fs::set_permissions(sandbox.file(""), fs::Permissions::from_mode(0o755))?;
        fs::set_permissions(sandbox.file("run"), fs::Permissions::from_mode(0o755))?;
        let curl = |groups: &str| {
            let mut command = Command::new("setpriv");
            command
                .args([
                    "--reuid=65534",
                    "--regid=65534",
                    groups,
                    "curl",
                    "-s",
                    "--unix-socket",
                ])
                .arg(&daemon.socket)
                .arg("http://localhost/healthz");
            command.output()
        };
        let member = curl(&format!("--groups={gid}"))?;
        let stranger = curl("--clear-groups")?;
        ensure!(!stranger.status.success(), "{}", text(&stranger));
        // Its process has the group, and the user does not: the kernel lets it connect.
        ensure!(
            text(&member).contains("\"kind\":\"forbidden\""),
            "{}",
            text(&member)
        );
    }
    daemon.stop()
}

#[test]
fn a_socket_of_the_service_manager_is_taken_over_and_left() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let directory = sandbox.file("run/host-agent");
    fs::create_dir(&directory)?;
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o700))?;
    let socket = directory.join("serve.sock");
    let listener = UnixListener::bind(&socket)?;
    // Waits in the backlog, before any daemon.
    let mut early = UnixStream::connect(&socket)?;
    write!(
        early,
        "GET /healthz HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n"
    )?;
    let mut shell = Command::new("sh");
    let handed = format!(
        "exec 3<&{}; LISTEN_FDS=1 LISTEN_PID=$$ exec \"$0\" \"$@\"",
        listener.as_raw_fd()
    );
    nix::fcntl::fcntl(
        &listener,
        nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::empty()),
    )?;
    shell.arg("-c").arg(handed).arg(e2e::program());
    sandbox.set_environment(&mut shell);
    let daemon = Daemon::start(&sandbox, shell)?;
    drop(listener);
    early.set_read_timeout(Some(limit(10)))?;
    let mut answer = String::new();
    early.read_to_string(&mut answer)?;
    ensure!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    daemon.stop()?;
    ensure!(socket.exists());
    Ok(())
}
