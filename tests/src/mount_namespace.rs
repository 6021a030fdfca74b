//! File systems that only one test sees: a mount name space, kept open by a
//! process, in which commands are started.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::{Sandbox, program};

/// A mount name space. On drop its mounts go away.
#[derive(Debug)]
pub struct MountNamespace {
    holder: Child,
    as_user: bool,
}

impl MountNamespace {
    /// Makes a name space and runs the shell lines `script` in it as root, or as root
    /// of a new user name space.
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
        let namespace = Self { holder, as_user };
        if line.trim_end() != "mounted" {
            bail!("cannot mount; run as root, or allow user name spaces:\n{script}");
        }
        Ok(namespace)
    }

    /// Mounts a tmpfs of this size at `path`, which is created.
    pub fn with_tmpfs(path: &Path, size: &str) -> Result<Self> {
        std::fs::create_dir_all(path)?;
        let path = path.display();
        Self::new(&format!("mount -t tmpfs -o size={size} small {path}"))
    }

    /// Replaces `/dev` by the usual devices and a `kvm` that the shell lines `kvm`
    /// make in the new directory.
    pub fn with_kvm(sandbox: &Sandbox, kvm: &str) -> Result<Self> {
        let devices = sandbox.file("dev");
        std::fs::create_dir_all(&devices)?;
        let devices = devices.display();
        Self::new(&format!(
            "mount -t tmpfs dev {devices}; cd {devices}\n\
             for name in null zero full random urandom; do\n\
             : >$name; mount --bind /dev/$name $name; done\n\
             {kvm}\nmount --rbind {devices} /dev; cd /"
        ))
    }

    /// The program in this name space, with the environment of `sandbox`. Without
    /// `privileged` it has no capabilities, even as root.
    pub fn command(&self, sandbox: &Sandbox, privileged: bool) -> Command {
        let mut command = Command::new("nsenter");
        let holder = self.holder.id().to_string();
        // `--root`: the lab runs the tests in a chroot, whose root the name space keeps.
        command.args(["--mount", "--root", "--target", &holder]);
        if self.as_user {
            command.args(["--user", "--preserve-credentials"]);
        }
        if !privileged {
            command.args(["setpriv", "--bounding-set=-all", "--inh-caps=-all"]);
        }
        command.arg(program());
        sandbox.set_environment(&mut command);
        command
    }

    /// The path at which this process reaches `path` of the name space.
    pub fn outside(&self, path: &Path) -> PathBuf {
        let mut outside = PathBuf::from(format!("/proc/{}/root", self.holder.id()));
        outside.extend(path.components().skip(1));
        outside
    }
}

impl Drop for MountNamespace {
    fn drop(&mut self) {
        let _ = self.holder.kill();
        let _ = self.holder.wait();
    }
}
