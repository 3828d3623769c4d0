//! What is done to this repository: set-up, tests, checks, simulation. `cargo xtask help` lists it.
//!
//! Continuous integration calls `ci` and nothing else, so whatever it finds can be found at a desk.

mod cargo;
mod ci;
mod docker;
mod image;
mod sim;
mod test;
mod tidy;
mod wasm;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// What is done to this repository.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Set up what the tests need and run them all
    Test {
        /// For the test runner: a filter, `--no-capture`, …
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        runner: Vec<String>,
    },
    /// Everything a change must pass: format, lints, tidy, components, tests
    Ci,
    /// The rules of this repository that no compiler knows
    Tidy,
    /// Run the simulator
    Sim(sim::Arguments),
    /// Build the images of the tests and the examples
    Images,
    /// The Wasm components that are committed beside their sources
    Wasm {
        #[command(subcommand)]
        task: Wasm,
    },
}

#[derive(Debug, Subcommand)]
enum Wasm {
    /// Build them all from their sources
    Build,
    /// Fail if one is not what its source says
    Verify,
}

fn main() -> ExitCode {
    match run(Arguments::parse().task, &root()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Not by returning it: whoever asked for backtraces meant those of panics.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task, root: &Path) -> Result<()> {
    match task {
        Task::Test { runner } => test::all(root, &runner),
        Task::Ci => ci::all(root),
        Task::Tidy => tidy::run(root),
        Task::Sim(arguments) => sim::seeds(root, &arguments),
        Task::Images => image::build(root),
        Task::Wasm { task: Wasm::Build } => wasm::build(root),
        Task::Wasm { task: Wasm::Verify } => wasm::verify(root).map(drop),
    }
}

/// The repository, wherever the command was given.
fn root() -> PathBuf {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().expect("xtask is a directory of the repository").to_owned()
}
