//! Guest-agent packages, signed by keys of the test.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use minisign::KeyPair;
use sha2::{Digest, Sha256};

use crate::Sandbox;

/// Someone who signs packages.
#[derive(Debug)]
pub struct Signer(KeyPair);

impl Signer {
    /// With a new key.
    pub fn new() -> Result<Self> {
        Ok(Self(KeyPair::generate_unencrypted_keypair()?))
    }

    /// The public key as a file `.pub`.
    pub fn key(&self) -> Result<String> {
        Ok(self.0.pk.to_box()?.into_string())
    }

    /// Lets the host of `sandbox` trust this signer under `name`.
    pub fn trust(&self, sandbox: &Sandbox, name: &str) -> Result<()> {
        let keys = sandbox.data().join("agent-keys");
        fs::create_dir_all(&keys)?;
        Ok(fs::write(keys.join(format!("{name}.pub")), self.key()?)?)
    }

    /// Signs a file; the signature is beside it.
    pub fn sign(&self, file: &Path) -> Result<()> {
        let bytes = fs::read(file)?;
        let signature = minisign::sign(None, &self.0.sk, &bytes[..], None, None)?;
        let name = format!("{}.minisig", file.display());
        Ok(fs::write(name, signature.into_string())?)
    }
}

/// Makes a package of a program by `host-agent agent pack`.
pub fn pack(sandbox: &Sandbox, program: &[u8], version: &str) -> Result<PathBuf> {
    let file = sandbox.file(&format!("program-{version}"));
    fs::write(&file, program)?;
    let package = sandbox.file(&format!("guest-agent-{version}.agent"));
    let arguments = [
        "agent",
        "pack",
        &file.to_string_lossy(),
        "--set-version",
        version,
        "-o",
        &package.to_string_lossy(),
    ];
    let output = sandbox.output(&arguments)?;
    ensure!(output.status.success(), "{}", crate::text(&output));
    fs::remove_file(file)?;
    Ok(package)
}

/// Writes image `name` into the data directory of `sandbox`: image `minimal`, whose initrd has
/// this public key too. An image with keys trusts no others.
pub fn pin_key(sandbox: &Sandbox, name: &str, key: &str) -> Result<()> {
    let images = sandbox.data().join("images");
    let from = fs::read_link(&images)?;
    fs::remove_file(&images)?;
    fs::create_dir(&images)?;
    for entry in fs::read_dir(&from)? {
        let entry = entry?;
        std::os::unix::fs::symlink(entry.path(), images.join(entry.file_name()))?;
    }
    let (minimal, image) = (from.join("minimal"), images.join(name));
    fs::create_dir(&image)?;
    for file in ["kernel", "base.ext4", "resource.ext4", "guest-agent"] {
        std::os::unix::fs::symlink(minimal.join(file), image.join(file))?;
    }
    let mut initrd = fs::read(minimal.join("initrd"))?;
    // The kernel unpacks archives one after the other.
    initrd.resize(initrd.len().next_multiple_of(4), 0);
    let start = initrd.len();
    for (path, mode, content) in [
        ("agent-keys", 0o040_755, &b""[..]),
        ("agent-keys/test.pub", 0o100_644, key.as_bytes()),
        ("TRAILER!!!", 0, b""),
    ] {
        entry(&mut initrd, start, path, mode, content);
    }
    fs::write(image.join("initrd"), &initrd)?;
    let manifest = fs::read(minimal.join("manifest.json"))?;
    let mut manifest: serde_json::Value = serde_json::from_slice(&manifest)?;
    manifest["name"] = name.into();
    let digest = Sha256::digest(&initrd);
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    manifest["files"]["initrd"]["sha256"] = digest.into();
    manifest["files"]["initrd"]["size"] = initrd.len().into();
    Ok(fs::write(
        image.join("manifest.json"),
        manifest.to_string(),
    )?)
}

/// Appends a file to an archive in cpio's format `newc`, which begins at `start`.
fn entry(archive: &mut Vec<u8>, start: usize, path: &str, mode: u32, content: &[u8]) {
    let links = if mode & 0o040_000 == 0 { 1 } else { 2 };
    let fields = [
        u32::try_from(archive.len() - start).unwrap_or(0) + 1,
        mode,
        0,
        0,
        links,
        0,
        u32::try_from(content.len()).unwrap_or(0),
        0,
        0,
        0,
        0,
        u32::try_from(path.len()).unwrap_or(0) + 1,
        0,
    ];
    archive.extend(b"070701");
    for field in fields {
        archive.extend(format!("{field:08x}").bytes());
    }
    archive.extend(path.bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}
