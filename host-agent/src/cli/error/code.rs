//! The numbers of errors.

use crate::cli::exit::Exit;

/// A class of error. Its number is stable: scripts and people look it up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Code {
    /// No other class fits.
    Unclassified,
    /// The command line or an environment variable is not valid.
    Usage,
    /// Definition, configuration or package refused.
    Service,
    /// Definition, configuration or package cannot be read.
    ServiceFile,
    /// A report, a package or standard output cannot be written.
    Output,
    /// There is no `/dev/kvm`.
    NoKvm,
    /// `/dev/kvm` may not be opened.
    KvmDenied,
    /// `/dev/kvm` cannot run an unmodified kernel.
    KvmUnusable,
    /// Not enough memory or disk.
    HostFull,
    /// `--require-sandbox`: a layer is missing.
    Sandbox,
    /// The guest image does not exist.
    ImageMissing,
    /// The guest image does not match its manifest.
    ImageDamaged,
    /// A public port is in use.
    PortInUse,
    /// The deployment could not be started.
    Start,
    /// A guest did not boot.
    Boot,
    /// A time limit passed.
    Timeout,
    /// A role failed or keeps exiting.
    Role,
    /// A probe failed.
    Probe,
    /// The service did not stop cleanly.
    Unclean,
    /// No running instance has that name.
    NoInstance,
    /// Several running instances have that name.
    Ambiguous,
    /// The host agent or an agent in the guest does not answer.
    Unreachable,
    /// The directory with the sockets of running deployments cannot be used.
    RuntimeDirectory,
    /// The request contradicts what exists.
    Conflict,
    /// No `host-agent serve` runs.
    NotServing,
    /// An operation of a service failed.
    Operation,
    /// The store of services cannot be used.
    Store,
    /// An update failed and was rolled back.
    RolledBack,
    /// An update is halted.
    Halted,
    /// A file of the configuration is refused.
    Configuration,
    /// A guest-agent package or its signature is not valid, or not trusted.
    AgentRefused,
    /// A guest agent is older than what is offered, or nobody is trusted to sign.
    AgentConflict,
    /// A guest-agent package, its signature or program cannot be read.
    AgentFile,
    /// No such guest agent was published.
    NoAgent,
    /// The client may not do it.
    Forbidden,
    /// `exec`: the host side failed.
    ExecHost,
    /// `exec`: the program could not be started in the guest.
    ExecGuest,
    /// `cp`: files could not be copied.
    Copy,
    /// `image build`, `image import`: the builder failed.
    ImageBuild,
    /// `image import`: the file is not a root file system or an archive of layers.
    ImageImport,
    /// `explain`: there is no such number.
    NoSuchError,
    /// `serve --page`: the address cannot be used.
    Page,
    /// Ended by a signal.
    Interrupted,
}

impl Code {
    /// Every code.
    #[cfg(test)]
    const ALL: [Self; 43] = [
        Self::Unclassified,
        Self::Usage,
        Self::Service,
        Self::ServiceFile,
        Self::Output,
        Self::NoKvm,
        Self::KvmDenied,
        Self::KvmUnusable,
        Self::HostFull,
        Self::Sandbox,
        Self::ImageMissing,
        Self::ImageDamaged,
        Self::PortInUse,
        Self::Start,
        Self::Boot,
        Self::Timeout,
        Self::Role,
        Self::Probe,
        Self::Unclean,
        Self::NoInstance,
        Self::Ambiguous,
        Self::Unreachable,
        Self::RuntimeDirectory,
        Self::Conflict,
        Self::NotServing,
        Self::Operation,
        Self::Store,
        Self::RolledBack,
        Self::Halted,
        Self::Configuration,
        Self::AgentRefused,
        Self::AgentConflict,
        Self::AgentFile,
        Self::NoAgent,
        Self::Forbidden,
        Self::ExecHost,
        Self::ExecGuest,
        Self::Copy,
        Self::ImageBuild,
        Self::ImageImport,
        Self::NoSuchError,
        Self::Page,
        Self::Interrupted,
    ];

