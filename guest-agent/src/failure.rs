//! Which failures can pass while the guest runs, and which cannot. Pure.

use std::io;

/// Errors of `execve` and of the look at the program before it that stay what they are:
/// the role's files are read-only.
const PROGRAM: &[i32] = &[
    libc::ENOENT,
    libc::ENOTDIR,
    libc::EISDIR,
    libc::EACCES,
    libc::ENOEXEC,
    libc::ELIBBAD,
    libc::ELOOP,
    libc::ENAMETOOLONG,
    libc::E2BIG,
];

/// Errors of mounts and quotas that say that the kernel or the disk cannot do what is
/// asked, however often.
const SETUP: &[i32] = &[
    libc::EINVAL,
    libc::ENODEV,
    libc::ENOTTY,
    libc::ENOSYS,
    libc::EOPNOTSUPP,
    libc::EUCLEAN,
];

/// A failed step on the way to a goal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// What failed and why, for people.
    pub detail: String,
    /// Another attempt in this boot would fail too.
    pub permanent: bool,
}

impl Failure {
    /// A failure that may pass.
    pub const fn passing(detail: String) -> Self {
        Self {
            detail,
            permanent: false,
        }
    }

    /// A failure that stays.
    pub const fn permanent(detail: String) -> Self {
        Self {
            detail,
            permanent: true,
        }
    }

    /// The role's program could not be started because of `error`.
    pub fn of_program(detail: String, error: &io::Error) -> Self {
        // The standard library refuses a zero byte in an argument itself.
        let permanent = error.kind() == io::ErrorKind::InvalidInput || is_one_of(error, PROGRAM);
        Self { detail, permanent }
    }

    /// The guest could not be set up because of `error`.
    pub fn of_setup(detail: String, error: &io::Error) -> Self {
        Self {
            detail,
            permanent: is_one_of(error, SETUP),
        }
    }
}

fn is_one_of(error: &io::Error, errors: &[i32]) -> bool {
    error
        .raw_os_error()
        .is_some_and(|number| errors.contains(&number))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_failures_that_cannot_pass_are_permanent() {
        let program = |errno| {
            let error = io::Error::from_raw_os_error(errno);
            Failure::of_program(String::new(), &error).permanent
        };
        assert!(program(libc::ENOENT) && program(libc::ENOEXEC) && program(libc::EACCES));
        for errno in [
            libc::EAGAIN,
            libc::ENOMEM,
            libc::EMFILE,
            libc::ETXTBSY,
            libc::EIO,
        ] {
            assert!(!program(errno), "{errno}");
        }
        let setup = |errno| {
            let error = io::Error::from_raw_os_error(errno);
            Failure::of_setup(String::new(), &error).permanent
        };
        assert!(setup(libc::EINVAL) && setup(libc::ENODEV));
        for errno in [
            libc::EBUSY,
            libc::EDQUOT,
            libc::ENOSPC,
            libc::ENOMEM,
            libc::ENOENT,
        ] {
            assert!(!setup(errno), "{errno}");
        }
        let zero_byte = io::Error::from(io::ErrorKind::InvalidInput);
        assert!(Failure::of_program(String::new(), &zero_byte).permanent);
    }
}
