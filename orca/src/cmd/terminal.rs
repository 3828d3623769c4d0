//! The terminal we were started in: hidden prompts, and raw mode for `exec`. Whatever is changed is changed back on
//! every way out.

use std::io::{self, BufRead as _, IsTerminal as _, Read as _};

use orca_wire::message::agent::Size;
use rustix::termios::{LocalModes, OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use zeroize::Zeroizing;

use crate::exit::Failure;

/// Longest secret that is read: what fits into one message with room to spare.
const SECRET_BYTES_MAX: u64 = 1 << 20;

/// Keeps the terminal in another mode for as long as it lives.
#[derive(Debug)]
pub struct Mode {
    before: Termios,
}

impl Mode {
    /// Every key goes to the program as it is.
    pub fn raw() -> io::Result<Mode> {
        Mode::change(Termios::make_raw)
    }

    /// What is typed is not shown.
    fn hidden() -> io::Result<Mode> {
        Mode::change(|mode| mode.local_modes.remove(LocalModes::ECHO))
    }

    fn change(change: impl FnOnce(&mut Termios)) -> io::Result<Mode> {
        let before = tcgetattr(io::stdin())?;
        let mut mode = before.clone();
        change(&mut mode);
        tcsetattr(io::stdin(), OptionalActions::Flush, &mode)?;
        Ok(Mode { before })
    }
}

impl Drop for Mode {
    fn drop(&mut self) {
        // There is nobody to tell, and nothing else to try.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// The window's size; a terminal that does not say, such as one of a CI system, gets the classic one.
pub fn size() -> Size {
    const CLASSIC: Size = Size { columns: 80, rows: 24 };
    match tcgetwinsize(io::stdout()) {
        Ok(size) if size.ws_col > 0 && size.ws_row > 0 => Size { columns: size.ws_col, rows: size.ws_row },
        Ok(_) | Err(_) => CLASSIC,
    }
}

pub fn is_interactive() -> bool {
    io::stdin().is_terminal() && io::stdout().is_terminal()
}

/// A secret from a prompt, or all of standard input without its last line break.
pub fn secret(prompt: &str) -> Result<Zeroizing<String>, Failure> {
    let failed = |error: io::Error| Failure::general("the value cannot be read").why(error.to_string());
    let mut text = Zeroizing::new(String::new());
    if io::stdin().is_terminal() {
        eprint!("{prompt}: ");
        let hidden = Mode::hidden().map_err(failed)?;
        let read = io::stdin().lock().read_line(&mut text);
        drop(hidden);
        eprintln!();
        read.map_err(failed)?;
    } else {
        io::stdin().lock().take(SECRET_BYTES_MAX + 1).read_to_string(&mut text).map_err(failed)?;
        if text.len() as u64 > SECRET_BYTES_MAX {
            return Err(Failure::input(format!("a value has at most {SECRET_BYTES_MAX} bytes")));
        }
    }
    if text.ends_with('\n') {
        text.pop();
        if text.ends_with('\r') {
            text.pop();
        }
    }
    if text.is_empty() {
        return Err(Failure::input("the value is empty").fix("pipe it in, or type it at the prompt"));
    }
    Ok(text)
}
