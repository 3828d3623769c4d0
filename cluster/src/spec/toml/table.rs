//! Reading a tree of TOML so that nothing in it goes unread. Every key that is asked for is thereby known; what is left
//! in a table when its reader is done is an unknown key. Nothing stops at the first problem: a reader gets [`None`] for
//! what is wrong or absent and goes on, and the [`Report`] keeps what was wrong with it.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use ::toml::de::{DeTable, DeValue};

use super::problem::{Problem, printable};
use super::{SourceFile, suggestion};
use crate::spec::check::{Fault, Kind, Place, Step};

/// Most problems that are reported for one file: nobody reads more, and a file made to have a million has few readers.
pub const PROBLEMS_MAX: usize = 100;

/// What has been found wrong with a file so far.
pub(super) struct Report<'f> {
    file: &'f SourceFile,
    root: &'f DeValue<'f>,
    /// Where each line starts.
    lines: Vec<usize>,
    found: RefCell<Vec<(Place, Problem)>>,
}

impl<'f> Report<'f> {
    pub fn new(file: &'f SourceFile, root: &'f DeValue<'f>) -> Report<'f> {
        let lines = std::iter::once(0).chain(file.text.match_indices('\n').map(|(at, _)| at + 1)).collect();
        Report { file, root, lines, found: RefCell::default() }
    }

    pub fn root(&self) -> Table<'_> {
        Table::new(self, Place::default(), self.root.as_table())
    }

    /// Everything that is wrong, in the order of the file. Where the syntax is broken the tree is a guess: in such a
    /// line, and below such a header, only the syntax is reported; and in such a file nothing is called missing.
    /// `broken` has the lines whose syntax is.
    pub fn finish(&self, broken: BTreeMap<usize, Problem>) -> Vec<Problem> {
        let mut problems: Vec<Problem> = self.found.take().into_iter().map(|(_, problem)| problem).collect();
        if !broken.is_empty() {
            let is_header = |line: &usize| self.line(*line).trim_start().starts_with('[');
            let headers: Vec<usize> = (1..=self.lines.len()).filter(is_header).collect();
            let is_guess = |problem: &Problem| {
                let header = headers[..headers.partition_point(|line| *line <= problem.line)].last();
                broken.contains_key(&problem.line) || header.is_some_and(|line| broken.contains_key(line))
            };
            problems.retain(|problem| problem.kind != Kind::Missing && !is_guess(problem));
            problems.extend(broken.into_values());
        }
        problems.sort_by_key(|problem| problem.span.start);
        problems.dedup();
        problems.truncate(PROBLEMS_MAX);
        problems
    }

    pub fn text(&self, span: &Range<usize>) -> &'f str {
        self.file.text.get(span.clone()).unwrap_or_default()
    }

    fn line(&self, number: usize) -> &'f str {
        let end = self.lines.get(number).copied().unwrap_or(self.file.text.len());
        &self.file.text[self.lines[number - 1]..end]
    }

    pub fn line_of(&self, at: usize) -> usize {
        self.lines.partition_point(|start| *start <= at)
    }

    pub fn problem(&self, span: Range<usize>, kind: Kind, message: &str, hint: Option<&str>) -> Problem {
        let text = &self.file.text;
        let start = text.floor_char_boundary(span.start);
        let end = text.floor_char_boundary(span.end).max(start);
        let line = self.line_of(start);
        Problem {
            file: self.file.name.clone(),
            span: start..end,
            line,
            column: text[self.lines[line - 1]..start].chars().count() + 1,
            kind,
            message: printable(message),
            hint: hint.map(printable),
        }
    }

    /// Reports a problem that belongs to no key.
    pub fn add_at(&self, span: Range<usize>, kind: Kind, message: &str, hint: Option<&str>) {
        self.push(Place::default(), self.problem(span, kind, message, hint));
    }

    pub fn add(&self, place: &Place, part: Part, kind: Kind, message: &str, hint: Option<&str>) {
        if !self.is_full() {
            self.push(place.clone(), self.problem(self.locate(place, part), kind, message, hint));
        }
    }

    fn push(&self, place: Place, problem: Problem) {
        self.found.borrow_mut().push((place, problem));
    }

    /// Whether there is no point in looking on. Some more than are shown are kept, because they are not found in the
    /// order of the file.
    fn is_full(&self) -> bool {
        self.found.borrow().len() >= 2 * PROBLEMS_MAX
    }

    /// Reports what is wrong with a value that was read from `within`, unless something it was concluded from has been
    /// reported already: one mistake is one problem.
    pub fn fault(&self, within: &Place, fault: &Fault) {
        if self.is_full() {
            return;
        }
        let at = within.within(&fault.at);
        let is_known = |place: &Place| {
            let found = self.found.borrow();
            found.iter().any(|(other, _)| other.steps().len() > within.steps().len() && other.touches(place))
        };
        if is_known(&at) || fault.given.iter().any(|given| is_known(&within.within(given))) {
            return;
        }
        let part = if fault.is_key { Part::Key } else { Part::Value };
        self.add(&at, part, fault.kind, &fault.message, fault.hint.as_deref());
    }

    /// Where in the file a place is. For one that is not in the file: the innermost table around it.
    pub fn locate(&self, place: &Place, part: Part) -> Range<usize> {
        let mut here = self.root;
        let mut span = 0..0;
        for (at, step) in place.steps().iter().enumerate() {
            let is_last = at + 1 == place.steps().len();
            match (step, here) {
                (Step::Key(key), DeValue::Table(table)) => {
                    let Some((key, value)) = table.get_key_value(key.as_ref()) else {
                        break;
                    };
                    here = value.get_ref();
                    let points_at_key = is_last && part == Part::Key;
                    span = if points_at_key || value.span().is_empty() { key.span() } else { value.span() };
                }
                (Step::Key(text), DeValue::Array(array)) => {
                    let element = array.iter().find(|element| element.get_ref().as_str() == Some(text.as_ref()));
                    let Some(element) = element else { break };
                    here = element.get_ref();
                    span = element.span();
                }
                (Step::Index(index), DeValue::Array(array)) => {
                    let Some(element) = array.get(*index) else {
                        break;
                    };
                    here = element.get_ref();
                    span = element.span();
                }
                // One table where there could be an array of them.
                (Step::Index(_), _) => {}
                (Step::Key(_), _) => break,
            }
        }
        span
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Key,
    Value,
}

