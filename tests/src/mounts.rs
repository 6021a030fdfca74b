//! File systems that only one test sees: a mount name space kept open by a
//! process, which commands can be started in.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{Place, program};

/// A mount name space; its mounts go when this is dropped.
#[derive(Debug)]
pub struct Mounts {
    holder: Child,
    as_user: bool,
}

impl Mounts {
    /// A name space in which the shell lines `script` have run as root, or as
    /// root of a user name space of its own.
    pub fn new(script: &str) -> Result<Self> {
        let as_user = !nix::unistd::Uid::effective().is_root();
        let mut command = Command::new("unshare");
        command.arg("--mount");
        if as_user {
            command.args(["--user", "--map-root-user"]);
        }
        let mut holder = command
            .args([
                "sh",
                "-c",
                &format!("set -e\n{script}\necho mounted\nexec cat"),
            ])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("unshare is a test dependency (util-linux)")?;
        let stdout = holder.stdout.take().context("stdout is piped")?;
        let mut line = String::new();
        BufReader::new(stdout).read_line(&mut line)?;
        let mounts = Self { holder, as_user };
        if line.trim_end() != "mounted" {
            bail!("cannot mount; as root, or where users may have name spaces:\n{script}");
        }
        Ok(mounts)
    }

    /// A small file system at `path`, which is made.
    pub fn small(path: &Path, size: &str) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        let path = path.display();
        Self::new(&format!("mount -t tmpfs -o size={size} small {path}"))
    }

    /// Devices as everywhere, but with `kvm` made by the shell lines `kvm`,
    /// which run in the new directory of devices.
    pub fn devices(place: &Place, kvm: &str) -> Result<Self> {
        let devices = place.file("dev");
        std::fs::create_dir_all(&devices)?;
        let devices = devices.display();
        Self::new(&format!(
            "mount -t tmpfs dev {devices}; cd {devices}\n\
             for name in null zero full random urandom; do\n\
             : >$name; mount --bind /dev/$name $name; done\n\
             {kvm}\nmount --rbind {devices} /dev; cd /"
        ))
    }

    /// The program in this name space, with the directories of `place`.
    /// Without `privileged`, root has no more rights than anybody.
    pub fn command(&self, place: &Place, privileged: bool) -> Command {
        let mut command = Command::new("nsenter");
        let holder = self.holder.id().to_string();
        // Its root too: this process may have been given another one.
        command.args(["--mount", "--root", "--target", &holder]);
        if self.as_user {
            command.args(["--user", "--preserve-credentials"]);
        }
        if !privileged {
            command.args(["setpriv", "--bounding-set=-all", "--inh-caps=-all"]);
        }
        command.arg(program());
        place.surround(&mut command);
        command
    }

    /// `path` in this name space, as it is reached from outside.
    pub fn seen(&self, path: &Path) -> PathBuf {
        let mut seen = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        seen.extend(path.components().skip(1));
        seen
    }
}

impl Drop for Mounts {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
