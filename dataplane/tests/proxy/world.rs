//! What the tests stand on: real servers, a real proxy and a client that sees every byte.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use orca_cluster::id::{Label, NodeId, ReplicaId, Revision, ServiceName};
use orca_cluster::route::{Absence, Backend, RouteKey, Tables, Upstream};
use orca_cluster::time::Timestamp;
use orca_cluster::traffic::{Legacy, Traffic};
use orca_dataplane::{AccessLog, Config, DataPlane, Limits, NoModules};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Longer than anything takes that goes right.
pub const DEADLINE: Duration = Duration::from_secs(10);

pub fn service() -> ServiceName {
    ServiceName::new(Label::new("shop").unwrap(), Label::new("web").unwrap())
}

/// One service, `shop/web`, routed at every host.
pub fn tables(backends: &[(u64, SocketAddr)]) -> Arc<Tables> {
    Arc::new(tables_with(upstream(backends)))
}

pub fn upstream(backends: &[(u64, SocketAddr)]) -> Upstream {
    let backend = |&(number, address): &(u64, SocketAddr)| Backend {
        replica: ReplicaId(number),
        revision: Revision(number),
        node: NodeId(1),
        address: Some(address),
        weight: 1,
    };
    Upstream {
        backends: backends.iter().map(backend).collect(),
        absence: Absence::Failing,
        response_timeout: Duration::from_secs(30),
        module: false,
    }
}

pub fn tables_with(upstream: Upstream) -> Tables {
    Tables {
        routes: BTreeMap::from([(RouteKey::try_from("*/".to_owned()).unwrap(), service())]),
        services: BTreeMap::from([(service(), upstream)]),
        ..Tables::default()
    }
}

pub fn limits() -> Limits {
    Limits { connections_per_source_max: 4096, ..Limits::default() }
}

pub fn start(workers: usize, limits: Limits) -> DataPlane {
    let config = Config {
        http: vec!["127.0.0.1:0".parse().unwrap()],
        workers,
        access_log: AccessLog::Off,
        limits,
        trusted_proxies: Vec::new(),
    };
    DataPlane::start(config, Arc::new(NoModules)).unwrap()
}

/// A proxy with one worker before these replicas.
pub async fn proxy(backends: &[(u64, SocketAddr)]) -> DataPlane {
    let plane = start(1, limits());
    plane.apply(tables(backends)).await;
    plane
}

pub fn traffic(plane: &DataPlane) -> Traffic {
    plane.traffic(Timestamp(0))
}

pub fn legacy(plane: &DataPlane) -> Legacy {
    plane.legacy(Timestamp(0))
}

/// Waits for what must come to be.
pub async fn until<F: FnMut() -> bool>(what: &str, mut holds: F) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    assert!(tokio::time::timeout(DEADLINE, wait).await.is_ok(), "never happened: {what}");
}

/// A server made with a library.
pub async fn serve<F, R>(handler: F) -> SocketAddr
where
    F: Fn(Request<Incoming>) -> R + Clone + Send + 'static,
    R: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    raw(move |stream| {
        let handler = handler.clone();
        async move {
            let service = service_fn(move |request| {
                let answered = handler(request);
                async move { Ok::<_, std::convert::Infallible>(answered.await) }
            });
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await
}

/// A server that answers every request with its name.
pub async fn named(name: &'static str) -> SocketAddr {
    serve(move |_| async move { Response::new(Full::new(Bytes::from_static(name.as_bytes()))) }).await
}

/// A server that does with each connection what it is told.
pub async fn raw<F, R>(connection: F) -> SocketAddr
where
    F: Fn(TcpStream) -> R + Send + 'static,
    R: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(connection(stream));
        }
    });
    address
}

/// An address where nobody listens.
pub async fn nobody() -> SocketAddr {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap()
}

/// Reads a request's head from a raw connection; nothing if the peer closed.
pub async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(_) => return None,
        }
    }
    Some(String::from_utf8(head).unwrap())
}

/// A client's connection.
pub struct Client {
    pub stream: TcpStream,
    read: Vec<u8>,
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    /// As it came, but for the names' case.
    pub head: String,
    pub body: Vec<u8>,
}

