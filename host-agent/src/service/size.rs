//! Virtual machine sizes: those of the classic platform, and those that an operator adds.

use std::borrow::Cow;

use super::model::VmSize;

/// Size of a role whose definition has no `vmsize`.
pub const DEFAULT: &str = "Small";

/// MiB of every resource disk that local storage cannot use. The classic
/// platform reserves 6,144 MB for system files; here they hold the role's
/// temporary files, its logs and file system metadata.
pub const RESERVED_MIB: u64 = 6144;

/// Cores, memory and local storage, from "How to Configure Virtual Machine
/// Sizes". `A0` to `A4` are the names of the later size tables.
static TABLE: [(&str, VmSize); 5] = [
    ("A0", size("ExtraSmall", 1, 768, 19_480)),
    ("A1", size("Small", 1, 1792, 229_400)),
    ("A2", size("Medium", 2, 3584, 500_760)),
    ("A3", size("Large", 4, 7168, 1_023_000)),
    ("A4", size("ExtraLarge", 8, 14_336, 2_087_960)),
];

const fn size(name: &'static str, vcpus: u8, memory_mib: u32, resource_mib: u64) -> VmSize {
    VmSize {
        name: Cow::Borrowed(name),
        vcpus,
        memory_mib,
        resource_mib,
    }
}

/// The sizes that a host offers: the classic ones, and those of its operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sizes {
    /// By name. The classic ones come first, by memory.
    sizes: Vec<VmSize>,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            sizes: TABLE.iter().map(|(_, size)| size.clone()).collect(),
        }
    }
}

impl Sizes {
    /// Adds a size, or replaces the one of its name.
    pub fn set(&mut self, size: VmSize) {
        match self.sizes.iter_mut().find(|known| known.name == size.name) {
            Some(known) => *known = size,
            None => self.sizes.push(size),
        }
    }

    /// The size called `name`. The classic ones have two names.
    pub fn find(&self, name: &str) -> Option<&VmSize> {
        let of_alias = TABLE.iter().find(|(alias, _)| *alias == name);
        let by_name = |name: &str| self.sizes.iter().find(|size| size.name == name);
        by_name(name).or_else(|| by_name(&of_alias?.1.name))
    }

    /// The size of a role whose definition has none.
    pub fn default_size(&self) -> &VmSize {
        self.find(DEFAULT).expect("classic sizes are never removed")
    }

    /// Every size.
    pub fn iter(&self) -> impl Iterator<Item = &VmSize> {
        self.sizes.iter()
    }

    /// Every name that a definition may use.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let names = self.sizes.iter().map(|size| &*size.name);
        names.chain(TABLE.iter().map(|(alias, _)| *alias))
    }
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
