//! Processor time, memory and descriptors of a process, from `/proc` (proc(5)). Blocks.

use std::fs;

use nix::unistd::{SysconfVar, sysconf};

/// Figures of a process.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct ProcessSample {
    /// Seconds of processor time in user and kernel mode.
    pub(crate) cpu_seconds: f64,
    /// Resident memory.
    pub(crate) resident_bytes: u64,
    /// Open descriptors; only known of the own process.
    pub(crate) open_fds: Option<u64>,
}

/// The figures of process `pid`; `None` if it is gone.
pub(crate) fn read(pid: u32) -> Option<ProcessSample> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let unit = |name| sysconf(name).ok().flatten()?.try_into().ok();
    let mut sample = parse(
        &stat,
        unit(SysconfVar::CLK_TCK)?,
        unit(SysconfVar::PAGE_SIZE)?,
    )?;
    if pid == std::process::id() {
        let entries = fs::read_dir("/proc/self/fd").ok()?;
        // The descriptor of this listing is one of them.
        sample.open_fds = Some((entries.count() as u64).saturating_sub(1));
    }
    Some(sample)
}

/// Reads `/proc/PID/stat`. The name of the program, field 2, may contain spaces and
/// parentheses; the fields follow its last one.
fn parse(stat: &str, ticks_per_second: u64, page: u64) -> Option<ProcessSample> {
    let (_, fields) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = fields.split_whitespace().collect();
    // The first one is field 3.
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    let (utime, stime, rss) = (field(14)?, field(15)?, field(24)?);
    Some(ProcessSample {
        cpu_seconds: utime.checked_add(stime)? as f64 / ticks_per_second as f64,
        resident_bytes: rss.checked_mul(page)?,
        open_fds: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_name_does_not_shift_the_fields() {
        let stat = "7 (a) 1 (b) S 1 2 3 4 5 6 7 8 9 10 250 150 0 0 20 0 1 0 99 4096 3 18446744073709551615";
        let sample = parse(stat, 100, 4096).unwrap();
        assert!((sample.cpu_seconds - 4.0).abs() < f64::EPSILON);
        assert_eq!(sample.resident_bytes, 3 * 4096);
        assert_eq!(parse("7 (a", 100, 4096), None);
        assert_eq!(parse("7 (a) S 1", 100, 4096), None);
    }

    #[test]
    fn this_process_has_memory_and_descriptors() {
        let sample = read(std::process::id()).unwrap();
        assert!(sample.resident_bytes > 1 << 20, "{sample:?}");
        assert!(sample.open_fds.unwrap() >= 3, "{sample:?}");
        assert_eq!(read(u32::MAX), None);
    }
}
