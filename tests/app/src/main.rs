//! A service that misbehaves on command: what the tests deploy. No dependencies, so that it links statically into
//! an image with nothing else in it.
//!
//! Without arguments it serves HTTP/1.1 on `BIND:PORT`, one thread for each connection. `PATHS` lists what it answers,
//! `VARIABLES` what changes it. With an argument it is a command to exec inside the container: see [`command`].

mod command;
mod http;
mod sha1;
mod sys;
mod websocket;

use std::collections::HashMap;
use std::env;
use std::io::{self, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use http::{Request, Response};

const PATHS: &str = "\
/               hello, with the version
/healthz        200, or 503 after /unready
/version        $VERSION
/env?NAME       that variable, or 404
/file?PATH      that file, or 404
/headers        the request as it arrived
/echo           the request's body
/slow?MS        answers after so long
/big?KIB        so much body
/stream?N,MS    N chunks, one every MS milliseconds
/ws             WebSocket, echoes messages
/status?CODE    answers with it
/exit?CODE      ends the process
/crash          aborts
/eat?MIB        uses so much memory, all there is without a number
/hang           never answers
/unready /ready what /healthz says from now on
";

/// Longest that connections may take to end after SIGTERM, so that nothing is left behind for ever.
const DRAIN_MAX: Duration = Duration::from_secs(120);

/// Settings from the environment, read once. `EXIT_AT_START=CODE` logs one line and exits; `START_DELAY_MS` is the
/// time before it listens; `IGNORE_SIGTERM=1` does that.
struct Variables {
    version: String,
    bind: String,
    port: u16,
    start_delay: Duration,
    exit_at_start: Option<u8>,
    ignore_sigterm: bool,
}

struct Server {
    version: String,
    ready: AtomicBool,
    draining: AtomicBool,
    connections: Mutex<HashMap<u64, Connection>>,
    gone: Condvar,
    next: AtomicU64,
}

struct Connection {
    stream: TcpStream,
    use_: Use,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Use {
    Idle,
    Request,
    WebSocket,
}

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let Some((name, rest)) = arguments.split_first() {
        return command::run(name, rest);
    }
    match serve(&Variables::read()) {
        Ok(code) => code,
        Err(error) => {
            log(&format!("cannot serve: {error}"));
            ExitCode::FAILURE
        }
    }
}

impl Variables {
    fn read() -> Variables {
        let text = |name: &str| env::var(name).ok().filter(|v| !v.is_empty());
        let number = |name: &str| text(name).and_then(|v| v.parse::<u64>().ok());
        Variables {
            version: text("VERSION").unwrap_or_else(|| "0".to_owned()),
            bind: text("BIND").unwrap_or_else(|| "0.0.0.0".to_owned()),
            port: number("PORT").and_then(|n| u16::try_from(n).ok()).unwrap_or(8080),
            start_delay: Duration::from_millis(number("START_DELAY_MS").unwrap_or(0)),
            exit_at_start: number("EXIT_AT_START").and_then(|n| u8::try_from(n).ok()),
            ignore_sigterm: text("IGNORE_SIGTERM").is_some_and(|v| v != "0"),
        }
    }
}

fn serve(variables: &Variables) -> io::Result<ExitCode> {
    let signals = sys::signals()?;
    if let Some(code) = variables.exit_at_start {
        log(&format!("fatal: told to exit with {code} at start"));
        return Ok(ExitCode::from(code));
    }
    thread::sleep(variables.start_delay);

    let listener = TcpListener::bind((variables.bind.as_str(), variables.port))?;
    log(&format!("version {} listening on http://{}", variables.version, listener.local_addr()?));
    let server = Arc::new(Server {
        version: variables.version.clone(),
        ready: AtomicBool::new(true),
        draining: AtomicBool::new(false),
        connections: Mutex::default(),
        gone: Condvar::new(),
        next: AtomicU64::new(0),
    });
    let accepting = Arc::clone(&server);
    let address = listener.local_addr()?;
    thread::spawn(move || accept(&accepting, listener));

    for signal in signals {
        log(&format!("got signal {signal}"));
        if !variables.ignore_sigterm {
            break;
        }
    }
    server.draining.store(true, Ordering::SeqCst);
    // Wakes the accepting thread, which then closes its socket: whoever comes later is refused, not left waiting.
    drop(TcpStream::connect((address.ip(), address.port())));
    let unfinished = server.drain();
    log(&format!("stopped, {unfinished} connections unfinished"));
    Ok(ExitCode::SUCCESS)
}

fn accept(server: &Arc<Server>, listener: TcpListener) {
    for stream in listener.incoming() {
        if server.draining.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let server = Arc::clone(server);
        thread::spawn(move || {
            // An error here is a client that went away: its affair.
            drop(server.connection(stream));
        });
    }
}

impl Server {
    fn connections(&self) -> MutexGuard<'_, HashMap<u64, Connection>> {
        self.connections.lock().expect("no thread panics while it holds the connections")
    }

    fn connection(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let kept = Connection { stream: stream.try_clone()?, use_: Use::Idle };
        self.connections().insert(id, kept);
        let result = self.requests(id, &stream);
        self.connections().remove(&id);
        self.gone.notify_all();
        result
    }

    fn requests(&self, id: u64, stream: &TcpStream) -> io::Result<()> {
        let mut reader = http::Reader::new(stream);
        loop {
            if !reader.wait()? || !self.begin(id, Use::Request) {
                return Ok(());
            }
            let Some(request) = reader.request()? else { return Ok(()) };
            if request.path == "/ws" {
                self.begin(id, Use::WebSocket);
                return websocket::serve(stream, &mut reader, &request);
            }
            let last = request.wants_close;
            let response = self.answer(&request);
            let close = last || self.draining.load(Ordering::SeqCst);
            response.write(stream, close, request.method == "HEAD")?;
            if close || !self.begin(id, Use::Idle) {
                return Ok(());
            }
        }
    }

    /// Whether the connection may go on like that: an idle one may not once the server drains.
    fn begin(&self, id: u64, use_: Use) -> bool {
        let mut connections = self.connections();
        if use_ == Use::Idle && self.draining.load(Ordering::SeqCst) {
            return false;
        }
        match connections.get_mut(&id) {
            Some(connection) => connection.use_ = use_,
            None => return false,
        }
        true
    }

    /// Closes what is idle, says goodbye on WebSockets, waits for requests to end; gives how many did not.
    fn drain(&self) -> usize {
        let deadline = Instant::now() + DRAIN_MAX;
        let mut connections = self.connections();
        for connection in connections.values() {
            // One that is already closed needs nothing.
            match connection.use_ {
                Use::Idle => drop(connection.stream.shutdown(Shutdown::Both)),
                Use::WebSocket => drop(websocket::going_away(&connection.stream)),
                Use::Request => {}
            }
        }
        while !connections.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                break;
            }
            connections = self.gone.wait_timeout(connections, left).expect("as in `connections`").0;
        }
        connections.len()
    }

    fn answer(&self, request: &Request) -> Response {
        let number = |default: u64| request.query.parse::<u64>().unwrap_or(default);
        match request.path.as_str() {
            "/" => Response::text(200, format!("hello from version {}\n", self.version)),
            "/healthz" if self.ready.load(Ordering::SeqCst) => Response::text(200, "ok\n"),
            "/healthz" => Response::text(503, "told to be unready\n"),
            "/ready" => self.set_ready(true),
            "/unready" => self.set_ready(false),
            "/version" => Response::text(200, format!("{}\n", self.version)),
            "/env" => Response::maybe(env::var(&request.query).ok().map(String::into_bytes)),
            "/file" => Response::maybe(std::fs::read(&request.query).ok()),
            "/headers" => Response::text(200, request.head.clone()),
            "/echo" => Response::bytes(200, request.body.clone()),
            "/slow" => {
                thread::sleep(Duration::from_millis(number(1000)));
                Response::text(200, "slow\n")
            }
            "/big" => {
                let size = usize::try_from(number(1024).min(1 << 20)).unwrap_or(0) << 10;
                Response::bytes(200, vec![b'x'; size])
            }
            "/stream" => {
                let (count, pause) = request.query.split_once(',').unwrap_or((&request.query, "100"));
                Response::stream(count.parse().unwrap_or(10), Duration::from_millis(pause.parse().unwrap_or(100)))
            }
            "/status" => Response::text(u16::try_from(number(200)).unwrap_or(200), "as asked\n"),
            "/exit" => {
                let code = i32::try_from(number(1)).unwrap_or(1);
                log(&format!("told to exit with {code}"));
                std::process::exit(code)
            }
            "/crash" => {
                log("told to crash");
                std::process::abort()
            }
            "/eat" => Response::text(200, format!("ate {} MiB\n", eat(number(u64::MAX)))),
            "/hang" => loop {
                thread::park();
            },
            _ => Response::text(404, format!("no such path; there are\n{PATHS}")),
        }
    }

    fn set_ready(&self, ready: bool) -> Response {
        self.ready.store(ready, Ordering::SeqCst);
        log(if ready { "told to be ready" } else { "told to be unready" });
        Response::text(200, "ok\n")
    }
}

/// Takes so many MiB and keeps them.
fn eat(mebibytes: u64) -> u64 {
    log("told to eat memory");
    for _ in 0..mebibytes {
        let mut block = vec![0u8; 1 << 20];
        // Only pages that were written count.
        block.iter_mut().step_by(1024).for_each(|byte| *byte = 1);
        std::hint::black_box(Box::leak(block.into_boxed_slice()));
    }
    mebibytes
}

fn log(line: &str) {
    // Nobody to tell when the log itself is gone.
    drop(writeln!(io::stdout(), "{line}"));
}
