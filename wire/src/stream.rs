//! One request and what follows it: a bidirectional QUIC stream, cut into frames. Both directions are independent;
//! a stream that goes wrong ends alone, with a code that tells the other side why.
//!
//! Dropping a [`Sender`] before [`finish`](Sender::finish), or a [`Receiver`] before the end, is cancelling: the
//! other side is told at once. All waiting here can be given up at any point and taken up again (`select!`): what
//! was half sent or half received stays.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::{Buf as _, Bytes, BytesMut};
use quinn::{ConnectionError, ReadError, VarInt, WriteError};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::timeout;

use crate::codec::{self, Decoder, EncodeError, Frame, FrameError};

/// Why a stream was broken off, as the other side reads it.
mod code {
    use quinn::VarInt;
    pub const CANCELLED: VarInt = VarInt::from_u32(1);
    pub const MALFORMED: VarInt = VarInt::from_u32(2);
    pub const PANICKED: VarInt = VarInt::from_u32(3);
    pub const CROWDED: VarInt = VarInt::from_u32(4);
}

/// What one stream may send before it is read, and a whole connection. A Raft snapshot or a module fills the first.
pub(crate) const STREAM_WINDOW: u32 = 1024 * 1024;
pub(crate) const CONNECTION_WINDOW: u32 = 16 * 1024 * 1024;

/// Most bytes taken from QUIC at a time.
const READ_LENGTH: usize = 64 * 1024;

/// Most bytes held as beginnings of messages for all streams of a connection together. Each may be 16 MiB and there
/// may be a thousand: without this, one node gone bad could fill the leader's memory.
const HELD_MAX: usize = 4 * codec::MESSAGE_LENGTH_MAX;

/// How long the other side may take nothing at all while we have something to send. Its reader is stuck then, and
/// what we hold for it is given back. See [`Stream::may_rest`] for those that are not.
const STALL: Duration = Duration::from_secs(30);

/// The same for readers that may rest: a person's pager stays open over night.
const REST_MAX: Duration = Duration::from_secs(24 * 60 * 60);

#[derive(Debug, thiserror::Error)]
pub enum StreamError {
    #[error("no answer within {} ms", .0.as_millis())]
    Deadline(Duration),
    #[error("the other side took nothing for {} s", .0.as_secs())]
    Stalled(Duration),
    #[error("the other side gave up on this request")]
    Cancelled,
    #[error("the other side failed at this request; its log says how")]
    Panicked,
    #[error("the other side did not understand what was sent")]
    NotUnderstood,
    #[error("the stream ended where an answer was due")]
    Ended,
    #[error("the other side sent what is not understood here")]
    Malformed(#[source] FrameError),
    #[error("the other side sent {got} where {wanted} was due")]
    Unexpected { got: &'static str, wanted: &'static str },
    #[error("too many large messages come at once over this connection")]
    Crowded,
    #[error("cannot be sent")]
    Encode(#[from] EncodeError),
    #[error("the other side closed the connection: {0}")]
    Refused(String),
    #[error("the connection is lost")]
    Lost(#[source] ConnectionError),
}

impl From<ConnectionError> for StreamError {
    fn from(error: ConnectionError) -> StreamError {
        match error {
            ConnectionError::ApplicationClosed(close) if !close.reason.is_empty() => {
                StreamError::Refused(String::from_utf8_lossy(&close.reason).into_owned())
            }
            other => StreamError::Lost(other),
        }
    }
}

fn broken_off(why: VarInt) -> StreamError {
    match why {
        code::MALFORMED => StreamError::NotUnderstood,
        code::PANICKED => StreamError::Panicked,
        code::CROWDED => StreamError::Crowded,
        _ => StreamError::Cancelled,
    }
}

/// Kept for all streams of a connection together.
#[derive(Debug)]
pub(crate) struct Account {
    connection: quinn::Connection,
    /// Streams broken off because the other side sent nonsense.
    faults: AtomicU64,
    /// Bytes held as the beginnings of frames.
    held: AtomicUsize,
    /// Streams whose window is not taken from the connection's.
    rooms: Mutex<u32>,
}

impl Account {
    pub fn of(connection: &quinn::Connection) -> Arc<Account> {
        let (connection, faults, held) = (connection.clone(), AtomicU64::default(), AtomicUsize::default());
        Arc::new(Account { connection, faults, held, rooms: Mutex::default() })
    }

    pub fn fault_count(&self) -> u64 {
        self.faults.load(Ordering::Relaxed)
    }

    fn change_rooms(&self, change: impl FnOnce(u32) -> u32) {
        // The number is whole at any time. Held until it is told, so that the last one told is the last one counted.
        let mut rooms = self.rooms.lock().unwrap_or_else(PoisonError::into_inner);
        *rooms = change(*rooms);
        let window = CONNECTION_WINDOW.saturating_add(rooms.saturating_mul(STREAM_WINDOW));
        self.connection.set_receive_window(VarInt::from_u32(window));
    }
}

/// One stream's window on top of its connection's, as long as this is kept.
#[derive(Debug)]
struct Room(Arc<Account>);

impl Room {
    fn take(account: &Arc<Account>) -> Room {
        account.change_rooms(|rooms| rooms + 1);
        Room(Arc::clone(account))
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        self.0.change_rooms(|rooms| rooms - 1);
    }
}

/// What may come where messages and bytes are mixed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item<T> {
    Message(T),
    Bytes(Bytes),
}

#[derive(Debug)]
pub struct Stream {
    pub sender: Sender,
    pub receiver: Receiver,
}

impl Stream {
    pub(crate) fn new(send: quinn::SendStream, receive: quinn::RecvStream, account: Arc<Account>) -> Stream {
        let sender = Sender { stream: send, pending: BytesMut::new(), stall: STALL, done: false };
        let decoder = Decoder::default();
        let receiver = Receiver { stream: receive, decoder, account, held: 0, room: None, done: false };
        Stream { sender, receiver }
    }

    /// Whoever reads this, here or there, may take nothing for as long as a person rests: it does not count as stuck,
    /// and what waits here unread leaves the connection's other streams their room.
    pub fn may_rest(&mut self) {
        self.sender.stall = REST_MAX;
        self.receiver.room.get_or_insert_with(|| Room::take(&self.receiver.account));
    }

    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), StreamError> {
        self.sender.send(message).await
    }

    pub async fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        self.sender.send_bytes(bytes).await
    }

