//! A request on its way to a replica: the writing half of an HTTP/1.1 client (RFC 9112). Its head is encoded once; its
//! body is passed on piece by piece, each only when the one before has been taken.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf, Bytes};
use http::header::{self, HeaderMap};
use http::{Method, Uri};
use http_body::Body as _;
use tokio::io::AsyncWrite;
use tokio::net::tcp::OwnedWriteHalf;

use super::header::may_be_trailer;
use crate::body::{Body, BodyError};

/// A piece of a body that is smaller is copied behind what is written before it; a larger one is written from where it
/// lies.
const COPIED_MAX: usize = 4 << 10;
const HEAD_BYTES_USUAL: usize = 512;

#[derive(Debug)]
pub struct Upload {
    /// Encoded, and from `written` on not yet written.
    head: Vec<u8>,
    written: usize,
    /// What comes behind `head`.
    piece: Bytes,
    /// What comes behind `piece`.
    tail: &'static [u8],
    body: Body,
    is_body_touched: bool,
    place: Place,
    /// Some of the request is on its way.
    pub has_begun: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// In a body whose length the head said.
    Sized,
    Chunked,
    /// Nothing is added any more.
    Ended,
    /// Nor will it ever be whole: what the replica has of it must not be taken for the request, nor the connection used
    /// for another.
    Broken,
}

#[derive(Debug)]
pub enum Broken {
    /// The replica takes no more.
    Writing(io::Error),
    /// The client gives no more.
    Reading(BodyError),
}

impl Upload {
    /// `headers` are as they go out, but for how the body is framed.
    pub fn new(method: &Method, uri: &Uri, headers: &HeaderMap, body: Body) -> Upload {
        let place = if body.is_end_stream() {
            Place::Ended
        } else if headers.contains_key(header::CONTENT_LENGTH) {
            Place::Sized
        } else {
            Place::Chunked
        };
        let mut head = Vec::with_capacity(HEAD_BYTES_USUAL);
        head.extend_from_slice(method.as_str().as_bytes());
        head.push(b' ');
        match uri.path_and_query().map_or("/", |path| path.as_str()) {
            // Asks about the server as a whole.
            "*" => head.push(b'*'),
            path if path.starts_with('/') => head.extend_from_slice(path.as_bytes()),
            path => {
                head.push(b'/');
                head.extend_from_slice(path.as_bytes());
            }
        }
        head.extend_from_slice(b" HTTP/1.1\r\n");
        for (name, value) in headers {
            write_field(&mut head, name.as_str(), value.as_bytes());
        }
        if place == Place::Chunked {
            head.extend_from_slice(b"transfer-encoding: chunked\r\n");
        }
        head.extend_from_slice(b"\r\n");
        let is_body_touched = false;
        Upload { head, written: 0, piece: Bytes::new(), tail: b"", body, is_body_touched, place, has_begun: false }
    }

    /// Back to the beginning of a request that has no body, to be sent once more.
    pub fn rewind(&mut self) {
        self.written = 0;
        self.has_begun = false;
    }

    /// All of it is on its way.
    pub fn is_done(&self) -> bool {
        self.place == Place::Ended && self.is_written()
    }

    /// The body, if nothing of it has been taken.
    pub fn into_body(self) -> Option<Body> {
        (!self.is_body_touched).then_some(self.body)
    }

    /// Sends what there is, and is ready when that was all. After an error there is nothing more to come of it.
    pub fn poll(&mut self, to: &mut OwnedWriteHalf, context: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        if self.place == Place::Broken {
            return Poll::Pending;
        }
        let polled = self.poll_on(to, context);
        // A body says once that it broke off, and after that it looks as if it had ended.
        let has_failed = match &polled {
            Poll::Ready(Err(Broken::Writing(_))) => self.has_begun,
            Poll::Ready(Err(Broken::Reading(_))) => true,
            Poll::Ready(Ok(())) | Poll::Pending => false,
        };
        if has_failed {
            self.place = Place::Broken;
        }
        polled
    }

