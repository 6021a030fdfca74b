//! Turns facts about the host into checks, hints and a verdict. Pure.

use std::path::PathBuf;

use serde::Serialize;

use super::kvm_probe::{KvmFigures, KvmProbe};
use crate::cgroup::{NotEnforced, ParentCgroup};
use crate::vmm::sandbox::{Layer, SandboxReport};

/// Placeholder in a hint's command for the service, which the caller fills in.
pub const SERVICE: &str = "SERVICE";
/// With less free memory even the smallest guest does not start.
const LEAST_MEMORY: u64 = 192 << 20;
/// With less, a guest of the usual sizes does not fit.
const LOW_MEMORY: u64 = 1 << 30;
/// With less free disk space a guest cannot write its first blocks.
const LEAST_DISK: u64 = 64 << 20;
/// With less, a few guests fill the disk.
const LOW_DISK: u64 = 2 << 30;
/// Exit time for which the timeouts are chosen: 1 to 3 us on bare metal.
const EXIT_US_PER_SCALE: f64 = 3.0;
/// Largest factor by measurement: longer timeouts would hide faults.
const MOST_SCALE: u32 = 20;
/// Longest exit time on bare metal.
const BARE_METAL_US: f64 = 4.5;
/// Longest exit time of a hardware-assisted nested hypervisor.
const NESTED_US: f64 = 30.0;

/// Facts about the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// State of `/dev/kvm`.
    pub kvm: KvmFact,
    /// Whether this process is in a container.
    pub container: bool,
    /// The kernel module for this CPU (`kvm_intel`, `kvm_amd`), if it has hardware
    /// virtualization.
    pub module: Option<&'static str>,
    /// The user's name, for the commands in hints.
    pub user: String,
    /// `MemAvailable` in bytes.
    pub memory: u64,
    /// Free bytes of the data directory's file system.
    pub disk: u64,
    /// The data directory.
    pub data_dir: PathBuf,
    /// The parent of guests' cgroups.
    pub cgroup: Result<ParentCgroup, NotEnforced>,
    /// The sandbox of a VMM process, or why it is not known; `None` if it was not asked for.
    pub sandbox: Option<Result<SandboxReport, String>>,
    /// Value of `HOST_AGENT_TIMEOUT_SCALE`.
    pub scale_variable: Option<String>,
}

/// State of `/dev/kvm`.
#[derive(Debug, Clone, PartialEq)]
pub enum KvmFact {
    /// It does not exist.
    Missing,
    /// It cannot be opened: no permission.
    Denied {
        /// Group that owns it.
        group: Option<String>,
        /// Mode bits.
        mode: u32,
    },
    /// It cannot be opened for another reason.
    Failed {
        /// Text of the system's error.
        error: String,
    },
    /// It was opened and probed.
    Opened(KvmProbe),
}

/// Severity of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Level {
    /// No problem.
    Ok,
    /// Guests run, with a drawback.
    Warn,
    /// Guests cannot run.
    Fail,
}

/// One line of the report.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its severity.
    pub level: Level,
    /// What was checked.
    pub name: &'static str,
    /// What was found.
    pub text: String,
    /// The command or change that helps.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// Whether guests can run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    /// Yes.
    Usable,
    /// `/dev/kvm` does not exist.
    NoDevice,
    /// `/dev/kvm` may not be opened.
    NoPermission,
    /// `/dev/kvm` opens but cannot run an unmodified kernel.
    CannotRunKernel,
    /// Not enough memory.
    NoMemory,
    /// Not enough disk space.
    NoDisk,
}

/// The factor of every timeout, and its origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct TimeoutScale {
    /// 1 to 20, or the value that the user set.
    pub factor: u32,
    /// Set by `HOST_AGENT_TIMEOUT_SCALE`, not measured.
    pub from_environment: bool,
}

/// The checks in the order of the report.
pub fn checks(facts: &Facts) -> Vec<Check> {
    let mut checks = kvm_checks(facts);
    checks.push(memory_check(facts.memory));
    checks.push(disk_check(facts));
    checks.push(cgroup_check(&facts.cgroup));
    checks.extend(facts.sandbox.as_ref().map(sandbox_check));
    if let Some(why) = scale_refused(facts) {
        checks.push(Check {
            level: Level::Warn,
            name: "timeouts",
            text: why,
            hint: Some("export HOST_AGENT_TIMEOUT_SCALE=4".into()),
        });
    }
    checks
}

