//! First steps of PID 1: kernel file systems, modules, the root file system.

use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::Path;

use nix::kmod::{ModuleInitFlags, finit_module};
use nix::mount::{MsFlags, mount};
use nix::unistd::{chdir, chroot};

/// Where the new root is mounted before it becomes the root.
const NEW_ROOT: &str = "/newroot";
/// Kernel modules in the initial RAM file system, and their order.
const MODULES: &str = "/modules";

/// Public keys of the image, as files `.pub` in the initial RAM file system.
const KEYS: &str = "/agent-keys";
/// Longest text of a key that is read.
const MAX_KEY: u64 = 64 * 1024;

/// File systems in memory that every user can write. The kernel's default of half of the
/// memory for each would allow them all of it together.
const SHARED: &str = "mode=1777,size=20%,nr_inodes=16k";

/// Why the guest cannot boot.
#[derive(Debug, thiserror::Error)]
#[error("cannot {what}")]
pub struct BootError {
    what: String,
    #[source]
    source: io::Error,
}

fn failed(what: impl Into<String>) -> impl FnOnce(nix::Error) -> BootError {
    let what = what.into();
    move |errno| BootError {
        what,
        source: errno.into(),
    }
}

fn io_failed(what: impl Into<String>) -> impl FnOnce(io::Error) -> BootError {
    let what = what.into();
    move |source| BootError { what, source }
}

/// Mounts /proc, /sys, /dev and /run.
pub fn mount_kernel_file_systems() -> Result<(), BootError> {
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC | MsFlags::MS_NODEV;
    for (kind, target, flags, data) in [
        // A user sees its own processes only.
        ("proc", "/proc", safe, Some("hidepid=2")),
        ("sysfs", "/sys", safe, None),
        ("devtmpfs", "/dev", MsFlags::MS_NOSUID, Some("mode=0755")),
        (
            "tmpfs",
            "/run",
            MsFlags::MS_NOSUID | MsFlags::MS_NODEV,
            Some("mode=0755"),
        ),
    ] {
        fs::create_dir_all(target).map_err(io_failed(format!("make {target}")))?;
        match mount(Some(kind), target, Some(kind), flags, data) {
            // A kernel may have mounted /dev by itself.
            Ok(()) | Err(nix::Error::EBUSY) => {}
            Err(errno) => return Err(failed(format!("mount {target}"))(errno)),
        }
    }
    Ok(())
}

/// Makes RCU grace periods short, at the cost of interrupts to the other processors, or
/// normal again. Each move into a control group waits for one, which takes some ticks, and a
/// guest that starts has no work to interrupt.
pub fn expedite_rcu(yes: bool) {
    // Without the file grace periods are of normal length.
    let _ = fs::write("/sys/kernel/rcu_expedited", if yes { "1" } else { "0" });
}

/// Loads every module of the initial RAM file system, in its order.
pub fn load_modules() -> Result<(), BootError> {
    let order = Path::new(MODULES).join("order");
    let names = match fs::read_to_string(&order) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(io_failed(format!("read {}", order.display())))?,
    };
    for name in names.lines().filter(|name| !name.is_empty()) {
        let what = format!("load module {name}");
        let file = File::open(Path::new(MODULES).join(name)).map_err(io_failed(&*what))?;
        match finit_module(&file, c"", ModuleInitFlags::empty()) {
            Ok(()) | Err(nix::Error::EEXIST) => {}
            Err(errno) => return Err(failed(what)(errno)),
        }
    }
    Ok(())
}

/// The texts of the image's public keys. To be called before [`switch_root`].
pub fn image_keys() -> Result<Vec<String>, BootError> {
    let read = |path: &Path| {
        let mut text = String::new();
        File::open(path)?.take(MAX_KEY).read_to_string(&mut text)?;
        Ok(text)
    };
    let entries = match fs::read_dir(KEYS) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(io_failed(format!("list {KEYS}")))?,
    };
    let paths = entries.map(|entry| entry.map(|it| it.path()));
    let paths = paths.collect::<io::Result<Vec<_>>>();
    let mut paths = paths.map_err(io_failed(format!("list {KEYS}")))?;
    paths.retain(|path| path.extension().is_some_and(|it| it == "pub"));
    let texts = paths
        .iter()
        .map(|path| read(path).map_err(io_failed(format!("read {}", path.display()))));
    texts.collect()
}

/// Makes the OS disk the root file system of every thread of this process. Other threads
/// keep finding /proc, /sys, /dev and /run at their paths.
pub fn switch_root(device: &Path) -> Result<(), BootError> {
    fs::create_dir_all(NEW_ROOT).map_err(io_failed("make the mount point of the root"))?;
    mount(
        Some(device),
        NEW_ROOT,
        Some("ext4"),
        MsFlags::MS_NOATIME,
        None::<&str>,
    )
    .map_err(failed(format!("mount {} as root", device.display())))?;
    for dir in ["/proc", "/sys", "/dev", "/run"] {
        let target = format!("{NEW_ROOT}{dir}");
        fs::create_dir_all(&target).map_err(io_failed(format!("make {target}")))?;
        mount(
            Some(dir),
            target.as_str(),
            None::<&str>,
            MsFlags::MS_BIND | MsFlags::MS_REC,
            None::<&str>,
        )
        .map_err(failed(format!("bind {dir}")))?;
    }
    // Frees the memory of files that are not needed any more.
    let _ = fs::remove_dir_all(MODULES);
    let _ = fs::remove_file("/init");
    chdir(NEW_ROOT).map_err(failed("enter the new root"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>)
        .map_err(failed("move the new root"))?;
    chroot(".").map_err(failed("change root"))?;
    chdir("/").map_err(failed("change directory"))?;
    for (kind, target, data) in [
        ("devpts", "/dev/pts", Some("mode=0620,gid=5")),
        ("tmpfs", "/dev/shm", Some(SHARED)),
        ("tmpfs", "/tmp", Some(SHARED)),
        ("cgroup2", "/sys/fs/cgroup", None),
    ] {
        let made = fs::create_dir_all(target);
        let flags = MsFlags::MS_NOSUID;
        if made.is_err() || mount(Some(kind), target, Some(kind), flags, data).is_err() {
            eprintln!("app-agent: cannot mount {target}");
        }
    }
    Ok(())
}
