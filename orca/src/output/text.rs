//! Text with colours and a known width. Screens are built from it as values, so that a test can look at one without a
//! terminal, and so that what came from elsewhere can never move the cursor.

use std::fmt::Write as _;

use unicode_width::{UnicodeWidthChar as _, UnicodeWidthStr as _};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ink {
    Plain,
    Bold,
    Dim,
    Red,
    Green,
    Yellow,
    Blue,
    Magenta,
    Cyan,
}

impl Ink {
    fn code(self) -> &'static str {
        match self {
            Ink::Plain => "",
            Ink::Bold => "\x1b[1m",
            Ink::Dim => "\x1b[2m",
            Ink::Red => "\x1b[31m",
            Ink::Green => "\x1b[32m",
            Ink::Yellow => "\x1b[33m",
            Ink::Blue => "\x1b[34m",
            Ink::Magenta => "\x1b[35m",
            Ink::Cyan => "\x1b[36m",
        }
    }
}

/// One line, or a cell of one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Text {
    spans: Vec<(Ink, String)>,
}

impl Text {
    pub fn new() -> Text {
        Text::default()
    }

    pub fn plain(text: impl Into<String>) -> Text {
        Text::of(Ink::Plain, text)
    }

    pub fn of(ink: Ink, text: impl Into<String>) -> Text {
        let text: String = text.into();
        Text { spans: vec![(ink, printable(&text))] }
    }

    pub fn and(mut self, ink: Ink, text: impl Into<String>) -> Text {
        let text: String = text.into();
        self.spans.push((ink, printable(&text)));
        self
    }

    pub fn then(mut self, other: Text) -> Text {
        self.spans.extend(other.spans);
        self
    }

    pub fn width(&self) -> usize {
        self.spans.iter().map(|(_, text)| text.width()).sum()
    }

    /// Cut to so many columns, with dots where something is missing.
    pub fn fit(self, columns: usize) -> Text {
        if self.width() <= columns {
            return self;
        }
        let mut left = columns.saturating_sub(3);
        let mut short = Text::new();
        for (ink, text) in self.spans {
            let mut part = String::new();
            for c in text.chars() {
                let width = c.width().unwrap_or(0);
                if width > left {
                    left = 0;
                    break;
                }
                left -= width;
                part.push(c);
            }
            short.spans.push((ink, part));
            if left == 0 {
                break;
            }
        }
        short.and(Ink::Dim, &"..."[..columns.min(3)])
    }

    pub fn render(&self, colour: bool) -> String {
        let mut out = String::new();
        for (ink, text) in &self.spans {
            if colour && *ink != Ink::Plain && !text.is_empty() {
                let _ = write!(out, "{}{text}\x1b[0m", ink.code()); // Writing to a String cannot fail.
            } else {
                out.push_str(text);
            }
        }
        out
    }
}

/// Which side the cells of a column keep to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    Left,
    Right,
}

const GAP: usize = 2;

/// Rows with columns as wide as their widest cell; a column without any text takes no room.
pub fn table(indent: usize, sides: &[Side], rows: Vec<Vec<Text>>) -> Vec<Text> {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> =
        (0..columns).map(|at| rows.iter().filter_map(|row| row.get(at)).map(Text::width).max().unwrap_or(0)).collect();
    let line = |row: Vec<Text>| {
        let last = row.iter().rposition(|cell| cell.width() > 0);
        let mut line = Text::plain(" ".repeat(indent));
        let mut first = true;
        for (at, cell) in row.into_iter().enumerate() {
            if widths[at] == 0 || last.is_none_or(|last| at > last) {
                continue;
            }
            if !std::mem::take(&mut first) {
                line = line.and(Ink::Plain, " ".repeat(GAP));
            }
            let padding = " ".repeat(widths[at] - cell.width());
            line = match sides.get(at).copied().unwrap_or(Side::Left) {
                Side::Right => line.and(Ink::Plain, padding).then(cell),
                Side::Left if Some(at) == last => line.then(cell),
                Side::Left => line.then(cell).and(Ink::Plain, padding),
            };
        }
        line
    };
    rows.into_iter().map(line).collect()
}

/// Text that a terminal prints and does not obey.
fn printable(text: &str) -> String {
    let shown = |c: char| match c {
        '\t' | '\n' => ' ',
        '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}' => '\u{fffd}',
        c if c.is_control() => '\u{fffd}',
        c => c,
    };
    text.chars().map(shown).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_is_cut_by_columns_and_not_by_bytes() {
        let text = Text::of(Ink::Red, "日本語").and(Ink::Plain, "abc");
        assert_eq!(text.width(), 9);
        assert_eq!(text.clone().fit(9).render(false), "日本語abc");
        assert_eq!(text.clone().fit(8).render(false), "日本...");
        assert_eq!(text.fit(2).render(false), "..");
    }

    #[test]
    fn what_is_shown_is_never_obeyed() {
        assert_eq!(Text::plain("a\x1b[2Jb\u{202e}c").render(true), "a\u{fffd}[2Jb\u{fffd}c");
    }

    #[test]
    fn empty_columns_take_no_room() {
        let row = |a: &str, b: &str, c: &str| vec![Text::plain(a), Text::plain(b), Text::plain(c)];
        let lines = table(1, &[Side::Left, Side::Left, Side::Right], vec![row("a", "", "1"), row("bbb", "", "10")]);
        let lines: Vec<String> = lines.iter().map(|line| line.render(false)).collect();
        assert_eq!(lines, [" a     1", " bbb  10"]);
    }
}
