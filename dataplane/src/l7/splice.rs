//! A large body on its way from a replica's socket to the client's without passing through our memory: the kernel
//! hands the pages on through a pipe (splice(2)). Worth two more system calls from about 32 KiB on.
//!
//! The HTTP library stands between the two ends and wants to see bytes. What it is given are [`STAND_IN`] bytes,
//! which it counts, frames and passes down without ever looking at them; where they come out again, at the
//! client's socket, they are known by where they lie, and as many are moved out of the pipe in their stead. The library
//! keeps the order of what it is given, so one pipe for each connection keeps the order too. It copies nothing as long
//! as what is below it takes many slices at once (`is_write_vectored`).

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker, ready};

use bytes::Bytes;
use rustix::net::{SendAncillaryBuffer, SendFlags, sendmsg};
use rustix::pipe::{PipeFlags, SpliceFlags, fcntl_setpipe_size, pipe_with, splice};
use tokio::io::Interest;
use tokio::net::TcpStream;

/// A body with less left than this is copied.
pub const WORTH_IT: u64 = 32 << 10;
/// Most bytes in a pipe: small beside what sockets hold, and one worker's pipes stay below what the kernel lets an
/// ordinary user have (`/proc/sys/fs/pipe-user-pages-soft`).
const PIPE_BYTES: usize = 256 << 10;
/// Pipes of one worker, two descriptors each. Bodies beyond that are copied.
pub const PIPES_MAX: usize = 32;

/// Stand for bytes in a pipe. Nobody touches them, so the kernel never gives them memory.
static STAND_IN: LazyLock<&[u8]> = LazyLock::new(|| vec![0; PIPE_BYTES].leak());

/// Whether a slice stands for bytes in a pipe.
fn is_stand_in(slice: &[u8]) -> bool {
    STAND_IN.as_ptr_range().contains(&slice.as_ptr())
}

#[derive(Debug)]
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

/// The pipes of one worker that are not in use. They are empty.
#[derive(Debug, Default)]
pub struct Pipes {
    idle: Mutex<Vec<Pipe>>,
    /// In use or not.
    count: AtomicUsize,
}

impl Pipes {
    fn take(&self) -> Option<Pipe> {
        if let Some(pipe) = lock(&self.idle).pop() {
            return Some(pipe);
        }
        if self.count.fetch_add(1, Ordering::Relaxed) >= PIPES_MAX {
            self.count.fetch_sub(1, Ordering::Relaxed);
            return None;
        }
        match pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK) {
            Ok((read, write)) => {
                // Where it is not allowed, more turns are taken.
                let _ = fcntl_setpipe_size(&write, PIPE_BYTES);
                Some(Pipe { read, write })
            }
            Err(error) => {
                tracing::debug!(%error, "a large body is copied for want of a pipe");
                self.count.fetch_sub(1, Ordering::Relaxed);
                None
            }
        }
    }

    fn put(&self, pipe: Pipe) {
        lock(&self.idle).push(pipe);
    }
}

/// A client connection's way around our memory. Both its ends are used by the connection's own task.
#[derive(Debug)]
pub struct Bypass {
    pipes: Arc<Pipes>,
    flow: Mutex<Flow>,
}

#[derive(Debug, Default)]
struct Flow {
    pipe: Option<Pipe>,
    /// Bytes in the pipe.
    held: usize,
    /// Waits until they are gone.
    waiting: Option<Waker>,
}

/// What came of filling a [`Bypass`].
#[derive(Debug)]
pub enum Filled {
    /// These stand for what the pipe holds now.
    With(Bytes),
    /// The source has ended.
    Ended,
    /// There is no pipe to be had.
    Unavailable,
}

impl Bypass {
    pub fn new(pipes: Arc<Pipes>) -> Bypass {
        Bypass { pipes, flow: Mutex::default() }
    }

    /// Moves what has arrived, up to so many bytes, as soon as what was moved before has been taken.
    pub fn poll_fill(&self, from: &TcpStream, most: u64, context: &mut Context<'_>) -> Poll<io::Result<Filled>> {
        let mut flow = lock(&self.flow);
        // Only an empty pipe is filled: a full one and an empty socket look alike from outside.
        if flow.held > 0 {
            flow.waiting = Some(context.waker().clone());
            return Poll::Pending;
        }
        let pipe = match flow.pipe.take().or_else(|| self.pipes.take()) {
            Some(pipe) => flow.pipe.insert(pipe),
            None => return Poll::Ready(Ok(Filled::Unavailable)),
        };
        let most = usize::try_from(most).unwrap_or(usize::MAX).min(STAND_IN.len());
        let moved = loop {
            ready!(from.poll_read_ready(context))?;
            let moved = from.try_io(Interest::READABLE, || Ok(splice(from, None, &pipe.write, None, most, FLAGS)?));
            match moved {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                moved => break moved?,
            }
        };
        flow.held = moved;
        Poll::Ready(Ok(if moved == 0 { Filled::Ended } else { Filled::With(Bytes::from_static(&STAND_IN[..moved])) }))
    }

