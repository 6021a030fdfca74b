//! `host-agent agent`: which guest agent is offered to guests.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, Write as _};
use std::path::{Path, PathBuf};

use serde_json::json;
use vmbus::agent_package::{self, MAX_PROGRAM, START};
use vmbus::agent_signature::MAX_SIGNATURE;
use vmbus::text::chain;

use super::args::{AgentArg, AgentPackArgs, AgentVerb, PublishArgs};
use super::error::{CliError, Code};
use super::exit::Exit;
use super::instances::columns;
use super::output::Output;
use super::runtime;
use super::service::{connect, time};
use crate::api::agents::{AgentInfo, AgentPackage, Agents, PublishRequest};
use crate::api::client::ClientError;
use crate::api::types::RefusalKind;
use crate::digest::Digest;
use crate::printable::printable;

/// Runs the verb.
pub fn run(verb: &AgentVerb, output: &Output) -> Result<Exit, CliError> {
    if let AgentVerb::Pack(args) = verb {
        return pack(args, output);
    }
    runtime()?.block_on(async {
        match verb {
            AgentVerb::Pack(args) => pack(args, output),
            AgentVerb::Publish(args) => publish(args, output).await,
            AgentVerb::List => list(output).await,
            AgentVerb::Show(args) => show(args, output).await,
            AgentVerb::Withdraw(args) => withdraw(args, output).await,
        }
    })
}

fn unreadable(path: &Path) -> impl FnOnce(io::Error) -> CliError {
    let what = format!("cannot read {}", path.display());
    move |error| {
        let exit = match error.kind() {
            io::ErrorKind::NotFound => Exit::NotFound,
            io::ErrorKind::PermissionDenied => Exit::Permission,
            _ => Exit::Unclassified,
        };
        CliError::new(Code::AgentFile, what)
            .cause(error.to_string())
            .exit_with(exit)
    }
}

fn pack(args: &AgentPackArgs, output: &Output) -> Result<Exit, CliError> {
    let program = &args.program;
    let file = File::open(program).map_err(unreadable(program))?;
    let mut bytes = Vec::new();
    // One byte more than the largest shows that it is larger.
    let read = file.take(MAX_PROGRAM + 1).read_to_end(&mut bytes);
    let size = read.map_err(unreadable(program))? as u64;
    let mut package = agent_package::head(args.set_version, size);
    package.append(&mut bytes);
    // What no host would take is not written.
    let start = &package[..package.len().min(START)];
    agent_package::parse(start, package.len() as u64).map_err(|error| {
        let what = format!("{} is no guest agent", program.display());
        CliError::new(Code::AgentRefused, what).cause(chain(&error))
    })?;
    let to = &args.output;
    let written = write_beside(to, &package);
    written.map_err(|error| {
        let what = format!("cannot write {}", to.display());
        CliError::new(Code::Output, what).cause(error.to_string())
    })?;
    let version = args.set_version.to_string();
    let digest = Digest::of(&package[..]).map(|(digest, _)| digest.hex());
    let digest = digest.map_err(unreadable(to))?;
    output.answer(
        &format!("{}: guest agent {version}, sha256:{digest}", to.display()),
        || json!({"schema": "host-agent.agent-pack/1", "version": version, "package": digest}),
    )?;
    Ok(Exit::Success)
}

/// Writes the whole file or nothing.
fn write_beside(to: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = match to.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(directory)?;
    file.write_all(bytes)?;
    file.persist(to).map_err(|error| error.error)?;
    Ok(())
}

async fn publish(args: &PublishArgs, output: &Output) -> Result<Exit, CliError> {
    let path = &args.file;
    let mut file = File::open(path).map_err(unreadable(path))?;
    let signature = signature(path)?;
    let digest = Digest::of(&file).map_err(unreadable(path))?.0;
    file.rewind().map_err(unreadable(path))?;
    let mut client = connect().await?;
    let place = format!("agents/{}", digest.hex());
    let refused = |error| refused(path, error);
    client
        .upload::<AgentPackage>(&format!("{place}/package"), file)
        .await
        .map_err(refused)?;
    let request = PublishRequest {
        signature,
        allow_downgrade: args.allow_downgrade,
    };
    let agent: AgentInfo = client.put(&place, &request).await.map_err(refused)?;
    let text = format!(
        "guest agent {}: offered to all guests",
        agent.published.version
    );
    output.answer(
        &text,
        || json!({"schema": "host-agent.agent/1", "agent": agent}),
    )?;
    Ok(Exit::Success)
}

/// The signature beside a package.
fn signature(package: &Path) -> Result<String, CliError> {
    let mut path = package.as_os_str().to_owned();
    path.push(".minisig");
    let path = PathBuf::from(path);
    let mut text = String::new();
    let read = File::open(&path).and_then(|file| {
        let most = MAX_SIGNATURE as u64 + 1;
        file.take(most).read_to_string(&mut text)
    });
    read.map_err(|error| {
        let hint = format!("minisign -Sm {}", crate::shell::quoted(package));
        unreadable(&path)(error).hint(hint)
    })?;
    Ok(text)
}

