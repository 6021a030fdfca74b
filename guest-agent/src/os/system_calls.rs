//! System calls that a role without privileges is denied, by seccomp(2). A denied call fails
//! with an error; the filter stays in force for all that the role starts.
//!
//! Only the system calls of the machine's own architecture are filtered, and the kernel kills a
//! 32-bit program (SIGSYS): its numbers are others, and `socketcall` hides the arguments.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch,
};

/// `FS_IOC_FSSETXATTR` sets the quota project of a file; `FS_IOC_SETFLAGS` and its 32-bit form
/// take the flag from a directory by which new files inherit the project (Linux
/// `include/uapi/linux/fs.h`). The owner of a file may do both.
const SET_PROJECT: [u64; 3] = [0x401c_5820, 0x4008_6602, 0x4004_6602];
/// `file_setattr`, since Linux 6.17, does the same as `FS_IOC_FSSETXATTR`.
const FILE_SETATTR: i64 = 469;

/// The filters of a role, to be installed between fork and exec.
#[derive(Debug, Clone)]
pub struct Filters([BpfProgram; 2]);

impl Filters {
    /// Compiles them.
    pub fn new() -> io::Result<Self> {
        let socket = [(libc::SYS_socket, rules(0, &[libc::AF_VSOCK as u64])?)];
        let ioctl = rules(1, &SET_PROJECT)?;
        let rest = [
            (libc::SYS_ioctl, ioctl),
            (FILE_SETATTR, Vec::new()),
            // A ring could make the socket.
            (libc::SYS_io_uring_setup, Vec::new()),
        ];
        Ok(Self([
            filter(socket.into(), libc::EAFNOSUPPORT)?,
            filter(rest.into(), libc::EPERM)?,
        ]))
    }

    /// Installs the filters for this thread and all that it starts, which also get no new
    /// privileges from now on. Allocates nothing.
    pub fn install(&self) -> io::Result<()> {
        for program in &self.0 {
            seccompiler::apply_filter(program).map_err(|error| match error {
                seccompiler::Error::Prctl(error) | seccompiler::Error::Seccomp(error) => error,
                _ => io::ErrorKind::InvalidInput.into(),
            })?;
        }
        Ok(())
    }
}

/// Rules that match calls whose argument `index`, of 32 bits, has one of these values.
fn rules(index: u8, values: &[u64]) -> io::Result<Vec<SeccompRule>> {
    let rule = |value: &u64| {
        let equal = SeccompCmpOp::Eq;
        let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, equal, *value)?;
        SeccompRule::new(vec![condition])
    };
    let rules: Result<_, seccompiler::BackendError> = values.iter().map(rule).collect();
    rules.map_err(io::Error::other)
}

/// Fails calls that match with `errno`; a call without rules always matches.
fn filter(calls: BTreeMap<i64, Vec<SeccompRule>>, errno: i32) -> io::Result<BpfProgram> {
    let architecture = TargetArch::try_from(std::env::consts::ARCH).map_err(io::Error::other)?;
    let denied = SeccompAction::Errno(errno as u32);
    let filter = SeccompFilter::new(calls, SeccompAction::Allow, denied, architecture);
    let filter = filter.map_err(io::Error::other)?;
    BpfProgram::try_from(filter).map_err(io::Error::other)
}
