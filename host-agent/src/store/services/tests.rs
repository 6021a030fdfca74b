//! Services, revisions and operations over restarts.

use super::*;

fn digest(text: &str) -> Digest {
    Digest::of(text.as_bytes()).unwrap().0
}

fn wanted(package: &str, configuration: &str) -> Wanted {
    Wanted {
        package: digest(package),
        configuration: configuration.into(),
        publish: Vec::new(),
    }
}

fn store(dir: &Path) -> ServiceStore {
    ServiceStore::open(dir).unwrap()
}

#[test]
fn what_was_applied_is_there_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = store(dir.path());
    let ported = Wanted {
        publish: vec!["8080:http".parse().unwrap()],
        ..wanted("p", "<c/>")
    };
    let Applied::Begun(operation) = first.apply("shop", &ported, 7).unwrap() else {
        panic!("not begun");
    };
    first.deploying("shop", "d").unwrap();
    drop(first);
    let mut second = store(dir.path());
    let expected = ServiceRecord {
        name: "shop".into(),
        expected: Expected::Started,
        generation: 1,
        deployment: Some("d".into()),
    };
    assert_eq!(second.services().unwrap(), std::slice::from_ref(&expected));
    let revision = second.revision("shop", 1).unwrap().unwrap();
    assert_eq!((&revision.wanted, revision.user), (&ported, 7));
    assert_eq!(second.history("shop").unwrap(), [revision]);
    assert_eq!(second.operation(&operation.id).unwrap().unwrap(), operation);
    second.end("shop", None).unwrap();
    let ended = second.operation(&operation.id).unwrap().unwrap();
    assert_eq!(ended.state, OperationState::Succeeded);
    assert!(ended.ended_ms >= Some(ended.started_ms));
}

#[test]
fn the_same_apply_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = store(dir.path());
    store.apply("shop", &wanted("p", "<c/>"), 7).unwrap();
    let found = store.service("shop").unwrap().unwrap();
    let again = store.apply("shop", &wanted("p", "<c/>"), 8).unwrap();
    assert_eq!(again, Applied::Unchanged(found.clone()));
    for (package, configuration) in [("q", "<c/>"), ("p", "<d/>")] {
        let other = store
            .apply("shop", &wanted(package, configuration), 7)
            .unwrap();
        assert_eq!(other, Applied::Differs(found.clone()));
    }
    let ported = Wanted {
        publish: vec!["8080:http".parse().unwrap()],
        ..wanted("p", "<c/>")
    };
    let other = store.apply("shop", &ported, 7).unwrap();
    assert_eq!(other, Applied::Differs(found));
    assert_eq!(store.operations("shop").unwrap().len(), 1);
}

#[test]
fn a_deletion_ends_the_apply_and_is_begun_once() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = store(dir.path());
    assert!(store.delete("shop", 7).unwrap().is_none());
    store.apply("shop", &wanted("p", "<c/>"), 7).unwrap();
    let deletion = store.delete("shop", 7).unwrap().unwrap();
    assert_eq!(store.delete("shop", 8).unwrap().unwrap(), deletion);
    let applied = store.apply("shop", &wanted("p", "<c/>"), 7).unwrap();
    assert_eq!(applied, Applied::Deleting);
    let states: Vec<_> = store.operations("shop").unwrap();
    let states: Vec<_> = states.iter().map(|it| (it.kind, it.state)).collect();
    assert_eq!(
        states,
        [
            (OperationKind::Delete, OperationState::Running),
            (OperationKind::Apply, OperationState::Failed),
        ]
    );
    assert_eq!(store.packages().unwrap(), [digest("p")]);
    store.forget("shop").unwrap();
    assert_eq!(store.services().unwrap(), []);
    assert_eq!(store.packages().unwrap(), []);
    let ended = store.operation(&deletion.id).unwrap().unwrap();
    assert_eq!(ended.state, OperationState::Succeeded);
}

#[test]
fn old_operations_are_removed() {
    let dir = tempfile::tempdir().unwrap();
    let mut store = store(dir.path());
    for _ in 0..=MAX_OPERATIONS / 2 {
        store.apply("shop", &wanted("p", "<c/>"), 7).unwrap();
        store.delete("shop", 7).unwrap();
        store.forget("shop").unwrap();
    }
    let kept = store.operations("shop").unwrap().len();
    assert_eq!(kept, MAX_OPERATIONS as usize);
}
