//! Gathers the facts about the host; no other part of the doctor does I/O.

use std::fs::OpenOptions;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Group, Uid, User};

use super::verdict::{Facts, KvmFact};
use super::{Scope, kvm_probe};
use crate::cgroup;
use crate::vmm::sandbox::probe::probe;

const KVM: &str = "/dev/kvm";

/// Gathers the facts. Takes less than a second on a healthy machine.
pub fn gather(data_dir: PathBuf, scope: Scope) -> Facts {
    let module = std::fs::read_to_string("/proc/cpuinfo")
        .ok()
        .and_then(|text| module_of(&text));
    Facts {
        kvm: kvm(),
        container: Path::new("/.dockerenv").exists() || Path::new("/run/.containerenv").exists(),
        module,
        user: user(),
        memory: std::fs::read_to_string("/proc/meminfo")
            .ok()
            .and_then(|text| available(&text))
            .unwrap_or(0),
        disk: free_space(&data_dir),
        data_dir,
        cgroup: cgroup::find_parent(),
        sandbox: (scope == Scope::GuestsAndSandbox).then(probe),
        scale_variable: std::env::var_os("HOST_AGENT_TIMEOUT_SCALE")
            .filter(|value| !value.is_empty())
            .map(|value| value.to_string_lossy().into_owned()),
    }
}

fn kvm() -> KvmFact {
    match OpenOptions::new().read(true).write(true).open(KVM) {
        Ok(file) => KvmFact::Opened(kvm_probe::probe(file)),
        Err(error) => match error.kind() {
            ErrorKind::NotFound => KvmFact::Missing,
            ErrorKind::PermissionDenied => denied(),
            // The device node exists without the kernel module.
            _ if matches!(error.raw_os_error(), Some(libc::ENODEV | libc::ENXIO)) => {
                KvmFact::Missing
            }
            _ => KvmFact::Failed {
                error: error.to_string(),
            },
        },
    }
}

fn denied() -> KvmFact {
    let metadata = std::fs::metadata(KVM).ok();
    KvmFact::Denied {
        group: metadata.as_ref().and_then(|metadata| {
            let group = Group::from_gid(Gid::from_raw(metadata.gid()));
            group.ok().flatten().map(|group| group.name)
        }),
        mode: metadata.map_or(0, |metadata| metadata.mode()),
    }
}

fn user() -> String {
    User::from_uid(Uid::effective())
        .ok()
        .flatten()
        .map_or_else(|| format!("user {}", Uid::effective()), |user| user.name)
}

/// Free bytes for this user at `directory` or its nearest existing parent.
fn free_space(directory: &Path) -> u64 {
    directory
        .ancestors()
        .find_map(|path| nix::sys::statvfs::statvfs(path).ok())
        .map_or(0, |stat| stat.blocks_available() * stat.fragment_size())
}

/// The KVM module for the CPU that `/proc/cpuinfo` describes.
fn module_of(cpuinfo: &str) -> Option<&'static str> {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags"))?;
    flags.split_whitespace().find_map(|flag| match flag {
        "vmx" => Some("kvm_intel"),
        "svm" => Some("kvm_amd"),
        _ => None,
    })
}

/// `MemAvailable` of `/proc/meminfo`, in bytes.
fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_cpu_facts_are_read_from_proc() {
        let memory = "MemTotal:  100 kB\nMemFree: 1 kB\nMemAvailable:    2048 kB\n";
        assert_eq!(available(memory), Some(2 << 20));
        assert_eq!(available("MemFree: 1 kB\n"), None);
        assert_eq!(
            module_of("model: x\nflags\t\t: fpu svm sse\n"),
            Some("kvm_amd")
        );
        assert_eq!(module_of("flags : fpu vmx_foo\n"), None);
    }

    #[test]
    fn free_space_is_that_of_the_nearest_existing_parent() {
        assert!(free_space(Path::new("/no/such/directory")) > 0);
    }
}
