//! Limits of a service as a whole: what its guests expand, and what its files add up to.

use std::fs::{self, File};
use std::path::Path;

use super::archive::MAX_PARTS;
use super::archive_writer::{ArchiveWriter, is_limit};
use super::load_tests::service_directory;
use super::payload::{MAX_FILES, MAX_PATHS, MAX_UNPACKED, Total, check_path};
use super::xml;
use super::{ServiceError, load, pack};
use crate::progress::Progress;

/// Loads the service of [`service_directory`] with the pairs replaced in its definition and
/// its configuration.
fn loaded(pairs: &[(&str, &str)]) -> Result<(), ServiceError> {
    let directory = service_directory();
    for name in ["ServiceDefinition.csdef", "ServiceConfiguration.cscfg"] {
        let file = directory.path().join(name);
        let mut text = fs::read_to_string(&file).unwrap();
        for (old, new) in pairs {
            text = text.replacen(old, new, 1);
        }
        fs::write(file, text).unwrap();
    }
    load(directory.path(), None, &Progress::default()).map(|_| ())
}

#[test]
fn values_are_bounded_as_the_guest_expands_them() {
    let variables = |count: usize| -> String {
        let variable = |n| {
            format!(
                "<Variable name=\"V{n}\"><RoleInstanceValue xpath=\"/RoleEnvironment/\
                 CurrentInstance/ConfigurationSettings/ConfigurationSetting[@name='Greeting']\
                 /@value\"/></Variable>"
            )
        };
        (0..count).map(variable).collect()
    };
    let load = |count, length| {
        let environment = format!("<Environment>{}", variables(count));
        let value = format!("value=\"{}\"", "x".repeat(length));
        loaded(&[("<Environment>", &environment), ("value=\"hello\"", &value)])
    };
    load(10, 100_000).unwrap();
    let error = load(11, 100_000).unwrap_err();
    assert!(error.what().contains("cannot be started"), "{error}");
    assert!(error.what().contains("the limit is 1048576"), "{error}");
    assert!(error.hint().is_some());
    let error = load(5_500, 10_000).unwrap_err();
    assert!(error.what().contains("the limit is 1048576"), "{error}");
    // Longer than one variable may be.
    let error = load(1, 131_072).unwrap_err();
    assert!(error.what().contains("variable \"V0\""), "{error}");
    load(0, 131_072).unwrap();
}

#[test]
fn arguments_that_execve_refuses_are_refused_at_their_line() {
    let load = |argument: String| loaded(&[("--flag", &argument)]);
    load("x".repeat(131_071)).unwrap();
    let error = load("x".repeat(131_072)).unwrap_err();
    assert!(
        error.what().contains("argument 1 of the command line"),
        "{error}"
    );
    assert!(error.snippet().unwrap().contains("ProgramEntryPoint"));
    load("x ".repeat(90_000)).unwrap();
    let error = load("x ".repeat(110_000)).unwrap_err();
    assert!(error.what().contains("the limit is 1048576"), "{error}");
}

#[test]
fn the_definitions_of_all_instances_are_bounded() {
    let load = |count: u32| {
        let value = format!("value=\"{}\"", "x".repeat(100_000));
        let count = format!("count=\"{count}\"");
        loaded(&[("value=\"hello\"", &value), ("count=\"3\"", &count)])
    };
    load(600).unwrap();
    let error = load(700).unwrap_err();
    assert!(error.what().contains("the limit is 67108864"), "{error}");
}

#[test]
fn files_of_all_roles_count_together() {
    let mut total = Total::default();
    total.add("a", MAX_UNPACKED).unwrap();
    let error = total.add("b", 1).unwrap_err();
    assert!(
        error.contains("larger than 2147483648 bytes together"),
        "{error}"
    );

    let mut total = Total::default();
    for _ in 0..MAX_FILES {
        total.add("a", 0).unwrap();
    }
    assert!(
        total
            .add("b", 0)
            .unwrap_err()
            .contains("more than 50000 files")
    );

    let mut total = Total::default();
    let path = "p".repeat(4000);
    check_path(&path).unwrap();
    for _ in 0..MAX_PATHS / 4000 {
        total.add(&path, 0).unwrap();
    }
    assert!(
        total
            .add(&path, 0)
            .unwrap_err()
            .contains("more than 16777216 bytes")
    );
    assert!(
        check_path(&format!("{path}p"))
            .unwrap_err()
            .contains("longer than 4000")
    );

    // Each role is within the limit.
    let directory = service_directory();
    for role in ["Cart", "Mail"] {
        let file = File::create(directory.path().join(role).join("big")).unwrap();
        file.set_len(MAX_UNPACKED / 2).unwrap();
    }
    let out = directory.path().join("a.cspkg");
    for error in [
        load(directory.path(), None, &Progress::default()).unwrap_err(),
        pack(directory.path(), &out, &Progress::default()).unwrap_err(),
    ] {
        assert!(
            error
                .to_string()
                .contains("/Mail: the files of the roles are larger"),
            "{error}"
        );
    }
}

#[test]
fn attributes_and_namespaces_are_counted_before_parsing() {
    let file = Path::new("S.csdef");
    let parse = |text: &str| match xml::parse_written(file, text) {
        Ok(_) => String::new(),
        Err(error) => error.to_string(),
    };
    let attributes = |count| (0..count).map(|n| format!(" a{n}=''")).collect::<String>();
    let namespaces = |count| {
        let one = |n| format!(" xmlns:n{n}='u{n}'");
        (0..count).map(one).collect::<String>()
    };
    assert_eq!(parse(&format!("<a{}/>", attributes(64))), "");
    let error = parse(&format!("<a>\n<b{}></b></a>", attributes(65)));
    assert_eq!(error, "S.csdef:2:1: more than 64 attributes on an element");
    // Of nested elements together, and again after their end.
    let inside = format!("<b{}/>", namespaces(24));
    let pair = |outer| format!("<a{}>{inside}{inside}</a>", namespaces(outer));
    assert_eq!(parse(&pair(40)), "");
    assert!(parse(&pair(41)).contains("more than 64 namespace declarations"));
    // The parser would need seconds for each.
    for tag in [attributes(116_000), namespaces(60_000)] {
        assert!(parse(&format!("<a{tag}/>")).contains("more than 64 attributes"));
    }
    let error = parse(&format!("<a>{}</a>", "<b/>".repeat(120_000)));
    assert_eq!(
        error,
        "S.csdef: holds more than 120000 elements, texts and comments"
    );
}

#[test]
fn the_writer_of_packages_names_the_limit() {
    let file = tempfile::tempfile().unwrap();
    let mut writer = ArchiveWriter::new(file, (33, 0));
    for n in 0..MAX_PARTS {
        writer.add(&n.to_string(), || Ok(&[][..])).unwrap();
    }
    let error = writer.add("more", || Ok(&[][..])).unwrap_err();
    assert!(is_limit(&error));
    assert_eq!(error.to_string(), "the package would exceed 51000 parts");
    let of_the_system = std::io::Error::from_raw_os_error(libc::EFBIG);
    assert!(!is_limit(&of_the_system));
}
