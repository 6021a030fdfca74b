//! An instance whose file system hangs.

use std::cell::RefCell;
use std::fs::File;
use std::os::fd::AsRawFd as _;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::*;
use crate::supervisor::process::Expected;
use crate::supervisor::process::tests::outliving;

/// Mounts a file system that answers no call over `dir`, for this thread and those that it
/// starts. Every call waits until the returned file is closed.
fn hang(dir: &Path) -> File {
    let mut options = OpenOptions::new();
    let fuse = options.read(true).write(true).open("/dev/fuse").unwrap();
    let options = format!(
        "fd={},rootmode=40000,user_id=0,group_id=0",
        fuse.as_raw_fd()
    );
    let options = Some(options.as_str());
    mount(Some("hangs"), dir, Some("fuse"), MsFlags::empty(), options).unwrap();
    fuse
}

/// Runs `test` on a thread that has its own mounts. Does nothing where this process may not make
/// them, or not open `device`, which takes root.
pub(in super::super) fn with_own_mounts(device: &str, test: impl FnOnce() + Send) {
    let device = OpenOptions::new().read(true).write(true).open(device);
    let run = || {
        if device.is_err() || unshare(CloneFlags::CLONE_NEWNS).is_err() {
            return;
        }
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        test();
    };
    thread::scope(|scope| scope.spawn(run).join().unwrap());
}

#[test]
fn a_file_system_that_hangs_delays_no_task() {
    with_own_mounts("/dev/fuse", || {
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_all().build().unwrap();
        runtime.block_on(run_on_hanging_file_system());
    });
}

/// Lets an instance do in its directory whatever it does there without a guest.
async fn run_on_hanging_file_system() {
    let fuse: Arc<Mutex<Option<File>>> = Arc::default();
    let (steps, is_done) = (
        Arc::new(AtomicU64::new(0)),
        Arc::new(AtomicBool::new(false)),
    );
    let of_task = Arc::clone(&steps);
    tokio::spawn(async move {
        loop {
            of_task.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    // Ends the hang at the end, or if it reaches the runtime's thread.
    let (of_watch, of_task, of_test) = (fuse.clone(), steps.clone(), is_done.clone());
    let watch = thread::spawn(move || {
        let mut stalled = 0;
        while !of_test.load(Ordering::Relaxed) && stalled < 50 {
            let before = of_task.load(Ordering::Relaxed);
            thread::sleep(Duration::from_millis(100));
            let stands = of_task.load(Ordering::Relaxed) == before;
            stalled = if stands { stalled + 1 } else { 0 };
        }
        of_watch.lock().unwrap().take();
        stalled == 50
    });
    struct EndHang(Arc<AtomicBool>);
    impl Drop for EndHang {
        fn drop(&mut self) {
            self.0.store(true, Ordering::Relaxed);
        }
    }
    let end_hang = EndHang(is_done);

    let (ours, theirs) = wire::pair().unwrap();
    let dir: RefCell<PathBuf> = RefCell::default();
    let mut pid = 0;
    let mut started = started_as(
        HeartbeatRule::DEFAULT,
        true,
        |path| *dir.borrow_mut() = path.to_owned(),
        |prepared| {
            *fuse.lock().unwrap() = Some(hang(&dir.borrow()));
            let process = outliving(ours, &dir.borrow());
            pid = process.pid();
            adopting(prepared, process, Attached::default())
        },
    );
    // The free bytes are measured, the claim is checked, space is reserved.
    wire::send(theirs.as_fd(), &no_space(), &[]).unwrap();
    started
        .event(|kind| matches!(kind, EventKind::NoSpace { .. }))
        .await;
    let expected = Expected {
        name: "Cache_IN_0".into(),
        generation: 1,
        process: None,
    };
    let dir = dir.into_inner();
    let attach = VmmProcess::attach(&dir, &expected);
    let limit = Duration::from_millis(500);
    assert!(tokio::time::timeout(limit, attach).await.is_err());
    // The exit file is read, and the next boot recorded and prepared.
    kill(Pid::from_raw(pid.cast_signed()), Signal::SIGKILL).unwrap();
    let late = |kind: &EventKind| kind.to_string().contains("are not ready after");
    started.event(late).await;
    // What was reserved is given back.
    started.handle.send(Request::Stop).await;
    let limit = Duration::from_secs(20);
    let ended = tokio::time::timeout(limit, &mut started.task).await;
    assert!(ended.is_ok());
    drop(end_hang);
    let reached_the_thread = watch.join().unwrap();
    assert!(!reached_the_thread);
}
