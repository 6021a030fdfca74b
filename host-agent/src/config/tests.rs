//! Files, precedence and refusals.

use std::fs;

use super::*;

fn of_files(texts: &[&str]) -> Result<Config, ServiceError> {
    let directory = tempfile::tempdir().unwrap();
    let mut usual = vec![directory.path().join("absent.toml")];
    for (number, text) in texts.iter().enumerate() {
        let path = directory.path().join(format!("{number}.toml"));
        fs::write(&path, text).unwrap();
        usual.push(path);
    }
    let places = Places {
        usual,
        ..Places::default()
    };
    Config::of(&places)
}

fn refusal(text: &str) -> (String, String) {
    let error = of_files(&[text]).unwrap_err();
    let hint = error.hint().unwrap_or_default().to_owned();
    let position = error.position().unwrap();
    let line = format!("{}:{}: {}", position.line, position.column, error.what());
    (line, hint)
}

#[test]
fn later_files_win_and_each_value_knows_its_line() {
    let system = "[admission]\novercommit = 4\n[quotas]\nservices = 7\n[ports]\n80 = 8080\n";
    let user = "# mine\n[admission]\n\novercommit = 8\n[ports]\n443 = 8443\n";
    let config = of_files(&[system, user]).unwrap();
    let origin = |key: &str| {
        let entry = config.entries().into_iter().find(|it| it.key == key);
        let entry = entry.unwrap();
        let origin = entry.origin.to_string();
        let file = origin.rsplit('/').next().unwrap().to_owned();
        (entry.value.to_string(), file)
    };
    let expected = |value: &str, origin: &str| (value.to_owned(), origin.to_owned());
    assert_eq!(origin("admission.overcommit"), expected("8", "1.toml:4"));
    assert_eq!(origin("quotas.services"), expected("7", "0.toml:4"));
    assert_eq!(origin("quotas.instances"), expected("null", "default"));
    assert_eq!(origin("ports.80"), expected("8080", "0.toml:6"));
    assert_eq!(origin("ports.443"), expected("8443", "1.toml:6"));
    assert_eq!(config.admission().overcommit, 8);
    assert_eq!(config.rules().ports.len(), 2);
}

#[test]
fn a_size_is_added_and_another_replaced() {
    let text = "[sizes.Tiny]\nvcpus = 1\nmemory_mib = 256\nresource_mib = 8000\n\
                [sizes.Small]\nvcpus = 2\nmemory_mib = 512\nresource_mib = 9000\n";
    let rules = of_files(&[text]).unwrap().rules();
    assert_eq!(rules.sizes.find("Tiny").unwrap().memory_mib, 256);
    // The other name of Small.
    assert_eq!(rules.sizes.find("A1").unwrap().memory_mib, 512);
    assert_eq!(rules.sizes.default_size().vcpus, 2);
}

#[test]
fn what_has_no_effect_or_no_meaning_is_refused_at_its_place() {
    for (text, line, hint) in [
        (
            "[quotas]\nservice = 1",
            "2:1: unknown field `service`",
            "\"services\"",
        ),
        (
            "[quota]\nservices = 1",
            "1:2: unknown field `quota`",
            "\"quotas\"",
        ),
        (
            "[admission]\novercommit = 0",
            "2:14: 0 is not from 1 to 1024",
            "",
        ),
        ("[admission]\novercommit = \"x\"", "2:14: invalid type", ""),
        (
            "[directories]\ndata = \"x\"",
            "2:8: \"x\" is not an absolute path",
            "",
        ),
        (
            "[images]\ndefault = \"../x\"",
            "2:11: \"../x\" is no name of an image",
            "",
        ),
        ("[ports]\n0 = 1", "2:1: 0 is no port", ""),
        ("[ports]\n1 = 70000", "2:5: invalid value", ""),
        (
            "[sizes.A]\nvcpus = 9\nmemory_mib = 256\nresource_mib = 1",
            "2:9: 9 is not",
            "",
        ),
        ("[sizes.A]\nvcpus = 1", "missing field `memory_mib`", ""),
        (
            "[guests]\nheartbeat_limit = \"1d\"",
            "2:19: \"1d\" is no time",
            "",
        ),
        ("[quotas\n", "1:8: ", ""),
    ] {
        let (found, found_hint) = refusal(text);
        assert!(found.contains(line), "{text}: {found}");
        assert!(found_hint.contains(hint), "{text}: {found_hint}");
    }
}

#[test]
fn a_file_that_is_named_must_exist_and_our_variable_wins() {
    let absent = Places {
        named: Some("/nowhere/config.toml".into()),
        ..Places::default()
    };
    assert!(
        Config::of(&absent)
            .unwrap_err()
            .to_string()
            .starts_with("/nowhere/config.toml:")
    );
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("c.toml");
    fs::write(&path, "[directories]\ndata = \"/of/file\"\n").unwrap();
    let mut places = Places {
        named: Some(path),
        ..Places::default()
    };
    let of_file = Config::of(&places).unwrap().data_dir;
    assert_eq!(of_file.value, Path::new("/of/file"));
    places.data_dir = Some("/of/variable".into());
    let of_variable = Config::of(&places).unwrap().data_dir;
    assert_eq!(of_variable.value, Path::new("/of/variable"));
    assert_eq!(of_variable.origin.to_string(), "HOST_AGENT_DATA_DIR");
}

#[test]
fn the_user_has_a_file_below_the_home_directory() {
    let places = |set: &[(&str, &str)]| {
        let variable = |name: &str| {
            let found = set.iter().find(|(known, _)| *known == name);
            found.map(|(_, value)| OsString::from(value))
        };
        Places::of_environment(None, variable)
    };
    let found = places(&[("HOME", "/h"), (FILE_VARIABLE, "/f")]);
    assert_eq!(found.usual[0], Path::new(SYSTEM_FILE));
    assert_eq!(
        found.usual[1],
        Path::new("/h/.config/host-agent/config.toml")
    );
    assert_eq!(found.named.as_deref(), Some(Path::new("/f")));
    let found = places(&[("HOME", "/h"), ("XDG_CONFIG_HOME", "/x")]);
    assert_eq!(found.usual[1], Path::new("/x/host-agent/config.toml"));
}
