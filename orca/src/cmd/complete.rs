//! `completions`: for shells.

use std::process::ExitCode;

use super::done;
use crate::cli::{self, CompletionsArgs};
use crate::exit::Failure;
use crate::output::Output;

pub fn run(args: &CompletionsArgs, output: &Output) -> Result<ExitCode, Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut cli::command(), "orca", &mut script);
    output.print(&String::from_utf8_lossy(&script));
    done()
}
