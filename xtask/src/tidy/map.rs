//! ARCHITECTURE.md is a map: what is not on it cannot be found by it.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::Finding;

const MAP: &str = "ARCHITECTURE.md";

pub fn check(root: &Path, files: &[PathBuf]) -> Vec<Finding> {
    let finding = |why| Finding { file: MAP.into(), line: 0, why };
    let Ok(map) = fs::read_to_string(root.join(MAP)) else {
        return vec![finding("is not there, and should name every crate".to_owned())];
    };
    let crates: BTreeSet<String> = files
        .iter()
        .filter(|file| file.file_name().is_some_and(|name| name == "Cargo.toml"))
        .filter_map(|file| file.parent())
        // The examples and fixtures are no parts of orca.
        .filter(|directory| directory.components().count() == 1)
        .map(|directory| directory.display().to_string())
        .collect();
    crates
        .into_iter()
        .filter(|name| !map.contains(&format!("`{name}`")) && !map.contains(&format!("{name}/")))
        .map(|name| finding(format!("does not name `{name}`: say what it is for")))
        .collect()
}
