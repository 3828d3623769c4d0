//! A connection to a replica, and one request and its response on it. Everything happens in the task of the client's
//! connection: no hand-over, no wake-up between tasks, and the response's bytes go from one socket's buffer to the
//! other's. While a response comes, the rest of the request's body still goes out, whether the client takes the response
//! or not ([`Rest`]). When the response has ended, so has the request: what is left of it is not sent.

use std::cell::RefCell;
use std::future::poll_fn;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{HeaderMap, StatusCode};
use http_body::{Frame, SizeHint};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio_util::io::poll_read_buf;

use super::response::{Chunks, Extent, Head, Invalid, Piece, take_head};
use super::splice::{self, Bypass, Filled};
use super::upload::{self, Upload};
use crate::body::BodyError;

/// Room for a usual response. What is larger is read in larger pieces, or not read at all but spliced.
const READ_BYTES_MIN: usize = 8 << 10;
/// Room for a usual head: what comes behind it can be spliced only as long as it was not read.
const HEAD_BYTES_USUAL: usize = 1 << 10;
const READ_BYTES_MAX: usize = 64 << 10;
/// Notices a replica's host that vanished under a long answer.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

/// A connection on which one request at a time can be sent.
#[derive(Debug)]
pub struct Link {
    from: OwnedReadHalf,
    to: OwnedWriteHalf,
    /// Read and not yet taken.
    read: BytesMut,
    /// How much is read at first of the next response: the last one says what to expect.
    first_read: usize,
    /// Whether a request was answered on it before.
    pub reused: bool,
}

/// What a replica said to a request.
#[derive(Debug)]
pub enum Answer {
    Response(StatusCode, HeaderMap, Box<Incoming>),
    /// It agreed to change protocols: from here on the bytes are the users' own.
    Switched(HeaderMap, TcpStream, Bytes),
}

/// Why there was no answer.
#[derive(Debug)]
pub enum Failed {
    /// Nothing of the request was sent.
    Unsent(io::Error),
    /// It was sent, and the connection broke without a byte of a response.
    Broken(io::Error),
    Invalid(Invalid),
    /// The client broke off inside the request's body.
    Client(BodyError),
}

impl Link {
    pub async fn connect(address: SocketAddr, time_max: Duration) -> io::Result<Link> {
        let stream = match tokio::time::timeout(time_max, TcpStream::connect(address)).await {
            Ok(stream) => stream?,
            Err(_) => return Err(io::ErrorKind::TimedOut.into()),
        };
        stream.set_nodelay(true)?;
        SockRef::from(&stream).set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE))?;
        let (from, to) = stream.into_split();
        Ok(Link { from, to, read: BytesMut::new(), first_read: READ_BYTES_MIN, reused: false })
    }

    /// Whether it is as it was left. A server that has closed it, or said something nobody asked for, is not to be
    /// sent a request on it. Costs no system call while nothing has happened.
    pub fn is_quiet(&self) -> bool {
        let read = self.from.try_read(&mut [0]);
        self.read.is_empty() && matches!(read, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }

    /// Sends a request and waits for the head of its response. The request is taken only when there is one.
    pub async fn exchange(
        self,
        upload: &mut Option<Upload>,
        is_head: bool,
        bypass: &Arc<Bypass>,
    ) -> Result<Answer, Failed> {
        let mut link = Some(self);
        let mut sending = Ok(());
        poll_fn(|context| {
            let (Some(this), Some(request)) = (&mut link, &mut *upload) else {
                unreachable!("polled after its end");
            };
            if sending.is_ok() {
                match request.poll(&mut this.to, context) {
                    Poll::Ready(Err(upload::Broken::Reading(error))) => return Poll::Ready(Err(Failed::Client(error))),
                    Poll::Ready(Err(upload::Broken::Writing(error))) if !request.has_begun => {
                        return Poll::Ready(Err(Failed::Unsent(error)));
                    }
                    // It may have said why before it closed.
                    Poll::Ready(Err(upload::Broken::Writing(error))) => sending = Err(error),
                    Poll::Ready(Ok(())) | Poll::Pending => {}
                }
            }
            let head = ready!(this.read_head(is_head, context))?;
            let (Some(link), Some(upload)) = (link.take(), upload.take()) else {
                unreachable!("both were there a moment ago");
            };
            Poll::Ready(link.answer(head, upload, bypass))
        })
        .await
    }

    fn read_head(&mut self, is_head: bool, context: &mut Context<'_>) -> Poll<Result<Head, Failed>> {
        loop {
            if !self.read.is_empty() {
                match take_head(&mut self.read, is_head).map_err(Failed::Invalid)? {
                    // What comes before the response itself is between the replica and us.
                    Some(head) if head.status.is_informational() && head.status != StatusCode::SWITCHING_PROTOCOLS => {
                        continue;
                    }
                    Some(head) => return Poll::Ready(Ok(head)),
                    None => {}
                }
            }
            let error = match ready!(poll_read(&mut self.from, &mut self.read, self.first_read, context)) {
                Ok(0) => io::ErrorKind::UnexpectedEof.into(),
                Ok(_) => continue,
                Err(error) => error,
            };
            let is_silent = self.read.is_empty();
            return Poll::Ready(Err(if is_silent { Failed::Broken(error) } else { Failed::Invalid(Invalid::HeadCut) }));
        }
    }

    fn answer(self, head: Head, upload: Upload, bypass: &Arc<Bypass>) -> Result<Answer, Failed> {
        let Head { status, headers, extent, keeps_alive } = head;
        let Link { from, to, read, .. } = self;
        if status == StatusCode::SWITCHING_PROTOCOLS {
            let stream = from.reunite(to).map_err(|error| Failed::Broken(io::Error::other(error)))?;
            return Ok(Answer::Switched(headers, stream, read.freeze()));
        }
        let left = match extent {
            Extent::Sized(size) => Left::Sized(size),
            Extent::Chunked => Left::Chunked(Chunks::default()),
            Extent::Open => Left::Open,
        };
        let bypass = matches!(left, Left::Sized(size) if size >= splice::WORTH_IT).then(|| Arc::clone(bypass));
        let request = if upload.is_done() { Request::Sent(to) } else { Request::Going(Rest::new(upload, to)) };
        Ok(Answer::Response(status, headers, Box::new(Incoming { from, read, request, left, keeps_alive, bypass })))
    }
}

