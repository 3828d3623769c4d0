//! Connections to one replica, kept for the next request. The one used last is taken first, so that surplus ones
//! grow old and go. A server may close an idle connection at the moment we send on it; nothing prevents that, so
//! ours are given up before usual servers would, one that the server has already closed is not handed out, and
//! what still goes wrong is for [`forward`](super::forward) to retry where that is safe.

use std::fmt;
use std::future::{Future, poll_fn};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::task::{Context, Waker};
use std::time::Duration;

use http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::{TrySendError, http1};
use hyper_util::rt::TokioIo;
use socket2::SockRef;
use tokio::net::TcpStream;

use crate::body::Body;

/// Idle connections kept for one replica by one worker. The replica has taken as many at once before; what is not
/// needed again goes by its age.
const IDLE_MAX: usize = 512;
/// Shorter than the 5 s after which common application servers close an idle connection.
pub const IDLE_TIME_MAX: Duration = Duration::from_secs(4);
/// A large body is read in large pieces; a small one does not fill them.
const READ_BYTES_MAX: usize = 128 << 10;
/// Notices a replica's host that vanished under a long answer.
const TCP_KEEPALIVE: Duration = Duration::from_secs(30);

/// A connection on which one request at a time can be sent. It has no task of its own: whoever waits for something
/// on it drives it, so what arrives is passed on at once instead of by another turn of the scheduler.
#[derive(Debug)]
pub struct Link {
    sender: http1::SendRequest<Body>,
    driver: Driver,
    /// Whether a request was answered on it before.
    pub reused: bool,
}

/// Moves a connection's bytes. Nothing once it has ended.
struct Driver(Option<Pin<Box<dyn Future<Output = ()>>>>);

impl Driver {
    fn drive(&mut self, context: &mut Context<'_>) {
        if self.0.as_mut().is_some_and(|connection| connection.as_mut().poll(context).is_ready()) {
            self.0 = None;
        }
    }
}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() { "Driver" } else { "Driver (ended)" })
    }
}

impl Link {
    /// Sends a request and waits for the beginning of the response.
    pub async fn send(&mut self, request: Request<Body>) -> Result<Response<Incoming>, TrySendError<Request<Body>>> {
        let mut response = pin!(self.sender.try_send_request(request));
        poll_fn(|context| {
            self.driver.drive(context);
            response.as_mut().poll(context)
        })
        .await
    }

    /// To be called when more of a response's body is waited for.
    pub fn drive(&mut self, context: &mut Context<'_>) {
        self.driver.drive(context);
    }

    /// Lets it come to its end by itself: it is being upgraded, or still sends a request that is answered already.
    pub fn finish(self) {
        if let Some(connection) = self.driver.0 {
            tokio::task::spawn_local(connection);
        }
    }

    /// Whether a request can be sent on it. Takes note of what arrived since it was last looked at: its end, mostly.
    fn is_ready(&mut self) -> bool {
        self.driver.drive(&mut Context::from_waker(Waker::noop()));
        self.sender.is_ready()
    }
}

#[derive(Debug, Default)]
pub struct Pool {
    /// Those with the longest idle time first.
    idle: Vec<(Link, u64)>,
}

impl Pool {
    /// One that is ready to be used, if there is one.
    pub fn take(&mut self) -> Option<Link> {
        while let Some((mut link, _)) = self.idle.pop() {
            if link.is_ready() {
                return Some(link);
            }
        }
        None
    }

    pub fn put(&mut self, mut link: Link, now: u64) {
        if !link.is_ready() {
            return link.finish();
        }
        if self.idle.len() >= IDLE_MAX {
            return;
        }
        link.reused = true;
        self.idle.push((link, now));
    }

    /// Closes what has been idle for too long.
    pub fn sweep(&mut self, now: u64) {
        let limit = u64::try_from(IDLE_TIME_MAX.as_millis()).unwrap_or(u64::MAX);
        self.idle.retain_mut(|(link, since)| now.saturating_sub(*since) < limit && link.is_ready());
    }

    pub fn clear(&mut self) {
        self.idle.clear();
    }
}

/// Opens a connection to a replica.
pub async fn connect(address: SocketAddr, time_max: Duration) -> io::Result<Link> {
    let stream = match tokio::time::timeout(time_max, TcpStream::connect(address)).await {
        Ok(stream) => stream?,
        Err(_) => return Err(io::ErrorKind::TimedOut.into()),
    };
    stream.set_nodelay(true)?;
    SockRef::from(&stream).set_tcp_keepalive(&socket2::TcpKeepalive::new().with_time(TCP_KEEPALIVE))?;
    let (sender, connection) = http1::Builder::new()
        .max_buf_size(READ_BYTES_MAX)
        .handshake(TokioIo::new(stream))
        .await
        .map_err(io::Error::other)?;
    let driver = Driver(Some(Box::pin(async move {
        // What goes wrong on it is told to the request that is on it.
        let _ = connection.with_upgrades().await;
    })));
    Ok(Link { sender, driver, reused: false })
}
