//! Every image of the tests and the examples.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

use crate::cargo::cargo;
use crate::docker;

pub fn build(root: &Path) -> Result<()> {
    docker::ensure_engine()?;
    docker::build_images(root)?;
    build_catalog(root)
}

/// The shop's own program: one static file, and nothing else in the image.
fn build_catalog(root: &Path) -> Result<()> {
    let built = root.join("target/examples");
    let mut build = cargo(root, &["build", "--quiet", "--release", "--locked"]);
    build.arg("--manifest-path").arg(root.join("examples/shop/catalog/Cargo.toml")).arg("--target-dir").arg(&built);
    docker::run(build.env("RUSTFLAGS", "-C target-feature=+crt-static"))?;

    let files = root.join("target/images/catalog");
    docker::renew(&files)?;
    let program = files.join("catalog");
    fs::copy(built.join("release/catalog"), &program).context("cannot copy catalog")?;
    let changes = [docker::entry_point("/catalog"), "EXPOSE 8080".to_owned()];
    docker::import(&files, "orca-example/catalog:1", docker::hash_of(&program)?, &changes)
}
