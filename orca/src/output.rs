//! What a command says. Results go to standard output, everything else to standard error; with `--json`, results are
//! lines of JSON with the version of their schema. Screens are made by pure functions from a [`Screen`] and values.

pub mod board;
pub mod event;
pub mod history;
pub mod plan;
pub mod progress;
#[cfg(test)]
mod sample;
pub mod status;
pub mod text;
pub mod why;

use std::io::{self, IsTerminal as _, Write as _};

use jiff::tz::TimeZone;
use orca_cluster::time::Timestamp;
use serde::Serialize;

use crate::cli::Global;
use crate::exit::{Exit, Failure};
use crate::moment;
use text::{Ink, Text};

/// Raised when a field changes its meaning or goes; new fields may come at any time.
pub const SCHEMA: u32 = 1;
/// For what is not a terminal.
const WIDTH: usize = 100;

/// Where and when a screen is looked at.
#[derive(Debug, Clone)]
pub struct Screen {
    pub width: usize,
    pub colour: bool,
    pub now: Timestamp,
    pub zone: TimeZone,
}

#[derive(Debug, Clone)]
pub struct Output {
    pub json: bool,
    pub quiet: bool,
    pub verbose: u8,
    pub yes: bool,
    /// Whether somebody can be asked.
    pub can_ask: bool,
    /// Whether standard error can be redrawn.
    pub live: bool,
    pub out_is_terminal: bool,
    out_colour: bool,
    err_colour: bool,
}

#[derive(Serialize)]
struct Envelope<'a, T: Serialize> {
    schema: u32,
    r#type: &'a str,
    #[serde(flatten)]
    value: &'a T,
}

impl Output {
    pub fn new(global: &Global) -> Output {
        let (out, err) = (io::stdout().is_terminal(), io::stderr().is_terminal());
        // https://no-color.org: set and not empty.
        let allowed = std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
        let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
        Output {
            json: global.json,
            quiet: global.quiet,
            verbose: global.verbose,
            yes: global.yes,
            can_ask: io::stdin().is_terminal() && err,
            live: err && !dumb && !global.quiet && !global.json,
            out_is_terminal: out,
            out_colour: out && allowed && !dumb,
            err_colour: err && allowed && !dumb,
        }
    }

    /// For what goes to standard output.
    pub fn screen(&self, now: Timestamp) -> Screen {
        let width = if self.out_is_terminal { columns(io::stdout()) } else { WIDTH };
        Screen { width, colour: self.out_colour, now, zone: TimeZone::system() }
    }

    /// For what goes to standard error.
    pub fn side_screen(&self, now: Timestamp) -> Screen {
        let width = if self.live { columns(io::stderr()) } else { WIDTH };
        Screen { width, colour: self.err_colour, now, zone: TimeZone::system() }
    }

    /// Results for people.
    pub fn print(&self, text: &str) {
        let mut out = io::stdout().lock();
        let written = out.write_all(text.as_bytes()).and_then(|()| out.flush());
        ended_pipe(&written);
    }

    pub fn lines(&self, lines: &[Text]) {
        let text: String = lines.iter().map(|line| line.render(self.out_colour) + "\n").collect();
        self.print(&text);
    }

    /// One result for programs, on one line.
    pub fn object<T: Serialize>(&self, kind: &str, value: &T) {
        let envelope = Envelope { schema: SCHEMA, r#type: kind, value };
        let text = serde_json::to_string(&envelope).expect("what is printed has text as keys");
        self.print(&(text + "\n"));
    }

    /// Progress and remarks; nothing is lost if nobody reads them.
    pub fn notice(&self, line: &Text) {
        if !self.quiet && !self.json {
            self.complain(&(line.render(self.err_colour) + "\n"));
        }
    }

    /// Said even with `-q`.
    pub fn warn(&self, message: &str) {
        let line = Text::of(Ink::Yellow, "warning:").and(Ink::Plain, format!(" {message}"));
        self.complain(&(line.render(self.err_colour) + "\n"));
    }

    pub fn fail(&self, failure: &Failure) {
        if self.json {
            let envelope = Envelope { schema: SCHEMA, r#type: "error", value: &Failed { error: failure } };
            let text = serde_json::to_string(&envelope).expect("what is printed has text as keys");
            self.complain(&(text + "\n"));
            return;
        }
        self.complain(&failure.report);
        let text: String = failed(failure).iter().map(|line| line.render(self.err_colour) + "\n").collect();
        self.complain(&text);
    }

    /// To standard error as it is.
    pub fn complain(&self, text: &str) {
        let mut err = io::stderr().lock();
        // There is nowhere left to say that this failed.
        let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
    }

    /// Asks, unless `-y` answers; without a terminal, names the flag.
    pub fn confirm(&self, question: &str) -> Result<(), Failure> {
        if self.yes {
            return Ok(());
        }
        if !self.can_ask {
            return Err(Failure::input(format!("this needs a yes: {question}"))
                .why("there is no terminal to ask on")
                .fix("pass -y if you mean it"));
        }
        self.complain(&format!("{question} [y/N] "));
        let mut answer = String::new();
        let read = io::stdin().read_line(&mut answer);
        match (read, answer.trim().to_ascii_lowercase().as_str()) {
            (Ok(_), "y" | "yes") => Ok(()),
            _ => Err(Failure::general("nothing was done")),
        }
    }
}

#[derive(Serialize)]
struct Failed<'a> {
    error: &'a Failure,
}

/// `orca … | head` is not an error.
fn ended_pipe(written: &io::Result<()>) {
    if let Err(error) = written {
        let code = if error.kind() == io::ErrorKind::BrokenPipe { 0 } else { 1 };
        std::process::exit(code);
    }
}

fn columns(terminal: impl rustix::fd::AsFd) -> usize {
    match rustix::termios::tcgetwinsize(terminal) {
        Ok(size) if size.ws_col > 0 => usize::from(size.ws_col),
        _ => WIDTH,
    }
}

/// An error as people see it, with whatever else went wrong; how it all ends is said last.
pub fn failed(failure: &Failure) -> Vec<Text> {
    let all = std::iter::once(failure).chain(&failure.others);
    let last = failure.others.len();
    all.enumerate().flat_map(|(at, one)| account(one, (at == last).then_some(failure.exit))).collect()
}

/// What, why, what was seen, what to do.
fn account(failure: &Failure, exit: Option<Exit>) -> Vec<Text> {
    let mut lines = vec![Text::of(Ink::Red, "error:").and(Ink::Plain, format!(" {}", failure.message))];
    let mut labelled = |label: &'static str, texts: &[String]| {
        for (at, text) in texts.iter().enumerate() {
            let label = if at == 0 { label } else { "" };
            lines.push(Text::of(Ink::Cyan, format!("  {label:<5} ")).and(Ink::Plain, text));
        }
    };
    labelled("why", &failure.why);
    labelled("seen", &failure.seen);
    labelled("logs", &failure.logs);
    labelled("fix", &failure.fix);
    if let Some(more) = &failure.more {
        let code = exit.map(|exit| format!("     exit code {}", exit.code())).unwrap_or_default();
        labelled("more", &[format!("{more}{code}")]);
    }
    lines
}

