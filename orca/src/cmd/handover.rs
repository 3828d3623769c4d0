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
//!    │◀────────────────────────── legacy, …│ again and again
//!    │ loads modules, applies its tables   │
//!    │── serves ──────────────────────────▶│ accepts no more, drains
//!    │◀─────────────────────── last legacy │
//!    │                                     │ exits
//! ```
//!
//! If the new one dies on the way, the old one goes on serving by the tables it has, and can be asked again. The new one
//! accepts nothing before both know that it goes on: until then it may find that it cannot, or the old one that it has
//! waited for too long, and what either of them had accepted would be lost.
//!
//! From then on nobody but the new one speaks for this node. What the old one has and what it counts is told to it, and it
//! reports that as its own: or a replica would be stopped under the requests that the old one has given it, and a receipt
//! would lack the requests that have ended there.

use std::fs;
use std::io::{self, IoSlice, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::net::TcpListener;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use orca_cluster::traffic::Legacy;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::watch;
use tokio::time::{interval, timeout};
use tracing::{debug, warn};

const SOCKET: &str = "handover";
const ASKS: &[u8; 16] = b"orca handover 3\n";
const GOES_ON: &[u8; 1] = b"g";
const MAY_GO_ON: &[u8; 1] = b"m";
const SERVES: &[u8; 1] = b"s";
/// Listening sockets that are given at once: one for each core and address; Linux allows 253 in a message.
const SOCKETS_MAX: usize = 128;
/// How long the old one may take to close its store, and the new one to know whether it goes on.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two words about what is left; as often as a node reports while a replica drains.
const TELL_INTERVAL: Duration = Duration::from_millis(100);
/// For the new one to take what it is told. It has nothing else to do for it than to read.
const TELL_MAX: Duration = Duration::from_secs(10);
/// A legacy, written out: some two thousand bytes for each revision that was ever served, and as much as a report may be.
const LEGACY_BYTES_MAX: usize = 16 << 20;

/// Where a successor knocks.
#[derive(Debug)]
pub struct Door {
    listener: tokio::net::UnixListener,
}

/// A successor that has asked.
#[derive(Debug)]
pub struct Successor(UnixStream);

/// A successor that goes on: it may accept connections at any moment.
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

/// The same, when it knows that its successor goes on.
#[derive(Debug)]
pub struct Ancestor(OwnedWriteHalf);

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
                Ok((_, false)) | Err(_) => warn!("somebody knocked and did not ask for a handover"),
            }
        }
    }
}

impl Successor {
    /// Gives the sockets and waits until it is known that the successor goes on.
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
            (&stream).write_all(MAY_GO_ON)?;
            Ok(stream)
        });
        Ok(Heir(into_async(given.await?)?))
    }
}

impl Heir {
    /// Tells what is left so far until the heir serves. There is no going back while it lives, so it may take its time; if
    /// it does not live, this is an error.
    pub async fn serves(&mut self, left: impl Fn() -> Legacy) -> io::Result<()> {
        let mut ticks = interval(TELL_INTERVAL);
        let mut said = [0];
        loop {
            tokio::select! {
                read = self.0.read_exact(&mut said) => return read.and_then(|_| is_word(said, SERVES)),
                _ = ticks.tick() => self.tell(&left()).await?,
            }
        }
    }

    /// Tells what is left until nothing is added to it any more.
    pub async fn follow(mut self, left: impl Fn() -> Legacy) -> io::Result<()> {
        let mut ticks = interval(TELL_INTERVAL);
        loop {
            ticks.tick().await;
            let left = left();
            timeout(TELL_MAX, self.tell(&left)).await??;
            if left.is_final {
                return Ok(());
            }
        }
    }

