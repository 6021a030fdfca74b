//! Paths of the data directory and the runtime directory.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::{Uid, User};

use crate::config::Config;

/// Variable with the data directory.
pub const DATA_VARIABLE: &str = "HOST_AGENT_DATA_DIR";

/// Images and deployments, by the configuration of this host. An absolute path. Blocking.
pub fn data_dir() -> PathBuf {
    // A configuration that cannot be read has ended the command before.
    Config::load(None).unwrap_or_default().data_dir.value
}

/// Sockets, by the configuration of this host. Blocking.
pub fn runtime_dir() -> PathBuf {
    Config::load(None).unwrap_or_default().runtime_dir.value
}

/// Images and deployments where no file and no variable of ours says another place:
/// `host-agent` under `XDG_DATA_HOME` or `~/.local/share`. An absolute path.
pub fn default_data_dir() -> PathBuf {
    let home = || Some(User::from_uid(Uid::effective()).ok()??.dir);
    let directory = data_dir_of(|name| env::var_os(name), home);
    // Fails only when the working directory is gone.
    std::path::absolute(&directory).unwrap_or(directory)
}

/// Sockets: `host-agent` under `XDG_RUNTIME_DIR`, `/run` for root, else a directory
/// per user in `/tmp`. Short, because a socket path has at most 107 bytes.
pub fn default_runtime_dir() -> PathBuf {
    runtime_dir_of(|name| env::var_os(name), Uid::effective())
}

/// Name of the socket of `host-agent serve` in the runtime directory, without its extension.
pub const SERVE: &str = "serve";

/// Socket of this user's `host-agent serve`.
pub fn serve_socket() -> PathBuf {
    runtime_dir().join(format!("{SERVE}.sock"))
}

/// Checks that only this user and root can create files in `directory`. The
/// content of any other directory is not trusted.
///
/// # Errors
/// Another user can, or `lstat` failed.
pub fn check_own(directory: &Path) -> io::Result<()> {
    let found = fs::symlink_metadata(directory)?;
    let refused = |why: String| Err(io::Error::new(io::ErrorKind::PermissionDenied, why));
    let mode = found.mode() & 0o7777;
    if !found.is_dir() {
        return refused("it is not a directory".into());
    }
    if found.uid() != Uid::effective().as_raw() {
        return refused(format!("it belongs to another user, {}", found.uid()));
    }
    // A group that may pass through it may reach a socket in it (`api.group`).
    if mode & 0o067 != 0 {
        return refused(format!("its mode is {mode:04o} and must be 0700"));
    }
    Ok(())
}

fn data_dir_of(
    variable: impl Fn(&str) -> Option<OsString>,
    home: impl FnOnce() -> Option<PathBuf>,
) -> PathBuf {
    let set = |name| set(&variable, name);
    if let Some(dir) = set("XDG_DATA_HOME").filter(|dir| dir.is_absolute()) {
        return dir.join("host-agent");
    }
    let home = set("HOME").or_else(home);
    let home = home.unwrap_or_else(|| PathBuf::from("/"));
    home.join(".local/share/host-agent")
}

fn runtime_dir_of(variable: impl Fn(&str) -> Option<OsString>, user: Uid) -> PathBuf {
    // XDG base directory specification: ignore relative paths.
    match set(&variable, "XDG_RUNTIME_DIR").filter(|dir| dir.is_absolute()) {
        Some(dir) => dir.join("host-agent"),
        None if user.is_root() => PathBuf::from("/run/host-agent"),
        None => PathBuf::from(format!("/tmp/host-agent-{user}")),
    }
}

fn set(variable: impl Fn(&str) -> Option<OsString>, name: &str) -> Option<PathBuf> {
    variable(name)
        .filter(|value| !value.is_empty())
        .map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn only_a_private_directory_of_this_user_is_trusted() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("run");
        assert_eq!(
            check_own(&directory).unwrap_err().kind(),
            io::ErrorKind::NotFound
        );
        fs::create_dir(&directory).unwrap();
        let with_mode = |mode| {
            fs::set_permissions(&directory, fs::Permissions::from_mode(mode)).unwrap();
            check_own(&directory).map_err(|error| error.kind())
        };
        assert_eq!(with_mode(0o700), Ok(()));
        for mode in [0o770, 0o701, 0o704, 0o1777] {
            assert_eq!(with_mode(mode), Err(io::ErrorKind::PermissionDenied));
        }
        assert_eq!(with_mode(0o700), Ok(()));
        let link = root.path().join("link");
        std::os::unix::fs::symlink(&directory, &link).unwrap();
        assert!(check_own(&link).is_err());
        // It belongs to root: for root this check would pass.
        if !Uid::effective().is_root() {
            assert!(check_own(Path::new("/root")).is_err());
        }
    }

    #[test]
    fn empty_or_relative_variables_do_not_set_directories() {
        let data = |set: &[(&str, &str)]| {
            let variable = |name: &str| {
                let found = set.iter().find(|(known, _)| *known == name);
                found.map(|(_, value)| OsString::from(value))
            };
            let home = || Some(PathBuf::from("/home/passwd"));
            data_dir_of(variable, home).display().to_string()
        };
        let of_passwd = "/home/passwd/.local/share/host-agent";
        assert_eq!(data(&[]), of_passwd);
        assert_eq!(data(&[("HOME", "")]), of_passwd);
        assert_eq!(data(&[("HOME", "/h")]), "/h/.local/share/host-agent");
        assert_eq!(data(&[("XDG_DATA_HOME", "/x")]), "/x/host-agent");
        assert_eq!(data(&[("XDG_DATA_HOME", "x")]), of_passwd);
        let runtime = |value: &str, user| {
            let variable = |_: &str| Some(OsString::from(value));
            let directory = runtime_dir_of(variable, Uid::from_raw(user));
            directory.display().to_string()
        };
        assert_eq!(runtime("/run/user/7", 7), "/run/user/7/host-agent");
        assert_eq!(runtime("run", 7), "/tmp/host-agent-7");
        assert_eq!(runtime("", 0), "/run/host-agent");
    }
}
