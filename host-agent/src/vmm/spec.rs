//! Description of a guest for its VMM process: plain data, checked on receipt.

use serde::{Deserialize, Serialize};

/// Most virtual processors of a guest.
pub const MAX_VCPUS: u8 = 8;

/// Index into the file descriptors that [`super::control::Command::Start`] carries.
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
    /// The guest's kernel must answer a connection within this, in milliseconds.
    pub dial_limit_ms: u32,
}

/// Where serial output goes. At `max_bytes` the VMM process copies `current` to
/// `previous` and truncates it: it has no paths to rename.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialSpec {
    /// Newest output.
    pub current: FileIndex,
    /// Output before that of `current`.
    pub previous: FileIndex,
    /// Size of `current` at which it is copied and truncated.
    pub max_bytes: u64,
}

/// A virtio-blk disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Serial number that the guest reads, at most 20 printable ASCII characters
    /// (virtio 1.2, 5.2.6.1).
    pub serial: String,
    /// Where its data is.
    pub backing: DiskBacking,
}

/// Where the data of a disk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DiskBacking {
    /// A raw file.
    Raw {
        /// The file.
        file: FileIndex,
        /// Refuse writes, whatever features the driver negotiated.
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
