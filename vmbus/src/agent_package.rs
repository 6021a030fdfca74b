//! The package of a guest agent: a line that names the format, a line of JSON that says what
//! the package is, then the program. Host and guest parse it with this module. Pure.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// First line of a package. Another meaning of the same fields gets another line.
pub const MAGIC: &[u8] = b"host-agent.guest-agent/1\n";

/// The machines that this build's guests are.
pub const TARGET: &str = "x86_64-linux";

/// Longest head, with [`MAGIC`] and the end of its line: the fields take a tenth of it.
pub const MAX_HEAD: usize = 1024;

/// Bytes at the start of a package that [`parse`] needs, if the package has as many: the head
/// and the start of an ELF header.
pub const START: usize = MAX_HEAD + ELF_START;

/// Largest program in bytes. A static guest agent has 2 MiB; every guest downloads it.
pub const MAX_PROGRAM: u64 = 64 << 20;

/// Largest package in bytes.
pub const MAX_PACKAGE: u64 = MAX_HEAD as u64 + MAX_PROGRAM;

/// Length of an ELF header up to its field `e_machine`.
const ELF_START: usize = 20;

/// `e_machine` of x86-64.
const EM_X86_64: [u8; 2] = [62, 0];

/// A version: three numbers, compared in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version {
    /// Changes what others rely on.
    pub major: u32,
    /// Adds something.
    pub minor: u32,
    /// Repairs something.
    pub patch: u32,
}

/// Text is no version.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no version: write three numbers, as in 1.20.3")]
pub struct VersionError(String);

impl FromStr for Version {
    type Err = VersionError;

    fn from_str(text: &str) -> Result<Self, VersionError> {
        let wrong = || VersionError(text.chars().take(40).collect());
        // One text for each version: no sign, no leading zero.
        let number = |part: &str| {
            let digits = part.bytes().all(|byte| byte.is_ascii_digit());
            let plain = digits && (part == "0" || !part.starts_with('0'));
            part.parse().ok().filter(|_| plain).ok_or_else(wrong)
        };
        let mut parts = text.split('.');
        let mut next = || number(parts.next().ok_or_else(wrong)?);
        let (major, minor, patch) = (next()?, next()?, next()?);
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self {
            major,
            minor,
            patch,
        })
    }
}

impl TryFrom<String> for Version {
    type Error = VersionError;

    fn try_from(text: String) -> Result<Self, VersionError> {
        text.parse()
    }
}

impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.to_string()
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// What a package says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Head {
    /// Version of the program.
    pub version: Version,
    /// The machines that it runs on.
    pub target: String,
    /// Length of the program in bytes.
    pub size: u64,
}

