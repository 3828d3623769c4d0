//! Every image of the tests and the examples.

use std::path::Path;

use anyhow::Result;

use crate::docker;

pub fn build(root: &Path) -> Result<()> {
    docker::ensure_engine()?;
    docker::build_images(root)
}
