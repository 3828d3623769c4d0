//! The TOML people write: `service.toml` and `cluster.toml`. Strict, and thorough: whoever has made fifteen mistakes is
//! told of all fifteen, each with its place in the file and what to write instead. What a later version will do is
//! recognised and refused by name, never silently accepted.
//!
//! Three passes: the tree with its spans from the `toml` crate ([`parse`]), the values people can write
//! ([`service`], [`settings`]), and the rules about values, which are not about TOML ([`check`](super::check)).
//! There is no file access here; whoever calls has read the text.

mod problem;
mod service;
mod settings;
mod table;

use std::collections::BTreeMap;
use std::ops::Range;

use ::toml::de::{DeTable, DeValue};
use toml_parser::lexer::TokenKind;

pub use problem::{Kind, Problem, render};
pub use table::PROBLEMS_MAX;

use super::check::{self, Fault, Place, Step};
use super::{Project, Route, Service, Settings};
use crate::id::{Label, ServiceName};
use service::{Draft, Name};
use table::{Part, Report, Table};

/// Most bytes of one file; checked before anything looks at it.
pub const FILE_BYTES_MAX: usize = 1 << 20;
/// Most tables, arrays and dotted keys within each other. We need five; what the parser builds is also freed
/// recursively, so without a bound a hostile file could overflow the stack.
pub const NESTING_MAX: usize = 64;

/// A file that someone wrote, with the name to call it by in messages.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    pub name: String,
    pub text: String,
}

/// Reads one `service.toml`. The project is called `default_name` if the file does not say.
pub fn project(file: &SourceFile, default_name: &Label) -> Result<Project, Vec<Problem>> {
    let (written, problems) = read_project(file, default_name);
    if problems.is_empty() { Ok(written.project) } else { Err(problems) }
}

/// Reads several of them, each with its default name, and checks that they can be in one cluster together.
pub fn projects(files: &[(SourceFile, Label)]) -> Result<Vec<Project>, Vec<Problem>> {
    let mut projects = Vec::new();
    let mut problems = Vec::new();
    let mut names: BTreeMap<Label, &SourceFile> = BTreeMap::new();
    let mut routes: BTreeMap<Route, (usize, ServiceName, String)> = BTreeMap::new();
    for (at, (file, default_name)) in files.iter().enumerate() {
        let (written, mut found) = read_project(file, default_name);
        let nothing = DeValue::Boolean(false);
        let report = Report::new(file, &nothing);
        let name = &written.project.name;
        if let Some(first) = names.get(name) {
            let message = format!("the project `{name}` is already in {}", first.name);
            let hint = "one project is one file; put `project = \"…\"` at the top of one of the two";
            found.push(report.problem(written.name_span.clone(), Kind::Conflict, &message, Some(hint)));
        } else {
            names.insert(name.clone(), file);
        }
        for (route, service, span) in written.claims {
            let owner = ServiceName::new(name.clone(), service);
            match routes.get(&route) {
                // Within one file it has been reported.
                Some((other, ..)) if *other == at => {}
                Some((_, owner, place)) => {
                    let message = format!("`{route}` is already routed to `{owner}` ({place})");
                    let hint = "give one of the two another domain or path";
                    found.push(report.problem(span, Kind::Conflict, &message, Some(hint)));
                }
                None => {
                    let place = format!("{}:{}", file.name, report.line_of(span.start));
                    routes.insert(route, (at, owner, place));
                }
            }
        }
        problems.extend(found);
        projects.push(written.project);
    }
    if problems.is_empty() { Ok(projects) } else { Err(problems) }
}

/// Reads `cluster.toml`.
pub fn settings(file: &SourceFile) -> Result<Settings, Vec<Problem>> {
    let (settings, problems) = parse(file, |root| {
        let settings = settings::read(root);
        for fault in check::settings(&settings) {
            root.report.fault(&Place::default(), &fault);
        }
        settings
    });
    match settings {
        Some(settings) if problems.is_empty() => Ok(settings),
        _ => Err(problems),
    }
}

