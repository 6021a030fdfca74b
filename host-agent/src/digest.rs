//! SHA-256 digests, and a reader that checks one.

use std::io::{self, Read};

use base64::prelude::{BASE64_STANDARD, Engine as _};
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest as _, Sha256};
use utoipa::openapi::RefOr;
use utoipa::openapi::schema::{ObjectBuilder, Schema, Type};
use utoipa::{PartialSchema, ToSchema};

/// A SHA-256.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest([u8; 32]);

impl Digest {
    /// Digest and length of everything in `content`.
    pub fn of(mut content: impl Read) -> io::Result<(Self, u64)> {
        let mut hasher = Sha256::new();
        let mut length = 0;
        let mut buffer = vec![0; 1 << 16];
        loop {
            match content.read(&mut buffer) {
                Ok(0) => return Ok((Self(hasher.finalize().into()), length)),
                Ok(read) => {
                    hasher.update(&buffer[..read]);
                    length += read as u64;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    /// 64 digits.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }

    /// Reads [`Self::hex`]; no other spelling is accepted.
    pub fn from_hex(text: &str) -> Option<Self> {
        let mut bytes = [0; 32];
        if text.len() != 2 * bytes.len() || !text.is_ascii() {
            return None;
        }
        for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks(2)) {
            let pair = std::str::from_utf8(pair).ok()?;
            *byte = u8::from_str_radix(pair, 16).ok()?;
        }
        let digest = Self(bytes);
        (digest.hex() == text).then_some(digest)
    }

    /// The first 16 bytes in hex: a name for the content.
    pub fn guid(&self) -> String {
        hex(&self.0[..16])
    }

    /// Base64, as manifests hold it.
    pub fn to_base64(self) -> String {
        BASE64_STANDARD.encode(self.0)
    }

    /// Reads [`Self::to_base64`]; no other spelling is accepted.
    pub fn from_base64(text: &str) -> Option<Self> {
        let bytes = BASE64_STANDARD.decode(text).ok()?;
        Some(Self(bytes.try_into().ok()?))
    }
}

impl PartialSchema for Digest {
    fn schema() -> RefOr<Schema> {
        let text = ObjectBuilder::new().schema_type(Type::String);
        text.pattern(Some("^[0-9a-f]{64}$")).into()
    }
}

impl ToSchema for Digest {}

impl Serialize for Digest {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.hex())
    }
}

impl<'de> Deserialize<'de> for Digest {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        Self::from_hex(&text)
            .ok_or_else(|| D::Error::custom("a SHA-256 has 64 lower-case hexadecimal digits"))
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().flat_map(|byte| [byte >> 4, byte & 15]);
    digits
        .map(|digit| char::from_digit(digit.into(), 16).expect("four bits are a digit"))
        .collect()
}

/// A reader that fails at its end unless the content has the expected digest.
#[derive(Debug)]
pub struct Verified<R> {
    inner: R,
    hasher: Sha256,
    expected: Digest,
}

impl<R: Read> Verified<R> {
    /// A reader of `inner`, whose content must have the digest `expected`.
    pub fn new(inner: R, expected: Digest) -> Self {
        Self {
            inner,
            hasher: Sha256::new(),
            expected,
        }
    }
}

impl<R: Read> Read for Verified<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.inner.read(buffer)?;
        self.hasher.update(&buffer[..read]);
        if read == 0 && !buffer.is_empty() {
            let found = Digest(self.hasher.clone().finalize().into());
            if found != self.expected {
                let what = "the content does not have the expected SHA-256";
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        }
        Ok(read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_canonical_base64_is_read() {
        let (digest, length) = Digest::of(&b"abc"[..]).unwrap();
        assert_eq!(length, 3);
        let text = "ungWv48Bz+pBQUDeXa4iI7ADYaOWF3qctBD/YfIAFa0=";
        assert_eq!(digest.to_base64(), text);
        assert_eq!(digest.guid(), "ba7816bf8f01cfea414140de5dae2223");
        assert_eq!(Digest::from_base64(text), Some(digest));
        // The last digit has two unused bits, which must be 0.
        assert_eq!(Digest::from_base64(&text.replace("a0=", "a1=")), None);
        for bad in ["", "=", &text[1..], &text[..43], "é", &format!("{text}=")] {
            assert_eq!(Digest::from_base64(bad), None, "{bad}");
        }
    }

    #[test]
    fn content_with_another_digest_is_an_error() {
        let (digest, _) = Digest::of(&b"abc"[..]).unwrap();
        let read =
            |content: &'static [u8]| Verified::new(content, digest).read_to_end(&mut Vec::new());
        assert_eq!(read(b"abc").unwrap(), 3);
        assert!(read(b"abd").is_err());
        assert!(read(b"").is_err());
    }
}
