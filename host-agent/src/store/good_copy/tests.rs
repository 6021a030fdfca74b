//! A store that is damaged in every way, with its good copy beside it.

use super::*;
use crate::digest::Digest;
use crate::store::events::EventFilter;
use crate::store::events::tests::event;
use crate::store::services::{Applied, ServiceStore, Wanted};

/// A closed store with a service, events and a good copy of it; the path of its database.
fn stored(dir: &Path) -> PathBuf {
    let mut store = ServiceStore::open(dir).unwrap();
    let wanted = Wanted {
        package: Digest::of(&b"p"[..]).unwrap().0,
        configuration: "<c/>".into(),
        publish: vec!["8080:http".parse().unwrap()],
    };
    for name in ["shop", "mail"] {
        let applied = store.apply(name, &wanted, 7).unwrap();
        assert!(matches!(applied, Applied::Begun(_)));
    }
    store.deploying("shop", "0123").unwrap();
    store.record(&[event("0123", "A_IN_0", "first")]).unwrap();
    store.database().copier().copy().unwrap();
    dir.join("state/host-agent.db")
}

/// Everything in the store but the events.
fn content(store: &ServiceStore) -> String {
    let services = store.services().unwrap();
    let history = services.iter().map(|it| store.history(&it.name).unwrap());
    let history: Vec<_> = history.collect();
    let operations = services
        .iter()
        .map(|it| store.operations(&it.name).unwrap());
    format!(
        "{services:?} {history:?} {:?}",
        operations.collect::<Vec<_>>()
    )
}

#[test]
fn the_copy_of_a_damaged_store_takes_its_place_and_its_numbers_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = stored(dir.path());
    let store = ServiceStore::open(dir.path()).unwrap();
    let before = content(&store);
    assert_eq!(store.database().restored(), None);
    drop(store);
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let mut store = ServiceStore::open(dir.path()).unwrap();
    assert_eq!(content(&store), before);
    let aside = store.database().restored().unwrap().aside.clone().unwrap();
    assert_eq!(fs::read(aside).unwrap(), &whole[..whole.len() / 2]);
    let number = store.record(&[event("0123", "A_IN_0", "next")]).unwrap();
    assert!(number > 10_000_000, "{number}");
    let all = store.events(Some(1), &EventFilter::default()).unwrap();
    assert_eq!(all.events.len(), 1);
    // Restored is said once.
    drop(store);
    let store = ServiceStore::open(dir.path()).unwrap();
    assert_eq!(store.database().restored(), None);
}

#[test]
fn a_store_that_is_empty_gone_or_behind_its_copy_is_no_new_store() {
    let dir = tempfile::tempdir().unwrap();
    let path = stored(dir.path());
    let before = content(&ServiceStore::open(dir.path()).unwrap());
    let old = fs::read(&path).unwrap();
    let mut store = ServiceStore::open(dir.path()).unwrap();
    store.deploying("mail", "4567").unwrap();
    store.database().copier().copy().unwrap();
    let newer = content(&store);
    assert_ne!(newer, before);
    drop(store);
    let breaks: [(&str, &dyn Fn()); 3] = [
        ("empty", &|| fs::write(&path, b"").unwrap()),
        ("gone", &|| fs::remove_file(&path).unwrap()),
        // What a log with a flipped bit leaves: SQLite drops the commits after it in silence.
        ("has lost changes", &|| fs::write(&path, &old).unwrap()),
    ];
    for (what, break_it) in breaks {
        break_it();
        let store = ServiceStore::open(dir.path()).unwrap();
        assert_eq!(content(&store), newer, "{what}");
        let restored = store.database().restored().unwrap();
        assert!(restored.what.contains(what), "{restored:?}");
    }
}

#[test]
fn no_flipped_byte_makes_a_store_start_empty() {
    let dir = tempfile::tempdir().unwrap();
    let path = stored(dir.path());
    let before = content(&ServiceStore::open(dir.path()).unwrap());
    let copy = fs::read(super::path(&path)).unwrap();
    let whole = fs::read(&path).unwrap();
    let mut restored = 0;
    // A prime step visits every place of a page over the pages.
    for position in (0..whole.len()).step_by(31) {
        let mut flipped = whole.clone();
        flipped[position] ^= 0x55;
        fs::write(&path, &flipped).unwrap();
        fs::write(super::path(&path), &copy).unwrap();
        let store = match ServiceStore::open(dir.path()) {
            // The number of the schema: refused, and left as it is.
            Err(StoreError::Newer { .. }) => continue,
            opened => opened.unwrap(),
        };
        restored += u32::from(store.database().restored().is_some());
        assert_eq!(store.services().unwrap().len(), 2, "byte {position}");
        if store.database().restored().is_some() {
            assert_eq!(content(&store), before, "byte {position}");
        }
        drop(store);
        for entry in fs::read_dir(path.parent().unwrap()).unwrap() {
            let name = entry.unwrap().path();
            if name.to_string_lossy().contains("damaged-") {
                fs::remove_file(name).unwrap();
            }
        }
    }
    assert!(restored > 20, "{restored}");
}

#[test]
fn a_restore_that_is_killed_goes_on_at_the_next_start() {
    let dir = tempfile::tempdir().unwrap();
    let path = stored(dir.path());
    let before = content(&ServiceStore::open(dir.path()).unwrap());
    // The file is put aside, its log is not.
    fs::rename(&path, path.with_extension("damaged-1.db")).unwrap();
    fs::write(with_suffix(&path, "-wal"), b"log of the damaged file").unwrap();
    fs::write(path.with_extension("restore.partial"), b"half").unwrap();
    let store = ServiceStore::open(dir.path()).unwrap();
    assert_eq!(content(&store), before);
    assert!(store.database().restored().is_some());
}

#[test]
fn a_copy_that_is_killed_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let path = stored(dir.path());
    let before = content(&ServiceStore::open(dir.path()).unwrap());
    fs::write(path.with_extension("copy.partial"), b"half").unwrap();
    fs::write(&path, b"damaged").unwrap();
    assert_eq!(content(&ServiceStore::open(dir.path()).unwrap()), before);
}
