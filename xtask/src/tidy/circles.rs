//! No circles among the top modules of a crate: then each can be read knowing only what it builds on. They are found in
//! the text, by where `crate::` stands outside tests: what a crate's own file exports again, and a list over several
//! lines, are not seen through.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::{Finding, source};

/// The modules that each module names, and where it first does.
type Uses<'a> = BTreeMap<&'a str, BTreeMap<&'a str, (&'a str, usize)>>;

pub fn check(root: &Path, files: &[PathBuf]) -> Result<Vec<Finding>> {
    let mut crates: BTreeMap<&str, Vec<(&str, String)>> = BTreeMap::new();
    for file in files.iter().filter_map(|file| file.to_str()).filter(|file| file.ends_with(".rs")) {
        if let Some((name, _)) = split(file) {
            let text = fs::read_to_string(root.join(file)).with_context(|| format!("cannot read {file}"))?;
            crates.entry(name).or_default().push((file, text));
        }
    }
    Ok(crates.values().flat_map(|sources| circles(sources)).collect())
}

/// A file's crate and its place below `src`.
fn split(file: &str) -> Option<(&str, &str)> {
    let (name, rest) = file.split_once('/')?;
    Some((name, rest.strip_prefix("src/")?))
}

/// One finding for each knot of modules.
fn circles(sources: &[(&str, String)]) -> Vec<Finding> {
    let uses = uses(sources);
    let mut findings = Vec::new();
    let mut told = BTreeSet::new();
    for (module, named) in &uses {
        let Some(way) = way_back(&uses, module).filter(|way| way.iter().all(|module| !told.contains(module))) else {
            continue;
        };
        let back = [way.as_slice(), &[*module]].concat();
        if let Some((file, line)) = back.get(1).and_then(|next| named.get(next)) {
            let why = format!(
                "modules in a circle, {}: move what one needs of another to where both can have it",
                back.join(" -> ")
            );
            findings.push(Finding { file: file.into(), line: *line, why });
        }
        told.extend(way);
    }
    findings
}

/// The shortest way from a module, by way of those it names, to one that names it.
fn way_back<'a>(uses: &Uses<'a>, module: &'a str) -> Option<Vec<&'a str>> {
    let mut ways = VecDeque::from([vec![module]]);
    let mut seen = BTreeSet::new();
    while let Some(way) = ways.pop_front() {
        for next in way.last().and_then(|last| uses.get(last)).into_iter().flat_map(BTreeMap::keys) {
            if *next == module {
                return Some(way);
            }
            if seen.insert(*next) {
                ways.push_back([way.as_slice(), &[*next]].concat());
            }
        }
    }
    None
}

fn uses<'a>(sources: &'a [(&'a str, String)]) -> Uses<'a> {
    let modules: BTreeSet<&str> = sources.iter().filter_map(|(file, _)| top_module(file)).collect();
    let mut uses = Uses::new();
    for (file, text) in sources {
        let Some(module) = top_module(file).filter(|_| !file.ends_with("/tests.rs")) else { continue };
        let lines: Vec<&str> = text.lines().collect();
        for (at, line) in lines.iter().enumerate().take_while(|(at, _)| !source::tests_begin(&lines, *at)) {
            for name in names(line).filter(|name| modules.contains(name) && *name != module) {
                uses.entry(module).or_default().entry(name).or_insert((file, at + 1));
            }
        }
    }
    uses
}

/// The module of the crate that a file is, or is in; the crate's own file is in none.
fn top_module(file: &str) -> Option<&str> {
    let (_, path) = split(file)?;
    let module = path.split_once('/').map_or(path, |(module, _)| module).trim_end_matches(".rs");
    (!["lib", "main", "bin"].contains(&module)).then_some(module)
}

/// What a line names of its own crate: `crate::one`, or each of `crate::{one, two}`.
fn names(line: &str) -> impl Iterator<Item = &str> {
    let code = line.split("//").next().unwrap_or_default();
    let is_part = |c: char| c.is_alphanumeric() || c == '_';
    let own = code.match_indices("crate::").filter(move |(at, _)| !code[..*at].ends_with(is_part));
    own.flat_map(move |(at, word)| {
        let rest = &code[at + word.len()..];
        let list = rest.strip_prefix('{').and_then(|rest| rest.split_once('}'));
        let (list, count) = list.map_or((rest, 1), |(list, _)| (list, usize::MAX));
        list.split(',').take(count).map(move |item| item.trim_start().split(|c| !is_part(c)).next().unwrap_or_default())
    })
}

#[cfg(test)]
mod tests {
    use super::circles;

    /// Where each circle begins, and the modules in it.
    fn found(sources: &[(&str, &str)]) -> Vec<String> {
        let sources: Vec<_> = sources.iter().map(|(file, text)| (*file, (*text).to_owned())).collect();
        let told = circles(&sources).into_iter().map(|finding| finding.to_string());
        told.map(|told| told.split_once(": move").unwrap().0.to_owned()).collect()
    }

    #[test]
    fn a_circle_is_found_wherever_its_modules_name_each_other() {
        let sources = [
            ("a/src/lib.rs", "pub use crate::plan::Plan;\n"),
            ("a/src/plan.rs", "use std::fmt;\nuse crate::state::State;\n"),
            ("a/src/state.rs", "fn a() {\n    crate::view::look()\n}\n"),
            ("a/src/view/wide.rs", "use crate::{id, plan};\n"),
            ("a/src/id.rs", "use other_crate::plan;\n"),
        ];
        assert_eq!(found(&sources), ["a/src/plan.rs:2: modules in a circle, plan -> state -> view -> plan"]);
    }

    #[test]
    fn a_knot_of_several_circles_is_told_once() {
        let sources = [
            ("a/src/one.rs", "use crate::three::C;\nuse crate::two::B;\n"),
            ("a/src/two.rs", "use crate::one::A;\n"),
            ("a/src/three.rs", "use crate::four::D;\n"),
            ("a/src/four.rs", "use crate::one::A;\n"),
        ];
        assert_eq!(found(&sources), ["a/src/four.rs:1: modules in a circle, four -> one -> three -> four"]);
    }

    #[test]
    fn tests_words_and_modules_of_one_top_module_make_no_circle() {
        let sources = [
            ("a/src/plan.rs", "use crate::state::State;\nuse crate::plan::route::Route;\n"),
            ("a/src/plan/route.rs", "use crate::plan::Plan;\n"),
            ("a/src/plan/tests.rs", "use crate::leader::Leader;\n"),
            ("a/src/leader.rs", "use crate::plan::Plan;\n"),
            ("a/src/state.rs", "//! See [`crate::plan`].\n#[cfg(test)]\nmod tests {\n    use crate::plan::Plan;\n}\n"),
        ];
        assert!(found(&sources).is_empty(), "{:?}", found(&sources));
    }
}