    fn poll_on(&mut self, to: &mut OwnedWriteHalf, context: &mut Context<'_>) -> Poll<Result<(), Broken>> {
        loop {
            // Before anything is written: a small body goes out with its head. After that each piece when the one before
            // has been taken.
            let is_due = self.piece.is_empty()
                && self.tail.is_empty()
                && (self.written == self.head.len() || !self.is_body_touched);
            let is_waiting = match self.place {
                Place::Sized | Place::Chunked if is_due => {
                    self.poll_body(context).map_err(Broken::Reading)?.is_pending()
                }
                _ => false,
            };
            if self.is_written() {
                match self.place {
                    Place::Ended => return Poll::Ready(Ok(())),
                    _ if is_waiting => return Poll::Pending,
                    _ => continue,
                }
            }
            ready!(self.poll_write(to, context)).map_err(Broken::Writing)?;
        }
    }

    fn is_written(&self) -> bool {
        self.written == self.head.len() && self.piece.is_empty() && self.tail.is_empty()
    }

    fn poll_write(&mut self, to: &mut OwnedWriteHalf, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let head = &self.head[self.written..];
        let mut written = if self.piece.is_empty() && self.tail.is_empty() {
            ready!(Pin::new(to).poll_write(context, head))?
        } else {
            let slices = [IoSlice::new(head), IoSlice::new(&self.piece), IoSlice::new(self.tail)];
            ready!(Pin::new(to).poll_write_vectored(context, &slices))?
        };
        if written == 0 {
            return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
        }
        self.has_begun = true;
        let of_head = written.min(head.len());
        self.written += of_head;
        written -= of_head;
        let of_piece = written.min(self.piece.len());
        self.piece.advance(of_piece);
        self.tail = &self.tail[written - of_piece..];
        Poll::Ready(Ok(()))
    }

    /// Takes the next frame of the body.
    fn poll_body(&mut self, context: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context)).transpose()?;
        self.is_body_touched = true;
        if self.written == self.head.len() {
            self.head.clear();
            self.written = 0;
        }
        let is_chunked = self.place == Place::Chunked;
        match frame.map(http_body::Frame::into_data) {
            Some(Ok(data)) => {
                if data.is_empty() {
                    return Poll::Ready(Ok(()));
                }
                if is_chunked {
                    self.head.extend_from_slice(format!("{:x}\r\n", data.len()).as_bytes());
                    self.tail = b"\r\n";
                } else if self.body.is_end_stream() {
                    self.place = Place::Ended;
                }
                if data.len() <= COPIED_MAX {
                    self.head.extend_from_slice(&data);
                    self.head.extend_from_slice(std::mem::take(&mut self.tail));
                } else {
                    self.piece = data;
                }
            }
            Some(Err(frame)) => {
                if let (Ok(trailers), true) = (frame.into_trailers(), is_chunked) {
                    self.end_chunks(&trailers);
                }
            }
            None if is_chunked => self.end_chunks(&HeaderMap::new()),
            None => self.place = Place::Ended,
        }
        Poll::Ready(Ok(()))
    }

    fn end_chunks(&mut self, trailers: &HeaderMap) {
        self.head.extend_from_slice(b"0\r\n");
        for (name, value) in trailers.iter().filter(|(name, _)| may_be_trailer(name)) {
            write_field(&mut self.head, name.as_str(), value.as_bytes());
        }
        self.head.extend_from_slice(b"\r\n");
        self.place = Place::Ended;
    }
}

/// Neither part can hold a line's end: their types see to that.
fn write_field(head: &mut Vec<u8>, name: &str, value: &[u8]) {
    head.reserve(name.len() + value.len() + 4);
    head.extend_from_slice(name.as_bytes());
    head.extend_from_slice(b": ");
    head.extend_from_slice(value);
    head.extend_from_slice(b"\r\n");
}
