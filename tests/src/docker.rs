//! What a test does that drives a Docker engine where there is none: it ends, having said so.
//!
//! Whether there is one is not for a test to find out. `cargo xtask test` sets it up, and only where that is
//! impossible, and never in continuous integration, sets these variables. Anywhere else a missing engine is a failure.

use std::fs::OpenOptions;
use std::io::Write as _;

/// Why tests of Docker are to be skipped.
const SKIP: &str = "ORCA_TEST_SKIP_DOCKER";
/// The file in which each leaves a line, so that they can be counted.
const SKIPPED: &str = "ORCA_TEST_SKIPPED";

/// Whether the calling test is to return at once.
pub fn is_skipped() -> bool {
    let Ok(reason) = std::env::var(SKIP) else { return false };
    let thread = std::thread::current();
    let test = thread.name().unwrap_or("a test");
    eprintln!("{test} skipped: {reason}");
    if let Ok(file) = std::env::var(SKIPPED) {
        let mut file = OpenOptions::new().append(true).create(true).open(file).expect("xtask names a file of its own");
        writeln!(file, "{test}").expect("a line can be added to it");
    }
    true
}