    /// Nothing more will be sent.
    pub async fn finish(&mut self) -> Result<(), StreamError> {
        self.sender.finish().await
    }

    /// The next message; `None` when the other side has finished.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, StreamError> {
        let next = self.receiver.next().await;
        self.break_off_after(next)
    }

    /// The message that is due; its absence is an error.
    pub async fn next_within<T: DeserializeOwned>(&mut self, deadline: Duration) -> Result<T, StreamError> {
        match timeout(deadline, self.next()).await {
            Ok(next) => next?.ok_or(StreamError::Ended),
            Err(_) => Err(StreamError::Deadline(deadline)),
        }
    }

    pub async fn next_bytes(&mut self) -> Result<Option<Bytes>, StreamError> {
        let next = self.receiver.next_bytes().await;
        self.break_off_after(next)
    }

    pub async fn next_item<T: DeserializeOwned>(&mut self) -> Result<Option<Item<T>>, StreamError> {
        let next = self.receiver.next_item().await;
        self.break_off_after(next)
    }

    /// Comes to an end when the other side wants no more from us: it dropped its end, or is gone.
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        self.sender.closed()
    }

    /// Sends the last message, and that it is the last.
    pub async fn answer<T: Serialize>(mut self, message: &T) -> Result<(), StreamError> {
        self.send(message).await?;
        self.finish().await
    }

    /// Nonsense in one direction ends the other too: there is nobody who could make sense of the answer.
    fn break_off_after<T>(&mut self, next: Result<T, StreamError>) -> Result<T, StreamError> {
        if matches!(next, Err(StreamError::Malformed(_) | StreamError::Unexpected { .. })) {
            self.sender.break_off(code::MALFORMED);
        }
        if matches!(next, Err(StreamError::Crowded)) {
            self.sender.break_off(code::CROWDED);
        }
        next
    }
}

#[derive(Debug)]
pub struct Sender {
    stream: quinn::SendStream,
    /// Encoded and not yet taken by QUIC: left by a send that was given up.
    pending: BytesMut,
    stall: Duration,
    done: bool,
}

impl Sender {
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), StreamError> {
        self.flush().await?;
        codec::encode(message, &mut self.pending)?;
        self.flush().await
    }

    pub async fn send_bytes(&mut self, bytes: &[u8]) -> Result<(), StreamError> {
        // One frame at a time: what waits here stays small whatever is passed in. Given up half way, whole frames
        // have gone, so this one call alone cannot be taken up again without sending some of it twice.
        for part in bytes.chunks(codec::RAW_LENGTH_MAX) {
            self.flush().await?;
            codec::encode_raw(part, &mut self.pending);
        }
        self.flush().await
    }

    pub async fn finish(&mut self) -> Result<(), StreamError> {
        self.flush().await?;
        self.done = true;
        self.stream.finish().map_err(|_| StreamError::Cancelled)
    }

    /// How long the other side may take nothing.
    pub fn set_stall(&mut self, stall: Duration) {
        self.stall = stall;
    }

    /// See [`Stream::closed`].
    pub fn closed(&self) -> impl Future<Output = ()> + Send + 'static {
        let stopped = self.stream.stopped();
        async move {
            // Stopped, lost, or all was finished and received: in each case nobody waits for more.
            let _ = stopped.await;
        }
    }

    async fn flush(&mut self) -> Result<(), StreamError> {
        while !self.pending.is_empty() {
            let written = timeout(self.stall, self.stream.write(&self.pending)).await;
            let length = written.map_err(|_| StreamError::Stalled(self.stall))?.map_err(|error| match error {
                WriteError::Stopped(why) => broken_off(why),
                WriteError::ConnectionLost(error) => error.into(),
                WriteError::ClosedStream | WriteError::ZeroRttRejected => StreamError::Cancelled,
            })?;
            self.pending.advance(length);
        }
        Ok(())
    }

    fn break_off(&mut self, why: VarInt) {
        if !self.done {
            self.done = true;
            // Already closed is as good.
            let _ = self.stream.reset(why);
        }
    }
}

