//! A steady load of three kinds of clients, which knows what became of each request.
//!
//! It is open: a request is begun when its time has come, however long the others take. Every request that was sent is
//! in the [`Tally`] with exactly one outcome, so a [`Tally`] can be compared with the proxy's own count to the request.
//! Clients are well-behaved: they take a connection that the server said it will close, or has closed, for closed, and end
//! WebSockets by saying so. They try nothing again.

use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};

use super::wait::{PATIENCE, wait_until};

/// Past it, a request is not answered.
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Failures that a report shows.
const SHOWN_MAX: usize = 8;
/// Addresses that clients connect from, all of this machine: 127.1.1.1 and those that follow it.
const SOURCES: u64 = 64;
const SOURCE_FIRST: u32 = 0x7f01_0101;
const CLOSE: u8 = 8;
const TEXT: u8 = 1;

#[derive(Debug, Clone)]
pub struct Target {
    pub address: SocketAddr,
    pub host: String,
    /// WebSockets are opened at `/ws`.
    pub path: String,
}

impl Target {
    pub fn path(self, path: &str) -> Target {
        Target { path: path.to_owned(), ..self }
    }
}

#[derive(Debug, Clone, Copy)]
pub struct Rates {
    /// Requests a second on connections that are kept.
    pub keep_alive: u32,
    /// Requests a second on connections of their own, with `Connection: close`.
    pub close: u32,
    /// WebSockets open at any time.
    pub web_sockets: u32,
    /// How long each WebSocket lives before its client ends it.
    pub web_socket_life: Duration,
    /// Between two messages on one of them.
    pub message_every: Duration,
}

impl Default for Rates {
    /// 250 requests a second and 10 WebSockets of two seconds each.
    fn default() -> Rates {
        Rates {
            keep_alive: 150,
            close: 100,
            web_sockets: 10,
            web_socket_life: Duration::from_secs(2),
            message_every: Duration::from_millis(50),
        }
    }
}

impl Rates {
    /// For what speaks no WebSocket.
    pub fn plain() -> Rates {
        Rates { web_sockets: 0, ..Rates::default() }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    KeepAlive,
    Close,
    WebSocket,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// Answered whole; a WebSocket: every message came back, and it was closed because we asked.
    Answered { status: u16 },
    /// No connection: the request was not sent.
    Refused { why: String },
    /// The connection ended, or was ended by the server, before all had come.
    Cut {
        /// A WebSocket that had been agreed on: the proxy counts it with status 101.
        opened: bool,
        why: String,
    },
    /// No whole answer in time.
    Silent,
}

/// One request, or one WebSocket from its handshake to its end.
#[derive(Debug, Clone)]
pub struct Record {
    pub kind: Kind,
    /// When its connection was opened; one that is kept has carried others before.
    pub connected: Instant,
    pub begun: Instant,
    pub ended: Instant,
    pub outcome: Outcome,
    /// The first line of what came with 200.
    pub body: Option<String>,
}

/// What became of all of them.
#[derive(Debug, Clone, Default)]
pub struct Tally {
    pub records: Vec<Record>,
    /// Messages that came back.
    pub echoes: u64,
}

#[derive(Debug)]
pub struct Load {
    stop: watch::Sender<bool>,
    tally: Arc<Mutex<Tally>>,
    thread: thread::JoinHandle<()>,
}

#[derive(Debug, Clone)]
struct Clients {
    target: Target,
    rates: Rates,
    tally: Arc<Mutex<Tally>>,
    /// With the time at which each was opened.
    idle: Arc<Mutex<VecDeque<(Instant, Connection)>>>,
    number: Arc<AtomicU64>,
    stopped: watch::Receiver<bool>,
}

type Connection = BufReader<TcpStream>;

impl Load {
    pub fn start(target: Target, rates: Rates) -> Load {
        let (stop, stopped) = watch::channel(false);
        let tally = Arc::<Mutex<Tally>>::default();
        let clients =
            Clients { target, rates, tally: Arc::clone(&tally), idle: Arc::default(), number: Arc::default(), stopped };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let thread = thread::spawn(move || runtime.block_on(clients.run()));
        Load { stop, tally, thread }
    }

    /// What has ended so far.
    pub fn so_far(&self) -> Tally {
        self.tally.lock().unwrap().clone()
    }

    /// How many have been answered so far.
    pub fn answered(&self) -> usize {
        self.tally.lock().unwrap().answered()
    }

    /// Lets so many more be answered.
    #[track_caller]
    pub fn go_on(&self, more: usize) {
        let goal = self.answered() + more;
        wait_until(&format!("{more} more answers"), PATIENCE, || self.answered() >= goal);
    }

