//! How a command ends. Scripts branch on the number and people read the lines, so both are made in one place.

use std::fmt;
use std::ops::{Deref, DerefMut};
use std::process::ExitCode;

use orca_cluster::command::Refusal;
use orca_cluster::state::Evidence;
use orca_wire::message::client::{Reason, Refused};
use serde::Serialize;

/// Exit codes. The numbers are an interface: they never change their meaning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
#[repr(u8)]
pub enum Exit {
    Done = 0,
    General = 1,
    Input = 2,
    Changes = 3,
    Unauthorised = 4,
    NotFound = 5,
    Conflict = 6,
    RolledBack = 7,
    Degraded = 8,
    TimedOut = 9,
    Unreachable = 10,
    NoQuorum = 11,
    Interrupted = 130,
}

impl Exit {
    pub const ALL: [Exit; 13] = [
        Exit::Done,
        Exit::General,
        Exit::Input,
        Exit::Changes,
        Exit::Unauthorised,
        Exit::NotFound,
        Exit::Conflict,
        Exit::RolledBack,
        Exit::Degraded,
        Exit::TimedOut,
        Exit::Unreachable,
        Exit::NoQuorum,
        Exit::Interrupted,
    ];

    pub fn code(self) -> u8 {
        self as u8
    }

    /// As `--help` says it.
    pub fn meaning(self) -> &'static str {
        match self {
            Exit::Done => "done",
            Exit::General => "failed for another reason",
            Exit::Input => "bad input or usage; nothing was sent",
            Exit::Changes => "`plan --exit-code` has changes",
            Exit::Unauthorised => "not authorised",
            Exit::NotFound => "not found",
            Exit::Conflict => "conflict: the state has moved, or another deploy of the service runs",
            Exit::RolledBack => "deploy failed and was rolled back; the old version still serves",
            Exit::Degraded => "deploy failed, and the service is degraded",
            Exit::TimedOut => "stopped waiting; the cluster goes on with it",
            Exit::Unreachable => "the cluster cannot be reached",
            Exit::NoQuorum => "the cluster has no quorum and can only be read",
            Exit::Interrupted => "interrupted",
        }
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit.code())
    }
}

/// Why a command did not do what was asked: the thing, the cause, the next step. Boxed: it is rare, and large.
#[derive(Debug, Clone, Serialize)]
#[serde(transparent)]
pub struct Failure {
    account: Box<Account>,
}

#[derive(Debug, Clone, Serialize)]
pub struct Account {
    #[serde(rename = "code")]
    pub exit: Exit,
    pub message: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub why: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub seen: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub logs: Vec<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub fix: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub more: Option<String>,
    /// What is wrong in the files, if that is it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub problems: Vec<orca_cluster::spec::toml::Problem>,
    /// What people are shown above the message: the files with what is wrong underlined.
    #[serde(skip)]
    pub report: String,
    /// What else went wrong at the same time. Programs find it with the service it is about.
    #[serde(skip)]
    pub others: Vec<Failure>,
    /// Whoever answered is not who was meant.
    #[serde(skip)]
    pub stranger: bool,
    /// What of the files does not fit the cluster, until it is known where that is written.
    #[serde(skip)]
    pub unfit: Vec<Refusal>,
}

impl Failure {
    pub fn new(exit: Exit, message: impl Into<String>) -> Failure {
        let account = Account {
            exit,
            message: message.into(),
            why: Vec::new(),
            seen: Vec::new(),
            logs: Vec::new(),
            fix: Vec::new(),
            more: None,
            problems: Vec::new(),
            report: String::new(),
            others: Vec::new(),
            stranger: false,
            unfit: Vec::new(),
        };
        Failure { account: Box::new(account) }
    }

    pub fn input(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Input, message)
    }

    pub fn general(message: impl Into<String>) -> Failure {
        Failure::new(Exit::General, message)
    }

    pub fn why(mut self, cause: impl Into<String>) -> Failure {
        self.why.push(cause.into());
        self
    }

    pub fn fix(mut self, step: impl Into<String>) -> Failure {
        self.fix.push(step.into());
        self
    }

    pub fn more(mut self, command: impl Into<String>) -> Failure {
        self.more = Some(command.into());
        self
    }

    /// The first of several, and the others behind it. They end as the worst of them does.
    pub fn of_all(failures: impl IntoIterator<Item = Failure>) -> Option<Failure> {
        let mut failures = failures.into_iter();
        let mut first = failures.next()?;
        first.others.extend(failures);
        let worst = first.others.iter().map(|other| other.exit).fold(first.exit, Exit::max);
        first.exit = worst;
        Some(first)
    }

    /// An error of a library, with its causes as the `why`.
    pub fn from_error(exit: Exit, error: &dyn std::error::Error) -> Failure {
        let mut failure = Failure::new(exit, error.to_string());
        let mut cause = error.source();
        while let Some(error) = cause {
            failure.why.push(error.to_string());
            cause = error.source();
        }
        failure
    }

    /// Sorts what a diagnosis saw into what was seen and what the replica wrote.
    pub fn evidence<'a>(mut self, evidence: impl IntoIterator<Item = &'a Evidence>) -> Failure {
        for evidence in evidence {
            match evidence {
                Evidence::Printed(line) => self.logs.push(line.clone()),
                Evidence::Seen(line) => self.seen.push(line.clone()),
            }
        }
        self
    }
}

impl Deref for Failure {
    type Target = Account;
    fn deref(&self) -> &Account {
        &self.account
    }
}

impl DerefMut for Failure {
    fn deref_mut(&mut self) -> &mut Account {
        &mut self.account
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

impl From<Refused> for Failure {
    fn from(refused: Refused) -> Failure {
        let exit = match refused.reason {
            Reason::Invalid => Exit::Input,
            Reason::Unauthorised => Exit::Unauthorised,
            Reason::NotFound => Exit::NotFound,
            Reason::Conflict => Exit::Conflict,
            Reason::NoQuorum => Exit::NoQuorum,
            Reason::TimedOut => Exit::TimedOut,
            Reason::Failed => Exit::General,
        };
        let mut failure = Failure::new(exit, refused.message);
        failure.fix.extend(refused.hint);
        failure.unfit = refused.unfit;
        failure
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_numbers_are_those_of_the_product() {
        let numbers: Vec<u8> = Exit::ALL.iter().map(|exit| exit.code()).collect();
        assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 130]);
    }

    #[test]
    fn a_refusal_becomes_its_exit_code() {
        let refused = |reason| Refused { reason, message: "no".to_owned(), hint: None, unfit: Vec::new() };
        let exit = |reason| Failure::from(refused(reason)).exit;
        assert_eq!(exit(Reason::Unauthorised), Exit::Unauthorised);
        assert_eq!(exit(Reason::NotFound), Exit::NotFound);
        assert_eq!(exit(Reason::Conflict), Exit::Conflict);
        assert_eq!(exit(Reason::NoQuorum), Exit::NoQuorum);
        assert_eq!(exit(Reason::Invalid), Exit::Input);
    }
}
