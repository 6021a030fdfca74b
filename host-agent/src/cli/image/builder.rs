//! Runs the script that builds images.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::cli::deploy::builder_program;
use crate::cli::error::{CliError, Code};

/// Builds image `name` in `data_dir`. The script shows its steps on standard error. A signal of
/// the terminal reaches it too.
pub fn run(data_dir: &Path, name: &str, options: &[String]) -> Result<(), CliError> {
    let failed = |what: &str| {
        CliError::new(
            Code::ImageBuild,
            format!("image {name} was not built: {what}"),
        )
    };
    let Some(program) = builder_program() else {
        return Err(failed("the script that builds images is not installed")
            .hint("scripts/install   (in the source of this program)"));
    };
    let status = Command::new(&program)
        .arg(name)
        .args(options)
        .arg("--out")
        .arg(data_dir.join("images"))
        .stdin(Stdio::null())
        // Standard output is for the answer.
        .stdout(Stdio::null())
        .status()
        .map_err(|error| {
            failed(&format!("{} cannot be started", program.display())).cause(error.to_string())
        })?;
    if status.success() {
        return Ok(());
    }
    Err(
        failed(&format!("{} ended with {status}", program.display()))
            .hint("VERBOSE=1 shows the output of each step"),
    )
}