/// How the message of every key begins that is right and has no effect yet.
pub(super) const NOT_YET: &str = "not supported yet: ";

/// A table that is being read, or one that could be there and is not.
pub(super) struct Table<'r> {
    pub report: &'r Report<'r>,
    pub place: Place,
    inner: Option<&'r DeTable<'r>>,
    known: Vec<&'static str>,
    /// Whether keys may have any name.
    is_open: Cell<bool>,
}

impl<'r> Table<'r> {
    fn new(report: &'r Report<'r>, place: Place, inner: Option<&'r DeTable<'r>>) -> Table<'r> {
        Table { report, place, inner, known: Vec::new(), is_open: Cell::new(false) }
    }

    pub fn is_present(&self) -> bool {
        self.inner.is_some()
    }

    /// The value of a key, which is known from now on.
    pub fn get(&mut self, key: &'static str) -> Option<Item<'r>> {
        if !self.known.contains(&key) {
            self.known.push(key);
        }
        let value = self.inner?.get(key)?;
        Some(Item { report: self.report, place: self.place.key(key), value: value.get_ref() })
    }

    pub fn string(&mut self, key: &'static str) -> Option<&'r str> {
        self.get(key)?.string()
    }

    pub fn flag(&mut self, key: &'static str) -> Option<bool> {
        self.get(key)?.flag()
    }

    pub fn count(&mut self, key: &'static str) -> Option<u32> {
        self.get(key)?.count()
    }

    pub fn seconds(&mut self, key: &'static str) -> Option<Duration> {
        self.get(key)?.seconds()
    }

    /// Reads the table below a key; if there is none, `read` sees an empty one.
    pub fn table<T>(&mut self, key: &'static str, read: impl FnOnce(&mut Table<'r>) -> T) -> T {
        let item = self.get(key);
        let inner = item.and_then(|item| item.table());
        let mut table = Table::new(self.report, self.place.key(key), inner);
        let value = read(&mut table);
        table.finish();
        value
    }

    /// Reads each of the tables below a key: an array of them, or a single one.
    pub fn tables<T>(&mut self, key: &'static str, mut read: impl FnMut(&mut Table<'r>) -> T) -> Vec<T> {
        let Some(item) = self.get(key) else {
            return Vec::new();
        };
        let items = match item.value {
            DeValue::Table(_) => vec![Item { place: item.place.index(0), ..item }],
            _ => item.items(),
        };
        let mut values = Vec::new();
        for item in items {
            let Some(inner) = item.table() else { continue };
            let mut table = Table::new(self.report, item.place, Some(inner));
            values.push(read(&mut table));
            table.finish();
        }
        values
    }

    /// All values of a table whose keys have names that people choose.
    pub fn entries(&self) -> Vec<(&'r str, Item<'r>)> {
        self.is_open.set(true);
        let all = self.inner.into_iter().flat_map(DeTable::iter);
        all.map(|(key, value)| {
            let place = self.place.key(key.get_ref().to_string());
            (key.get_ref().as_ref(), Item { report: self.report, place, value: value.get_ref() })
        })
        .collect()
    }

    pub fn missing(&self, key: &'static str, message: &str, hint: &str) {
        self.report.add(&self.place.key(key), Part::Key, Kind::Missing, message, Some(hint));
    }

    /// Reports what nobody asked for.
    pub fn finish(self) {
        if self.is_open.get() {
            return;
        }
        for key in self.inner.into_iter().flat_map(DeTable::keys) {
            let key: &str = key.get_ref();
            if self.report.is_full() {
                return;
            }
            if !self.known.contains(&key) {
                let hint = self.advice(key);
                let place = self.place.key(key.to_owned());
                self.report.add(&place, Part::Key, Kind::UnknownKey, &format!("unknown key `{key}`"), hint.as_deref());
            }
        }
    }

    fn advice(&self, key: &str) -> Option<String> {
        /// What other tools call our keys.
        const ALIASES: [(&str, &str); 14] = [
            ("args", "command"),
            ("cmd", "command"),
            ("entrypoint", "command"),
            ("environment", "env"),
            ("envs", "env"),
            ("healthcheck", "health"),
            ("health_check", "health"),
            ("host", "domain"),
            ("hostname", "domain"),
            ("instances", "replicas"),
            ("scale", "replicas"),
            ("retries", "failure_threshold"),
            ("timeout", "timeout_secs"),
            ("interval", "interval_secs"),
        ];
        /// Keys that people write one table too far out.
        const HOMES: [(&str, &str); 24] = [
            ("strategy", "[service.deploy]"),
            ("max_surge", "[service.deploy]"),
            ("max_unavailable", "[service.deploy]"),
            ("canary_weight", "[service.deploy]"),
            ("auto_promote", "[service.deploy]"),
            ("ready_timeout_secs", "[service.deploy]"),
            ("drain_timeout_secs", "[service.deploy]"),
            ("stop_grace_secs", "[service.deploy]"),
            ("memory", "[service.resources]"),
            ("cpu", "[service.resources]"),
            ("gpu", "[service.resources]"),
            ("node", "[service.placement]"),
            ("labels", "[service.placement]"),
            ("spread", "[service.placement]"),
            ("username", "[service.registry]"),
            ("password", "[service.registry]"),
            ("max_concurrent", "[service.module]"),
            ("outbound", "[service.module]"),
            ("acme_email", "[cluster]"),
            ("domain", "[cluster]"),
            ("log_level", "[cluster]"),
            ("allow_host", "[policy]"),
            ("service_cidr", "[network]"),
            ("otlp_endpoint", "[observability]"),
        ];
        if let Some((_, ours)) = ALIASES.iter().find(|(theirs, ours)| *theirs == key && self.known.contains(ours)) {
            return Some(format!("did you mean `{ours}`?"));
        }
        if let Some(hint) = suggestion(key, self.known.iter().copied()) {
            return Some(hint);
        }
        match self.place.steps() {
            [] if self.known.contains(&"service") && key != "cluster" => {
                Some("a key of a service goes below a line `[[service]]`".to_owned())
            }
            [] | [Step::Key(_), Step::Index(_)] => {
                let (_, home) = HOMES.iter().find(|(theirs, _)| *theirs == key)?;
                Some(format!("`{key}` goes into `{home}`"))
            }
            _ => {
                let known: Vec<String> = self.known.iter().map(|key| format!("`{key}`")).collect();
                Some(format!("known here: {}", known.join(", ")))
            }
        }
    }
}