    /// Begins nothing more, waits for what is under way, and gives the whole.
    #[track_caller]
    pub fn stop(self) -> Tally {
        self.stop.send(true).unwrap();
        self.thread.join().unwrap();
        self.tally.lock().unwrap().clone()
    }
}

impl Clients {
    async fn run(self) {
        let mut clients = JoinSet::new();
        clients.spawn(self.clone().steady(Kind::KeepAlive, self.rates.keep_alive));
        clients.spawn(self.clone().steady(Kind::Close, self.rates.close));
        for number in 0..self.rates.web_sockets {
            clients.spawn(self.clone().web_sockets(number));
        }
        while let Some(ended) = clients.join_next().await {
            ended.unwrap();
        }
    }

    /// So many requests a second.
    async fn steady(mut self, kind: Kind, rate: u32) {
        if rate == 0 {
            return;
        }
        let mut ticks = interval(Duration::from_secs(1) / rate);
        // What a busy machine kept us from beginning in time is made up for.
        ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
        let mut under_way = JoinSet::new();
        loop {
            tokio::select! {
                _ = ticks.tick() => {
                    let clients = self.clone();
                    under_way.spawn(async move { clients.one(kind).await });
                }
                Some(ended) = under_way.join_next() => ended.unwrap(),
                _ = self.stopped.changed() => break,
            }
        }
        while let Some(ended) = under_way.join_next().await {
            ended.unwrap();
        }
        self.idle.lock().unwrap().clear();
    }

    async fn one(&self, kind: Kind) {
        let begun = Instant::now();
        let kept = if kind == Kind::KeepAlive { self.kept() } else { None };
        let connected = kept.as_ref().map_or(begun, |(connected, _)| *connected);
        let (outcome, body) = match timeout(ANSWER_MAX, self.request(kind, kept)).await {
            Ok(Ok(response)) => {
                let text = String::from_utf8_lossy(&response.body);
                let line = (response.status == 200).then(|| text.lines().next().unwrap_or_default().to_owned());
                (Outcome::Answered { status: response.status }, line)
            }
            Ok(Err(outcome)) => (outcome, None),
            Err(_) => (Outcome::Silent, None),
        };
        self.record(Record { kind, connected, begun, ended: Instant::now(), outcome, body });
    }

    fn record(&self, record: Record) {
        self.tally.lock().unwrap().records.push(record);
    }

    /// A connection that has been kept, by the server too.
    fn kept(&self) -> Option<(Instant, Connection)> {
        let mut idle = self.idle.lock().unwrap();
        std::iter::from_fn(|| idle.pop_front()).find(|(_, connection)| is_open(connection.get_ref()))
    }

    /// From one of many addresses, as many clients have: a proxy bounds what each may take.
    async fn connect(&self) -> Result<TcpStream, Outcome> {
        let number = self.number.fetch_add(1, Ordering::Relaxed) % SOURCES;
        let from = Ipv4Addr::from_bits(SOURCE_FIRST + u32::try_from(number).expect("there are few sources"));
        let connected = async {
            let socket = TcpSocket::new_v4()?;
            socket.bind(SocketAddr::new(from.into(), 0))?;
            socket.connect(self.target.address).await
        };
        connected.await.map_err(|error| Outcome::Refused { why: error.to_string() })
    }

    async fn request(&self, kind: Kind, kept: Option<(Instant, Connection)>) -> Result<Response, Outcome> {
        let (connected, mut connection) = match kept {
            Some(kept) => kept,
            None => (Instant::now(), BufReader::new(self.connect().await?)),
        };
        let Target { host, path, .. } = &self.target;
        let wish = if kind == Kind::Close { "close" } else { "keep-alive" };
        let head = format!("GET {path} HTTP/1.1\r\nhost: {host}\r\nconnection: {wish}\r\n\r\n");
        let response =
            exchange(&mut connection, head.as_bytes()).await.map_err(|why| Outcome::Cut { opened: false, why })?;
        if kind == Kind::KeepAlive && response.keeps {
            self.idle.lock().unwrap().push_back((connected, connection));
        }
        Ok(response)
    }

    /// One after the other, until all is stopped.
    async fn web_sockets(self, client: u32) {
        // Spread, so that some begin and some end at any time.
        let share = self.rates.web_socket_life * client / self.rates.web_sockets;
        let mut life = self.rates.web_socket_life - share / 2;
        while !*self.stopped.borrow() {
            let begun = Instant::now();
            let outcome = self.web_socket(life).await;
            let refused = matches!(outcome, Outcome::Refused { .. });
            let kind = Kind::WebSocket;
            self.record(Record { kind, connected: begun, begun, ended: Instant::now(), outcome, body: None });
            if refused {
                // As a browser does: not in a tight loop.
                sleep(Duration::from_millis(50)).await;
            }
            life = self.rates.web_socket_life;
        }
    }

