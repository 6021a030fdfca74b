//! What the agents have more of than the programs that they start: open files,
//! and time until the kernel ends them for want of memory.

use std::fs;
use std::io;

use nix::sys::resource::{Resource, setrlimit};

/// Files that an agent may have open: each connection of a tunnel takes two.
const FILES: u64 = 65_536;
/// Soft limit of every other program, for those that call `select`.
pub const USUAL_FILES: u64 = 1024;
/// Among the last to be ended, and still before the guest has no memory at all.
const SCORE: &str = "-900";
const SCORE_FILE: &str = "/proc/self/oom_score_adj";

/// Gives this process an agent's share.
pub fn raise() -> io::Result<()> {
    setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES)?;
    fs::write(SCORE_FILE, SCORE)
}

/// Whether this process has more time than others until the kernel ends it.
pub fn favoured() -> bool {
    fs::read_to_string(SCORE_FILE).is_ok_and(|score| score.starts_with('-'))
}