/// One value, and where it stands.
pub(super) struct Item<'r> {
    pub report: &'r Report<'r>,
    pub place: Place,
    pub value: &'r DeValue<'r>,
}

impl<'r> Item<'r> {
    /// Reports that the value is of the right type and wrong.
    pub fn wrong(&self, message: impl AsRef<str>, hint: Option<&str>) {
        self.report.add(&self.place, Part::Value, Kind::Value, message.as_ref(), hint);
    }

    /// Reports that the value cannot be there together with something else.
    pub fn conflict(&self, message: impl AsRef<str>, hint: &str) {
        self.report.add(&self.place, Part::Key, Kind::Conflict, message.as_ref(), Some(hint));
    }

    /// Reports that the value is right and would have no effect.
    pub fn unsupported(&self, what: &str, meanwhile: &str) {
        let message = format!("{NOT_YET}{what}");
        self.report.add(&self.place, Part::Value, Kind::Unsupported, &message, Some(meanwhile));
    }

    pub fn unsupported_key(&self, what: &str, meanwhile: &str) {
        let message = format!("{NOT_YET}{what}");
        self.report.add(&self.place, Part::Key, Kind::Unsupported, &message, Some(meanwhile));
    }

    pub fn mistyped(&self, wanted: &str, hint: Option<String>) {
        let message = format!("expected {wanted}, found {}", type_name(self.value));
        self.report.add(&self.place, Part::Value, Kind::Type, &message, hint.as_deref());
    }