    /// The number, and the exit code unless the error has its own.
    pub(super) const fn row(self) -> (u16, Exit) {
        match self {
            Self::Unclassified => (1, Exit::Unclassified),
            Self::Usage => (2, Exit::Usage),
            Self::Interrupted => (3, Exit::Signal(2)),
            Self::Service => (101, Exit::Invalid),
            Self::ServiceFile => (102, Exit::NotFound),
            Self::Output => (103, Exit::Unclassified),
            Self::NoKvm => (201, Exit::Host),
            Self::KvmDenied => (202, Exit::Permission),
            Self::KvmUnusable => (203, Exit::Host),
            Self::HostFull => (204, Exit::Host),
            Self::ImageMissing => (205, Exit::NotFound),
            Self::ImageDamaged => (206, Exit::Invalid),
            Self::PortInUse => (207, Exit::Conflict),
            Self::Start => (208, Exit::Unclassified),
            Self::Sandbox => (209, Exit::Host),
            Self::Boot => (301, Exit::Boot),
            Self::Timeout => (302, Exit::Timeout),
            Self::Role => (401, Exit::Role),
            Self::Probe => (402, Exit::Role),
            Self::Unclean => (403, Exit::Role),
            Self::Operation => (404, Exit::Role),
            Self::NoInstance => (501, Exit::NotFound),
            Self::Ambiguous => (502, Exit::Conflict),
            Self::Unreachable => (503, Exit::Unreachable),
            Self::ExecHost => (504, Exit::ExecHost),
            Self::ExecGuest => (505, Exit::Guest(127)),
            Self::RuntimeDirectory => (506, Exit::Permission),
            Self::Conflict => (507, Exit::Conflict),
            Self::NotServing => (508, Exit::Unreachable),
            Self::Store => (509, Exit::Unclassified),
            Self::RolledBack => (515, Exit::RolledBack),
            Self::Halted => (516, Exit::Halted),
            Self::Configuration => (520, Exit::Invalid),
            Self::Copy => (530, Exit::Unclassified),
            Self::ImageBuild => (532, Exit::Unclassified),
            Self::ImageImport => (533, Exit::Invalid),
            Self::Forbidden => (522, Exit::Permission),
            Self::NoSuchError => (531, Exit::NotFound),
            Self::Page => (545, Exit::Conflict),
            Self::AgentRefused => (540, Exit::Invalid),
            Self::AgentConflict => (541, Exit::Conflict),
            Self::AgentFile => (542, Exit::NotFound),
            Self::NoAgent => (543, Exit::NotFound),
        }
    }

    /// `HA-nnnn`.
    pub fn name(self) -> String {
        format!("HA-{:04}", self.row().0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn error_numbers_are_unique_and_no_exit_code_is_zero() {
        let mut numbers: Vec<u16> = Code::ALL.iter().map(|code| code.row().0).collect();
        numbers.sort_unstable();
        let count = numbers.len();
        numbers.dedup();
        assert_eq!(numbers.len(), count);
        assert!(Code::ALL.iter().all(|code| code.row().1.code() != 0));
    }

    #[test]
    fn the_manual_lists_every_error_with_its_exit_code() {
        let manual = include_str!("../../../../docs/errors.md");
        let listed: Vec<(&str, &str)> = manual
            .lines()
            .filter_map(|line| {
                let mut cells = line.strip_prefix("| ")?.split(" | ");
                let name = cells.next().filter(|name| name.starts_with("HA-"))?;
                Some((name, cells.next()?))
            })
            .collect();
        let mut codes: Vec<_> = Code::ALL.iter().map(|code| code.row()).collect();
        codes.sort_by_key(|(number, _)| *number);
        let codes: Vec<_> = codes
            .into_iter()
            .map(|(number, exit)| (format!("HA-{number:04}"), exit.code().to_string()))
            .collect();
        let codes: Vec<_> = codes
            .iter()
            .map(|(a, b)| (a.as_str(), b.as_str()))
            .collect();
        assert_eq!(listed, codes);
    }
}