/// Reads what has arrived, up to so many bytes and perhaps a few more.
fn poll_read(
    from: &mut OwnedReadHalf,
    read: &mut BytesMut,
    most: usize,
    context: &mut Context<'_>,
) -> Poll<io::Result<usize>> {
    read.reserve(most);
    poll_read_buf(Pin::new(from), context, read)
}

/// The rest of a request whose response has begun. Its response is read by whoever sends it to the client; the rest goes on
/// also while the client takes nothing, or both would wait for each other. Used by the client's task alone.
#[derive(Debug, Clone)]
pub struct Rest(Rc<RefCell<(Upload, Option<OwnedWriteHalf>)>>);

impl Rest {
    fn new(upload: Upload, to: OwnedWriteHalf) -> Rest {
        Rest(Rc::new(RefCell::new((upload, Some(to)))))
    }

    /// Sends what there is.
    pub fn poll(&self, context: &mut Context<'_>) {
        let (upload, to) = &mut *self.0.borrow_mut();
        let Some(open) = to.as_mut().filter(|_| !upload.is_done()) else { return };
        match upload.poll(open, context) {
            // The replica is told, or it would wait for the rest, and the client for the replica.
            Poll::Ready(Err(upload::Broken::Reading(_))) => *to = None,
            // The response is what counts now, and says itself if it breaks off.
            Poll::Ready(Ok(()) | Err(upload::Broken::Writing(_))) | Poll::Pending => {}
        }
    }

    /// The writing half, if all was sent and nobody else holds the rest.
    fn sent(self) -> Option<OwnedWriteHalf> {
        let (upload, to) = Rc::try_unwrap(self.0).ok()?.into_inner();
        to.filter(|_| upload.is_done())
    }
}

/// A response's body as it comes from a replica.
#[derive(Debug)]
pub struct Incoming {
    from: OwnedReadHalf,
    /// Read and not yet taken.
    read: BytesMut,
    request: Request,
    left: Left,
    keeps_alive: bool,
    /// For a body that is worth it.
    bypass: Option<Arc<Bypass>>,
}

#[derive(Debug)]
enum Request {
    Sent(OwnedWriteHalf),
    Going(Rest),
}

#[derive(Debug)]
enum Left {
    Sized(u64),
    Chunked(Chunks),
    /// Until the connection ends.
    Open,
    Nothing,
}

impl Incoming {
    /// What is still to be sent of the request, for whoever sees to it that it goes on.
    pub fn rest(&self) -> Option<Rest> {
        match &self.request {
            Request::Sent(_) => None,
            Request::Going(rest) => Some(rest.clone()),
        }
    }

