//! As much of HTTP/1.1 as is needed behind a proxy that has already checked every request.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::time::Duration;

/// A connection without a request is closed; the proxy lets go of its own sooner.
const IDLE_MAX: Duration = Duration::from_secs(120);
const HEAD_BYTES_MAX: u64 = 16 << 10;
/// Nothing here wants a body; one that comes along is read past.
const BODY_BYTES_MAX: u64 = 64 << 10;

pub struct Request {
    pub method: String,
    pub path: String,
    pub query: String,
    /// Of a WebSocket handshake.
    pub key: Option<String>,
}

pub struct Connection {
    pub stream: BufReader<TcpStream>,
}

impl Connection {
    pub fn new(stream: TcpStream) -> io::Result<Connection> {
        stream.set_read_timeout(Some(IDLE_MAX))?;
        Ok(Connection { stream: BufReader::new(stream) })
    }

    /// The next request; none when the other side has closed.
    pub fn read(&mut self) -> io::Result<Option<Request>> {
        let mut head = (&mut self.stream).take(HEAD_BYTES_MAX);
        let mut line = String::new();
        head.read_line(&mut line)?;
        let mut words = line.split_whitespace();
        let (Some(method), Some(target)) = (words.next(), words.next()) else { return Ok(None) };
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let (method, path, query) = (method.to_owned(), path.to_owned(), query.to_owned());
        let (mut key, mut length) = (None, 0);
        loop {
            line.clear();
            if head.read_line(&mut line)? == 0 {
                return Ok(None);
            }
            let Some((name, value)) = line.trim_end().split_once(':') else { break };
            match name.to_ascii_lowercase().as_str() {
                "sec-websocket-key" => key = Some(value.trim().to_owned()),
                "content-length" => length = value.trim().parse().unwrap_or(u64::MAX),
                _ => {}
            }
        }
        if length > BODY_BYTES_MAX {
            return Ok(None);
        }
        io::copy(&mut (&mut self.stream).take(length), &mut io::sink())?;
        Ok(Some(Request { method, path, query, key }))
    }

    pub fn respond(&mut self, status: u16, kind: &str, body: &str) -> io::Result<()> {
        let reason = match status {
            200 => "OK",
            201 => "Created",
            404 => "Not Found",
            409 => "Conflict",
            422 => "Unprocessable Content",
            _ => "Service Unavailable",
        };
        let length = body.len();
        let head = format!("HTTP/1.1 {status} {reason}\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n");
        self.stream.get_mut().write_all(&[head.as_bytes(), body.as_bytes()].concat())
    }
}
