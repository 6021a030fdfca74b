//! Limits of a service as a whole: what its guests expand.

use std::fs;

use super::load_tests::service_directory;
use super::{ServiceError, load};
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