    async fn tell(&mut self, left: &Legacy) -> io::Result<()> {
        let text = serde_json::to_vec(left)?;
        self.0.write_u32(u32::try_from(text.len()).map_err(io::Error::other)?).await?;
        self.0.write_all(&text).await
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
    /// left in peace. What it leaves is kept up with until it has drained, or has ended.
    pub async fn goes_on(self) -> io::Result<(Ancestor, watch::Receiver<Legacy>)> {
        let stream = blocking(move || {
            let Predecessor(stream) = self;
            (&stream).write_all(GOES_ON)?;
            expect(&stream, MAY_GO_ON)?;
            Ok(stream)
        });
        let (mut words, voice) = into_async(stream.await?)?.into_split();
        // Before there is anybody to report without it: counters that became smaller would be taken for lost ones.
        let (left, legacy) = watch::channel(timeout(PATIENCE, hear(&mut words)).await??);
        tokio::spawn(keep_up(words, left));
        Ok((Ancestor(voice), legacy))
    }
}

impl Ancestor {
    /// Tells it that it is not needed any more, and is to drain.
    pub async fn let_go(mut self) {
        if let Err(error) = self.0.write_all(SERVES).await {
            debug!(%error, "the predecessor has ended already");
        }
    }
}

/// Until the predecessor has ended.
async fn keep_up(mut words: OwnedReadHalf, left: watch::Sender<Legacy>) {
    let error = loop {
        match hear(&mut words).await {
            Ok(said) => drop(left.send_replace(said)),
            Err(error) => break error,
        }
    };
    if !left.borrow().is_final {
        warn!(%error, "the predecessor has ended before it had drained: receipts of now will say \"at least\"");
    }
    left.send_modify(Legacy::end);
}

async fn hear(words: &mut OwnedReadHalf) -> io::Result<Legacy> {
    let length = usize::try_from(words.read_u32().await?).map_err(io::Error::other)?;
    if length > LEGACY_BYTES_MAX {
        return Err(io::Error::other(format!("{length} bytes at once are too many")));
    }
    let mut text = vec![0; length];
    words.read_exact(&mut text).await?;
    Ok(serde_json::from_slice(&text)?)
}

fn expect(mut stream: &UnixStream, word: &[u8; 1]) -> io::Result<()> {
    let mut said = [0];
    stream.read_exact(&mut said)?;
    is_word(said, word)
}

fn is_word(said: [u8; 1], word: &[u8; 1]) -> io::Result<()> {
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
    use orca_cluster::id::ReplicaId;
    use orca_cluster::time::Timestamp;
    use orca_cluster::traffic::{InFlight, Traffic};

    use super::*;

    const LONGEST: Duration = Duration::from_secs(20);

    /// What is left when so many requests are in flight.
    fn left(requests: u32) -> Legacy {
        let busy = InFlight { requests, upgraded: 0 };
        let in_flight = [(ReplicaId(7), busy)].into_iter().filter(|(_, busy)| busy.requests > 0).collect();
        let traffic = Traffic { started: Timestamp(3), in_flight, ..Traffic::default() };
        Legacy { is_choosing: requests > 0, is_final: requests == 0, traffic }
    }

    #[tokio::test]
    async fn the_same_sockets_listen_on_in_the_successor_which_hears_what_is_left() {
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
        let busy = watch::Sender::new(3);
        let told = busy.clone();
        let old = tokio::spawn(async move {
            let mut heir = old.await.unwrap()?;
            heir.serves(|| left(*told.borrow())).await?;
            told.send_replace(1);
            heir.follow(|| left(*told.borrow())).await
        });
        let (ancestor, mut legacy) = predecessor.goes_on().await.unwrap();
        assert_eq!(*legacy.borrow(), left(3), "known before anything is accepted");
        let (accepted, _) = listeners[0].accept().unwrap();
        assert_eq!(accepted.peer_addr().unwrap(), early.local_addr().unwrap());
        busy.send_replace(2);
        hears(&mut legacy, |said| *said == left(2)).await;
        assert!(!old.is_finished());

        ancestor.let_go().await;
        hears(&mut legacy, |said| *said == left(1)).await;
        busy.send_replace(0);
        hears(&mut legacy, |said| said.is_final).await;
        old.await.unwrap().unwrap();
        let ended = async { while legacy.changed().await.is_ok() {} };
        timeout(LONGEST, ended).await.unwrap();
        assert_eq!(*legacy.borrow(), left(0), "with nothing lost");
    }

    #[tokio::test]
    async fn a_predecessor_that_is_killed_leaves_what_it_last_said_and_a_gap() {
        let data = tempfile::tempdir().unwrap();
        let door = Door::open(data.path()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let old = tokio::spawn(async move {
            let mut heir = door.asked().await?.give(vec![listener]).await?;
            heir.serves(|| left(3)).await
        });
        let (_, predecessor) = ask(data.path()).await.unwrap().unwrap().take_apart();
        let (_ancestor, mut legacy) = predecessor.goes_on().await.unwrap();
        old.abort();
        hears(&mut legacy, |said| said.is_final).await;
        let traffic = Traffic { started: Timestamp(3), gaps: 1, ..Traffic::default() };
        assert_eq!(*legacy.borrow(), Legacy { is_choosing: false, is_final: true, traffic });
    }

    async fn hears(legacy: &mut watch::Receiver<Legacy>, what: impl FnMut(&Legacy) -> bool) {
        timeout(LONGEST, legacy.wait_for(what)).await.unwrap().unwrap();
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
    async fn a_successor_that_goes_on_and_dies_is_an_error_too() {
        let data = tempfile::tempdir().unwrap();
        let door = Door::open(data.path()).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let old = tokio::spawn(async move {
            let mut heir = door.asked().await?.give(vec![listener]).await?;
            heir.serves(|| left(3)).await
        });
        let (_, predecessor) = ask(data.path()).await.unwrap().unwrap().take_apart();
        let (ancestor, _legacy) = predecessor.goes_on().await.unwrap();
        drop(ancestor);
        timeout(LONGEST, old).await.unwrap().unwrap().unwrap_err();
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
