//! Landlock: a ruleset that allows nothing.

use landlock::{
    ABI, Access as _, AccessFs, AccessNet, LandlockStatus, Ruleset, RulesetAttr as _, RulesetError,
    RulesetStatus, Scope,
};

/// Forbids every access to files by path, TCP bind and connect, abstract sockets
/// and signals outside of this process, as far as the kernel's Landlock knows them.
/// Descriptors that are open keep their rights.
pub(super) fn apply() -> Result<Option<String>, String> {
    let status = restrict().map_err(|error| error.to_string())?;
    match (status.ruleset, status.landlock) {
        (RulesetStatus::NotEnforced, LandlockStatus::NotEnabled) => {
            Err("not enabled: boot with lsm=landlock,…".into())
        }
        (RulesetStatus::NotEnforced, _) => Err("not in this kernel".into()),
        (
            _,
            LandlockStatus::Available {
                effective_abi,
                kernel_abi,
            },
        ) => {
            let abi = kernel_abi.unwrap_or(effective_abi as i32);
            Ok(Some(format!("ABI {abi}")))
        }
        (_, LandlockStatus::NotEnabled | LandlockStatus::NotImplemented) => Ok(None),
    }
}

fn restrict() -> Result<landlock::RestrictionStatus, RulesetError> {
    // The newest one that this program knows: an older kernel takes what it knows.
    let abi = ABI::V10;
    Ruleset::default()
        .handle_access(AccessFs::from_all(abi))?
        .handle_access(AccessNet::from_all(abi))?
        .scope(Scope::from_all(abi))?
        .create()?
        .restrict_self()
}
