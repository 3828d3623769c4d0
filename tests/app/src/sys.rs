//! The few system calls std has no safe form for.

use std::io::{self, PipeReader, Read as _, Write as _};
use std::os::fd::{IntoRawFd as _, RawFd};
use std::sync::atomic::{AtomicI32, Ordering};

const SIGINT: i32 = 2;
const SIGTERM: i32 = 15;
const TIOCGWINSZ: u64 = 0x5413;

/// Where the signal handler writes the number of the signal it got.
static WRITER: AtomicI32 = AtomicI32::new(-1);

// SAFETY: these are the C library's, which the standard library links anyway; the types are those of the manual pages
// signal(2), write(2) and ioctl(2) on Linux.
unsafe extern "C" {
    fn signal(number: i32, handler: extern "C" fn(i32)) -> usize;
    #[link_name = "raise"]
    fn raise_signal(number: i32) -> i32;
    fn write(fd: RawFd, bytes: *const u8, count: usize) -> isize;
    fn ioctl(fd: RawFd, request: u64, ...) -> i32;
}

extern "C" fn on_signal(number: i32) {
    let byte = number as u8;
    // SAFETY: write(2) is safe in a signal handler, the pointer is to one live byte, and the descriptor is a pipe
    // that is never closed. A full pipe has told its reader enough already, so the result does not matter.
    unsafe { write(WRITER.load(Ordering::SeqCst), &raw const byte, 1) };
}

/// The numbers of the signals that arrive from now on: SIGTERM and SIGINT.
pub fn signals() -> io::Result<impl Iterator<Item = u8>> {
    let (mut reader, writer) = io::pipe()?;
    WRITER.store(writer.into_raw_fd(), Ordering::SeqCst);
    for number in [SIGTERM, SIGINT] {
        // SAFETY: `on_signal` is an `extern "C"` function that does only what a signal handler may do.
        unsafe { signal(number, on_signal) };
    }
    Ok(std::iter::from_fn(move || next(&mut reader)))
}

fn next(reader: &mut PipeReader) -> Option<u8> {
    let mut byte = [0];
    loop {
        match reader.read_exact(&mut byte) {
            Ok(()) => return Some(byte[0]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return None,
        }
    }
}

/// Sends this process a signal. Twice: std answers the first SIGSEGV itself, by leaving the next one alone.
pub fn raise(number: i32) {
    for _ in 0..2 {
        // SAFETY: raise(3) takes any number, and only handlers installed here, by std or by the system answer to it.
        unsafe { raise_signal(number) };
    }
}

/// Columns and rows of the terminal on standard input.
pub fn terminal_size() -> Option<(u16, u16)> {
    let mut size = [0u16; 4];
    // SAFETY: TIOCGWINSZ fills a `struct winsize`, four unsigned shorts, and `size` is just that.
    let result = unsafe { ioctl(0, TIOCGWINSZ, &raw mut size) };
    (result == 0).then_some((size[1], size[0]))
}

/// Writes all of it to standard output at once.
pub fn print(bytes: &[u8]) {
    let mut out = io::stdout().lock();
    // Nobody to tell when standard output is gone.
    drop(out.write_all(bytes).and_then(|()| out.flush()));
}