    pub fn string(&self) -> Option<&'r str> {
        if let Some(text) = self.value.as_str() {
            return Some(text);
        }
        let hint = scalar_text(self.value).map(|text| format!("write it in quotes: \"{text}\""));
        self.mistyped("a text", hint);
        None
    }

    pub fn flag(&self) -> Option<bool> {
        if let Some(flag) = self.value.as_bool() {
            return Some(flag);
        }
        self.mistyped("true or false", None);
        None
    }

    pub fn table(&self) -> Option<&'r DeTable<'r>> {
        if let Some(table) = self.value.as_table() {
            return Some(table);
        }
        self.mistyped("a table", None);
        None
    }

    /// A whole number from 0.
    pub fn count(&self) -> Option<u32> {
        let DeValue::Integer(number) = self.value else {
            let hint = self.value.as_str().and_then(|text| text.parse::<u32>().ok());
            self.mistyped("a whole number", hint.map(|number| format!("write it without quotes: {number}")));
            return None;
        };
        match i128::from_str_radix(number.as_str(), number.radix()).map(u32::try_from) {
            Ok(Ok(number)) => Some(number),
            Ok(Err(_)) | Err(_) => {
                let sign = if number.as_str().starts_with('-') { "negative" } else { "too large" };
                self.wrong(format!("the number is {sign}"), None);
                None
            }
        }
    }

    /// A whole number or one with a fraction, from 0.
    pub fn number(&self) -> Option<f64> {
        let number = match self.value {
            DeValue::Integer(_) => return self.count().map(f64::from),
            DeValue::Float(number) => number.as_str().parse::<f64>().unwrap_or(f64::NAN),
            _ => {
                self.mistyped("a number", None);
                return None;
            }
        };
        if number >= 0.0 && number <= f64::from(u32::MAX) {
            return Some(number);
        }
        self.wrong(if number < 0.0 { "the number is negative" } else { "the number is too large" }, None);
        None
    }

    /// A span of time in seconds, to the millisecond.
    pub fn seconds(&self) -> Option<Duration> {
        if let Some(text) = self.value.as_str() {
            let number: String = text.chars().take_while(char::is_ascii_digit).collect();
            let hint = (!number.is_empty() && number.len() < 8).then(|| match text[number.len()..].trim() {
                "m" | "min" => format!("write the number of seconds: {}", number.parse().unwrap_or(0_u64) * 60),
                _ => format!("write the number of seconds: {number}"),
            });
            self.mistyped("a number of seconds", hint);
            return None;
        }
        let millis = (self.number()? * 1000.0).round();
        // In range: at most 2^32 seconds.
        Some(Duration::from_millis(millis as u64))
    }

    /// The elements of an array.
    pub fn items(&self) -> Vec<Item<'r>> {
        let Some(array) = self.value.as_array() else {
            let text = scalar_text(self.value).or_else(|| self.value.as_str().map(str::to_owned));
            self.mistyped("an array", text.map(|text| format!("write it in brackets: [\"{text}\"]")));
            return Vec::new();
        };
        let element = |(at, value): (usize, &'r ::toml::Spanned<DeValue<'r>>)| Item {
            report: self.report,
            place: self.place.index(at),
            value: value.get_ref(),
        };
        array.iter().enumerate().map(element).collect()
    }

    /// The texts of an array.
    pub fn strings(&self) -> Vec<(Item<'r>, &'r str)> {
        self.items().into_iter().filter_map(|item| item.string().map(|text| (item, text))).collect()
    }

    /// Parses the text, and reports what the parser says.
    pub fn parse<T, E: std::fmt::Display>(
        &self,
        parse: impl FnOnce(&str) -> Result<T, E>,
        hint: Option<&str>,
    ) -> Option<T> {
        match parse(self.string()?) {
            Ok(value) => Some(value),
            Err(error) => {
                self.wrong(error.to_string(), hint);
                None
            }
        }
    }

    /// One of some words.
    pub fn word(&self, words: &[&'static str]) -> Option<&'static str> {
        let text = self.string()?;
        if let Some(word) = words.iter().find(|word| **word == text) {
            return Some(word);
        }
        let choices = crate::spec::check::one_of(words);
        let hint = suggestion(text, words.iter().copied());
        self.wrong(format!("`{text}` is not {choices}"), hint.as_deref());
        None
    }
}

fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}

/// How a number or a flag is written.
fn scalar_text(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::Integer(number) => Some(number.to_string()),
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        DeValue::Boolean(flag) => Some(flag.to_string()),
        DeValue::String(_) | DeValue::Datetime(_) | DeValue::Array(_) | DeValue::Table(_) => None,
    }
}
