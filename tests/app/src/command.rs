//! What `exec` can be told to do inside the container.

use std::io::{self, IsTerminal as _, Read as _, Write as _};
use std::net::TcpStream;
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use crate::sys;

/// How long [`size`] waits for the terminal to change.
const RESIZE_WAIT_MAX: Duration = Duration::from_secs(10);

pub fn run(name: &str, arguments: &[String]) -> ExitCode {
    match name {
        "echo" => sys::print(format!("{}\n", arguments.join(" ")).as_bytes()),
        "complain" => eprintln!("{}", arguments.join(" ")),
        "cat" => cat(),
        "env" => match arguments.first().and_then(|name| std::env::var(name).ok()) {
            Some(value) => sys::print(format!("{value}\n").as_bytes()),
            None => return ExitCode::FAILURE,
        },
        "exit" => {
            let code = arguments.first().and_then(|code| code.parse().ok()).unwrap_or(1);
            sys::print(format!("exit {code}\n").as_bytes());
            return ExitCode::from(code);
        }
        "sleep" => {
            thread::sleep(Duration::from_millis(arguments.first().and_then(|ms| ms.parse().ok()).unwrap_or(1000)))
        }
        "write" => return write(arguments),
        "raise" => {
            sys::raise(arguments.first().and_then(|number| number.parse().ok()).unwrap_or(11));
        }
        "size" => size(),
        "fetch" => return fetch(arguments),
        other => {
            sys::print(
                format!("no command `{other}`: echo, complain, cat, env, exit, sleep, write, raise, size, fetch\n")
                    .as_bytes(),
            );
            return ExitCode::from(2);
        }
    }
    ExitCode::SUCCESS
}

/// `write PATH`: a line to that file; fails as most programs do, in the system's words.
fn write(arguments: &[String]) -> ExitCode {
    let [path] = arguments else { return ExitCode::from(2) };
    match std::fs::write(path, "a line\n") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("cannot write {path}: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `fetch HOST:PORT PATH`: the body of that, over HTTP.
fn fetch(arguments: &[String]) -> ExitCode {
    let [host, path] = arguments else { return ExitCode::from(2) };
    let answer = TcpStream::connect(host).and_then(|mut stream| {
        write!(stream, "GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n")?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).map(|_| answer)
    });
    match answer {
        Ok(answer) => {
            let end = answer.windows(4).position(|window| window == b"\r\n\r\n").map_or(0, |at| at + 4);
            sys::print(&answer[end..]);
            ExitCode::SUCCESS
        }
        Err(error) => {
            sys::print(format!("{host}: {error}\n").as_bytes());
            ExitCode::FAILURE
        }
    }
}

/// Standard input to standard output, as it comes.
fn cat() {
    let mut block = [0; 4096];
    while let Ok(count @ 1..) = io::stdin().lock().read(&mut block) {
        sys::print(&block[..count]);
    }
}

/// Prints `80x24` and again when the terminal changes, then ends; `no terminal` where there is none.
fn size() {
    if !io::stdin().is_terminal() {
        return sys::print(b"no terminal\n");
    }
    let first = sys::terminal_size();
    print_size(first);
    let deadline = Instant::now() + RESIZE_WAIT_MAX;
    while Instant::now() < deadline {
        let now = sys::terminal_size();
        if now != first {
            return print_size(now);
        }
        thread::sleep(Duration::from_millis(5));
    }
}

fn print_size(size: Option<(u16, u16)>) {
    let (columns, rows) = size.unwrap_or_default();
    sys::print(format!("{columns}x{rows}\n").as_bytes());
}
