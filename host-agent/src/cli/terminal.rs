//! The terminal on standard input: raw mode and window size.
#![allow(unsafe_code)]

use std::io;

use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};

/// Raw mode: every key reaches the program, until this is dropped.
pub struct RawMode(Termios);

impl RawMode {
    /// Enters raw mode.
    pub fn enter() -> nix::Result<Self> {
        let saved = tcgetattr(io::stdin())?;
        let mut raw = saved.clone();
        cfmakeraw(&mut raw);
        tcsetattr(io::stdin(), SetArg::TCSANOW, &raw)?;
        Ok(Self(saved))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // Fails only if the terminal is gone.
        let _ = tcsetattr(io::stdin(), SetArg::TCSANOW, &self.0);
    }
}

/// Rows and columns of the terminal on standard input, else output, else error;
/// 24 by 80 if none of them is a terminal with a size.
pub fn window_size() -> (u16, u16) {
    let streams = [libc::STDIN_FILENO, libc::STDOUT_FILENO, libc::STDERR_FILENO];
    streams.into_iter().find_map(size_of).unwrap_or((24, 80))
}

fn size_of(stream: libc::c_int) -> Option<(u16, u16)> {
    let mut size = libc::winsize {
        ws_row: 0,
        ws_col: 0,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: TIOCGWINSZ writes one `winsize` to the pointer, which is to a
    // live value of that type.
    let result = unsafe { libc::ioctl(stream, libc::TIOCGWINSZ, &raw mut size) };
    (result == 0 && size.ws_row > 0 && size.ws_col > 0).then_some((size.ws_row, size.ws_col))
}