    /// Writes the bytes that these stand for.
    pub fn poll_drain(&self, to: &TcpStream, stand_in: &[u8], context: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let mut flow = lock(&self.flow);
        let count = stand_in.len().min(flow.held);
        let (Some(pipe), true) = (&flow.pipe, count > 0) else {
            return Poll::Ready(Err(io::Error::other("the body's bytes are no longer there")));
        };
        let moved = loop {
            ready!(to.poll_write_ready(context))?;
            let moved = to.try_io(Interest::WRITABLE, || Ok(splice(&pipe.read, None, to, None, count, FLAGS)?));
            match moved {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                moved => break moved?,
            }
        };
        flow.held -= moved;
        if flow.held == 0 {
            self.pipes.put(flow.pipe.take().expect("it was just read from"));
            if let Some(waiting) = flow.waiting.take() {
                waiting.wake();
            }
        }
        Poll::Ready(Ok(moved))
    }
}

impl Drop for Bypass {
    fn drop(&mut self) {
        // With bytes in it that nobody wants any more.
        if lock(&self.flow).pipe.take().is_some() {
            self.pipes.count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

const FLAGS: SpliceFlags = SpliceFlags::NONBLOCK.union(SpliceFlags::MOVE);

/// The slices in front of the first that stands for bytes in a pipe.
pub fn ahead_of_stand_in<'a, 'b>(slices: &'a [IoSlice<'b>]) -> &'a [IoSlice<'b>] {
    let count = slices.iter().position(|slice| is_stand_in(slice)).unwrap_or(slices.len());
    &slices[..count]
}

/// Writes what bytes out of a pipe follow at once: they may share a segment.
pub fn poll_write_more(to: &TcpStream, slices: &[IoSlice<'_>], context: &mut Context<'_>) -> Poll<io::Result<usize>> {
    loop {
        ready!(to.poll_write_ready(context))?;
        let sent = to.try_io(Interest::WRITABLE, || {
            Ok(sendmsg(to, slices, &mut SendAncillaryBuffer::default(), SendFlags::MORE | SendFlags::NOSIGNAL)?)
        });
        match sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            sent => return Poll::Ready(sent),
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;

    use super::*;

    /// Both ends of a connection.
    async fn connection() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let near = TcpStream::connect(listener.local_addr().expect("it is bound")).await.expect("it listens");
        (near, listener.accept().await.expect("it was connected to").0)
    }

    #[tokio::test]
    async fn bytes_go_from_socket_to_socket_and_stand_ins_through_our_hands() {
        let (mut server, source) = connection().await;
        let (sink, mut client) = connection().await;
        let pipes = Arc::new(Pipes::default());
        let bypass = Bypass::new(Arc::clone(&pipes));
        let body: Vec<u8> = (0..50_000_u32).map(|number| (number % 251) as u8).collect();
        server.write_all(&body).await.expect("it fits in the socket");
        drop(server);

        let mut got = Vec::new();
        while got.len() < body.len() {
            let left = (body.len() - got.len()) as u64;
            let filled = poll_fn(|context| bypass.poll_fill(&source, left, context)).await.expect("it can be read");
            let Filled::With(mut stand_in) = filled else { panic!("{filled:?}") };
            assert!(is_stand_in(&stand_in));
            assert!(ahead_of_stand_in(&[IoSlice::new(b"head"), IoSlice::new(&stand_in)]).len() == 1);
            let mut context = Context::from_waker(Waker::noop());
            assert!(bypass.poll_fill(&source, left, &mut context).is_pending(), "nothing is mixed");
            while !stand_in.is_empty() {
                let drained =
                    poll_fn(|context| bypass.poll_drain(&sink, &stand_in, context)).await.expect("it is open");
                bytes::Buf::advance(&mut stand_in, drained);
                let before = got.len();
                got.resize(before + drained, 0);
                client.read_exact(&mut got[before..]).await.expect("it was sent");
            }
        }
        assert!(got == body);
        let ended = poll_fn(|context| bypass.poll_fill(&source, 1, context)).await;
        assert!(matches!(ended, Ok(Filled::Ended)));
        let nothing = poll_fn(|context| bypass.poll_drain(&sink, &STAND_IN[..1], context)).await;
        assert!(nothing.is_err(), "what is not there is not made up");
    }

    #[tokio::test]
    async fn pipes_are_bounded_and_one_with_bytes_in_it_is_not_used_again() {
        let pipes = Arc::new(Pipes::default());
        let mut open = Vec::new();
        for _ in 0..PIPES_MAX {
            let (mut server, source) = connection().await;
            server.write_all(b"some").await.expect("it fits in the socket");
            let bypass = Bypass::new(Arc::clone(&pipes));
            let filled = poll_fn(|context| bypass.poll_fill(&source, 4, context)).await;
            assert!(matches!(filled, Ok(Filled::With(_))));
            open.push((server, source, bypass));
        }
        let last = Bypass::new(Arc::clone(&pipes));
        let filled = poll_fn(|context| last.poll_fill(&open[0].1, 4, context)).await;
        assert!(matches!(filled, Ok(Filled::Unavailable)));
        open.clear();
        assert_eq!(pipes.count.load(Ordering::Relaxed), 0);
        assert!(lock(&pipes.idle).is_empty());
    }
}