    /// The connection, if another request can be sent on it. The rest of the request must be nobody else's any more.
    pub fn into_link(self) -> Option<Link> {
        if !self.keeps_alive || !self.is_at_end() || !self.read.is_empty() {
            return None;
        }
        let to = match self.request {
            Request::Sent(to) => to,
            Request::Going(rest) => rest.sent()?,
        };
        // Room is kept for a usual response, and not for the largest there was. What a buffer has room for is read, so one
        // for heads alone is made anew.
        let (read, first_read) = match self.bypass {
            Some(_) => (BytesMut::new(), HEAD_BYTES_USUAL),
            None if self.read.capacity() <= READ_BYTES_MIN => (self.read, READ_BYTES_MIN),
            None => (BytesMut::new(), READ_BYTES_MIN),
        };
        Some(Link { from: self.from, to, read, first_read, reused: true })
    }

    fn is_at_end(&self) -> bool {
        match &self.left {
            Left::Nothing | Left::Sized(0) => true,
            Left::Chunked(chunks) => chunks.is_at_end(),
            Left::Sized(_) | Left::Open => false,
        }
    }

    fn poll_sized(&mut self, left: u64, context: &mut Context<'_>) -> Poll<io::Result<Bytes>> {
        let data = if !self.read.is_empty() {
            let here = self.read.len().min(usize::try_from(left).unwrap_or(usize::MAX));
            self.read.split_to(here).freeze()
        } else if left >= splice::WORTH_IT
            && let Some(bypass) = &self.bypass
        {
            match ready!(bypass.poll_fill(self.from.as_ref(), left, context))? {
                Filled::With(stand_in) => stand_in,
                Filled::Ended => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                Filled::Unavailable => {
                    self.bypass = None;
                    return self.poll_sized(left, context);
                }
            }
        } else {
            let most = usize::try_from(left).unwrap_or(usize::MAX).clamp(READ_BYTES_MIN, READ_BYTES_MAX);
            if ready!(poll_read(&mut self.from, &mut self.read, most, context))? == 0 {
                return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
            }
            return self.poll_sized(left, context);
        };
        self.left = Left::Sized(left - data.len() as u64);
        Poll::Ready(Ok(data))
    }

    fn poll_chunked(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Option<Frame<Bytes>>>> {
        let Left::Chunked(chunks) = &mut self.left else {
            return Poll::Ready(Ok(None));
        };
        loop {
            match chunks.next(&mut self.read)? {
                Some(Piece::Data(data)) => return Poll::Ready(Ok(Some(Frame::data(data)))),
                Some(Piece::Trailers(trailers)) => return Poll::Ready(Ok(Some(Frame::trailers(trailers)))),
                Some(Piece::End) => return Poll::Ready(Ok(None)),
                None if ready!(poll_read(&mut self.from, &mut self.read, READ_BYTES_MAX, context))? == 0 => {
                    return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into()));
                }
                None => {}
            }
        }
    }

    fn poll_open(&mut self, context: &mut Context<'_>) -> Poll<io::Result<Option<Bytes>>> {
        if self.read.is_empty() && ready!(poll_read(&mut self.from, &mut self.read, READ_BYTES_MAX, context))? == 0 {
            self.left = Left::Nothing;
            return Poll::Ready(Ok(None));
        }
        Poll::Ready(Ok(Some(self.read.split().freeze())))
    }
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let this = &mut *self;
        if let Request::Going(rest) = &this.request {
            rest.poll(context);
        }
        let frame = match this.left {
            Left::Nothing | Left::Sized(0) => return Poll::Ready(None),
            Left::Sized(left) => ready!(this.poll_sized(left, context)).map(|data| Some(Frame::data(data))),
            Left::Chunked(_) => ready!(this.poll_chunked(context)),
            Left::Open => ready!(this.poll_open(context)).map(|data| data.map(Frame::data)),
        };
        Poll::Ready(frame.map_err(BodyError::Replica).transpose())
    }

    fn is_end_stream(&self) -> bool {
        self.is_at_end()
    }

    fn size_hint(&self) -> SizeHint {
        match self.left {
            Left::Nothing => SizeHint::with_exact(0),
            Left::Sized(left) => SizeHint::with_exact(left),
            Left::Chunked(_) | Left::Open => SizeHint::default(),
        }
    }
}
