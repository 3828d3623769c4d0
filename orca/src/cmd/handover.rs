//! One `orca server` takes over from another on the same machine without refusing a connection: the new process asks
//! over a Unix socket in the data directory, the old one closes its store and gives its listening sockets away, the
//! new one opens the store and begins to accept, and only then does the old one stop accepting and finish what it has.
//! In between both hold the same sockets, so a connection always has somebody to take it, or waits in the backlog.
//!
//! ```text
//!   new                                   old
//!    │── asks ────────────────────────────▶│ control plane and agent end, the proxy goes on
//!    │◀────────────────── listening sockets│
//!    │ opens the store                     │
//!    │── goes on ─────────────────────────▶│
//!    │◀────────────────────────── may go on│
//!    │ loads modules, applies its tables   │
//!    │── serves ──────────────────────────▶│ accepts no more, drains
//!    │◀──────────── what is not finished, …│
//!    │                                     │ exits
//! ```
//!
//! If the new one dies on the way, the old one goes on serving by the tables it has, and can be asked again. The new one
//! accepts nothing before both know that it goes on: until then it may find that it cannot, or the old one that it has
//! waited for too long, and what either of them had accepted would be lost.
//!
//! While the old one drains, nobody but the new one speaks for this node. What the old one still has is told to it, and it
//! reports that as its own, or a replica would be stopped under the requests that the old one has given it.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use orca_cluster::traffic::Unfinished;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio::time::timeout;
use tracing::debug;

const SOCKET: &str = "handover";
const ASKS: &[u8; 16] = b"orca handover 2\n";
const GOES_ON: &[u8; 1] = b"g";
const MAY_GO_ON: &[u8; 1] = b"m";
const SERVES: &[u8; 1] = b"s";
/// Listening sockets that are given at once: one for each core and address; Linux allows 253 in a message.
const SOCKETS_MAX: usize = 128;
/// How long the old one may take to close its store, and the new one to know whether it goes on.
const PATIENCE: Duration = Duration::from_secs(60);
/// For the new one to take what it is told. It has nothing else to do for it than to read.
const TELL_MAX: Duration = Duration::from_secs(10);
/// What is not finished, written out: some fifty bytes for each replica of a node.
const UNFINISHED_BYTES_MAX: usize = 1 << 20;

/// Where a successor knocks.
#[derive(Debug)]
pub struct Door {
    listener: tokio::net::UnixListener,
}

/// A successor that has asked.
#[derive(Debug)]
pub struct Successor(UnixStream);

/// A successor that serves.
#[derive(Debug)]
pub struct Heir(tokio::net::UnixStream);

/// What a predecessor gave.
#[derive(Debug)]
pub struct Inheritance {
    pub listeners: Vec<TcpListener>,
    predecessor: Predecessor,
}

/// Who goes on serving until it is told that it need not.
#[derive(Debug)]
pub struct Predecessor(UnixStream);

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
    pub async fn give(self, listeners: Vec<TcpListener>) -> io::Result<Heir> {
        let given = blocking(move || {
            let Successor(stream) = self;
            let given: Vec<_> = listeners.iter().take(SOCKETS_MAX).map(|listener| listener.as_fd()).collect();
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !ancillary.push(SendAncillaryMessage::ScmRights(&given)) {
                return Err(io::Error::other("there are too many listening sockets to give"));
            }
            let count = [u8::try_from(given.len()).unwrap_or(u8::MAX)];
            rustix::net::sendmsg(&stream, &[IoSlice::new(&count)], &mut ancillary, SendFlags::empty())?;
            expect(&stream, GOES_ON)?;
            // From here on it may accept connections at any moment, so there is no going back while it lives; if it does
            // not, this ends.
            stream.set_read_timeout(None)?;
            (&stream).write_all(MAY_GO_ON)?;
            expect(&stream, SERVES)?;
            Ok(stream)
        });
        Ok(Heir(into_async(given.await?)?))
    }
}

impl Heir {
    pub async fn tell(&mut self, unfinished: &Unfinished) -> io::Result<()> {
        let text = serde_json::to_vec(unfinished)?;
        let length = u32::try_from(text.len()).map_err(io::Error::other)?;
        let told = async {
            self.0.write_all(&length.to_be_bytes()).await?;
            self.0.write_all(&text).await
        };
        timeout(TELL_MAX, told).await.map_err(io::Error::from)?
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
        Ok(Some(Inheritance { listeners, predecessor: Predecessor(predecessor) }))
    })
    .await
}