impl Reply {
    pub fn text(&self) -> &str {
        std::str::from_utf8(&self.body).unwrap()
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        self.head.lines().skip(1).find_map(|line| {
            let (key, value) = line.split_once(':')?;
            key.eq_ignore_ascii_case(name).then(|| value.trim())
        })
    }
}

impl Client {
    pub async fn connect(plane: &DataPlane) -> Client {
        let stream = TcpStream::connect(plane.addresses()[0]).await.unwrap();
        stream.set_nodelay(true).unwrap();
        Client { stream, read: Vec::new() }
    }

    pub async fn to(address: SocketAddr) -> Result<Client, String> {
        let stream = TcpStream::connect(address).await.map_err(|error| error.to_string())?;
        Ok(Client { stream, read: Vec::new() })
    }

    pub async fn send(&mut self, text: impl AsRef<[u8]>) {
        self.stream.write_all(text.as_ref()).await.unwrap();
    }

    pub async fn get(&mut self, path: &str) -> Reply {
        self.send(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        self.reply().await.unwrap()
    }

    pub async fn reply(&mut self) -> Result<Reply, String> {
        self.reply_to(false).await
    }

    /// One response, whole; an error says how it was not.
    pub async fn reply_to(&mut self, is_head: bool) -> Result<Reply, String> {
        let read = async {
            let head = self.line_end(b"\r\n\r\n").await?;
            let head = String::from_utf8(head).unwrap();
            let status =
                head.split(' ').nth(1).and_then(|s| s.parse().ok()).ok_or_else(|| format!("no status: {head}"))?;
            let mut reply = Reply { status, head, body: Vec::new() };
            if is_head || status < 200 || status == 204 || status == 304 {
                return Ok(reply);
            }
            if reply.header("transfer-encoding") == Some("chunked") {
                loop {
                    let line = String::from_utf8(self.line_end(b"\r\n").await?).unwrap();
                    let size = usize::from_str_radix(line.trim(), 16).map_err(|e| e.to_string())?;
                    if size == 0 {
                        let trailers = self.line_end(b"\r\n").await?;
                        if trailers != b"\r\n" {
                            reply.head.push_str(std::str::from_utf8(&trailers).unwrap());
                            self.line_end(b"\r\n").await?;
                        }
                        return Ok(reply);
                    }
                    reply.body.extend(self.exactly(size).await?);
                    self.exactly(2).await?;
                }
            }
            match reply.header("content-length").map(|length| length.parse().unwrap()) {
                Some(length) => reply.body = self.exactly(length).await?,
                None => reply.body = self.rest().await,
            }
            Ok(reply)
        };
        tokio::time::timeout(DEADLINE, read).await.map_err(|_| "no response in time".to_owned())?
    }

    /// Everything until the connection ends.
    pub async fn rest(&mut self) -> Vec<u8> {
        let mut rest = std::mem::take(&mut self.read);
        let read = self.stream.read_to_end(&mut rest);
        // A reset is an end, too.
        let _ = tokio::time::timeout(DEADLINE, read).await.expect("the connection ends");
        rest
    }

    pub async fn exactly(&mut self, count: usize) -> Result<Vec<u8>, String> {
        while self.read.len() < count {
            self.more().await?;
        }
        let rest = self.read.split_off(count);
        Ok(std::mem::replace(&mut self.read, rest))
    }

    async fn line_end(&mut self, end: &[u8]) -> Result<Vec<u8>, String> {
        loop {
            if let Some(at) = self.read.windows(end.len()).position(|window| window == end) {
                return self.exactly(at + end.len()).await;
            }
            self.more().await?;
        }
    }

    async fn more(&mut self) -> Result<(), String> {
        match self.stream.read_buf(&mut self.read).await {
            Ok(0) => Err(format!("the connection ended after {:?}", String::from_utf8_lossy(&self.read))),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }
}

/// A number that several tasks count up.
#[derive(Clone, Default)]
pub struct Count(Arc<AtomicU64>);

impl Count {
    pub fn add(&self, more: u64) {
        self.0.fetch_add(more, Ordering::SeqCst);
    }

    pub fn get(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}