impl Drop for Sender {
    fn drop(&mut self) {
        // Without this QUIC would take the drop for a clean end, and half an answer for a whole one.
        self.break_off(if std::thread::panicking() { code::PANICKED } else { code::CANCELLED });
    }
}

#[derive(Debug)]
pub struct Receiver {
    stream: quinn::RecvStream,
    decoder: Decoder,
    account: Arc<Account>,
    /// This stream's part of [`Account::held`].
    held: usize,
    room: Option<Room>,
    done: bool,
}

impl Receiver {
    /// The next message; `None` when the other side has finished.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, StreamError> {
        match self.next_frame().await? {
            None => Ok(None),
            Some(Frame::Message(body)) => self.decode(&body).map(Some),
            Some(Frame::Raw(_)) => Err(self.unexpected("bytes", "a message")),
        }
    }

    pub async fn next_bytes(&mut self) -> Result<Option<Bytes>, StreamError> {
        match self.next_frame().await? {
            None => Ok(None),
            Some(Frame::Raw(bytes)) => Ok(Some(bytes)),
            Some(Frame::Message(_)) => Err(self.unexpected("a message", "bytes")),
        }
    }

    pub async fn next_item<T: DeserializeOwned>(&mut self) -> Result<Option<Item<T>>, StreamError> {
        match self.next_frame().await? {
            None => Ok(None),
            Some(Frame::Raw(bytes)) => Ok(Some(Item::Bytes(bytes))),
            Some(Frame::Message(body)) => self.decode(&body).map(|message| Some(Item::Message(message))),
        }
    }

    async fn next_frame(&mut self) -> Result<Option<Frame>, StreamError> {
        loop {
            let frame = self.decoder.frame();
            self.settle()?;
            match frame {
                Ok(Some(frame)) => return Ok(Some(frame)),
                Ok(None) => {}
                Err(fault) => return Err(self.malformed(fault)),
            }
            if self.done {
                return Ok(None);
            }
            let chunk = self.stream.read_chunk(READ_LENGTH, true).await.map_err(|error| match error {
                ReadError::Reset(why) => broken_off(why),
                ReadError::ConnectionLost(error) => error.into(),
                ReadError::ClosedStream | ReadError::IllegalOrderedRead | ReadError::ZeroRttRejected => {
                    StreamError::Cancelled
                }
            })?;
            match chunk {
                Some(chunk) => self.decoder.push(&chunk.bytes),
                None => {
                    self.done = true;
                    self.decoder.end().map_err(|fault| self.malformed(fault))?;
                }
            }
        }
    }

    fn decode<T: DeserializeOwned>(&mut self, body: &[u8]) -> Result<T, StreamError> {
        codec::decode(body).map_err(|fault| self.malformed(fault))
    }

    fn malformed(&mut self, fault: FrameError) -> StreamError {
        self.stop_reading();
        StreamError::Malformed(fault)
    }

    fn unexpected(&mut self, got: &'static str, wanted: &'static str) -> StreamError {
        self.stop_reading();
        StreamError::Unexpected { got, wanted }
    }

    fn stop_reading(&mut self) {
        self.account.faults.fetch_add(1, Ordering::Relaxed);
        self.break_off(code::MALFORMED);
    }

    fn break_off(&mut self, why: VarInt) {
        self.decoder = Decoder::default();
        self.account.held.fetch_sub(std::mem::take(&mut self.held), Ordering::Relaxed);
        if !self.done {
            self.done = true;
            // Already at its end is as good.
            let _ = self.stream.stop(why);
        }
    }

    /// Brings the account up to date with what the decoder holds now.
    fn settle(&mut self) -> Result<(), StreamError> {
        let (before, now) = (self.held, self.decoder.held());
        self.held = now;
        self.account.held.fetch_add(now, Ordering::Relaxed);
        let total = self.account.held.fetch_sub(before, Ordering::Relaxed) - before;
        if now > before && total > HELD_MAX {
            self.break_off(code::CROWDED);
            return Err(StreamError::Crowded);
        }
        Ok(())
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.break_off(code::CANCELLED);
    }
}