/// Why `HOST_AGENT_TIMEOUT_SCALE` is invalid, if it is.
pub fn scale_refused(facts: &Facts) -> Option<String> {
    let value = facts.scale_variable.as_deref()?;
    parse_scale(value)
        .is_none()
        .then(|| format!("HOST_AGENT_TIMEOUT_SCALE={value} is not a whole number from 1 to 1000"))
}

/// The first problem that keeps guests from running.
pub fn verdict(facts: &Facts) -> Verdict {
    match &facts.kvm {
        KvmFact::Missing => Verdict::NoDevice,
        KvmFact::Denied { .. } => Verdict::NoPermission,
        KvmFact::Failed { .. } => Verdict::CannotRunKernel,
        KvmFact::Opened(KvmProbe::Ran(_)) if facts.memory < LEAST_MEMORY => Verdict::NoMemory,
        KvmFact::Opened(KvmProbe::Ran(_)) if facts.disk < LEAST_DISK => Verdict::NoDisk,
        KvmFact::Opened(KvmProbe::Ran(_)) => Verdict::Usable,
        KvmFact::Opened(_) => Verdict::CannotRunKernel,
    }
}

/// The factor for timeouts.
pub fn timeout_scale(facts: &Facts) -> TimeoutScale {
    if let Some(factor) = facts.scale_variable.as_deref().and_then(parse_scale) {
        return TimeoutScale {
            factor,
            from_environment: true,
        };
    }
    let factor = match &facts.kvm {
        KvmFact::Opened(KvmProbe::Ran(measured)) => scale_of(measured.exit_us),
        _ => 1,
    };
    TimeoutScale {
        factor,
        from_environment: false,
    }
}

/// The factor for an exit that takes `exit_us`.
fn scale_of(exit_us: f64) -> u32 {
    if exit_us <= BARE_METAL_US {
        return 1;
    }
    // The cast saturates, also for infinity.
    ((exit_us / EXIT_US_PER_SCALE).round() as u32).clamp(1, MOST_SCALE)
}

fn parse_scale(value: &str) -> Option<u32> {
    value.trim().parse().ok().filter(|n| (1..=1000).contains(n))
}

/// The kind of host, judged by its exit time.
pub fn kind_of_host(measured: &KvmFigures) -> &'static str {
    if measured.exit_us <= BARE_METAL_US {
        "bare metal"
    } else if measured.exit_us <= NESTED_US {
        "nested"
    } else {
        "emulated or heavily loaded"
    }
}

fn kvm_checks(facts: &Facts) -> Vec<Check> {
    let check = |level, name, text: String, hint: Option<String>| Check {
        level,
        name,
        text,
        hint,
    };
    match &facts.kvm {
        KvmFact::Missing => vec![check(
            Level::Fail,
            "kvm",
            "/dev/kvm does not exist".into(),
            Some(missing_hint(facts)),
        )],
        KvmFact::Denied { group, mode } => vec![check(
            Level::Fail,
            "kvm",
            format!(
                "/dev/kvm exists, but {} may not open it (group {}, mode {:04o})",
                facts.user,
                group.as_deref().unwrap_or("unknown"),
                mode & 0o7777
            ),
            Some(denied_hint(facts, group.as_deref(), *mode)),
        )],
        KvmFact::Failed { error } => vec![check(
            Level::Fail,
            "kvm",
            format!("/dev/kvm cannot be opened: {error}"),
            Some("dmesg | grep -i kvm".into()),
        )],
        KvmFact::Opened(KvmProbe::Ran(measured)) => {
            let scale = timeout_scale(facts);
            let text = format!(
                "64-bit guest ran; {:.1} us per exit: {} (timeouts x{}{})",
                measured.exit_us,
                kind_of_host(measured),
                scale.factor,
                if scale.from_environment {
                    ", set by HOST_AGENT_TIMEOUT_SCALE"
                } else {
                    ""
                }
            );
            let opens = "/dev/kvm opens read-write, API 12".into();
            vec![
                check(Level::Ok, "kvm", opens, None),
                check(Level::Ok, "vm probe", text, None),
            ]
        }
        KvmFact::Opened(probe) => {
            let why = match probe {
                KvmProbe::Lacking { what } => format!("it lacks {what}"),
                KvmProbe::Stopped { at, how } => format!("guest stopped at {at} ({how})"),
                KvmProbe::Hung | KvmProbe::Ran(_) => "guest did not stop within 2 s".into(),
            };
            let text = format!("present, but cannot run an unmodified kernel: {why}");
            let hint = Some(unusable_hint(facts));
            vec![
                check(Level::Ok, "kvm", "/dev/kvm opens read-write".into(), None),
                check(Level::Fail, "vm probe", text, hint),
            ]
        }
    }
}

