//! As much of HTTP/1.1 as tests need: requests with a length or in chunks, keep-alive, streamed answers.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

/// Longest head taken.
const HEAD_LENGTH_MAX: usize = 64 << 10;
/// Longest body taken.
const BODY_LENGTH_MAX: u64 = 256 << 20;

pub struct Request {
    pub method: String,
    pub path: String,
    /// What follows the `?`, as it is.
    pub query: String,
    /// Request line and fields as they came.
    pub head: String,
    pub body: Vec<u8>,
    pub wants_close: bool,
}

pub struct Response {
    status: u16,
    body: Body,
}

enum Body {
    Whole(Vec<u8>),
    Stream { count: u64, pause: Duration },
}

pub struct Reader<'a>(BufReader<&'a TcpStream>);

impl<'a> Reader<'a> {
    pub fn new(stream: &'a TcpStream) -> Reader<'a> {
        Reader(BufReader::new(stream))
    }

    /// Waits for the first byte of a request; false when the client has closed.
    pub fn wait(&mut self) -> io::Result<bool> {
        Ok(!self.0.fill_buf()?.is_empty())
    }

    pub fn request(&mut self) -> io::Result<Option<Request>> {
        let mut head = String::new();
        loop {
            let before = head.len();
            if self.0.read_line(&mut head)? == 0 {
                return Ok(None);
            }
            if head.len() > HEAD_LENGTH_MAX {
                return Err(io::Error::other("the head of the request is too long"));
            }
            if matches!(&head[before..], "\r\n" | "\n") {
                break;
            }
        }
        let mut words = head.lines().next().unwrap_or_default().split(' ');
        let method = words.next().unwrap_or_default().to_owned();
        let target = words.next().unwrap_or_default();
        let old = words.next() == Some("HTTP/1.0");
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let (path, query) = (path.to_owned(), query.to_owned());

        if field(&head, "expect").is_some_and(|v| v.eq_ignore_ascii_case("100-continue")) {
            self.0.get_mut().write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        let chunked = field(&head, "transfer-encoding").is_some_and(|v| v.eq_ignore_ascii_case("chunked"));
        let body = if chunked { self.chunks()? } else { self.bytes(&head)? };
        let connection = field(&head, "connection").unwrap_or_default().to_ascii_lowercase();
        let wants_close = if old { connection != "keep-alive" } else { connection == "close" };
        Ok(Some(Request { method, path, query, head, body, wants_close }))
    }

    fn bytes(&mut self, head: &str) -> io::Result<Vec<u8>> {
        let length = field(head, "content-length").and_then(|v| v.parse().ok()).unwrap_or(0);
        self.exactly(length)
    }

    fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let mut line = String::new();
            self.0.read_line(&mut line)?;
            let size = line.trim().split(';').next().unwrap_or_default();
            let size = u64::from_str_radix(size, 16).map_err(io::Error::other)?;
            body.extend(self.exactly(size)?);
            line.clear();
            self.0.read_line(&mut line)?;
            if size == 0 {
                return Ok(body);
            }
        }
    }

    /// So many bytes.
    pub fn exactly(&mut self, length: u64) -> io::Result<Vec<u8>> {
        if length > BODY_LENGTH_MAX {
            return Err(io::Error::other("the body is too long"));
        }
        let mut bytes = Vec::new();
        let read = self.0.by_ref().take(length).read_to_end(&mut bytes)?;
        if read as u64 == length { Ok(bytes) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }
}

/// The value of a field of the head.
pub fn field<'a>(head: &'a str, name: &str) -> Option<&'a str> {
    head.lines().skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then_some(value.trim())
    })
}

impl Response {
    pub fn text(status: u16, text: impl Into<String>) -> Response {
        Response::bytes(status, text.into().into_bytes())
    }

    pub fn bytes(status: u16, bytes: Vec<u8>) -> Response {
        Response { status, body: Body::Whole(bytes) }
    }

    pub fn stream(count: u64, pause: Duration) -> Response {
        Response { status: 200, body: Body::Stream { count, pause } }
    }

    /// 404 for nothing.
    pub fn maybe(bytes: Option<Vec<u8>>) -> Response {
        match bytes {
            Some(bytes) => Response::bytes(200, bytes),
            None => Response::text(404, "absent\n"),
        }
    }

    pub fn write(self, mut stream: &TcpStream, close: bool, head_only: bool) -> io::Result<()> {
        let mut head = format!("HTTP/1.1 {} {}\r\ncontent-type: text/plain\r\n", self.status, reason(self.status));
        head.push_str(if close { "connection: close\r\n" } else { "connection: keep-alive\r\n" });
        match self.body {
            Body::Whole(body) => {
                head.push_str(&format!("content-length: {}\r\n\r\n", body.len()));
                let mut bytes = head.into_bytes();
                if !head_only {
                    bytes.extend(body);
                }
                stream.write_all(&bytes)
            }
            Body::Stream { count, pause } => {
                head.push_str("transfer-encoding: chunked\r\n\r\n");
                stream.write_all(head.as_bytes())?;
                for number in 1..=count {
                    let line = format!("chunk {number}\n");
                    stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes())?;
                    thread::sleep(pause);
                }
                stream.write_all(b"0\r\n\r\n")
            }
        }
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        302 => "Found",
        404 => "Not Found",
        500 => "Internal Server Error",
        503 => "Service Unavailable",
        _ => "As Asked",
    }
}
