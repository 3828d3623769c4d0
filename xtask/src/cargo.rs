//! Running cargo: the one that runs us, in the repository.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// A command of cargo's.
pub fn cargo(root: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root).args(arguments).stdin(Stdio::null());
    if in_ci() {
        // Nothing is built twice there, so what a second build could use is only written.
        command.env("CARGO_INCREMENTAL", "0");
    }
    command
}

/// Whether `cargo NAME` is installed.
pub fn has(name: &str) -> bool {
    let mut command = Command::new("cargo");
    command.args([name, "--version"]).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Runs a command with our output; what it printed is explanation enough if it fails.
pub fn run(command: &mut Command) -> Result<()> {
    let mut line = vec![command.get_program().to_string_lossy().into_owned()];
    line.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    // Cargo is called by its whole path.
    line[0] = line[0].rsplit('/').next().unwrap_or_default().to_owned();
    let line = line.join(" ");
    let status = command.status().with_context(|| format!("cannot run `{line}`"))?;
    ensure!(status.success(), "`{line}` failed: {status}");
    Ok(())
}

/// Whether this is continuous integration, where nothing may be skipped.
pub fn in_ci() -> bool {
    std::env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}
