//! Everything a change must pass, cheapest first, with the time each part took.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context as _, Result};

use crate::cargo::{cargo, run};
use crate::{test, tidy, wasm};

/// A part: its name, and what is run.
type Part = (&'static str, fn(&Path) -> Result<()>);

const PARTS: [Part; 5] = [
    ("format", |root| run(&mut cargo(root, &["fmt", "--all", "--check"]))),
    ("tidy", tidy::run),
    ("lints", |root| run(&mut cargo(root, &["clippy", "--workspace", "--all-targets", "--", "--deny", "warnings"]))),
    ("components", |root| wasm::verify(root).map(drop)),
    ("tests", |root| test::all(root, &[])),
];

pub fn all(root: &Path) -> Result<()> {
    let mut times = Vec::new();
    for (name, part) in PARTS {
        eprintln!("== {name}");
        let begun = Instant::now();
        part(root).with_context(|| format!("{name} failed; {}", again(name)))?;
        times.push(format!("{name} {:.0} s", begun.elapsed().as_secs_f64()));
    }
    eprintln!("all passed: {}", times.join(", "));
    Ok(())
}

/// How to see it at a desk.
fn again(name: &str) -> &'static str {
    match name {
        "format" => "`cargo fmt --all` puts it right",
        "tidy" => "`cargo xtask tidy` shows it again",
        "lints" => "`cargo clippy --workspace --all-targets` shows it again",
        "components" => "`cargo xtask wasm build` builds them anew",
        _ => "`cargo xtask test` runs them again",
    }
}
