//! Licences, advisories and sources of what we depend on, by deny.toml.

use std::path::Path;

use anyhow::Result;

use crate::cargo::{cargo, has, run};

pub fn check(root: &Path) -> Result<()> {
    if !has("deny") {
        eprintln!("licences and advisories were not checked: `cargo install --locked cargo-deny`");
        return Ok(());
    }
    // Advisories are fetched; without a network the rest is still worth knowing.
    run(&mut cargo(root, &["deny", "--log-level", "error", "check", "licenses", "bans", "sources"]))
}