/// `1 replica`, `2 replicas`.
pub fn count(number: impl Into<u64>, noun: &str) -> String {
    let number: u64 = number.into();
    if number == 1 { format!("1 {noun}") } else { format!("{} {noun}s", grouped(number)) }
}

/// `48,211`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// `12.4 MB`, as registries count.
pub fn megabytes(bytes: u64) -> String {
    match bytes {
        0..=999_999 => format!("{:.0} kB", bytes as f64 / 1e3),
        1_000_000..=999_999_999 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}

/// `41 ms`, `0.4 ms`, `1.2 s`.
pub fn latency(micros: u64) -> String {
    match micros {
        0..=9_999 => format!("{:.1} ms", micros as f64 / 1e3),
        10_000..=999_999 => format!("{:.0} ms", micros as f64 / 1e3),
        _ => format!("{:.1} s", micros as f64 / 1e6),
    }
}

/// An image as short as people call it: without the usual registry and without the digest.
pub fn short_source(source: &str) -> String {
    let source = source.strip_prefix("docker.io/").unwrap_or(source);
    let source = source.strip_prefix("library/").unwrap_or(source);
    match source.split_once("@sha256:") {
        Some((name, digest)) if name.contains(':') || digest.len() < 12 => name.to_owned(),
        Some((name, digest)) => format!("{name}@{}", &digest[..12]),
        None => source.to_owned(),
    }
}

impl Screen {
    pub fn ago(&self, at: Timestamp) -> String {
        moment::age(self.now.since(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use orca_cluster::state::Evidence;

    #[test]
    fn an_error_names_the_thing_the_cause_and_the_next_step() {
        let failure = Failure::new(
            Exit::RolledBack,
            "api did not become ready on n1; nothing was switched, version 1.4.2 still serves all traffic",
        )
        .why("the process listens on 127.0.0.1:8080; the proxy reaches it on the container's address")
        .evidence(&[
            Evidence::Seen("GET /healthz -> connection refused, 14 tries in 10.0 s".to_owned()),
            Evidence::Printed("listening on http://127.0.0.1:8080".to_owned()),
            // As the program wrote it.
            Evidence::Printed("log: ready".to_owned()),
        ])
        .fix("bind to 0.0.0.0:8080, or set `port` if the app uses another one")
        .more("orca logs api/r7");
        let text: Vec<String> = failed(&failure).iter().map(|line| line.render(false)).collect();
        expect_test::expect![[r#"
            error: api did not become ready on n1; nothing was switched, version 1.4.2 still serves all traffic
              why   the process listens on 127.0.0.1:8080; the proxy reaches it on the container's address
              seen  GET /healthz -> connection refused, 14 tries in 10.0 s
              logs  listening on http://127.0.0.1:8080
                    log: ready
              fix   bind to 0.0.0.0:8080, or set `port` if the app uses another one
              more  orca logs api/r7     exit code 7"#]]
        .assert_eq(&text.join("\n"));
    }

    #[test]
    fn numbers_are_short() {
        assert_eq!([grouped(7), grouped(48_211), grouped(1_000_000)], ["7", "48,211", "1,000,000"]);
        assert_eq!([latency(400), latency(41_200), latency(1_250_000)], ["0.4 ms", "41 ms", "1.2 s"]);
        assert_eq!([megabytes(12_400_000), megabytes(900_000)], ["12.4 MB", "900 kB"]);
        let image = "docker.io/library/redis@sha256:0123456789abcdef0123456789abcdef";
        assert_eq!(
            [short_source(image), short_source("redis:7@sha256:0123456789abcdef")],
            ["redis@0123456789ab", "redis:7"]
        );
    }
}
