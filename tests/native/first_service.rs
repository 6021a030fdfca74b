//! The service of docs/first-service.md is complete and valid.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Context, Result, ensure};
use e2e::{Sandbox, text};

const PAGE: &str = include_str!("../../docs/first-service.md");

/// The files of the page: a line "`path`:" and the code block after it.
fn files() -> Result<Vec<(&'static str, &'static str)>> {
    let mut files = Vec::new();
    let mut rest = PAGE;
    while let Some((_, after)) = rest.split_once("\n`hello/") {
        let (name, after) = after.split_once('`').context("the name ends")?;
        rest = after;
        if let Some(block) = after.strip_prefix(":\n\n```") {
            let (_, block) = block.split_once('\n').context("the fence ends")?;
            let end = block.find("```\n").context("the block ends")?;
            files.push((name, &block[..end]));
        }
    }
    Ok(files)
}

#[test]
fn the_service_of_the_documentation_is_valid() -> Result<()> {
    let sandbox = Sandbox::new()?;
    let files = files()?;
    ensure!(files.len() == 5, "{files:?}");
    for (name, contents) in files {
        let path = sandbox.file("hello").join(name);
        fs::create_dir_all(path.parent().context("a file is in a directory")?)?;
        fs::write(&path, contents)?;
        if PAGE.contains(&format!("$ chmod +x hello/{name}\n")) {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
        }
    }
    let service = sandbox.file("hello").display().to_string();
    let output = sandbox.output(&["validate", &service])?;
    ensure!(output.status.success(), "{}", text(&output));
    Ok(())
}