/// What a cluster has against services of a file that is right by itself, in the order of the file.
pub fn misfits(file: &SourceFile, faults: &[(Label, Fault)]) -> Vec<Problem> {
    let (problems, _) = parse(file, |root| {
        let drafts = root.tables("service", service::read);
        let report = root.report;
        let problem = |(name, fault): &(Label, Fault)| {
            let draft = drafts.iter().find(|draft| draft.service.name == *name)?;
            let mut fault = fault.clone();
            find_written(&mut fault, draft);
            let part = if fault.is_key { Part::Key } else { Part::Value };
            let span = report.locate(&draft.place.within(&fault.at), part);
            Some(report.problem(span, fault.kind, &fault.message, fault.hint.as_deref()))
        };
        faults.iter().filter_map(problem).collect::<Vec<Problem>>()
    });
    let mut problems = problems.unwrap_or_default();
    problems.sort_by_key(|problem| problem.span.start);
    problems
}

/// "did you mean", if one of the words is close enough to be meant.
pub fn suggestion<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    /// No key or word of ours is longer; comparing takes the product of both lengths.
    const LENGTH_MAX: usize = 64;
    if word.len() > LENGTH_MAX {
        return None;
    }
    let close = |candidate: &str| {
        let distance = strsim::osa_distance(word, candidate);
        (distance <= (candidate.len().min(word.len()) / 3).max(1)).then_some(distance)
    };
    let best =
        known.into_iter().filter_map(|candidate| close(candidate).map(|distance| (distance, candidate))).min()?;
    Some(format!("did you mean `{}`?", best.1))
}

/// A project and where the parts of it are that other files may conflict with.
struct Written {
    project: Project,
    name_span: Range<usize>,
    claims: Vec<(Route, Label, Range<usize>)>,
}

fn read_project(file: &SourceFile, default_name: &Label) -> (Written, Vec<Problem>) {
    let (written, problems) = parse(file, |root| {
        let name = root.get("project").and_then(|item| item.parse(Label::new, None));
        let is_single_table = root.get("service").is_some_and(|item| item.value.is_table());
        if is_single_table {
            let hint = "write `[[service]]`: there can be several";
            root.report.add(&Place::of("service"), Part::Value, Kind::Type, "expected an array of tables", Some(hint));
        }
        let drafts = root.tables("service", service::read);
        if drafts.is_empty() {
            let hint = "a service begins with a line `[[service]]`";
            root.report.add_at(0..0, Kind::Missing, "there is no service in this file", Some(hint));
        }
        check_together(root.report, &drafts);

        let span = |place: &Place| root.report.locate(place, Part::Value);
        let claims = drafts.iter().flat_map(|draft| {
            let name = &draft.service.name;
            draft.claims.iter().map(move |(route, place)| (route.clone(), name.clone(), span(place)))
        });
        Written {
            claims: claims.collect(),
            name_span: span(&Place::of("project")),
            project: Project {
                name: name.unwrap_or_else(|| default_name.clone()),
                services: drafts.into_iter().map(|Draft { service, .. }| (service.name.clone(), service)).collect(),
            },
        }
    });
    let nothing = || Written {
        project: Project { name: default_name.clone(), services: BTreeMap::new() },
        name_span: 0..0,
        claims: Vec::new(),
    };
    (written.unwrap_or_else(nothing), problems)
}

/// The rules between services, for those that have a name to be spoken of.
fn check_together(report: &Report<'_>, drafts: &[Draft]) {
    let named: Vec<&Draft> = drafts.iter().filter(|draft| draft.name == Name::Right).collect();
    let services: Vec<&Service> = named.iter().map(|draft| &draft.service).collect();
    for (at, mut fault) in check::together(&services) {
        match fault.at.steps() {
            // It may be the one that lacks its name.
            [Step::Key(key), Step::Key(_)]
                if key == "depends_on"
                    && fault.kind == Kind::Value
                    && drafts.iter().any(|draft| draft.name == Name::Absent) =>
            {
                continue;
            }
            _ => {}
        }
        find_written(&mut fault, named[at]);
        report.fault(&named[at].place, &fault);
    }
}

