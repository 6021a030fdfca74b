//! What a VMM process is told to run: plain data, checked on receipt.

use serde::{Deserialize, Serialize};

/// Most virtual processors of a guest.
pub const MAX_VCPUS: u8 = 8;

/// Position of a file descriptor in the list passed with
/// [`super::control::Command::Start`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileIndex(pub u8);

/// A guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GuestSpec {
    /// Instance name, for the process title and log lines only.
    pub name: String,
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Guest RAM in MiB, at least 64.
    pub memory_mib: u32,
    /// Kernel command line; the devices come by ACPI, not from here.
    pub cmdline: String,
    /// `/dev/kvm`, open read-write.
    pub kvm: FileIndex,
    /// bzImage or ELF vmlinux.
    pub kernel: FileIndex,
    /// Initial RAM file system.
    pub initrd: FileIndex,
    /// Serial output: the current file and the one before it.
    pub serial: SerialSpec,
    /// Disks in the order in which the guest numbers them (`vda`, `vdb`, …).
    pub disks: Vec<DiskSpec>,
    /// The guest's kernel must answer a dial within this, in milliseconds.
    pub dial_limit_ms: u32,
    /// Keep the guest alive when the control socket closes. A command in the
    /// foreground owns its guests and says `false`.
    pub outlive_supervisor: bool,
}

/// Where serial output goes. When `current` holds `max_bytes`, it is copied to
/// `previous` and begins anew, so that names keep their meaning without a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialSpec {
    /// Newest output.
    pub current: FileIndex,
    /// What came before it.
    pub previous: FileIndex,
    /// Size at which the files turn over.
    pub max_bytes: u64,
}

/// A virtio-blk disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// What the guest reads as the disk's serial number, at most
    /// 20 printable ASCII characters (virtio 1.2, 5.2.6.1).
    pub serial: String,
    /// What backs it.
    pub backing: DiskBacking,
}

/// What backs a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBacking {
    /// A raw file.
    Raw {
        /// The file.
        file: FileIndex,
        /// Writes are refused whatever the guest negotiated.
        read_only: bool,
    },
    /// A qcow2 diff over a raw base that is never written.
    Diff {
        /// The qcow2 file, read-write.
        diff: FileIndex,
        /// The base image, open read-only.
        base: FileIndex,
    },
}
