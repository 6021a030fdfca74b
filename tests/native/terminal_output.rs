//! Text of guests, packages and files cannot drive the user's terminal.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener;

use anyhow::{Result, ensure};
use e2e::run::end;
use e2e::service::Service;
use e2e::terminal::Terminal;
use e2e::{Sandbox, text};

/// Clears the screen, sets the title by a C1 control, hides, reverses the direction, and
/// separates lines.
const HOSTILE: &str = "a\u{1b}[2Jb\u{9d}0;t\u{7}c\u{200b}d\u{202e}e\u{2066}f\u{2028}g\u{feff}h";

/// Runs the program on a terminal to its end; the output.
fn shown(sandbox: &Sandbox, arguments: &[&str]) -> Result<String> {
    let mut terminal = Terminal::open(24, 200)?;
    let mut child = terminal.start(sandbox, arguments)?;
    end(&mut child)?;
    // The terminal echoes this after the output of the program.
    terminal.write("THE-END\n")?;
    terminal.wait_for("THE-END")
}

/// Fails if `shown` has a character that is not one of text.
fn is_plain(shown: &str) -> Result<()> {
    let hostile = |c: &char| !c.is_ascii() && HOSTILE.contains(*c);
    let other = |c: char| (c.is_control() && !"\r\n\t".contains(c)) || hostile(&c);
    ensure!(!shown.contains(other), "{shown:?}");
    Ok(())
}

#[test]
fn a_log_is_printable_on_a_terminal_and_whole_in_a_pipe() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let instance = sandbox.data().join("deployments/0123/Role_IN_0");
    fs::create_dir_all(&instance)?;
    let log = format!("first\r\n{HOSTILE}\u{ff}\r\nlast\r\n");
    for (source, file) in [("role", "role.log"), ("serial", "serial.log")] {
        fs::write(instance.join(file), &log)?;
        let arguments = ["logs", "Role_IN_0", "--source", source];
        let shown = shown(&sandbox, &arguments)?;
        is_plain(&shown)?;
        ensure!(shown.contains("first\r\na\u{fffd}[2Jb"), "{shown:?}");
        ensure!(shown.contains("h\u{ff}\r\nlast\r\n"), "{shown:?}");
        let piped = sandbox.output(&arguments)?;
        ensure!(piped.stdout == log.as_bytes(), "{}", text(&piped));
    }
    Ok(())
}

#[test]
fn a_hostile_service_is_described_in_printable_text() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let service = sandbox.file(&HOSTILE.replace('/', ""));
    Service::idle().write(&service)?;
    let name = service.to_string_lossy().into_owned();
    let definition = service.join("ServiceDefinition.csdef");
    let good = fs::read_to_string(&definition)?;
    let hostile = HOSTILE.replace(['\u{1b}', '\u{7}'], "");
    let attribute = good.replace("vmsize=", &format!("{hostile}=\"1\" vmsize="));
    let value = good.replace("ExtraSmall", &hostile);
    ensure!(attribute != good && value != good);
    for content in [&good, &attribute, &value] {
        fs::write(&definition, content)?;
        for arguments in [
            &["validate", &name][..],
            &["validate", &name, "--json"],
            &["validate", &name, "--error-format", "json"],
            &["pack", &name, "-o", &format!("{name}.cspkg")],
            &["run", &name],
            &["test", &name],
            &["test", &name, "--json"],
            &["run", "-vv", &name, &name],
        ] {
            let shown = shown(&sandbox, arguments)?;
            is_plain(&shown)?;
            ensure!(shown.contains("0;t"), "{arguments:?}: {shown:?}");
        }
    }
    Ok(())
}

#[test]
fn log_lines_of_the_program_are_printable() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let sockets = sandbox.file("run/host-agent");
    fs::create_dir(&sockets)?;
    fs::set_permissions(&sockets, fs::Permissions::from_mode(0o700))?;
    // No process listens on it, which a line of the log says.
    let name = HOSTILE.replace('/', "");
    drop(UnixListener::bind(sockets.join(format!("{name}.sock")))?);
    let shown = shown(&sandbox, &["ps", "-vv"])?;
    is_plain(&shown)?;
    ensure!(
        shown.contains("0;t") && shown.contains("skipped"),
        "{shown:?}"
    );
    Ok(())
}
