//! docs/security.md names tests that exist, and every class of bugs once.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

const PAGE: &str = include_str!("../../docs/security.md");
/// Begins the cell of a row without tests.
const WITHOUT_TESTS: [&str; 2] = ["does not apply: ", "no test yet: "];

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// Adds every Rust file below `directory`.
fn find_sources(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory).with_context(|| directory.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            find_sources(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// Names of the tests in a file: functions after an attribute `test`.
fn tests_of(source: &str) -> Vec<String> {
    let mut names = Vec::new();
    let mut is_test = false;
    for line in source.lines().map(str::trim) {
        let function = line.strip_prefix("async ").unwrap_or(line);
        if line.starts_with("#[test]") || line.starts_with("#[tokio::test") {
            is_test = true;
        } else if let Some(rest) = function.strip_prefix("fn ") {
            if std::mem::take(&mut is_test) {
                let end = rest.find('(').unwrap_or(rest.len());
                names.push(rest[..end].to_owned());
            }
        } else if !line.starts_with("#[") {
            is_test = false;
        }
    }
    names
}

/// Every test of the source tree as `::crate::module::test`, without the parts `src`,
/// `mod` and, of unit tests, `tests`.
fn all_tests() -> Result<Vec<String>> {
    let root = root();
    let mut tests = Vec::new();
    for part in ["vmbus/src", "host-agent/src", "guest-agent/src", "tests"] {
        let mut files = Vec::new();
        find_sources(&root.join(part), &mut files)?;
        for file in files {
            let module = file.strip_prefix(&root)?.with_extension("");
            let parts = module.iter().filter_map(|part| part.to_str());
            let parts: Vec<_> = parts
                .filter(|part| !["src", "mod", "tests"].contains(part))
                .collect();
            let source = fs::read_to_string(&file)?;
            tests.extend(
                tests_of(&source)
                    .iter()
                    .map(|name| format!("::{}::{name}", parts.join("::"))),
            );
        }
    }
    Ok(tests)
}

/// The code spans of `text` that name a test.
fn named_tests(text: &str) -> impl Iterator<Item = &str> {
    let spans = text.split('`').skip(1).step_by(2);
    spans.filter(|span| span.contains("::") && !span.contains("module::test"))
}

#[test]
fn every_named_test_exists() -> Result<()> {
    let tests = all_tests()?;
    ensure!(tests.len() > 500, "{} tests", tests.len());
    let mut wrong = Vec::new();
    for named in named_tests(PAGE) {
        let suffix = format!("::{named}");
        let found: Vec<_> = tests
            .iter()
            .filter(|test| test.ends_with(&suffix))
            .collect();
        if found.len() != 1 {
            wrong.push(format!("{named}: {found:?}"));
        }
    }
    ensure!(
        wrong.is_empty(),
        "not exactly one test:\n{}",
        wrong.join("\n")
    );
    Ok(())
}

#[test]
fn every_class_of_bugs_has_a_test_or_a_reason() -> Result<()> {
    let rows = PAGE.lines().filter_map(|line| {
        let cells: Vec<_> = line.strip_prefix("| ")?.split(" | ").collect();
        Some((cells.first()?.parse::<u32>().ok()?, cells))
    });
    let mut numbers = Vec::new();
    for (number, cells) in rows {
        numbers.push(number);
        ensure!(cells.len() == 3, "row {number}: {} cells", cells.len());
        let tested = named_tests(cells[2]).next().is_some();
        let reason = WITHOUT_TESTS.iter().any(|word| cells[2].starts_with(word));
        ensure!(tested != reason, "row {number}: {}", cells[2]);
    }
    ensure!(numbers.into_iter().eq(1..=64), "rows 1 to 64, in order");
    Ok(())
}
