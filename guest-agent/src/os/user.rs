//! The role's user: an account without a password or a shell.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};

/// User and group id of the role: one role per guest.
pub const ROLE_ID: u32 = 60000;
/// Its name.
pub const ROLE_USER: &str = "role";

/// Adds the account to the guest's user and group files, once.
pub fn create(home: &str) -> io::Result<()> {
    add(
        "/etc/passwd",
        &format!("{ROLE_USER}:x:{ROLE_ID}:{ROLE_ID}:role:{home}:/usr/sbin/nologin"),
    )?;
    add("/etc/group", &format!("{ROLE_USER}:x:{ROLE_ID}:"))
}

/// Denies user namespaces to users without privileges: in one of its own, a role would have
/// all capabilities and so reach far more of the kernel.
pub fn forbid_namespaces() -> io::Result<()> {
    // Debian's own; it leaves them to root.
    match fs::write("/proc/sys/kernel/unprivileged_userns_clone", "0") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            fs::write("/proc/sys/user/max_user_namespaces", "0")
        }
        other => other,
    }
}

fn add(path: &str, line: &str) -> io::Result<()> {
    let text = match fs::read_to_string(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        other => other?,
    };
    let name = format!("{ROLE_USER}:");
    if text.lines().any(|line| line.starts_with(&name)) {
        return Ok(());
    }
    let mut file = OpenOptions::new().append(true).create(true).open(path)?;
    if !text.is_empty() && !text.ends_with('\n') {
        file.write_all(b"\n")?;
    }
    writeln!(file, "{line}")
}
