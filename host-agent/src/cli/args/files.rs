//! Arguments of the verbs for files.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

/// `pack`.
#[derive(Debug, Clone, Args)]
pub struct PackArgs {
    /// Directory with a .csdef and a directory of files per role
    pub dir: PathBuf,
    /// The package to write
    #[arg(short, long, value_name = "F.cspkg")]
    pub output: PathBuf,
}

/// `validate`.
#[derive(Debug, Clone, Args)]
pub struct ValidateArgs {
    /// Service directories, .csdef, .cscfg, .cspkg
    #[arg(required = true, value_name = "F")]
    pub files: Vec<PathBuf>,
    /// Configuration, when it is not beside the service
    #[arg(long, value_name = "F.cscfg")]
    pub config: Option<PathBuf>,
}

/// `completion`.
#[derive(Debug, Clone, Args)]
pub struct CompletionArgs {
    /// The shell
    pub shell: Shell,
}

/// Shells with a completion script.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Shell {
    /// Bash.
    Bash,
    /// Zsh.
    Zsh,
    /// Fish.
    Fish,
}
