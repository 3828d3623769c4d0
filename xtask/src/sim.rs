//! The simulator, many seeds or one again.

use std::path::Path;

use anyhow::Result;
use clap::Args;

use crate::cargo::{cargo, run};

/// Which seeds.
#[derive(Debug, Args)]
pub struct Arguments {
    /// How many seeds
    #[arg(long, default_value_t = 1_000, conflicts_with = "seed")]
    seeds: u64,
    /// The first of them
    #[arg(long, default_value_t = 0, conflicts_with = "seed")]
    from: u64,
    /// This one only, decimal or 0x…
    #[arg(long)]
    seed: Option<String>,
    /// Tell what happened in it
    #[arg(long, requires = "seed")]
    story: bool,
}

pub fn seeds(root: &Path, arguments: &Arguments) -> Result<()> {
    let Arguments { seeds, from, seed, story } = arguments;
    let mut sim = cargo(root, &["run", "--quiet", "--profile", "sim", "--package", "orca-tests", "--bin", "sim", "--"]);
    match seed {
        Some(seed) => sim.args(["--seed", seed]),
        None => sim.args(["--seeds", &seeds.to_string(), "--from", &from.to_string()]),
    };
    if *story {
        sim.arg("--story");
    }
    run(&mut sim)
}
