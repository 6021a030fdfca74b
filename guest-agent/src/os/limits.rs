//! Limits of the agents that differ from those of the programs that they start: more open
//! files, and a better score for the OOM killer.

use std::fs;
use std::io;

use nix::sys::resource::{Resource, setrlimit};

/// Files that an agent may have open: each connection of a tunnel takes two.
const FILES: u64 = 65_536;
/// Soft limit of every other program, for those that call `select`.
pub const USUAL_FILES: u64 = 1024;
/// Among the last that the OOM killer ends, but not exempt: then a guest agent that leaks
/// would take all memory of the guest.
const SCORE: &str = "-900";
const SCORE_FILE: &str = "/proc/self/oom_score_adj";

/// Gives this process the limits of an agent.
pub fn raise() -> io::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES)?;
    fs::write(SCORE_FILE, SCORE)
}

/// Whether the OOM killer spares this process longer than others.
pub fn favoured() -> bool {
    fs::read_to_string(SCORE_FILE).is_ok_and(|score| score.starts_with('-'))
}