/// The daemon's refusal of a package.
fn refused(path: &Path, error: ClientError) -> CliError {
    let what = format!("{} was not published", path.display());
    match &error {
        ClientError::Refused {
            kind: RefusalKind::Invalid,
            ..
        } => CliError::new(Code::AgentRefused, what)
            .cause(chain(&error))
            .hint(
                "minisign -Vm FILE -p KEY.pub   shows whether file and signature belong together",
            ),
        ClientError::Refused {
            kind: RefusalKind::Conflict,
            ..
        } => CliError::new(Code::AgentConflict, what)
            .cause(chain(&error))
            .hint("host-agent agent publish --help"),
        _ => error.into(),
    }
}

async fn list(output: &Output) -> Result<Exit, CliError> {
    let found: Agents = connect().await?.get("agents").await?;
    let head = [
        "VERSION",
        "STATE",
        "GUESTS",
        "FAILED IN",
        "PUBLISHED",
        "PACKAGE",
    ];
    let mut rows = vec![head.map(str::to_owned)];
    rows.extend(found.agents.iter().map(row));
    let mut text = match rows.len() {
        1 => "no guest agent was published: guests run that of their image".to_owned(),
        _ => columns(&rows),
    };
    let of_image = found.guests.iter().filter(|it| it.agent.package.is_none());
    let of_image = of_image.count();
    if of_image > 0 && rows.len() > 1 {
        text.push_str(&format!(
            "\nguest agent of the image: {of_image} of {} guests",
            found.guests.len()
        ));
    }
    output.answer(
        &text,
        || json!({"schema": "host-agent.agents/1", "agents": found.agents, "guests": found.guests}),
    )?;
    Ok(Exit::Success)
}

fn state(agent: &AgentInfo) -> &'static str {
    match (agent.offered, agent.published.withdrawn) {
        (true, _) => "offered",
        (false, true) => "withdrawn",
        (false, false) => "not offered",
    }
}

fn row(agent: &AgentInfo) -> [String; 6] {
    let row = [
        agent.published.version.clone(),
        state(agent).to_owned(),
        agent.guests.to_string(),
        agent.failures.len().to_string(),
        time(agent.published.at_ms),
        agent.published.package.hex()[..12].to_owned(),
    ];
    row.map(|cell| printable(&cell))
}

async fn show(args: &AgentArg, output: &Output) -> Result<Exit, CliError> {
    let found: Agents = connect().await?.get("agents").await?;
    let agent = find(found.agents, &args.agent)?;
    let published = &agent.published;
    let mut text = format!(
        "guest agent {}: {}, package sha256:{}, published {} by user {}",
        published.version,
        state(&agent),
        published.package.hex(),
        time(published.at_ms),
        published.user,
    );
    for guest in found
        .guests
        .iter()
        .filter(|it| it.agent.package == Some(published.package))
    {
        let word = if guest.agent.watched {
            "watched"
        } else {
            "proven"
        };
        text.push_str(&format!(
            "\n  runs in {}/{}, {word}",
            &guest.deployment, guest.instance
        ));
    }
    for failure in &agent.failures {
        let reason = printable(&failure.reason);
        text.push_str(&format!(
            "\n  failed in {}/{}: {reason}",
            failure.deployment, failure.instance
        ));
    }
    output.answer(
        &text,
        || json!({"schema": "host-agent.agent/1", "agent": agent}),
    )?;
    Ok(Exit::Success)
}

async fn withdraw(args: &AgentArg, output: &Output) -> Result<Exit, CliError> {
    let mut client = connect().await?;
    let found: Agents = client.get("agents").await?;
    let agent = find(found.agents, &args.agent)?;
    let path = format!("agents/{}", agent.published.package.hex());
    let agent: AgentInfo = client.delete(&path).await?;
    output.answer(
        &format!("guest agent {}: {}", agent.published.version, state(&agent)),
        || json!({"schema": "host-agent.agent/1", "agent": agent}),
    )?;
    Ok(Exit::Success)
}

/// The one that `name` means: the newest publication of a version, or a package by its digits.
fn find(agents: Vec<AgentInfo>, name: &str) -> Result<AgentInfo, CliError> {
    let is_it = |it: &AgentInfo| {
        let digits = it.published.package.hex();
        it.published.version == name || (name.len() >= 8 && digits.starts_with(name))
    };
    let found = agents.into_iter().find(is_it);
    found.ok_or_else(|| {
        CliError::new(
            Code::NoAgent,
            format!("no guest agent {name} was published"),
        )
        .hint("host-agent agent list")
    })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn only_a_program_for_guests_is_packed() {
        let dir = tempfile::tempdir().unwrap();
        let (program, to) = (dir.path().join("p"), dir.path().join("p.agent"));
        let args = AgentPackArgs {
            program: program.clone(),
            set_version: "1.2.3".parse().unwrap(),
            output: to.clone(),
        };
        let output = Output::before_flags(false);
        assert_eq!(pack(&args, &output).unwrap_err().code(), Code::AgentFile);
        fs::write(&program, "#!/bin/sh\n").unwrap();
        assert_eq!(pack(&args, &output).unwrap_err().code(), Code::AgentRefused);
        assert!(!to.exists());
        let this = fs::read("/proc/self/exe").unwrap();
        fs::write(&program, &this[..this.len().min(100_000)]).unwrap();
        pack(&args, &output).unwrap();
        let package = fs::read(&to).unwrap();
        let (head, at) = agent_package::parse(&package[..START], package.len() as u64).unwrap();
        assert_eq!(head.version.to_string(), "1.2.3");
        assert!(package[at..] == this[..this.len().min(100_000)]);
    }
}
