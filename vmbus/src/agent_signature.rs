//! Checks a guest-agent package and its signature in one pass. Host and guest check with the
//! same code.

use std::io::{self, Read};

use minisign_verify::{PublicKey, Signature};
use sha2::{Digest, Sha256};

use crate::agent_package::{self, Head, MAX_PACKAGE, PackageError, START};

/// Longest text of a signature. One of minisign has 300 bytes and two comments.
pub const MAX_SIGNATURE: usize = 4096;
/// Longest text of a public key. One of minisign has 57 bytes and a comment.
pub const MAX_KEY: usize = 1024;
/// Most public keys that are trusted at a time.
pub const MAX_KEYS: usize = 16;
/// Bytes read at once.
const BUFFER: usize = 64 * 1024;

/// The public keys of those who may sign packages.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TrustedKeys(Vec<PublicKey>);

/// Why text is no list of keys.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// One of them is no key.
    #[error("not a public key of minisign")]
    Invalid(#[source] minisign_verify::Error),
    /// One of them is too long.
    #[error("a public key has {0} bytes, at most {MAX_KEY} are possible")]
    Long(usize),
    /// There are too many.
    #[error("{0} public keys, at most {MAX_KEYS} are possible")]
    Many(usize),
}

impl TrustedKeys {
    /// Keys from the texts of files `.pub`.
    pub fn parse<T: AsRef<str>>(texts: &[T]) -> Result<Self, KeyError> {
        if texts.len() > MAX_KEYS {
            return Err(KeyError::Many(texts.len()));
        }
        let key = |text: &T| {
            let text = text.as_ref();
            if text.len() > MAX_KEY {
                return Err(KeyError::Long(text.len()));
            }
            PublicKey::decode(text).map_err(KeyError::Invalid)
        };
        Ok(Self(texts.iter().map(key).collect::<Result<_, _>>()?))
    }

    /// How many they are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A package that is whole and signed by a trusted key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checked {
    /// What it says of itself.
    pub head: Head,
    /// Where its program begins.
    pub program_at: u64,
    /// Its SHA-256 in lower-case hexadecimal.
    pub sha256: String,
}

