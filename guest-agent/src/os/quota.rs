//! Project quotas of ext4: a directory tree with a limit of its own.
#![allow(unsafe_code)]

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// `FS_IOC_FSGETXATTR` and `FS_IOC_FSSETXATTR` (Linux `include/uapi/linux/fs.h`).
const GET_ATTRIBUTES: libc::c_ulong = 0x801c_581f;
const SET_ATTRIBUTES: libc::c_ulong = 0x401c_5820;
/// `FS_XFLAG_PROJINHERIT`: new files belong to the directory's project.
const INHERIT: u32 = 0x200;
/// `QCMD(Q_SETQUOTA, PRJQUOTA)` (Linux `include/uapi/linux/quota.h`).
const SET_PROJECT_QUOTA: libc::c_int = (0x80_0008 << 8) | 2;
/// `QIF_BLIMITS` and `QIF_ILIMITS`: the limits of blocks and of inodes are valid.
const LIMITS: u32 = 1 | 4;
/// Inodes of the resource disk for each MiB: one for 16 KiB.
const INODES_PER_MIB: u64 = 64;
/// Least limit of inodes, for small directories of small files.
const LEAST_INODES: u64 = 8192;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Default)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

/// Makes `directory` the root of `project`.
pub fn set_project(directory: &Path, project: u32) -> io::Result<()> {
    let directory = File::open(directory)?;
    let mut attributes = Attributes::default();
    // SAFETY: the kernel writes one `fsxattr`, whose layout `Attributes` has.
    let result = unsafe { libc::ioctl(directory.as_raw_fd(), GET_ATTRIBUTES, &raw mut attributes) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    attributes.project = project;
    attributes.flags |= INHERIT;
    // SAFETY: the kernel reads one `fsxattr`, whose layout `Attributes` has.
    let result =
        unsafe { libc::ioctl(directory.as_raw_fd(), SET_ATTRIBUTES, &raw const attributes) };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Inodes of a directory of `mib` MiB: its share of the disk.
const fn inodes(mib: u64) -> u64 {
    let share = mib.saturating_mul(INODES_PER_MIB);
    if share > LEAST_INODES {
        share
    } else {
        LEAST_INODES
    }
}

/// Limits `project` on the file system of `device` to `mib` MiB and their share of inodes.
pub fn limit(device: &Path, project: u32, mib: u64) -> io::Result<()> {
    let device = CString::new(device.as_os_str().as_bytes())?;
    // SAFETY: `dqblk` is plain data for which all zeros is a value.
    let mut quota: libc::dqblk = unsafe { std::mem::zeroed() };
    // In units of 1 KiB.
    quota.dqb_bhardlimit = mib.saturating_mul(1024);
    quota.dqb_bsoftlimit = quota.dqb_bhardlimit;
    quota.dqb_ihardlimit = inodes(mib);
    quota.dqb_isoftlimit = quota.dqb_ihardlimit;
    quota.dqb_valid = LIMITS;
    // SAFETY: the path ends with a NUL and the kernel reads one `dqblk`; both
    // live through the call.
    let result = unsafe {
        libc::quotactl(
            SET_PROJECT_QUOTA,
            device.as_ptr(),
            libc::c_int::try_from(project).unwrap_or(libc::c_int::MAX),
            (&raw mut quota).cast(),
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inodes_are_shared_like_the_space_of_the_disk() {
        assert_eq!(inodes(1), LEAST_INODES);
        assert_eq!(inodes(13_336), 13_336 * 64);
        assert_eq!(inodes(u64::MAX), u64::MAX);
    }
}
