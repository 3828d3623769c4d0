//! Which of our crates may know which. An edge that is not here is a change of the design: it is made here first.

use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::Finding;
use crate::cargo::cargo;

/// What a crate may depend on, of ours.
struct Edges {
    of: &'static str,
    to: &'static [&'static str],
    /// For its tests, besides.
    in_tests: &'static [&'static str],
}

const EDGES: [Edges; 10] = [
    Edges { of: "orca-cluster", to: &[], in_tests: &[] },
    Edges { of: "orca-wire", to: &["orca-cluster"], in_tests: &[] },
    Edges { of: "orca-dataplane", to: &["orca-cluster"], in_tests: &[] },
    // These two never know each other: what they share is a value of the cluster or a message of the wire.
    Edges { of: "orca-control", to: &["orca-cluster", "orca-wire"], in_tests: &["orca-tests"] },
    Edges { of: "orca-agent", to: &["orca-cluster", "orca-dataplane", "orca-wire"], in_tests: &["orca-tests"] },
    Edges {
        of: "orca",
        to: &["orca-agent", "orca-cluster", "orca-control", "orca-dataplane", "orca-wire"],
        in_tests: &["orca-tests"],
    },
    Edges {
        of: "orca-tests",
        to: &["orca-cluster"],
        in_tests: &["orca-agent", "orca-control", "orca-dataplane", "orca-wire"],
    },
    Edges {
        of: "orca-bench",
        to: &["orca-agent", "orca-cluster", "orca-dataplane", "orca-wire"],
        in_tests: &["orca-agent", "orca-cluster", "orca-dataplane", "orca-wire"],
    },
    Edges { of: "orca-test-app", to: &[], in_tests: &[] },
    Edges { of: "xtask", to: &[], in_tests: &[] },
];

pub fn check(root: &Path) -> Result<Vec<Finding>> {
    let mut command = cargo(root, &["metadata", "--no-deps", "--format-version", "1"]);
    let output = command.stderr(Stdio::inherit()).output().context("cannot run cargo")?;
    ensure!(output.status.success(), "cargo metadata failed");
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata printed no JSON")?;
    let packages = metadata["packages"].as_array().context("cargo metadata lists no packages")?;
    let ours: Vec<&str> = packages.iter().filter_map(|package| package["name"].as_str()).collect();

    let mut findings = Vec::new();
    for package in packages {
        let name = package["name"].as_str().context("a package has a name")?;
        let manifest = package["manifest_path"].as_str().context("a package has a manifest")?;
        let found = |why| Finding {
            file: Path::new(manifest).strip_prefix(root).unwrap_or(Path::new(manifest)).to_owned(),
            line: 0,
            why,
        };
        let Some(edges) = EDGES.iter().find(|edges| edges.of == name) else {
            findings.push(found(format!("`{name}` is not in the list of xtask/src/tidy/edges.rs")));
            continue;
        };
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            let to = dependency["name"].as_str().unwrap_or_default();
            let in_tests = dependency["kind"] == "dev";
            let is_allowed = edges.to.contains(&to) || in_tests && edges.in_tests.contains(&to);
            if ours.contains(&to) && !is_allowed {
                let which = if in_tests { "the tests of " } else { "" };
                findings.push(found(format!(
                    "{which}`{name}` may not depend on `{to}`; a new edge is a change of the design \
                     (ARCHITECTURE.md, xtask/src/tidy/edges.rs)"
                )));
            }
        }
    }
    Ok(findings)
}