/// Why bytes are not a package for this build's guests.
#[derive(Debug, thiserror::Error)]
pub enum PackageError {
    /// The first line is another one.
    #[error("it does not begin as a guest-agent package does")]
    Format,
    /// The second line does not end where it must.
    #[error("its head has no end within {MAX_HEAD} bytes")]
    NoEnd,
    /// The second line is not what it must be.
    #[error("its head is not valid")]
    Head(#[from] serde_json::Error),
    /// It is for other machines.
    #[error("it is for {0:?}, guests are {TARGET:?}")]
    Target(String),
    /// The program is empty or too large.
    #[error("its program has {0} bytes, 1 to {MAX_PROGRAM} are possible")]
    Size(u64),
    /// Something is missing at the end, or too much.
    #[error("it has {found} bytes and should have {expected}: it is torn or damaged")]
    Length {
        /// Length of the package.
        found: u64,
        /// Length that the head asks for.
        expected: u64,
    },
    /// The program is none.
    #[error("its program is not an x86-64 ELF file")]
    Program,
}

/// Parses the first [`START`] bytes of a package of `length` bytes, or all of a shorter one:
/// its head, and where the program begins.
pub fn parse(start: &[u8], length: u64) -> Result<(Head, usize), PackageError> {
    let rest = start.strip_prefix(MAGIC).ok_or(PackageError::Format)?;
    let most = MAX_HEAD - MAGIC.len();
    let end = rest.iter().take(most).position(|byte| *byte == b'\n');
    let end = end.ok_or(PackageError::NoEnd)?;
    let head: Head = serde_json::from_slice(&rest[..end])?;
    if head.target != TARGET {
        return Err(PackageError::Target(head.target.chars().take(40).collect()));
    }
    if head.size == 0 || head.size > MAX_PROGRAM {
        return Err(PackageError::Size(head.size));
    }
    let at = MAGIC.len() + end + 1;
    let expected = at as u64 + head.size;
    if length != expected {
        let found = length;
        return Err(PackageError::Length { found, expected });
    }
    if !is_program(&start[at..]) {
        return Err(PackageError::Program);
    }
    Ok((head, at))
}

/// Magic number, 64 bits, little-endian, and the machine.
fn is_program(start: &[u8]) -> bool {
    let header = start.first_chunk::<ELF_START>();
    header.is_some_and(|it| it.starts_with(b"\x7fELF\x02\x01") && it.ends_with(&EM_X86_64))
}

/// The head of the package of a program with `size` bytes, which follows it.
pub fn head(version: Version, size: u64) -> Vec<u8> {
    let head = Head {
        version,
        target: TARGET.into(),
        size,
    };
    let mut bytes = MAGIC.to_vec();
    serde_json::to_writer(&mut bytes, &head).expect("text and numbers are JSON");
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A package whose program has `more` bytes after the start of its header.
    pub(crate) fn package(version: Version, more: usize) -> Vec<u8> {
        let mut program = b"\x7fELF\x02\x01\x01".to_vec();
        program.resize(ELF_START - 2, 0);
        program.extend(EM_X86_64);
        program.extend((0..more).map(|n| n as u8));
        let mut bytes = head(version, program.len() as u64);
        bytes.extend(program);
        bytes
    }

    fn version() -> impl Strategy<Value = Version> {
        any::<(u32, u32, u32)>().prop_map(|(major, minor, patch)| Version {
            major,
            minor,
            patch,
        })
    }

    fn parse_all(bytes: &[u8]) -> Result<(Head, usize), PackageError> {
        parse(&bytes[..bytes.len().min(START)], bytes.len() as u64)
    }

    #[test]
    fn a_version_has_one_text_and_the_order_of_its_numbers() {
        for wrong in [
            "",
            "1",
            "1.2",
            "1.2.3.4",
            "1.2.",
            "01.2.3",
            "1.2.+3",
            "1.2.-3",
            " 1.2.3",
            "v1.2.3",
            "1.2.3-rc1",
            "1.2.4294967296",
            "١.2.3",
        ] {
            assert!(wrong.parse::<Version>().is_err(), "{wrong}");
        }
        let of = |text: &str| text.parse::<Version>().unwrap();
        assert!(of("0.9.10") > of("0.9.9") && of("1.0.0") > of("0.99.99"));
    }

    #[test]
    fn a_package_for_other_machines_is_refused() {
        let whole = package("1.2.3".parse().unwrap(), 100);
        let replaced = |from: &str, to: &str| {
            let end = whole.len() - 120;
            let text = std::str::from_utf8(&whole[..end]).unwrap();
            let mut bytes = text.replace(from, to).into_bytes();
            bytes.extend(&whole[end..]);
            parse_all(&bytes).unwrap_err()
        };
        let error = replaced("x86_64-linux", "aarch64-linux");
        assert!(matches!(error, PackageError::Target(_)), "{error}");
        let error = replaced("/1\n", "/2\n");
        assert!(matches!(error, PackageError::Format), "{error}");
        let mut other = whole.clone();
        let machine = whole.len() - 100 - 2;
        other[machine] = 183;
        let error = parse_all(&other).unwrap_err();
        assert!(matches!(error, PackageError::Program), "{error}");
    }

    #[test]
    fn a_head_is_bounded() {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(std::iter::repeat_n(b' ', 1 << 20));
        assert!(matches!(parse_all(&bytes), Err(PackageError::NoEnd)));
        let huge = head("1.0.0".parse().unwrap(), MAX_PROGRAM + 1);
        assert!(matches!(parse_all(&huge), Err(PackageError::Size(_))));
        let huge = head("1.0.0".parse().unwrap(), u64::MAX);
        assert!(matches!(parse_all(&huge), Err(PackageError::Size(_))));
    }

    proptest! {
        #[test]
        fn every_package_is_read_as_it_was_written(version in version(), more in 0..3000_usize) {
            let bytes = package(version, more);
            let (head, at) = parse_all(&bytes).unwrap();
            prop_assert_eq!(head.version, version);
            prop_assert_eq!(at as u64 + head.size, bytes.len() as u64);
            prop_assert_eq!(version.to_string().parse::<Version>().unwrap(), version);
        }

        #[test]
        fn a_torn_package_is_refused_wherever_it_ends(
            version in version(), more in 0..3000_usize, cut in any::<prop::sample::Index>(),
        ) {
            let bytes = package(version, more);
            let torn = &bytes[..cut.index(bytes.len())];
            prop_assert!(parse_all(torn).is_err());
        }

        #[test]
        fn no_bytes_make_the_parser_panic(
            version in version(),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..8),
            more in prop::collection::vec(any::<u8>(), 0..200),
            length in any::<u64>(),
        ) {
            let mut bytes = package(version, 10);
            for (at, value) in damage {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            bytes.extend(&more);
            let _ = parse_all(&bytes);
            let _ = parse(&bytes, length);
            let _ = parse(&more, length);
            let mut after = MAGIC.to_vec();
            after.extend(&more);
            if let Ok((head, at)) = parse_all(&after) {
                prop_assert_eq!(at as u64 + head.size, after.len() as u64);
            }
        }
    }
}