    async fn web_socket(&self, life: Duration) -> Outcome {
        let stream = match self.connect().await {
            Ok(stream) => stream,
            Err(refused) => return refused,
        };
        let mut connection = BufReader::new(stream);
        let head = format!(
            "GET /ws HTTP/1.1\r\nhost: {}\r\nupgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\n\
             sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
            self.target.host
        );
        let opened = timeout(ANSWER_MAX, exchange(&mut connection, head.as_bytes())).await;
        match opened {
            Err(_) => return Outcome::Silent,
            Ok(Err(why)) => return Outcome::Cut { opened: false, why },
            Ok(Ok(Response { status: 101, .. })) => {}
            Ok(Ok(Response { status, .. })) => return Outcome::Answered { status },
        }
        match timeout(life + ANSWER_MAX, self.talk(&mut connection, life)).await {
            Ok(Ok(())) => Outcome::Answered { status: 101 },
            Ok(Err(why)) => Outcome::Cut { opened: true, why },
            Err(_) => Outcome::Silent,
        }
    }

    /// Each message must come back, in order, before the next is sent; then we close and the server agrees.
    async fn talk(&self, connection: &mut Connection, life: Duration) -> Result<(), String> {
        let until = Instant::now() + life;
        let mut stopped = self.stopped.clone();
        let mut ticks = interval(self.rates.message_every);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        while Instant::now() < until && !*stopped.borrow_and_update() {
            let number = self.number.fetch_add(1, Ordering::Relaxed);
            let message = format!("message {number}");
            send_frame(connection, TEXT, message.as_bytes()).await?;
            match receive_frame(connection).await? {
                (TEXT, payload) if payload == message.as_bytes() => self.tally.lock().unwrap().echoes += 1,
                (TEXT, payload) => return Err(format!("`{message}` came back as {payload:?}")),
                (CLOSE, payload) => return Err(format!("closed by the server with {payload:?}")),
                (opcode, _) => return Err(format!("a frame of kind {opcode}")),
            }
            // A server that ends it between two messages is noticed here too.
            tokio::select! {
                _ = ticks.tick() => {}
                _ = stopped.changed() => {}
                end = connection.fill_buf() => return Err(match end {
                    Ok([]) => "ended between two messages".to_owned(),
                    Ok(bytes) => format!("unasked-for bytes {bytes:?}"),
                    Err(error) => error.to_string(),
                }),
            }
        }
        send_frame(connection, CLOSE, &1000u16.to_be_bytes()).await?;
        match receive_frame(connection).await? {
            (CLOSE, _) => Ok(()),
            (opcode, _) => Err(format!("a frame of kind {opcode} for our close")),
        }
    }
}

/// Whether nothing has come, not even the end. Asked of the kernel: the runtime may not have heard of it yet.
fn is_open(stream: &TcpStream) -> bool {
    let same = stream.as_fd().try_clone_to_owned().map(std::net::TcpStream::from).unwrap();
    same.peek(&mut [0]).is_err_and(|error| error.kind() == ErrorKind::WouldBlock)
}

#[derive(Debug)]
struct Response {
    status: u16,
    body: Vec<u8>,
    /// The connection can take another request.
    keeps: bool,
}

async fn exchange(connection: &mut Connection, head: &[u8]) -> Result<Response, String> {
    let failed = |error: std::io::Error| error.to_string();
    connection.get_mut().write_all(head).await.map_err(failed)?;
    let mut head = String::new();
    loop {
        let before = head.len();
        if connection.read_line(&mut head).await.map_err(failed)? == 0 {
            let when = if head.is_empty() { "before the answer" } else { "in the answer's head" };
            return Err(format!("ended {when}"));
        }
        if matches!(&head[before..], "\r\n" | "\n") {
            break;
        }
    }
    let status =
        head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(|| format!("no answer: {head}"))?;
    let field = |name: &str| {
        head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim().to_ascii_lowercase())
        })
    };
    let closes = field("connection").is_some_and(|value| value == "close");
    let chunked = field("transfer-encoding").is_some_and(|value| value.contains("chunked"));
    let length = field("content-length").and_then(|value| value.parse::<usize>().ok());
    let mut body = Vec::new();
    let keeps = match (status, chunked, length) {
        (101 | 204 | 304, _, _) => true,
        (_, true, _) => {
            chunks(connection, &mut body).await?;
            true
        }
        (_, false, Some(length)) => {
            body.resize(length, 0);
            connection.read_exact(&mut body).await.map_err(|error| format!("in the answer's body: {error}"))?;
            true
        }
        (_, false, None) => {
            connection.read_to_end(&mut body).await.map_err(failed)?;
            false
        }
    };
    Ok(Response { status, body, keeps: keeps && !closes })
}