/// Routes are products of domains and paths, and a host has two keys it can be under: the reader knows which line each
/// came from.
fn find_written(fault: &mut Fault, draft: &Draft) {
    let written = match fault.at.steps() {
        [Step::Key(key), Step::Key(route)] if key == "routes" => {
            draft.claims.iter().find(|(claimed, _)| claimed.to_string() == *route).map(|(_, written)| written)
        }
        [Step::Key(key), Step::Key(host)] if key == "domain" => {
            draft.hosts.iter().find(|(named, _)| named.to_string() == *host).map(|(_, written)| written)
        }
        _ => None,
    };
    if let Some(written) = written {
        fault.at = written.steps()[draft.place.steps().len()..].iter().cloned().collect();
    }
}

/// Turns text into a tree and has it read; returns what was read, unless the text could not even be looked at, and all
/// that is wrong with it.
fn parse<T>(file: &SourceFile, read: impl FnOnce(&mut Table<'_>) -> T) -> (Option<T>, Vec<Problem>) {
    let nothing = DeValue::Boolean(false);
    let refuse = |span: Range<usize>, message: String, hint: &str| {
        (None, vec![Report::new(file, &nothing).problem(span, Kind::Size, &message, Some(hint))])
    };
    if file.text.len() > FILE_BYTES_MAX {
        let message = format!("the file has {} bytes; at most {FILE_BYTES_MAX} are read", file.text.len());
        return refuse(0..0, message, "a service fits on one screen; is this the right file?");
    }
    if let Some(span) = too_deep(&file.text) {
        return refuse(span, format!("nested more than {NESTING_MAX} deep"), "is a bracket before this never closed?");
    }
    let (tree, errors) = DeTable::parse_recoverable(&file.text);
    let root = DeValue::Table(tree.into_inner());
    let report = Report::new(file, &root);
    let mut table = report.root();
    let value = read(&mut table);
    table.finish();
    // One for each line: what follows the first in a line is mostly its echo, and a hostile line could have a million.
    let mut broken = BTreeMap::new();
    for error in &errors {
        broken.entry(report.line_of(error.span().unwrap_or_default().start)).or_insert(error);
    }
    let broken = broken.into_iter().map(|(line, error)| (line, syntax(&report, error)));
    (Some(value), report.finish(broken.take(PROBLEMS_MAX).collect()))
}

/// Where brackets and dots of keys first nest too deep. Counted on tokens, before there is a tree. A bracket is closed
/// only by its own kind, so on broken input we count more than the parser builds, never less.
fn too_deep(text: &str) -> Option<Range<usize>> {
    let mut open = Vec::new();
    // For each open bracket, and the line itself: dots of the key that is being written.
    let mut dots = vec![0_usize];
    for token in toml_parser::Source::new(text).lex() {
        let closes = |bracket| open.last() == Some(&bracket);
        match token.kind() {
            kind @ (TokenKind::LeftSquareBracket | TokenKind::LeftCurlyBracket) => {
                open.push(kind);
                dots.push(0);
            }
            TokenKind::RightSquareBracket if closes(TokenKind::LeftSquareBracket) => {
                open.pop();
                dots.pop();
            }
            TokenKind::RightCurlyBracket if closes(TokenKind::LeftCurlyBracket) => {
                open.pop();
                dots.pop();
            }
            TokenKind::Dot => *dots.last_mut().expect("the line's own is never taken away") += 1,
            TokenKind::Comma => *dots.last_mut().expect("the line's own is never taken away") = 0,
            TokenKind::Newline if open.is_empty() => dots[0] = 0,
            _ => continue,
        }
        if open.len() + dots.iter().sum::<usize>() > NESTING_MAX {
            let span = token.span();
            return Some(span.start()..span.end());
        }
    }
    None
}

/// What the `toml` crate says, with the text it is about.
fn syntax(report: &Report<'_>, error: &::toml::de::Error) -> Problem {
    let span = error.span().unwrap_or_default();
    let text = report.text(&span);
    match error.message() {
        "duplicate key" => {
            let hint = match text {
                "module" => Some("with a table `[service.module]`, write the path into it: `path = \"./api.wasm\"`"),
                _ => Some("keep one of them"),
            };
            report.problem(span, Kind::Conflict, &format!("`{text}` is already given"), hint)
        }
        message => report.problem(span, Kind::Syntax, message, None),
    }
}
