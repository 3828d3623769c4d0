//! What people write, and what they are told about it.

mod accepted;
mod change;
mod mistakes;
mod properties;

use orca_cluster::id::Label;
use orca_cluster::spec::Project;
use orca_cluster::spec::toml::{self, Problem, SourceFile};

pub fn label(text: &str) -> Label {
    text.parse().expect("a label")
}

pub fn file(text: &str) -> SourceFile {
    SourceFile { name: "service.toml".to_owned(), text: text.to_owned() }
}

pub fn project(text: &str) -> Result<Project, Vec<Problem>> {
    toml::project(&file(text), &label("p"))
}

/// All problems as `orca deploy` shows them.
pub fn rendered(text: &str, problems: &[Problem]) -> String {
    problems.iter().map(|problem| toml::render(problem, text, false)).collect::<Vec<_>>().join("\n")
}
