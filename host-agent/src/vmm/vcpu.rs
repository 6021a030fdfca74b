//! The vCPU threads: run the guest, handle exits, pause and stop.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::eventfd::EventFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::bus::{Action, Bus};
use super::control::ExitReason;
use super::sandbox::{self, ThreadClass};
use super::vcpu_pause::VcpuPause;

/// Limit for a vCPU to leave the guest after a kick, in [`KickTimeout`]'s text too.
const KICK_LIMIT: Duration = Duration::from_secs(5);
/// Time between two kicks. A signal that arrives just before `KVM_RUN` does not
/// interrupt it, so one kick is not enough.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// A report of a vCPU to the main thread.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VcpuReport {
    /// The machine ended.
    Exit(ExitReason),
    /// The guest's kernel panicked.
    Panicked,
}

/// The vCPUs of a guest.
#[derive(Debug)]
pub struct Vcpus {
    shared: Arc<VcpuShared>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct VcpuShared {
    pause: VcpuPause,
    exits: Vec<AtomicU64>,
}

/// vCPUs did not leave the guest in time.
#[derive(Debug, thiserror::Error)]
#[error("{running} of {all} vCPUs did not leave the guest within 5 s")]
pub struct KickTimeout {
    running: usize,
    all: usize,
}

impl Vcpus {
    /// Starts a thread for each vCPU, which waits for [`Vcpus::resume`]. A thread
    /// sends its reports to `reports` and then signals `wake`.
    pub fn start(
        vcpus: Vec<VcpuFd>,
        bus: &Arc<Bus>,
        reports: &mpsc::Sender<VcpuReport>,
        wake: &EventFd,
    ) -> io::Result<Self> {
        extern "C" fn interrupted(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
        register_signal_handler(SIGRTMIN(), interrupted)
            .map_err(|error| io::Error::from_raw_os_error(error.errno()))?;
        let shared = Arc::new(VcpuShared {
            pause: VcpuPause::paused_at_start(),
            exits: vcpus.iter().map(|_| AtomicU64::new(0)).collect(),
        });
        let mut threads = Vec::new();
        for (id, vcpu) in vcpus.into_iter().enumerate() {
            let (shared, bus) = (Arc::clone(&shared), Arc::clone(bus));
            let (reports, wake) = (reports.clone(), wake.try_clone()?);
            let work = move || {
                let report = |report| {
                    // Fails only while the process ends.
                    let _ = reports.send(report);
                    let _ = wake.write(1);
                };
                if let Some(reason) = run(id, vcpu, &shared, &bus, &report) {
                    report(VcpuReport::Exit(reason));
                }
            };
            let name = format!("vcpu-{id}");
            threads.push(sandbox::spawn(ThreadClass::Vcpu, &name, work)?);
        }
        Ok(Self { shared, threads })
    }

    /// Takes every vCPU out of the guest until [`Vcpus::resume`].
    pub fn pause(&self) -> Result<(), KickTimeout> {
        self.shared.pause.pause();
        self.kick_until(|ended| self.shared.pause.paused() + ended)
    }

    /// Whether every vCPU is out of the guest, after [`Vcpus::pause`].
    pub fn is_paused(&self) -> bool {
        self.running(|ended| self.shared.pause.paused() + ended) == 0
    }

    /// Lets the vCPUs run, at first or again.
    pub fn resume(&self) {
        self.shared.pause.resume();
    }

    /// Exits of each vCPU that this process handled.
    pub fn exits(&self) -> Vec<u64> {
        let load = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        self.shared.exits.iter().map(load).collect()
    }

    /// Ends every thread.
    pub fn stop(&self) -> Result<(), KickTimeout> {
        self.shared.pause.stop();
        self.kick_until(|ended| ended)
    }

    /// vCPUs that `outside`, given the number of ended threads, does not count.
    fn running(&self, outside: impl Fn(usize) -> usize) -> usize {
        let ended = self.threads.iter().filter(|t| t.is_finished()).count();
        self.threads.len().saturating_sub(outside(ended))
    }

    /// Kicks the vCPUs until `outside`, given the number of ended threads, counts
    /// all of them as outside the guest.
    fn kick_until(&self, outside: impl Fn(usize) -> usize) -> Result<(), KickTimeout> {
        let all = self.threads.len();
        let deadline = Instant::now() + KICK_LIMIT;
        loop {
            let running = self.running(&outside);
            if running == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(KickTimeout { running, all });
            }
            for thread in self.threads.iter().filter(|t| !t.is_finished()) {
                // Fails only for a thread that has just ended.
                let _ = thread.kill(SIGRTMIN());
            }
            std::thread::sleep(KICK_INTERVAL);
        }
    }
}

/// Runs one vCPU. Returns the reason if the vCPU ended the machine.
fn run(
    id: usize,
    mut vcpu: VcpuFd,
    shared: &VcpuShared,
    bus: &Bus,
    report: &impl Fn(VcpuReport),
) -> Option<ExitReason> {
    loop {
        let enter = shared.pause.enter(|| {
            // Sets the pause flag of kvmclock, so that the guest's watchdogs do not
            // take the pause for a hang (`KVM_KVMCLOCK_CTRL`). Fails if the guest does
            // not use kvmclock.
            let _ = vcpu.kvmclock_ctrl();
        });
        if !enter {
            return None;
        }
        let exit = vcpu.run();
        shared.exits[id].fetch_add(1, Ordering::Relaxed);
        match exit {
            Ok(VcpuExit::IoIn(port, data)) => bus.port_in(port, data),
            Ok(VcpuExit::IoOut(port, data)) => match bus.port_out(port, data) {
                Action::None => {}
                Action::PowerOff => return Some(ExitReason::PowerOff),
                Action::Reset if bus.panicked() => return Some(ExitReason::Panic),
                Action::Reset => return Some(ExitReason::Reboot),
                Action::Panicked => report(VcpuReport::Panicked),
            },
            Ok(VcpuExit::MmioRead(address, data)) => bus.mmio_read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => bus.mmio_write(address, data),
            Ok(VcpuExit::Shutdown) => return Some(ExitReason::TripleFault),
            Ok(VcpuExit::Hlt | VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
            Ok(other) => {
                let detail = format!("vCPU {id}: KVM exit {other:?}");
                return Some(ExitReason::Failed { detail });
            }
            Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(error) => {
                let detail = format!("vCPU {id}: KVM_RUN: {error}");
                return Some(ExitReason::Failed { detail });
            }
        }
    }
}
