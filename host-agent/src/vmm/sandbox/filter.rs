//! The seccomp filter of a thread.
//!
//! A filter kills the process at a system call that its table lacks. It can be
//! neither removed nor relaxed; a thread that is created inherits it.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::rules::{Allowed, Argument, ThreadClass};

/// A filter cannot be installed.
#[derive(Debug, thiserror::Error)]
pub enum FilterError {
    /// It cannot be compiled.
    #[error("compile a seccomp filter")]
    Compile(#[from] BackendError),
    /// The kernel refuses it.
    #[error("install a seccomp filter")]
    Install(#[from] seccompiler::Error),
}

impl From<FilterError> for io::Error {
    fn from(error: FilterError) -> Self {
        Self::other(error)
    }
}

/// A compiled filter.
#[derive(Debug, Clone)]
pub struct Filter(BpfProgram);

impl Filter {
    /// The filter of a class.
    pub fn of(class: ThreadClass) -> Result<Self, FilterError> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for allowed in class.allowed() {
            let alternatives = rules.entry(allowed.call).or_default();
            if !allowed.when.is_empty() {
                alternatives.push(rule(allowed)?);
            }
        }
        let filter = SeccompFilter::new(
            rules,
            SeccompAction::KillProcess,
            SeccompAction::Allow,
            TargetArch::x86_64,
        )?;
        Ok(Self(filter.try_into()?))
    }

    /// Installs the filter in the calling thread.
    pub fn install(&self) -> Result<(), FilterError> {
        Ok(seccompiler::apply_filter(&self.0)?)
    }
}

fn rule(allowed: &Allowed) -> Result<SeccompRule, BackendError> {
    let conditions = allowed.when.iter().map(|argument| {
        let (index, operator, value) = match *argument {
            Argument::Is(index, value) => (index, SeccompCmpOp::Eq, value),
            Argument::Has(index, bits) => (index, SeccompCmpOp::MaskedEq(bits), bits),
            Argument::Lacks(index, bits) => (index, SeccompCmpOp::MaskedEq(bits), 0),
            Argument::OwnProcess(index) => (index, SeccompCmpOp::Eq, u64::from(std::process::id())),
        };
        // The kernel takes each of these arguments as 32 bits, or tests low bits.
        SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value)
    });
    SeccompRule::new(conditions.collect::<Result<_, _>>()?)
}

/// Whether this kernel has filters that kill a process (Linux 4.14).
pub(super) fn available() -> Result<(), String> {
    let action = libc::SECCOMP_RET_KILL_PROCESS;
    // SAFETY: the kernel reads one action from the pointer, which is valid for the
    // call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_GET_ACTION_AVAIL,
            0,
            &raw const action,
        )
    };
    match result {
        0 => Ok(()),
        _ => Err(format!("seccomp: {}", io::Error::last_os_error())),
    }
}
