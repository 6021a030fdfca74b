//! Pseudo-terminals for programs of operators.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::pty::{Winsize, openpty};

/// Rows and columns.
pub type Size = (u16, u16);

/// A terminal.
#[derive(Debug)]
pub struct Terminal {
    /// The guest agent's end: non-blocking and close-on-exec.
    pub ours: OwnedFd,
    /// The program's end.
    pub theirs: OwnedFd,
}

/// Makes a terminal.
pub fn open(size: Size) -> io::Result<Terminal> {
    let pair = openpty(Some(&winsize(size)), None)?;
    for end in [&pair.master, &pair.slave] {
        fcntl(end, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))?;
    }
    fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok(Terminal {
        ours: pair.master,
        theirs: pair.slave,
    })
}

/// Gives the terminal another size; the kernel sends SIGWINCH to its foreground process
/// group.
pub fn resize(ours: &OwnedFd, size: Size) -> io::Result<()> {
    let size = winsize(size);
    // SAFETY: TIOCSWINSZ reads one `winsize`, which lives through the call.
    let result = unsafe { libc::ioctl(ours.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    Errno::result(result)?;
    Ok(())
}

const fn winsize((rows, columns): Size) -> Winsize {
    Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}