/// Why a package is refused.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    /// It cannot be read.
    #[error("cannot be read")]
    Read(#[from] io::Error),
    /// It is no package.
    #[error(transparent)]
    Package(#[from] PackageError),
    /// The signature is none.
    #[error("the signature is not one of minisign")]
    Signature(#[source] minisign_verify::Error),
    /// The signature is too long.
    #[error("the signature has {0} bytes, at most {MAX_SIGNATURE} are possible")]
    SignatureLength(usize),
    /// Signed with a key that is not trusted.
    #[error("it is signed with a key that is not trusted here (of {0} trusted keys)")]
    Untrusted(usize),
    /// Bytes were changed after they were signed, or the signature is of another file.
    #[error("the signature is not of this package: one of them was changed")]
    Mismatch,
}

/// Reads a package of `length` bytes and checks it against its `signature`.
pub fn check(
    package: &mut impl Read,
    length: u64,
    signature: &str,
    keys: &TrustedKeys,
) -> Result<Checked, CheckError> {
    if signature.len() > MAX_SIGNATURE {
        return Err(CheckError::SignatureLength(signature.len()));
    }
    let signature = Signature::decode(signature).map_err(CheckError::Signature)?;
    // Only prehashed signatures: others would need the whole package in memory.
    let mut verifiers = Vec::new();
    for key in &keys.0 {
        match key.verify_stream(&signature) {
            Ok(verifier) => verifiers.push(verifier),
            Err(minisign_verify::Error::UnexpectedKeyId) => {}
            Err(error) => return Err(CheckError::Signature(error)),
        }
    }
    if verifiers.is_empty() {
        return Err(CheckError::Untrusted(keys.len()));
    }
    let mut start = Vec::with_capacity(START);
    let mut digest = Sha256::new();
    let mut found = 0;
    let mut buffer = vec![0; BUFFER];
    // One byte more than the longest shows that there is more.
    let mut package = package.take(MAX_PACKAGE + 1);
    loop {
        let count = match package.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(error.into()),
        };
        let part = &buffer[..count];
        found += count as u64;
        start.extend_from_slice(&part[..count.min(START - start.len())]);
        digest.update(part);
        for verifier in &mut verifiers {
            verifier.update(part);
        }
    }
    let (head, program_at) = agent_package::parse(&start, found)?;
    if found != length {
        let expected = length;
        return Err(PackageError::Length { found, expected }.into());
    }
    // Keys may share an id.
    if !verifiers.iter_mut().any(|it| it.finalize().is_ok()) {
        return Err(CheckError::Mismatch);
    }
    Ok(Checked {
        head,
        program_at: program_at as u64,
        sha256: digest
            .finalize()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent_package::tests::package;
    use minisign::KeyPair;
    use proptest::prelude::*;

    struct Signed {
        package: Vec<u8>,
        signature: String,
        key: String,
    }

    fn signed() -> Signed {
        let pair = KeyPair::generate_unencrypted_keypair().unwrap();
        let package = package("1.2.3".parse().unwrap(), 200_000);
        let signature = minisign::sign(None, &pair.sk, &package[..], Some("trusted"), None);
        Signed {
            signature: signature.unwrap().into_string(),
            key: pair.pk.to_box().unwrap().into_string(),
            package,
        }
    }

    fn check_with(package: &[u8], signature: &str, keys: &[&str]) -> Result<Checked, CheckError> {
        let keys = TrustedKeys::parse(keys).unwrap();
        check(&mut &*package, package.len() as u64, signature, &keys)
    }

    #[test]
    fn only_whole_packages_of_a_trusted_key_pass() {
        let [ours, other] = [signed(), signed()];
        let keys = [&*other.key, &*ours.key];
        let checked = check_with(&ours.package, &ours.signature, &keys).unwrap();
        assert_eq!(checked.head.version.to_string(), "1.2.3");
        assert_eq!(checked.sha256.len(), 64);
        let untrusted = check_with(&ours.package, &ours.signature, &[&other.key]);
        assert!(matches!(untrusted, Err(CheckError::Untrusted(1))));
        let none = check_with(&ours.package, &ours.signature, &[]);
        assert!(matches!(none, Err(CheckError::Untrusted(0))));
        let torn = check_with(&ours.package[..100_000], &ours.signature, &keys);
        assert!(matches!(torn, Err(CheckError::Package(_))), "{torn:?}");
        let comment = ours
            .signature
            .replace("comment: trusted", "comment: changed");
        assert_ne!(comment, ours.signature);
        let changed = check_with(&ours.package, &comment, &keys);
        assert!(matches!(changed, Err(CheckError::Mismatch)), "{changed:?}");
        let mut package = ours.package.clone();
        package[150_000] ^= 1;
        let swapped = check_with(&package, &other.signature, &keys);
        assert!(matches!(swapped, Err(CheckError::Mismatch)), "{swapped:?}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn a_changed_byte_of_the_program_is_found(
            at in 200..200_000_usize, mask in 1..=255_u8,
        ) {
            thread_local!(static SIGNED: Signed = signed());
            SIGNED.with(|it| {
                let mut package = it.package.clone();
                package[at] ^= mask;
                let found = check_with(&package, &it.signature, &[&it.key]);
                assert!(matches!(found, Err(CheckError::Mismatch)), "{found:?}");
            });
        }

        #[test]
        fn no_text_makes_the_signature_parser_panic(
            lines in prop::collection::vec("[ -~é]{0,80}", 0..6),
            damage in prop::collection::vec((any::<prop::sample::Index>(), any::<char>()), 0..4),
        ) {
            thread_local!(static SIGNED: Signed = signed());
            SIGNED.with(|it| {
                let _ = check_with(&it.package[..300], &lines.join("\n"), &[&it.key]);
                let mut signature: Vec<char> = it.signature.chars().collect();
                for (at, value) in &damage {
                    let at = at.index(signature.len());
                    signature[at] = *value;
                }
                let signature: String = signature.into_iter().collect();
                let _ = check_with(&it.package[..300], &signature, &[&it.key]);
                let mut key: Vec<char> = it.key.chars().collect();
                for (at, value) in &damage {
                    let at = at.index(key.len());
                    key[at] = *value;
                }
                let _ = TrustedKeys::parse(&[key.into_iter().collect::<String>()]);
                let _ = TrustedKeys::parse(&lines);
            });
        }
    }
}
