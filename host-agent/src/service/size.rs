//! The virtual machine sizes of the classic platform.

use super::model::VmSize;

/// Size of a role whose definition has no `vmsize`.
pub const DEFAULT: &str = "Small";

/// MiB of every resource disk that local storage cannot use. The classic
/// platform reserves 6,144 MB for system files; here they hold the role's
/// temporary files, its logs and file system metadata.
pub const RESERVED_MIB: u64 = 6144;

/// Cores, memory and local storage, from "How to Configure Virtual Machine
/// Sizes". `A0` to `A4` are the names of the later size tables.
const TABLE: [(&str, VmSize); 5] = [
    ("A0", size("ExtraSmall", 1, 768, 19_480)),
    ("A1", size("Small", 1, 1792, 229_400)),
    ("A2", size("Medium", 2, 3584, 500_760)),
    ("A3", size("Large", 4, 7168, 1_023_000)),
    ("A4", size("ExtraLarge", 8, 14_336, 2_087_960)),
];

const fn size(name: &'static str, vcpus: u8, memory_mib: u32, resource_mib: u64) -> VmSize {
    VmSize {
        name,
        vcpus,
        memory_mib,
        resource_mib,
    }
}

/// The size called `name`, by either of its names.
pub fn find(name: &str) -> Option<VmSize> {
    TABLE
        .iter()
        .find(|(alias, size)| size.name == name || *alias == name)
        .map(|(_, size)| *size)
}

/// Every name that a definition may use.
pub fn names() -> impl Iterator<Item = &'static str> {
    let written = TABLE.iter().map(|(_, size)| size.name);
    written.chain(TABLE.iter().map(|(alias, _)| *alias))
}

/// Whether `name` is a size of the classic platform that this version does not
/// support.
pub fn is_later(name: &str) -> bool {
    name.starts_with("Standard_")
        || name
            .strip_prefix('A')
            .and_then(|number| number.parse::<u8>().ok())
            .is_some_and(|number| (5..=11).contains(&number))
}
