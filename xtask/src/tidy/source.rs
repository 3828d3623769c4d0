//! Rules for lines of Rust. They look at text, not at syntax: simple enough to be right about our own code, and the
//! few places that are right all the same are listed here.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::Finding;

/// Code that may sleep although it is for tests: the program that misbehaves on command does so when told to, a load
/// keeps its pace, and the rest look again until a condition holds or a deadline passes.
const MAY_SLEEP: [&str; 5] = [
    "tests/app/src/",
    "tests/it/support/load.rs",
    "tests/it/support/wait.rs",
    "dataplane/tests/proxy/limits.rs",
    "dataplane/tests/proxy/world.rs",
];
/// Where openraft's types may be named.
const MAY_NAME_OPENRAFT: [&str; 3] = ["control/src/raft.rs", "control/src/raft/", "control/tests/raft/"];
/// Lines above `unsafe` among which its reason must begin.
const SAFETY_LINES_MAX: usize = 12;

pub fn check(root: &Path, files: &[PathBuf]) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for file in files.iter().filter(|file| file.extension().is_some_and(|extension| extension == "rs")) {
        let text = fs::read_to_string(root.join(file)).with_context(|| format!("cannot read {}", file.display()))?;
        let found = faults(&file.to_string_lossy(), &text);
        findings.extend(found.into_iter().map(|(line, why)| Finding { file: file.clone(), line, why: why.to_owned() }));
    }
    Ok(findings)
}

/// Lines, from 1, and what is wrong with each.
fn faults(file: &str, text: &str) -> Vec<(usize, &'static str)> {
    // This file names what it looks for.
    if file == "xtask/src/tidy/source.rs" {
        return Vec::new();
    }
    let within = |places: &[&str]| places.iter().any(|place| file.starts_with(place));
    let mut is_test = file.starts_with("tests/") || file.contains("/tests/") || file.ends_with("/tests.rs");
    let mut faults = Vec::new();
    let lines: Vec<&str> = text.lines().collect();
    for (at, line) in lines.iter().enumerate() {
        is_test |= tests_begin(&lines, at);
        let code = line.split("//").next().unwrap_or_default();
        let mut fault = |why| faults.push((at + 1, why));

        if has_word(line, "TODO") || has_word(line, "XXX") {
            fault("unfinished: do it, or open an issue and name it");
        }
        if code.contains("todo!(") || code.contains("unimplemented!(") {
            fault("unfinished: a path that is not there yet is an error that says so");
        }
        if code.contains("#[ignore") {
            fault("a test that never runs: assert today's answer with a FIXME, or skip with a printed reason");
        }
        if is_test && code.contains("sleep(") && !within(&MAY_SLEEP) {
            fault("a test that sleeps: wait for the condition with a deadline, or move the clock");
        }
        if code.contains("openraft::") && !within(&MAY_NAME_OPENRAFT) {
            fault("openraft's types stay below control/src/raft: they change from release to release");
        }
        if has_word(code, "unsafe") && !code.contains("unsafe_") && !is_explained(&lines[..at]) {
            fault("`unsafe` without a paragraph `// SAFETY: …` above that says why it is sound");
        }
    }
    faults
}

/// Whether the tests of a file begin at this of its lines: ours come last.
pub fn tests_begin(lines: &[&str], at: usize) -> bool {
    let begins = |line: &&str| line.trim() == "#[cfg(test)]";
    lines.get(at).is_some_and(begins) && lines.get(at + 1).is_some_and(|next| next.ends_with('{'))
}

/// Whether the lines just above hold the reason for an `unsafe`.
fn is_explained(above: &[&str]) -> bool {
    above.iter().rev().take(SAFETY_LINES_MAX).any(|line| line.contains("SAFETY:") || line.contains("# Safety"))
}

fn has_word(line: &str, word: &str) -> bool {
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word)
        .any(|(at, _)| !line[..at].ends_with(is_part) && !line[at + word.len()..].starts_with(is_part))
}

#[cfg(test)]
mod tests {
    use super::faults;

    fn lines(file: &str, text: &str) -> Vec<usize> {
        faults(file, text).into_iter().map(|(line, _)| line).collect()
    }

    #[test]
    fn what_is_unfinished_is_found_where_it_is() {
        assert_eq!(
            lines("cluster/src/plan.rs", "fn a() {\n    todo!()\n}\n// TODO: b\n// a TODOLIST is none\n"),
            [2, 4]
        );
    }

    #[test]
    fn tests_may_not_sleep_but_what_they_test_may() {
        let text = "fn a() { sleep(PAUSE) }\n#[cfg(test)]\nmod tests {\n    fn b() { sleep(PAUSE) }\n}\n";
        assert_eq!(lines("agent/src/driver.rs", text), [4]);
        assert_eq!(lines("tests/it/deploy.rs", text), [1, 4]);
        assert!(lines("tests/app/src/main.rs", text).is_empty());
    }

    #[test]
    fn unsafe_needs_its_reason_above() {
        assert!(lines("agent/src/a.rs", "// SAFETY: it is.\nunsafe { b() }\n").is_empty());
        assert_eq!(lines("agent/src/a.rs", "unsafe { b() }\n#![deny(unsafe_code)]\n"), [1]);
    }

    #[test]
    fn openraft_stays_where_it_is() {
        assert!(lines("control/src/raft/log.rs", "use openraft::Vote;\n").is_empty());
        assert_eq!(lines("control/src/api.rs", "use openraft::Vote;\n// openraft says so\n"), [1]);
    }
}
