//! Connections to one replica, kept for the next request. The one used last is taken first, so that surplus ones
//! grow old and go. A server may close an idle connection at the moment we send on it; nothing prevents that, so
//! ours are given up before usual servers would, one that the server has already closed is not handed out, and
//! what still goes wrong is for [`forward`](super::forward) to retry where that is safe.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use hyper::client::conn::http1;
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

/// A connection on which one request at a time can be sent.
#[derive(Debug)]
pub struct Link {
    pub sender: http1::SendRequest<Body>,
    /// Whether a request was answered on it before.
    pub reused: bool,
}

#[derive(Debug, Default)]
pub struct Pool {
    /// Those with the longest idle time first.
    idle: Vec<(Link, u64)>,
}

impl Pool {
    /// One that is ready to be used, if there is one.
    pub fn take(&mut self) -> Option<Link> {
        while let Some((link, _)) = self.idle.pop() {
            if link.sender.is_ready() {
                return Some(link);
            }
        }
        None
    }

    pub fn put(&mut self, mut link: Link, now: u64) {
        if link.sender.is_closed() || self.idle.len() >= IDLE_MAX {
            return;
        }
        link.reused = true;
        self.idle.push((link, now));
    }

    /// Closes what has been idle for too long.
    pub fn sweep(&mut self, now: u64) {
        let limit = u64::try_from(IDLE_TIME_MAX.as_millis()).unwrap_or(u64::MAX);
        self.idle.retain(|(link, since)| now.saturating_sub(*since) < limit && !link.sender.is_closed());
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
    tokio::task::spawn_local(async move {
        // What goes wrong on it is told to the request that is on it.
        let _ = connection.with_upgrades().await;
    });
    Ok(Link { sender, reused: false })
}
