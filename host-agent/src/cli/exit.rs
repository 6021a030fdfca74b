//! The exit codes of the command, which scripts rely on.

use std::process::ExitCode;

/// How a command ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// 0: success.
    Success,
    /// 1: unclassified failure; a bug if common.
    Unclassified,
    /// 2: usage.
    Usage,
    /// 3: definition, configuration or package invalid.
    Invalid,
    /// 4: not found.
    NotFound,
    /// 5: conflict: in use, already exists, ambiguous.
    Conflict,
    /// 6: this host cannot run guests (KVM, memory, disk).
    Host,
    /// 7: timeout.
    Timeout,
    /// 8: guest boot failed (panic, no agent).
    Boot,
    /// 9: role unhealthy, or a probe failed.
    Role,
    /// 10: agent or engine unreachable.
    Unreachable,
    /// 11: permission denied.
    Permission,
    /// 12: an update failed and was rolled back.
    RolledBack,
    /// 13: an update is halted and needs a decision.
    Halted,
    /// 77: skipped (no KVM and `--on-no-kvm=skip`).
    Skipped,
    /// 125: `exec`: the host side failed.
    ExecHost,
    /// `exec`: the program's own exit code.
    Guest(u8),
    /// 128+n: ended by signal n, ours or the guest's.
    Signal(u8),
}

impl Exit {
    /// The number.
    pub const fn code(self) -> u8 {
        match self {
            Self::Success => 0,
            Self::Unclassified => 1,
            Self::Usage => 2,
            Self::Invalid => 3,
            Self::NotFound => 4,
            Self::Conflict => 5,
            Self::Host => 6,
            Self::Timeout => 7,
            Self::Boot => 8,
            Self::Role => 9,
            Self::Unreachable => 10,
            Self::Permission => 11,
            Self::RolledBack => 12,
            Self::Halted => 13,
            Self::Skipped => 77,
            Self::ExecHost => 125,
            Self::Guest(code) => code,
            Self::Signal(number) => 128_u8.saturating_add(number),
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_published_numbers_do_not_change() {
        use Exit::*;
        let table = [
            (Success, 0),
            (Unclassified, 1),
            (Usage, 2),
            (Invalid, 3),
            (NotFound, 4),
            (Conflict, 5),
            (Host, 6),
            (Timeout, 7),
            (Boot, 8),
            (Role, 9),
            (Unreachable, 10),
            (Permission, 11),
            (RolledBack, 12),
            (Halted, 13),
            (Skipped, 77),
            (ExecHost, 125),
            (Guest(126), 126),
            (Signal(2), 130),
            (Signal(15), 143),
        ];
        for (exit, code) in table {
            assert_eq!(exit.code(), code, "{exit:?}");
        }
        assert_eq!(Signal(255).code(), 255);
    }
}
