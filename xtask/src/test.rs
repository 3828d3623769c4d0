//! Every test of the repository, and all the set-up for it.
//!
//! Some tests drive a Docker engine. As root on Debian one is installed and started; where that is not possible they
//! are skipped, loudly. In continuous integration nothing is skipped: what cannot be tested fails.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cargo::{cargo, has, in_ci, run};
use crate::{docker, image};

/// Tells tests of Docker not to run, and why.
const SKIP_DOCKER: &str = "ORCA_TEST_SKIP_DOCKER";
/// The file in which a test that does not run leaves a line.
const SKIPPED: &str = "ORCA_TEST_SKIPPED";
/// The `orca` that tests of whole processes start.
const ORCA: &str = "ORCA_TEST_BINARY";

pub fn all(root: &Path, runner: &[String]) -> Result<()> {
    let without_docker = match docker::ensure_engine().and_then(|()| image::build(root)) {
        Ok(()) => None,
        Err(error) if in_ci() => {
            return Err(error.context("the tests of Docker cannot run, and here none may be skipped"));
        }
        Err(error) => Some(format!("{error:#}")),
    };
    if let Some(reason) = &without_docker {
        eprintln!("tests of Docker will be skipped: {reason}");
    }
    // With the tests in one go: the binary alone would have its dependencies built with fewer features, and again.
    run(&mut cargo(root, &["build", "--workspace", "--bins", "--tests"]))?;

    let skipped = root.join("target/tests-skipped");
    fs::write(&skipped, "").with_context(|| format!("cannot write {}", skipped.display()))?;
    let mut tests = if has("nextest") {
        cargo(root, &["nextest", "run", "--workspace"])
    } else {
        eprintln!(
            "cargo-nextest is not installed (`cargo install --locked cargo-nextest`); `cargo test` runs the same"
        );
        cargo(root, &["test", "--workspace", "--no-fail-fast"])
    };
    tests.args(runner).env(SKIPPED, &skipped).env(ORCA, target(root).join("debug/orca"));
    if let Some(reason) = &without_docker {
        tests.env(SKIP_DOCKER, reason);
    }
    let outcome = run(&mut tests);

    if let Some(reason) = without_docker {
        let count = fs::read_to_string(&skipped).unwrap_or_default().lines().count();
        eprintln!("{count} tests of Docker were skipped: {reason}");
    }
    outcome
}

/// Where cargo builds: as it was told, or below the workspace.
fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), PathBuf::from)
}
