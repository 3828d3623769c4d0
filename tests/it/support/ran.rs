//! A program that was run to its end.

use std::fmt;
use std::io::{self, Write as _};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::wait::wait_for;

/// Past it, a command hangs.
const END_MAX: Duration = Duration::from_secs(150);

#[derive(Debug, Clone)]
pub struct Ran {
    pub command: String,
    /// -1 if a signal ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

/// A program under way, whose output is being read. It does not outlive this.
#[derive(Debug)]
pub struct Running {
    command: String,
    begun: Instant,
    child: Child,
    stdout: Collected,
    stderr: Collected,
}

/// What has come out of a pipe, and the thread that reads it.
#[derive(Debug)]
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Running {
    /// Starts it, with this on its standard input.
    pub fn start(mut command: Command, input: &[u8]) -> Running {
        let words = std::iter::once(command.get_program()).chain(command.get_args());
        let words: Vec<String> = words.map(|word| word.to_string_lossy().into_owned()).collect();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let begun = Instant::now();
        let mut child = command.spawn().unwrap_or_else(|error| panic!("cannot run {}: {error}", words[0]));
        let mut stdin = child.stdin.take().unwrap();
        // One that does not read its input closes it: its affair.
        drop(stdin.write_all(input));
        drop(stdin);
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let (stdout, stderr) = (Collected::from(stdout), Collected::from(stderr));
        Running { command: words.join(" "), begun, child, stdout, stderr }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// SIGKILL, if it runs still.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
    }

    /// Standard output up to now.
    pub fn stdout(&self) -> String {
        self.stdout.text()
    }

    /// Standard error up to now.
    pub fn stderr(&self) -> String {
        self.stderr.text()
    }

    /// Waits for its end.
    #[track_caller]
    pub fn end(mut self) -> Ran {
        let what = format!("the end of {}", self.command);
        let (status, _): (ExitStatus, _) = wait_for(&what, END_MAX, || self.child.try_wait().unwrap());
        let took = self.begun.elapsed();
        let (stdout, stderr) = (self.stdout.end(), self.stderr.end());
        Ran { command: self.command.clone(), code: status.code().unwrap_or(-1), stdout, stderr, took }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        drop(self.child.kill());
        drop(self.child.wait());
        if thread::panicking() {
            // Nobody to tell when standard error is gone.
            drop(writeln!(io::stderr(), "--- what {} said on standard error\n{}", self.command, self.stderr.text()));
        }
    }
}

impl Collected {
    fn from(mut pipe: impl io::Read + Send + 'static) -> Collected {
        let bytes = Arc::<Mutex<Vec<u8>>>::default();
        let mut to = Keep(Arc::clone(&bytes));
        let thread = thread::spawn(move || {
            // What came until it broke is what there is to look at.
            drop(io::copy(&mut pipe, &mut to));
        });
        Collected { bytes, thread: Some(thread) }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes.lock().unwrap()).into_owned()
    }

    fn end(&mut self) -> String {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
        self.text()
    }
}

struct Keep(Arc<Mutex<Vec<u8>>>);

impl io::Write for Keep {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Ran {
    /// Fails the test unless it ended with 0.
    #[track_caller]
    pub fn succeeded(self) -> Ran {
        self.exited(0)
    }

    #[track_caller]
    pub fn exited(self, code: i32) -> Ran {
        assert_eq!(self.code, code, "{self}");
        self
    }

    /// Standard output as one document.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(self.stdout.trim()).unwrap_or_else(|error| panic!("{error}: {self}"))
    }

    /// Standard output as a document a line.
    #[track_caller]
    pub fn json_lines(&self) -> Vec<Value> {
        let parse = |line: &str| serde_json::from_str(line).unwrap_or_else(|error| panic!("{error}: {line}: {self}"));
        self.stdout.lines().map(parse).collect()
    }

    /// Fails the test unless standard error has all of these.
    #[track_caller]
    pub fn says(self, parts: &[&str]) -> Ran {
        for part in parts {
            assert!(self.stderr.contains(part), "no `{part}` in what it said: {self}");
        }
        self
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Ran { command, code, stdout, stderr, took } = self;
        write!(f, "`{command}` ended with {code} after {took:.1?}\n--- stdout\n{stdout}--- stderr\n{stderr}")
    }
}