impl Inheritance {
    pub fn take_apart(self) -> (Vec<TcpListener>, Predecessor) {
        (self.listeners, self.predecessor)
    }
}

impl Predecessor {
    /// From when on there is no way back: an error if the predecessor has ended, or has given up waiting and is to be
    /// left in peace.
    pub async fn goes_on(self) -> io::Result<Predecessor> {
        blocking(move || {
            let Predecessor(stream) = self;
            (&stream).write_all(GOES_ON)?;
            expect(&stream, MAY_GO_ON)?;
            Ok(Predecessor(stream))
        })
        .await
    }

    /// Tells it that it is not needed any more, and keeps up with what it has not finished until that is nothing, or it
    /// has ended.
    pub async fn follow(self, unfinished: watch::Sender<Unfinished>) {
        if let Err(error) = self.heard(&unfinished).await {
            // What it had has ended with it.
            debug!(%error, "the predecessor says nothing any more");
        }
        unfinished.send_replace(Unfinished::default());
    }

    async fn heard(self, unfinished: &watch::Sender<Unfinished>) -> io::Result<()> {
        let mut stream = into_async(self.0)?;
        stream.write_all(SERVES).await?;
        loop {
            let length = match stream.read_u32().await {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
                length => usize::try_from(length?).map_err(io::Error::other)?,
            };
            if length > UNFINISHED_BYTES_MAX {
                return Err(io::Error::other(format!("{length} bytes at once are too many")));
            }
            let mut text = vec![0; length];
            stream.read_exact(&mut text).await?;
            let said: Unfinished = serde_json::from_slice(&text)?;
            unfinished.send_if_modified(|before| {
                let is_news = *before != said;
                *before = said;
                is_news
            });
        }
    }
}

fn expect(mut stream: &UnixStream, word: &[u8; 1]) -> io::Result<()> {
    let mut said = [0];
    stream.read_exact(&mut said)?;
    if said == *word { Ok(()) } else { Err(io::Error::other("the other server said something else than was expected")) }
}

fn prepare(stream: &UnixStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))
}

fn into_async(stream: UnixStream) -> io::Result<tokio::net::UnixStream> {
    stream.set_nonblocking(true)?;
    tokio::net::UnixStream::from_std(stream)
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(work).await.map_err(io::Error::other)?
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use orca_cluster::id::ReplicaId;
    use orca_cluster::traffic::InFlight;

    use super::*;

    const LONGEST: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn the_same_sockets_listen_on_in_the_successor_which_hears_what_is_not_finished() {
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
        let predecessor = predecessor.goes_on().await.unwrap();
        assert!(!old.is_finished());
        let (sender, mut unfinished) = watch::channel(Unfinished { is_choosing: true, ..Unfinished::default() });
        let following = tokio::spawn(predecessor.follow(sender));
        let mut heir = old.await.unwrap().unwrap();
        let (accepted, _) = listeners[0].accept().unwrap();
        assert_eq!(accepted.peer_addr().unwrap(), early.local_addr().unwrap());

        let busy = InFlight { requests: 1, upgraded: 2 };
        let left = Unfinished { is_choosing: false, in_flight: BTreeMap::from([(ReplicaId(7), busy)]) };
        heir.tell(&left).await.unwrap();
        timeout(LONGEST, unfinished.wait_for(|said| *said == left)).await.unwrap().unwrap();
        drop(heir);
        timeout(LONGEST, following).await.unwrap().unwrap();
        assert!(unfinished.borrow().is_nothing(), "it has ended");
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

    #[tokio::test]
    async fn a_successor_does_not_go_on_when_its_predecessor_has_given_up() {
        let data = tempfile::tempdir().unwrap();
        let door = Door::open(data.path()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let old = tokio::spawn(async move { door.asked().await });
        let asking = tokio::spawn({
            let data = data.path().to_owned();
            async move { ask(&data).await }
        });
        let Successor(stream) = old.await.unwrap().unwrap();
        // What `give` does first, and then no more.
        let giving = blocking(move || {
            let given = [listener.as_fd()];
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&given)));
            rustix::net::sendmsg(&stream, &[IoSlice::new(&[1])], &mut ancillary, SendFlags::empty())?;
            Ok(())
        });
        giving.await.unwrap();
        let (_, predecessor) = asking.await.unwrap().unwrap().unwrap().take_apart();
        predecessor.goes_on().await.unwrap_err();
    }
}
