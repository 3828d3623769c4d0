//! One row of the table: how a fault is made, and what must be said about it.

use std::fmt;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::World;
use crate::support::{Node, Ran, docker};

/// How long after a fault its cause may still be unknown: three exits with their back-off, on a machine under load.
const KNOWN_WITHIN: Duration = Duration::from_secs(30);
/// How often a deploy is planned again because another fault came between.
const PLANS_MAX: u32 = 10;
/// How often in a row the same must be said.
const STEADY: u32 = 3;

#[derive(Debug, Clone, Copy)]
pub enum Place {
    Node,
    Lonely,
}

/// Done to a service after its deploy.
type Injection = Box<dyn Fn(&Case<'_>) + Send + Sync>;
type Asking = Box<dyn Fn(&Case<'_>) -> Ran + Send + Sync>;

pub struct Fault {
    /// Also the name of the service that is asked about.
    pub name: &'static str,
    place: Place,
    /// Deployed one after the other; the last one has the fault, or gets it by `then`.
    files: Vec<String>,
    /// How the last deploy ends.
    exit: i32,
    detach: bool,
    then: Option<Injection>,
    expect: Expect,
}

enum Expect {
    /// `orca why`: this code, and these words in its cause or evidence.
    Cause { code: &'static str, words: Vec<String> },
    /// The deploy says it, and changes nothing.
    Refusal { words: Vec<String> },
    /// What is asked after it says it, ends with this code, and changes nothing.
    LaterRefusal { ask: Asking, exit: i32, words: Vec<String> },
}

/// A fault being injected.
pub struct Case<'a> {
    pub node: &'a Node,
    pub service: &'static str,
}

/// What was said.
pub struct Found {
    wrong: Option<String>,
    code: String,
    cause: String,
}

impl Fault {
    pub fn new(name: &'static str, file: impl Into<String>) -> Fault {
        let expect = Expect::Cause { code: "", words: Vec::new() };
        Fault { name, place: Place::Node, files: vec![file.into()], exit: 8, detach: false, then: None, expect }
    }

    /// The deploy goes well; the fault comes after it.
    pub fn later(mut self, injection: impl Fn(&Case<'_>) + Send + Sync + 'static) -> Fault {
        self.exit = 0;
        self.then = Some(Box::new(injection));
        self
    }

    /// Deployed after the first file, which went well.
    pub fn update(mut self, file: impl Into<String>) -> Fault {
        self.files.push(file.into());
        self
    }

    pub fn exits(mut self, code: i32) -> Fault {
        self.exit = code;
        self
    }

    /// Nothing waits for the rollout, which may not end.
    pub fn detached(mut self) -> Fault {
        self.detach = true;
        self.exits(0)
    }

    pub fn at(mut self, place: Place) -> Fault {
        self.place = place;
        self
    }

    pub fn is<const N: usize>(mut self, code: &'static str, words: [&str; N]) -> Fault {
        self.expect = Expect::Cause { code, words: words.map(str::to_owned).to_vec() };
        self
    }

    pub fn refused<const N: usize>(mut self, exit: i32, words: [&str; N]) -> Fault {
        self.expect = Expect::Refusal { words: words.map(str::to_owned).to_vec() };
        self.exits(exit)
    }

    pub fn later_refused<const N: usize>(
        mut self,
        exit: i32,
        ask: impl Fn(&Case<'_>) -> Ran + Send + Sync + 'static,
        words: [&str; N],
    ) -> Fault {
        self.expect = Expect::LaterRefusal { ask: Box::new(ask), exit, words: words.map(str::to_owned).to_vec() };
        self.exits(0)
    }

    pub fn inject(&self, world: &World) -> Found {
        let case = Case { node: world.at(self.place), service: self.name };
        let found = self.try_inject(&case);
        // An engine has room for few networks, and a node for few crash loops.
        case.orca(&["rm", "-y", "--detach", &case.name()]);
        found
    }

    fn try_inject(&self, case: &Case<'_>) -> Found {
        let deploys: Vec<Ran> = self.files.iter().map(|file| self.deploy(case, file)).collect();
        let (last, before) = deploys.split_last().expect("a fault has a file");
        if let Some(failed) = before.iter().find(|ran| ran.code != 0) {
            return Found::wrong(format!("a deploy before it failed: {failed}"));
        }
        if last.code != self.exit {
            return Found::wrong(format!("its deploy ended with {}, not {}: {last}", last.code, self.exit));
        }
        match &self.expect {
            Expect::Refusal { words } => Found::refusal(last, words),
            Expect::LaterRefusal { ask, exit, words } => match ask(case) {
                ran if ran.code == *exit => Found::refusal(&ran, words),
                ran => Found::wrong(format!("it ended with {}, not {exit}: {ran}", ran.code)),
            },
            Expect::Cause { code, words } => {
                if let Some(injection) = &self.then {
                    injection(case);
                }
                case.wait(code, words)
            }
        }
    }

    fn deploy(&self, case: &Case<'_>, file: &str) -> Ran {
        let wait = if self.detach { "--detach" } else { "--wait" };
        let deploy = || case.node.deploy_with(file, &[wait, "--timeout", "60s"]);
        // What reaches into the host is refused when anything else has changed since it was looked at.
        let moved = |ran: &Ran| ran.code == 6 && ran.stderr.contains("state has moved");
        (1..PLANS_MAX).map(|_| deploy()).find(|ran| !moved(ran)).unwrap_or_else(deploy)
    }
}

impl Case<'_> {
    pub fn name(&self) -> String {
        self.node.name(self.service)
    }

    pub fn orca(&self, arguments: &[&str]) -> Ran {
        self.node.orca(arguments)
    }

    /// A request to the service, which may well not be answered.
    pub fn get(&self, path: &str) {
        drop(self.node.get(self.service, path));
    }

    /// The container that runs now.
    pub fn container(&self) -> String {
        let label = format!("label=orca.service={}", self.name());
        let all = docker(&["ps", "--quiet", "--filter", &label]);
        all.lines().next().expect("it runs").to_owned()
    }

    /// Asks until the right thing is said and goes on being said, or it is too late.
    fn wait(&self, code: &str, words: &[String]) -> Found {
        let deadline = Instant::now() + KNOWN_WITHIN;
        let mut right = 0;
        loop {
            let ran = self.orca(&["why", &self.name(), "--json"]);
            if ran.code != 0 {
                return Found::wrong(format!("`orca why` failed: {ran}"));
            }
            let said = ran.json();
            let found = judge(&said["diagnosis"], code, words);
            right = if found.is_right() { right + 1 } else { 0 };
            if right == STEADY || Instant::now() >= deadline {
                return found;
            }
        }
    }
}

fn judge(diagnosis: &Value, code: &str, words: &[String]) -> Found {
    let text = |key: &str| diagnosis[key].as_str().unwrap_or_default().to_owned();
    let evidence: Vec<&str> =
        diagnosis["evidence"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    let (said, cause, fix) = (text("code"), text("cause"), text("fix"));
    let all = format!("{cause}\n{}", evidence.join("\n"));
    let wrong = if said != code {
        Some(format!("not `{code}`; seen: {}", evidence.join(" | ")))
    } else if let Some(word) = words.iter().find(|word| !all.contains(*word)) {
        Some(format!("`{word}` is not said; seen: {}", evidence.join(" | ")))
    } else if fix.is_empty() {
        Some("no fix is given".to_owned())
    } else {
        None
    };
    Found { wrong, code: said, cause }
}

impl Found {
    fn refusal(ran: &Ran, words: &[String]) -> Found {
        let said = ran.stderr.replace('\n', " ");
        let missing = words.iter().find(|word| !said.contains(*word));
        let wrong = missing.map(|word| format!("`{word}` is not said: {said}"));
        Found { wrong, code: format!("exit {}", ran.code), cause: said }
    }

    fn wrong(what: String) -> Found {
        Found { wrong: Some(what), code: String::new(), cause: String::new() }
    }

    pub fn is_right(&self) -> bool {
        self.wrong.is_none()
    }
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<20} {}", self.code, self.cause)?;
        match &self.wrong {
            Some(wrong) => write!(f, "\n       {wrong}"),
            None => Ok(()),
        }
    }
}
