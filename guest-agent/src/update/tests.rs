//! Updates over real files, without a bus.

use std::fs;
use std::io::Write as _;

use minisign::KeyPair;
use vmbus::agent_package::head;
use vmbus::agent_signature::TrustedKeys;

use super::*;

struct Guest {
    dir: tempfile::TempDir,
    keys: KeyPair,
}

fn program(text: &str) -> Vec<u8> {
    let mut program = b"\x7fELF\x02\x01\x01".to_vec();
    program.resize(18, 0);
    program.extend([62, 0]);
    program.extend(text.bytes());
    program
}

impl Guest {
    fn new() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            keys: KeyPair::generate_unencrypted_keypair().unwrap(),
        }
    }

    fn files(&self) -> AgentFiles {
        AgentFiles::new(self.dir.path().join("agents"))
    }

    fn boot(&self) -> Updates {
        let image = self.dir.path().join("image");
        Updates::open(self.files(), "1.0.0".parse().unwrap(), image).0
    }

    fn package(version: &str) -> Vec<u8> {
        let program = program(version);
        let mut package = head(version.parse().unwrap(), program.len() as u64);
        package.extend(program);
        package
    }

    fn try_install(&self, package: &[u8], signed: &[u8]) -> Result<Installed, FilesError> {
        use sha2::{Digest as _, Sha256};
        let signature = minisign::sign(None, &self.keys.sk, signed, None, None).unwrap();
        let digest: String = Sha256::digest(package)
            .iter()
            .map(|it| format!("{it:02x}"))
            .collect();
        let mut file = self.files().begin(&digest).unwrap();
        file.write_all(package).unwrap();
        let trusted = self.keys.pk.to_box().unwrap().into_string();
        let trusted = TrustedKeys::parse(&[trusted]).unwrap();
        let signature = signature.into_string();
        self.files().install(file, &digest, &signature, &trusted)
    }

    fn install(&self, updates: &Updates, version: &str) -> Installed {
        let package = Self::package(version);
        let installed = self.try_install(&package, &package).unwrap();
        let of_slots = installed.clone();
        updates.change(|slots| slots.install(of_slots)).unwrap();
        installed
    }
}

fn runs(updates: &Updates) -> String {
    let bytes = fs::read(updates.next().program).unwrap_or_default();
    String::from_utf8_lossy(bytes.get(20..).unwrap_or(b"image")).into_owned()
}

#[test]
fn what_is_installed_and_bad_survives_a_reboot() {
    let guest = Guest::new();
    let updates = guest.boot();
    assert_eq!(runs(&updates), "image");
    guest.install(&updates, "2.0.0");
    updates.confirm();
    let bad = guest.install(&updates, "3.0.0");
    assert_eq!(runs(&updates), "3.0.0");
    assert!(updates.failed(Failure::Hung, "hung"));
    let updates = guest.boot();
    assert_eq!(runs(&updates), "2.0.0");
    let versions = updates.versions();
    assert_eq!(versions.version, "2.0.0");
    assert_eq!(versions.bad.len(), 1);
    assert_eq!(
        (&versions.bad[0].sha256, &*versions.bad[0].reason),
        (&bad.sha256, "hung")
    );
    assert!(!guest.dir.path().join("agents").join(&bad.sha256).exists());
}

#[test]
fn three_starts_over_boots_are_enough_for_a_version_that_takes_its_guest_along() {
    let guest = Guest::new();
    guest.install(&guest.boot(), "2.0.0");
    for _ in 0..3 {
        assert_eq!(runs(&guest.boot()), "2.0.0");
    }
    let updates = guest.boot();
    assert_eq!(runs(&updates), "image");
    assert_eq!(updates.versions().bad.len(), 1);
}

#[test]
fn a_version_that_ends_gets_three_starts_and_one_that_hangs_gets_one() {
    let guest = Guest::new();
    let updates = guest.boot();
    guest.install(&updates, "2.0.0");
    let mut starts = 0;
    while runs(&updates) == "2.0.0" {
        starts += 1;
        updates.failed(Failure::Once, "ended");
    }
    assert_eq!(starts, 3);
    guest.install(&updates, "2.0.1");
    assert_eq!(runs(&updates), "2.0.1");
    assert!(updates.failed(Failure::Hung, "hung"));
    // One that has proven itself is started again, until it ends again and again.
    guest.install(&updates, "2.0.2");
    updates.confirm();
    assert!(!updates.failed(Failure::Hung, "hung") && !updates.failed(Failure::Once, "ended"));
    assert!(updates.failed(Failure::Again, "ended"));
    assert_eq!(runs(&updates), "image");
}

#[test]
fn a_refused_package_leaves_nothing() {
    let guest = Guest::new();
    let package = Guest::package("2.0.0");
    let torn = guest.try_install(&package[..package.len() - 1], &package);
    assert!(matches!(torn, Err(FilesError::Refused(_))), "{torn:?}");
    let mut changed = package.clone();
    *changed.last_mut().unwrap() ^= 1;
    let changed = guest.try_install(&changed, &package);
    assert!(
        matches!(changed, Err(FilesError::Refused(_))),
        "{changed:?}"
    );
    assert_eq!(
        fs::read_dir(guest.dir.path().join("agents"))
            .unwrap()
            .count(),
        0
    );
}

#[test]
fn an_installed_program_that_was_changed_is_not_started() {
    use std::os::unix::fs::PermissionsExt as _;
    let guest = Guest::new();
    let updates = guest.boot();
    guest.install(&updates, "2.0.0");
    let path = updates.next().program;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
    fs::write(&path, program("other")).unwrap();
    assert_eq!(runs(&updates), "image");
    assert!(updates.versions().bad[0].reason.contains("changed"));
}

#[test]
fn a_damaged_state_starts_the_image_and_forgets_no_bad_version() {
    let guest = Guest::new();
    let updates = guest.boot();
    guest.install(&updates, "2.0.0");
    let state = guest.dir.path().join("agents/state.json");
    fs::write(&state, b"{").unwrap();
    let updates = guest.boot();
    assert_eq!(runs(&updates), "image");
    assert!(updates.change(|_| ()).is_none());
    assert_eq!(fs::read(&state).unwrap(), b"{");
}
