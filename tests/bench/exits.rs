//! VM exits of a process, as KVM counts them in debugfs for every VMM alike.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// KVM's directory of VMs, named by the thread that created the VM and a descriptor
/// (kernel, virt/kvm/kvm_main.c, kvm_create_vm_debugfs).
const VMS: &str = "/sys/kernel/debug/kvm";

/// The counters of one VM, each the sum over its vCPUs.
#[derive(Debug)]
pub struct ExitCounter(PathBuf);

impl ExitCounter {
    /// The counter of the VM that process `pid` created.
    pub fn of(pid: u32) -> Result<Self> {
        let names = |dir: &Path| -> Result<Vec<String>> {
            let entries =
                fs::read_dir(dir).with_context(|| format!("cannot read {}", dir.display()))?;
            let names = entries.flatten().map(|entry| entry.file_name());
            Ok(names
                .map(|name| name.to_string_lossy().into_owned())
                .collect())
        };
        let vms = Path::new(VMS);
        let hint = "root and `mount -t debugfs debugfs /sys/kernel/debug` are needed";
        let found = names(vms).context(hint)?;
        let threads = names(Path::new(&format!("/proc/{pid}/task")))?;
        let name = vm_of(&threads, &found)
            .with_context(|| format!("{VMS} has no VM of process {pid}: {found:?}"))?;
        Ok(Self(vms.join(name)))
    }

    /// Exits so far.
    pub fn read(&self) -> Result<u64> {
        let file = self.0.join("exits");
        let text =
            fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
        text.trim()
            .parse()
            .with_context(|| format!("{} is not a number", file.display()))
    }

    /// Every counter of the VM by name: those of exits by their cause among them.
    pub fn all(&self) -> BTreeMap<String, u64> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let counters = entries.filter_map(|entry| {
            let text = fs::read_to_string(entry.path()).ok()?;
            Some((
                entry.file_name().into_string().ok()?,
                text.trim().parse().ok()?,
            ))
        });
        counters.collect()
    }
}

/// The name in `vms` that begins with one of these thread ids.
fn vm_of<'a>(threads: &[String], vms: &'a [String]) -> Option<&'a str> {
    let created = |name: &&String| {
        let creator = name.split_once('-').map(|(creator, _)| creator);
        creator.is_some_and(|creator| threads.iter().any(|thread| thread == creator))
    };
    vms.iter().find(created).map(String::as_str)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_is_found_by_any_thread_of_its_process() {
        let vms = ["exits", "12-9", "123-11", "40-7"].map(String::from);
        let threads = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        assert_eq!(vm_of(&threads(&["122", "123"]), &vms), Some("123-11"));
        assert_eq!(vm_of(&threads(&["12"]), &vms), Some("12-9"));
        assert_eq!(vm_of(&threads(&["1", "9", "exits"]), &vms), None);
    }

    #[test]
    fn a_counter_is_one_number_and_anything_else_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("exits");
        let counter = ExitCounter(dir.path().to_owned());
        assert!(counter.read().is_err());
        fs::write(&file, "18446744073709551615\n").unwrap();
        assert_eq!(counter.read().unwrap(), u64::MAX);
        fs::write(&file, "many\n").unwrap();
        assert!(counter.read().is_err());
        fs::write(dir.path().join("halt_exits"), "3\n").unwrap();
        assert_eq!(counter.all(), BTreeMap::from([("halt_exits".into(), 3)]));
    }
}
