//! One `orca server` takes over from another on the same machine without refusing a connection: the new process asks
//! over a Unix socket in the data directory, the old one closes its store and gives its listening sockets away, the
//! new one opens the store and begins to accept, and only then does the old one stop accepting and finish what it has.
//! In between both hold the same sockets, so a connection always has somebody to take it, or waits in the backlog.
//!
//! ```text
//!   new                                   old
//!    │── asks ────────────────────────────▶│ control plane and agent end, the proxy goes on
//!    │◀─────────────────── listening sockets│
//!    │ opens the store, applies its tables  │
//!    │── serves ──────────────────────────▶│ accepts no more, drains, exits
//! ```
//!
//! If the new one dies on the way, the old one goes on serving by the tables it has, and can be asked again.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};

const SOCKET: &str = "handover";
const ASKS: &[u8; 16] = b"orca handover 1\n";
const SERVES: &[u8; 1] = b"s";
/// Listening sockets that are given at once: one for each core and address; Linux allows 253 in a message.
const SOCKETS_MAX: usize = 128;
/// How long the old one may take to close its store, and the new one to serve.
const PATIENCE: Duration = Duration::from_secs(60);

/// Where a successor knocks.
#[derive(Debug)]
pub struct Door {
    listener: tokio::net::UnixListener,
}

/// A successor that has asked.
#[derive(Debug)]
pub struct Successor(UnixStream);

/// What a predecessor gave.
#[derive(Debug)]
pub struct Inheritance {
    pub listeners: Vec<TcpListener>,
    predecessor: UnixStream,
}

impl Door {
    /// For the owner of the data directory only; a socket left by a process that was killed is replaced.
    pub fn open(data: &Path) -> io::Result<Door> {
        let path = data.join(SOCKET);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Door { listener: tokio::net::UnixListener::from_std(listener)? })
    }

    /// Waits for a successor. What knocks and does not ask is sent away.
    pub async fn asked(&self) -> io::Result<Successor> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            let stream = stream.into_std()?;
            let asked = blocking(move || {
                prepare(&stream)?;
                let mut asks = [0; ASKS.len()];
                (&stream).read_exact(&mut asks)?;
                Ok((stream, asks == *ASKS))
            });
            match asked.await {
                Ok((stream, true)) => return Ok(Successor(stream)),
                Ok((_, false)) | Err(_) => tracing::warn!("somebody knocked and did not ask for a handover"),
            }
        }
    }
}

impl Successor {
    /// Gives the sockets and waits until they are served.
    pub async fn give(self, listeners: Vec<TcpListener>) -> io::Result<()> {
        blocking(move || {
            let given: Vec<_> = listeners.iter().take(SOCKETS_MAX).map(|listener| listener.as_fd()).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !ancillary.push(SendAncillaryMessage::ScmRights(&given)) {
                return Err(io::Error::other("there are too many listening sockets to give"));
            }
            let count = [u8::try_from(given.len()).unwrap_or(u8::MAX)];
            rustix::net::sendmsg(&self.0, &[IoSlice::new(&count)], &mut ancillary, SendFlags::empty())?;
            let mut serves = [0; SERVES.len()];
            (&self.0).read_exact(&mut serves)
        })
        .await
    }
}

/// Asks the server of this data directory to hand over; nothing if none runs.
pub async fn ask(data: &Path) -> io::Result<Option<Inheritance>> {
    let path = data.join(SOCKET);
    blocking(move || {
        let predecessor = match UnixStream::connect(&path) {
            Ok(stream) => stream,
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused) => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        prepare(&predecessor)?;
        (&predecessor).write_all(ASKS)?;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut count = [0];
        let received = rustix::net::recvmsg(
            &predecessor,
            &mut [IoSliceMut::new(&mut count)],
            &mut ancillary,
            RecvFlags::CMSG_CLOEXEC,
        )?;
        let sockets = ancillary.drain().filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(sockets) => Some(sockets),
            _ => None,
        });
        let listeners: Vec<TcpListener> = sockets.flatten().map(|socket: OwnedFd| socket.into()).collect();
        if received.bytes == 0 || listeners.len() != usize::from(count[0]) || listeners.is_empty() {
            return Err(io::Error::other("the server that runs ended instead of handing over"));
        }
        Ok(Some(Inheritance { listeners, predecessor }))
    })
    .await
}

impl Inheritance {
    /// Tells the predecessor that it is not needed any more.
    pub async fn serves(predecessor: UnixStream) -> io::Result<()> {
        blocking(move || (&predecessor).write_all(SERVES)).await
    }

    pub fn take_apart(self) -> (Vec<TcpListener>, UnixStream) {
        (self.listeners, self.predecessor)
    }
}

fn prepare(stream: &UnixStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_sockets_listen_on_in_the_successor() {
        let data = tempfile::tempdir().unwrap();
        assert!(ask(data.path()).await.unwrap().is_none());
        let door = Door::open(data.path()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let old = tokio::spawn(async move {
            let successor = door.asked().await?;
            successor.give(vec![listener]).await
        });
        // Connected before anybody accepts: it waits in the backlog for whoever is left.
        let early = std::net::TcpStream::connect(address).unwrap();
        let (listeners, predecessor) = ask(data.path()).await.unwrap().unwrap().take_apart();
        assert_eq!(listeners[0].local_addr().unwrap(), address);
        assert!(!old.is_finished());
        Inheritance::serves(predecessor).await.unwrap();
        old.await.unwrap().unwrap();
        let (accepted, _) = listeners[0].accept().unwrap();
        assert_eq!(accepted.peer_addr().unwrap(), early.local_addr().unwrap());
    }

    #[tokio::test]
    async fn a_successor_that_dies_is_an_error_and_the_door_stays_open() {
        let data = tempfile::tempdir().unwrap();
        let door = Door::open(data.path()).unwrap();
        let path = data.path().join(SOCKET);
        let dies = tokio::task::spawn_blocking(move || UnixStream::connect(path).unwrap().write_all(ASKS));
        let successor = door.asked().await.unwrap();
        dies.await.unwrap().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        successor.give(vec![listener]).await.unwrap_err();
        assert!(data.path().join(SOCKET).exists());
    }
}
