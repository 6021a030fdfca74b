//! `scripts/run-tests`, which runs each test with a limit of time.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use e2e::run::eventually;
use e2e::text;

/// A test program of three tests, one of which waits for a process that it started and that
/// ignores SIGTERM.
const PROGRAM: &str = r#"#!/bin/sh
case $* in
  *--list*) printf 'fails: test\nhangs: test\npasses: test\n' ;;
  *fails*) echo why; exit 101 ;;
  *hangs*) sh -c 'trap "" TERM; echo $$ >"$0"; sleep 1000; sleep 1000' "$0.pid" ;;
esac
"#;

#[test]
fn a_test_that_hangs_ends_at_its_limit_and_is_named() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let program = directory.path().join("program");
    fs::write(&program, PROGRAM)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let runner = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/run-tests");
    let run = |arguments: &[&str]| {
        let mut command = Command::new(&runner);
        command.args(["--limit", "1"]).args(arguments);
        command.arg(&program).output()
    };
    let output = run(&["--jobs", "3"])?;
    let shown = text(&output);
    ensure!(output.status.code() == Some(1), "{shown}");
    for line in [
        "test passes ... ok (",
        "test fails ... FAILED (",
        "test hangs ... FAILED: it did not end within 1 s (",
        "---- fails ----\nwhy\n",
        "\ntest result: FAILED. 1 passed; 2 failed; 0 ignored; ",
    ] {
        ensure!(shown.contains(line), "{line:?} is not in {shown}");
    }
    let pid = fs::read_to_string(program.with_extension("pid"))?;
    let status = format!("/proc/{}/status", pid.trim());
    eventually("the process that the test started has ended", || {
        let status = fs::read_to_string(&status).unwrap_or_default();
        Ok(!status.contains("State:") || status.contains("State:\tZ"))
    })?;
    Ok(())
}
