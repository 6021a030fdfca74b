//! Number of cases of property tests.

use proptest::test_runner::Config;

/// `PROPTEST_CASES` cases, or `default` if the variable is not set.
pub(crate) fn cases(default: u32) -> Config {
    match std::env::var_os("PROPTEST_CASES") {
        Some(_) => Config::default(),
        None => Config::with_cases(default),
    }
}