async fn chunks(connection: &mut Connection, body: &mut Vec<u8>) -> Result<(), String> {
    loop {
        let mut line = String::new();
        connection.read_line(&mut line).await.map_err(|error| error.to_string())?;
        let size = usize::from_str_radix(line.trim(), 16).map_err(|_| "ended in the answer's body".to_owned())?;
        let begin = body.len();
        body.resize(begin + size + 2, 0);
        connection.read_exact(&mut body[begin..]).await.map_err(|error| format!("in a chunk: {error}"))?;
        body.truncate(begin + size);
        if size == 0 {
            return Ok(());
        }
    }
}

/// A client's frames are masked; ours with zeros, which leaves them as they are.
async fn send_frame(connection: &mut Connection, opcode: u8, payload: &[u8]) -> Result<(), String> {
    let length = u8::try_from(payload.len()).ok().filter(|length| *length < 126).expect("messages are short");
    let frame = [&[0x80 | opcode, 0x80 | length, 0, 0, 0, 0], payload].concat();
    connection.get_mut().write_all(&frame).await.map_err(|error| error.to_string())
}

async fn receive_frame(connection: &mut Connection) -> Result<(u8, Vec<u8>), String> {
    let ended = |error: std::io::Error| format!("no frame: {error}");
    let mut head = [0; 2];
    connection.read_exact(&mut head).await.map_err(ended)?;
    let mut payload = vec![0; usize::from(head[1] & 0x7f)];
    connection.read_exact(&mut payload).await.map_err(ended)?;
    Ok((head[0] & 0x0f, payload))
}

impl Tally {
    /// Requests that reached the server, handshakes of WebSockets among them.
    pub fn sent(&self) -> usize {
        self.records.iter().filter(|record| !record.is_refused()).count()
    }

    /// Those answered with 101 to 399.
    pub fn answered(&self) -> usize {
        self.records.iter().filter(|record| record.is_good()).count()
    }

    /// All others.
    pub fn failed(&self) -> usize {
        self.failures().count()
    }

    pub fn failures(&self) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(|record| !record.is_good())
    }

    pub fn of(&self, kind: Kind) -> impl Iterator<Item = &Record> {
        self.records.iter().filter(move |record| record.kind == kind)
    }

    /// How often each body came, by its first line.
    pub fn bodies(&self) -> BTreeMap<&str, usize> {
        let mut bodies = BTreeMap::new();
        for body in self.records.iter().filter_map(|record| record.body.as_deref()) {
            *bodies.entry(body).or_default() += 1;
        }
        bodies
    }

    /// WebSockets that did not end because their client ended them.
    pub fn cut_web_sockets(&self) -> usize {
        self.of(Kind::WebSocket).filter(|record| !record.is_good()).count()
    }

    /// How many were answered with a status of this class: 1 to 5.
    pub fn statuses(&self, class: u16) -> usize {
        let is_it = |record: &&Record| match record.outcome {
            Outcome::Answered { status } => status / 100 == class,
            Outcome::Cut { opened, .. } => opened && class == 1,
            Outcome::Refused { .. } | Outcome::Silent => false,
        };
        self.records.iter().filter(is_it).count()
    }

    /// Plain requests answered well a second, from the first begun to the last.
    pub fn rate(&self) -> f64 {
        let plain = || self.records.iter().filter(|record| record.kind != Kind::WebSocket);
        let (first, last) = (plain().map(|record| record.begun).min(), plain().map(|record| record.begun).max());
        match (first, last) {
            (Some(first), Some(last)) if last > first => plain().count() as f64 / (last - first).as_secs_f64(),
            _ => 0.0,
        }
    }
}

impl Record {
    pub fn is_good(&self) -> bool {
        matches!(self.outcome, Outcome::Answered { status: 101..400 })
    }

    pub fn is_refused(&self) -> bool {
        matches!(self.outcome, Outcome::Refused { .. })
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut outcomes: BTreeMap<(Kind, &Outcome), u64> = BTreeMap::new();
        for record in &self.records {
            *outcomes.entry((record.kind, &record.outcome)).or_default() += 1;
        }
        write!(f, "{} sent, {:.0}/s, {} failed, {} echoes; ", self.sent(), self.rate(), self.failed(), self.echoes)?;
        for ((kind, outcome), count) in &outcomes {
            write!(f, "{count} x {kind:?} {outcome:?}; ")?;
        }
        let begun = self.records.iter().map(|record| record.begun).min();
        for record in self.failures().take(SHOWN_MAX) {
            let at = begun.map(|begun| record.begun - begun).unwrap_or_default();
            write!(f, "\n  {at:.3?} + {:.3?}: {:?} {:?}", record.ended - record.begun, record.kind, record.outcome)?;
        }
        Ok(())
    }
}
