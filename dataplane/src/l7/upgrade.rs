//! Connections that are no longer HTTP: WebSockets and the like, after the replica agreed with 101. Bytes are copied
//! both ways through one buffer that the whole worker shares, so an idle one costs two sockets and no memory. It
//! lives until one side ends it; a new table does not concern it.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;

use super::connection::Gate;
use super::exchange::Exchange;
use super::websocket::Frames;
use super::worker::Worker;

/// Which side ended the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Client,
    Replica,
}

/// Carries an upgraded connection to its end. Of a WebSocket it is known which side asked for the end.
pub async fn run(client: OnUpgrade, replica: End, is_websocket: bool, exchange: Exchange) {
    let worker = Rc::clone(&exchange.client.worker);
    let _open = worker.open();
    let client = match client.await {
        Ok(client) => client,
        Err(error) => {
            tracing::debug!(%error, "an upgrade was agreed on and did not come about");
            return;
        }
    };
    let Some(client) = client_socket(client) else {
        tracing::error!("an upgraded connection is not one of our sockets");
        return exchange.cut();
    };
    let ended = tokio::select! {
        biased;
        () = worker.cut() => None,
        ended = copy(&worker, client, replica, is_websocket) => Some(ended),
    };
    let is_cut = match ended {
        None => true,
        Some(Ended { asked, first, clean }) => match (asked.unwrap_or(first), asked) {
            (Side::Client, _) => false,
            // It may end a connection in good order like anyone; one that is being stopped does so before its time.
            (Side::Replica, Some(_)) => exchange.is_draining(),
            (Side::Replica, None) => !clean || exchange.is_draining(),
        },
    };
    if is_cut { exchange.cut() } else { exchange.done() }
}

/// A socket, and what was read from it beyond the head.
#[derive(Debug)]
pub struct End {
    pub stream: TcpStream,
    pub early: bytes::Bytes,
}

struct Ended {
    /// Whose bytes ended first.
    first: Side,
    clean: bool,
    /// Who sent the first Close frame, if anyone did.
    asked: Option<Side>,
}

fn client_socket(upgraded: Upgraded) -> Option<End> {
    let parts = upgraded.downcast::<TokioIo<Gate>>().ok()?;
    Some(End { stream: parts.io.into_inner().into_stream(), early: parts.read_buf })
}

async fn copy(worker: &Worker, mut client: End, mut replica: End, is_websocket: bool) -> Ended {
    let (from_client, to_client) = client.stream.split();
    let (from_replica, to_replica) = replica.stream.split();
    let asked = Cell::new(None);
    let see = |side| {
        let (mut frames, asked) = (Frames::default(), &asked);
        move |bytes: &[u8]| {
            // The answer to a Close frame is one too.
            if is_websocket && asked.get().is_none() {
                frames.read(bytes);
                asked.set(frames.is_closed().then_some(side));
            }
        }
    };
    let up = pump(worker, from_client, to_replica, &client.early, see(Side::Client));
    let down = pump(worker, from_replica, to_client, &replica.early, see(Side::Replica));
    tokio::pin!(up, down);
    // When one direction has ended well the other goes on: that side may still have something to say.
    let (first, result) = tokio::select! {
        result = &mut up => (Side::Client, result),
        result = &mut down => (Side::Replica, result),
    };
    let broken = match result {
        Ok(()) => {
            let _ = match first {
                Side::Client => down.await,
                Side::Replica => up.await,
            };
            return Ended { first, clean: true, asked: asked.get() };
        }
        Err(broken) => broken,
    };
    let (at, error) = match (first, broken) {
        (Side::Client, Broken::Reading(error)) | (Side::Replica, Broken::Writing(error)) => (Side::Client, error),
        (Side::Replica, Broken::Reading(error)) | (Side::Client, Broken::Writing(error)) => (Side::Replica, error),
    };
    tracing::debug!(?at, %error, "an upgraded connection broke");
    Ended { first: at, clean: false, asked: asked.get() }
}

/// Where a direction broke.
enum Broken {
    Reading(io::Error),
    Writing(io::Error),
}

/// Copies one direction until its source ends, then says so to the other side.
async fn pump(
    worker: &Worker,
    from: tokio::net::tcp::ReadHalf<'_>,
    mut to: tokio::net::tcp::WriteHalf<'_>,
    early: &[u8],
    mut see: impl FnMut(&[u8]),
) -> Result<(), Broken> {
    see(early);
    to.write_all(early).await.map_err(Broken::Writing)?;
    loop {
        from.readable().await.map_err(Broken::Reading)?;
        let left = {
            let mut scratch = worker.scratch();
            let read = match from.try_read(&mut scratch) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(Broken::Reading(error)),
            };
            see(&scratch[..read]);
            let written = match to.try_write(&scratch[..read]) {
                Ok(written) => written,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => 0,
                Err(error) => return Err(Broken::Writing(error)),
            };
            // Rarely: the other side is slower. Then nothing more is read until it has taken this.
            scratch[written..read].to_vec()
        };
        if !left.is_empty() {
            to.write_all(&left).await.map_err(Broken::Writing)?;
        }
    }
    to.shutdown().await.map_err(Broken::Writing)
}