fn missing_hint(facts: &Facts) -> String {
    match (facts.container, facts.module) {
        (true, _) => "start the container with --device /dev/kvm".into(),
        (false, Some(module)) => format!("sudo modprobe {module}"),
        (false, None) => "turn on virtualization (VT-x, AMD-V) in the firmware, or nested \
                          virtualization in the hypervisor that runs this machine"
            .into(),
    }
}

fn denied_hint(facts: &Facts, group: Option<&str>, mode: u32) -> String {
    if facts.container {
        return "start the container with --device /dev/kvm, and --group-add with the \
                device's group when it does not run as root"
            .into();
    }
    match group {
        // Membership of group root would grant far more than this device.
        Some(group) if mode & 0o060 == 0o060 && group != "root" => format!(
            "sudo usermod -aG {group} {}   (then log in again)",
            facts.user
        ),
        _ => "echo 'KERNEL==\"kvm\", GROUP=\"kvm\", MODE=\"0666\"' | \
              sudo tee /etc/udev/rules.d/99-kvm.rules && sudo udevadm control --reload && \
              sudo udevadm trigger --name-match=kvm"
            .into(),
    }
}

fn unusable_hint(facts: &Facts) -> String {
    let machine = if facts.container {
        "container"
    } else {
        "machine"
    };
    format!(
        "use a {machine} with hardware virtualization; where tests may be skipped: \
         host-agent test {SERVICE} --on-no-kvm skip"
    )
}

fn memory_check(bytes: u64) -> Check {
    let (level, hint) = if bytes < LEAST_MEMORY {
        (Level::Fail, Some("free memory: ps aux --sort -rss | head"))
    } else if bytes < LOW_MEMORY {
        (
            Level::Warn,
            Some("use vmsize=\"ExtraSmall\", or free memory"),
        )
    } else {
        (Level::Ok, None)
    };
    Check {
        level,
        name: "memory",
        text: format!("{} free", iec(bytes)),
        hint: hint.map(Into::into),
    }
}

fn disk_check(facts: &Facts) -> Check {
    let level = if facts.disk < LEAST_DISK {
        Level::Fail
    } else if facts.disk < LOW_DISK {
        Level::Warn
    } else {
        Level::Ok
    };
    Check {
        level,
        name: "disk",
        text: format!("{} free in {}", iec(facts.disk), facts.data_dir.display()),
        hint: (level != Level::Ok)
            .then(|| "export HOST_AGENT_DATA_DIR=/directory/with/more/space".into()),
    }
}

fn cgroup_check(parent: &Result<ParentCgroup, NotEnforced>) -> Check {
    let (level, text, hint) = match parent {
        Ok(parent) => (
            Level::Ok,
            format!("v2: limits of guests are set in {}", parent.path.display()),
            None,
        ),
        Err(why) => (
            Level::Warn,
            format!("memory limit of guests is not enforced: {}", why.reason),
            Some(why.hint.clone()),
        ),
    };
    Check {
        level,
        name: "cgroup",
        text,
        hint,
    }
}

/// The check of the sandbox of VMM processes.
pub fn sandbox_check(sandbox: &Result<SandboxReport, String>) -> Check {
    let missing = |layer| {
        let report = sandbox.as_ref();
        report.is_ok_and(|report| report.missing().any(|state| state.layer == layer))
    };
    let (level, text) = match sandbox {
        Ok(report) if report.is_complete() => (Level::Ok, report.to_string()),
        Ok(report) => (Level::Warn, report.to_string()),
        Err(why) => (Level::Warn, format!("not known: {why}")),
    };
    let hint = if missing(Layer::Namespaces) {
        Some(
            "sysctl user.max_user_namespaces kernel.unprivileged_userns_clone \
             kernel.apparmor_restrict_unprivileged_userns   (shows what forbids namespaces)",
        )
    } else if missing(Layer::Landlock) {
        Some("boot with lsm=landlock and the names in /sys/kernel/security/lsm")
    } else {
        None
    };
    Check {
        level,
        name: "sandbox",
        text,
        hint: hint.map(Into::into),
    }
}

