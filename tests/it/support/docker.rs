//! The engine, seen past Orca.

use std::process::Command;

use super::node::Node;
use super::ran::Running;

/// Runs `docker`, which must succeed, and gives what it printed.
#[track_caller]
pub fn docker(arguments: &[&str]) -> String {
    let mut command = Command::new("docker");
    command.args(arguments);
    Running::start(command, b"").end().succeeded().stdout.trim_end().to_owned()
}

/// The full ids of a service's containers that run, sorted.
pub fn container_ids(node: &Node, service: &str) -> Vec<String> {
    let label = format!("label=orca.service={}/{service}", node.project());
    let list = docker(&["ps", "--quiet", "--no-trunc", "--filter", &label]);
    let mut ids: Vec<String> = list.lines().map(str::to_owned).collect();
    ids.sort();
    ids
}

/// When each of these containers was started, as the engine says it: changes with each start.
pub fn started_at(ids: &[String]) -> Vec<String> {
    let ids: Vec<&str> = ids.iter().map(String::as_str).collect();
    let format = ["inspect", "--format", "{{.Id}} {{.State.StartedAt}} {{.RestartCount}}"];
    docker(&[&format, ids.as_slice()].concat()).lines().map(str::to_owned).collect()
}
