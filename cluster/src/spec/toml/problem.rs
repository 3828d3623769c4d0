//! What is wrong with a file, for people and for programs: where, what, and what to do about it.

use std::fmt::{self, Write};
use std::ops::Range;

use serde::{Deserialize, Serialize};
use unicode_width::UnicodeWidthChar;

pub use crate::spec::check::Kind;

/// One thing that is wrong with one file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// The file's name, as it was given to us.
    pub file: String,
    /// Bytes from the start of the file.
    pub span: Range<usize>,
    /// From 1.
    pub line: usize,
    /// In characters, from 1.
    pub column: usize,
    pub kind: Kind,
    pub message: String,
    /// What to write instead.
    pub hint: Option<String>,
}

impl fmt::Display for Problem {
    /// On one line, as compilers do: editors and CI systems find the place.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}:{}: {}", self.file, self.line, self.column, self.message)?;
        match &self.hint {
            Some(hint) => write!(f, " ({hint})"),
            None => Ok(()),
        }
    }
}

/// Most columns of a source line that are shown.
const COLUMNS_MAX: usize = 120;
/// Columns shown in front of the span when a line has to be cut.
const COLUMNS_BEFORE: usize = 40;

const BOLD: &str = "\x1b[1m";
const RED: &str = "\x1b[1;31m";
const BLUE: &str = "\x1b[1;34m";
const CYAN: &str = "\x1b[1;36m";
const RESET: &str = "\x1b[0m";

/// The problem with the line it is in, underlined. `source` is the text of the file it was found in.
pub fn render(problem: &Problem, source: &str, color: bool) -> String {
    let paint = |style: &'static str| if color { style } else { "" };
    let (red, bold, blue, cyan, reset) = (paint(RED), paint(BOLD), paint(BLUE), paint(CYAN), paint(RESET));
    let number = problem.line.to_string();
    let margin = " ".repeat(number.len());
    let (line, below) = underlined(problem, source);
    let Problem { file, line: at, column, message, .. } = problem;

    let mut text = String::new();
    let _ = writeln!(text, "{red}error{reset}{bold}: {message}{reset}"); // Writing to a String cannot fail.
    let _ = writeln!(text, "{margin}{blue}-->{reset} {}:{at}:{column}", printable(file));
    let _ = writeln!(text, "{margin} {blue}|{reset}");
    let _ = writeln!(text, "{blue}{number} |{reset} {line}");
    let _ = writeln!(text, "{margin} {blue}|{reset} {red}{below}{reset}");
    if let Some(hint) = &problem.hint {
        let _ = writeln!(text, "{margin} {blue}={reset} {cyan}hint{reset}: {hint}");
    }
    text
}

/// The first line of the span as it can be shown on a terminal, and the marks that go below it.
fn underlined(problem: &Problem, source: &str) -> (String, String) {
    let start = source.floor_char_boundary(problem.span.start);
    let line_start = source[..start].rfind('\n').map_or(0, |at| at + 1);
    let line_end = source[start..].find('\n').map_or(source.len(), |at| start + at);
    let end = source.floor_char_boundary(problem.span.end).clamp(start, line_end);

    let mut line = String::new();
    let mut below = String::new();
    let mut skipped = false;
    let before = source[line_start..start].chars().count();
    for (at, (offset, c)) in source[line_start..line_end].char_indices().enumerate() {
        if before > COLUMNS_MAX - COLUMNS_BEFORE && at < before - COLUMNS_BEFORE {
            skipped = true;
            continue;
        }
        if std::mem::take(&mut skipped) {
            line.push_str("...");
            below.push_str("   ");
        }
        if line.len() > 4 * COLUMNS_MAX || below.len() > COLUMNS_MAX {
            line.push_str("...");
            break;
        }
        let shown = shown(c);
        line.push(shown);
        // An empty span points at the character behind it.
        let mark = if (start..end.max(start + 1)).contains(&(line_start + offset)) { '^' } else { ' ' };
        below.extend(std::iter::repeat_n(mark, shown.width().unwrap_or(1)));
    }
    if !below.contains('^') {
        // It is at the end of the line.
        below.push('^');
    }
    (line.trim_end().to_owned(), below.trim_end().to_owned())
}

/// A character that a terminal prints and does not obey.
fn shown(c: char) -> char {
    match c {
        '\t' => ' ',
        // Direction overrides would make the line read differently from what it says.
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        c if c.is_control() => '\u{fffd}',
        c => c,
    }
}

/// Text that came from the file, fit to be part of a message.
pub(super) fn printable(text: &str) -> String {
    /// Most characters of a message: one line and a half of a wide terminal.
    const LENGTH_MAX: usize = 240;
    let mut short: String = text.chars().take(LENGTH_MAX).map(shown).collect();
    if short.len() < text.len() && text.chars().nth(LENGTH_MAX).is_some() {
        short.push_str("...");
    }
    short
}