/// A size in IEC units.
pub fn iec(bytes: u64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(kvm: KvmFact) -> Facts {
        Facts {
            kvm,
            container: false,
            module: Some("kvm_amd"),
            user: "ada".into(),
            memory: 8 << 30,
            disk: 80 << 30,
            data_dir: "/home/ada/.local/share/host-agent".into(),
            cgroup: Err(NotEnforced {
                reason: "cgroup / has no controller memory".into(),
                hint: "boot with cgroup v2".into(),
            }),
            sandbox: None,
            scale_variable: None,
        }
    }

    fn ran(exit_us: f64) -> KvmFact {
        KvmFact::Opened(KvmProbe::Ran(KvmFigures {
            exit_us,
            loop_mips: 900.0,
        }))
    }

    #[test]
    fn each_kvm_state_has_a_verdict_and_a_hint() {
        let denied = |group: &str, mode| KvmFact::Denied {
            group: Some(group.into()),
            mode,
        };
        let stopped = KvmFact::Opened(KvmProbe::Stopped {
            at: "INT3",
            how: "KVM_EXIT_INTERNAL_ERROR".into(),
        });
        let cases = [
            (KvmFact::Missing, Verdict::NoDevice, "modprobe kvm_amd"),
            (
                denied("kvm", 0o660),
                Verdict::NoPermission,
                "usermod -aG kvm ada",
            ),
            (
                denied("root", 0o600),
                Verdict::NoPermission,
                "/etc/udev/rules.d",
            ),
            (denied("root", 0o660), Verdict::NoPermission, "udev"),
            (stopped, Verdict::CannotRunKernel, "hardware virtualization"),
            (
                KvmFact::Opened(KvmProbe::Hung),
                Verdict::CannotRunKernel,
                "skip",
            ),
        ];
        for (kvm, expected, hint) in cases {
            let facts = facts(kvm);
            assert_eq!(verdict(&facts), expected);
            let failed: Vec<_> = checks(&facts)
                .into_iter()
                .filter(|check| check.level == Level::Fail)
                .collect();
            assert_eq!(failed.len(), 1, "{failed:?}");
            let given = failed[0].hint.as_deref().unwrap_or_default();
            assert!(given.contains(hint), "{given}");
        }
        assert_eq!(verdict(&facts(ran(2.0))), Verdict::Usable);
    }

    #[test]
    fn a_lack_of_disk_or_memory_makes_a_host_unusable() {
        let mut host = facts(ran(2.0));
        host.disk = 1 << 20;
        assert_eq!(verdict(&host), Verdict::NoDisk);
        host.memory = 1 << 20;
        assert_eq!(verdict(&host), Verdict::NoMemory);
    }

    #[test]
    fn a_missing_layer_of_the_sandbox_is_a_warning_with_a_hint() {
        let report = |json: &str| Ok(serde_json::from_str(json).unwrap());
        let complete = r#"[{"layer":"landlock","missing":null,"detail":"ABI 7"}]"#;
        let check = sandbox_check(&report(complete));
        assert_eq!((check.level, check.hint), (Level::Ok, None));
        let missing = r#"[{"layer":"namespaces","missing":"unshare: EPERM","detail":null}]"#;
        let check = sandbox_check(&report(missing));
        assert_eq!(check.level, Level::Warn);
        assert!(check.text.contains("unshare: EPERM"), "{}", check.text);
        assert!(check.hint.unwrap().contains("max_user_namespaces"));
        let check = sandbox_check(&Err("no memory".into()));
        assert_eq!(check.level, Level::Warn);
        assert!(check.text.contains("no memory"), "{}", check.text);
    }

    #[test]
    fn timeouts_follow_the_exit_time_or_the_users_setting() {
        let scale = |us| timeout_scale(&facts(ran(us))).factor;
        assert_eq!([scale(0.9), scale(2.3), scale(4.4)], [1, 1, 1]);
        assert_eq!(scale(11.8), 4);
        assert_eq!([scale(1e3), scale(f64::INFINITY)], [MOST_SCALE; 2]);
        let mut host = facts(ran(11.8));
        host.scale_variable = Some("7".into());
        let set = timeout_scale(&host);
        assert!(set.from_environment && set.factor == 7);
        host.scale_variable = Some("fast".into());
        assert_eq!(timeout_scale(&host).factor, 4);
        assert!(checks(&host).iter().any(|check| check.name == "timeouts"));
        host.scale_variable = Some("1.5".into());
        let why = "HOST_AGENT_TIMEOUT_SCALE=1.5 is not a whole number from 1 to 1000";
        assert_eq!(scale_refused(&host).as_deref(), Some(why));
    }

    #[test]
    fn sizes_are_printed_in_iec_units() {
        assert_eq!(iec(0), "0 B");
        assert_eq!(iec(1023), "1023 B");
        assert_eq!(iec(1536), "1.5 KiB");
        assert_eq!(iec(80 << 30), "80.0 GiB");
        assert_eq!(iec(u64::MAX), "16384.0 PiB");
    }
}
