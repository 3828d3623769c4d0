//! Frames: what a stream is cut into.
//!
//! ```text
//!   ┌────────────┬──────┬─────────────┐
//!   │ length u32 │ kind │ body        │    length: of kind and body, big endian
//!   └────────────┴──────┴─────────────┘    kind 0: one message, JSON; kind 1: raw bytes
//! ```
//!
//! Pure. The decoder keeps no more than it was given, and refuses a frame by its first five bytes if it would be too
//! large: a length is never a reason to allocate.

use bytes::{Buf as _, BufMut as _, Bytes, BytesMut};
use orca_cluster::limit::Limits;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest message, as JSON. A goal of a full node is about 1 MiB.
pub const MESSAGE_LENGTH_MAX: usize = 16 * 1024 * 1024;

// What the cluster accepts can be sent to any node.
const _: () = assert!(Limits::OURS.message_bytes() <= MESSAGE_LENGTH_MAX as u64);

/// Largest run of raw bytes in one frame; longer data is several frames, so that messages get between them.
pub const RAW_LENGTH_MAX: usize = 64 * 1024;

const LENGTH_LENGTH: usize = 4;
const HEAD_LENGTH: usize = LENGTH_LENGTH + 1;
const KIND_MESSAGE: u8 = 0;
const KIND_RAW: u8 = 1;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// JSON, not yet looked at.
    Message(Bytes),
    Raw(Bytes),
}

impl Frame {
    fn length_max(kind: u8) -> Option<usize> {
        match kind {
            KIND_MESSAGE => Some(MESSAGE_LENGTH_MAX),
            KIND_RAW => Some(RAW_LENGTH_MAX),
            _ => None,
        }
    }
}

/// The bytes of the other side make no sense.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("a frame of kind {0}, which is unknown here")]
    Kind(u8),
    #[error("a frame of {length} bytes where at most {max} are allowed")]
    TooLong { length: usize, max: usize },
    #[error("an empty frame, without a kind")]
    Empty,
    #[error("the stream ended inside a frame")]
    Cut,
    #[error("a message that is not understood: {0}")]
    Message(String),
}

#[derive(Debug, thiserror::Error)]
pub enum EncodeError {
    #[error("a message of {0} bytes, where at most {MESSAGE_LENGTH_MAX} can be sent")]
    TooLong(usize),
    #[error("a message that has no form in JSON")]
    Form(#[source] serde_json::Error),
}

/// Appends one message.
pub fn encode<T: Serialize>(message: &T, out: &mut BytesMut) -> Result<(), EncodeError> {
    let start = out.len();
    out.put_u32(0);
    out.put_u8(KIND_MESSAGE);
    if let Err(error) = serde_json::to_writer(out.writer(), message) {
        out.truncate(start);
        return Err(EncodeError::Form(error));
    }
    let body = out.len() - start - HEAD_LENGTH;
    if body > MESSAGE_LENGTH_MAX {
        out.truncate(start);
        return Err(EncodeError::TooLong(body));
    }
    out[start..start + LENGTH_LENGTH].copy_from_slice(&length(body).to_be_bytes());
    Ok(())
}

/// Appends raw bytes, as many frames as they need.
pub fn encode_raw(bytes: &[u8], out: &mut BytesMut) {
    for part in bytes.chunks(RAW_LENGTH_MAX) {
        out.put_u32(length(part.len()));
        out.put_u8(KIND_RAW);
        out.put_slice(part);
    }
}

fn length(body: usize) -> u32 {
    u32::try_from(body + 1).expect("bodies are limited to far less than 4 GiB")
}

/// What a message says, as a type.
pub fn decode<T: DeserializeOwned>(message: &[u8]) -> Result<T, FrameError> {
    serde_json::from_slice(message).map_err(|error| FrameError::Message(error.to_string()))
}

/// Bytes in, frames out, however the bytes were cut on their way.
#[derive(Debug, Default)]
pub struct Decoder {
    buffer: BytesMut,
}

impl Decoder {
    pub fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    /// The next whole frame, if it is here. After an error there is no way to find the next frame.
    pub fn frame(&mut self) -> Result<Option<Frame>, FrameError> {
        let Some(head) = self.buffer.first_chunk::<LENGTH_LENGTH>() else {
            return Ok(None);
        };
        let length = u32::from_be_bytes(*head) as usize;
        let Some(body) = length.checked_sub(1) else {
            return Err(FrameError::Empty);
        };
        let Some(&kind) = self.buffer.get(LENGTH_LENGTH) else {
            return Ok(None);
        };
        let max = Frame::length_max(kind).ok_or(FrameError::Kind(kind))?;
        if body > max {
            return Err(FrameError::TooLong { length: body, max });
        }
        if self.buffer.len() < HEAD_LENGTH + body {
            return Ok(None);
        }
        self.buffer.advance(HEAD_LENGTH);
        let body = self.buffer.split_to(body).freeze();
        Ok(Some(if kind == KIND_RAW { Frame::Raw(body) } else { Frame::Message(body) }))
    }

    /// How many bytes wait for the rest of their frame.
    pub fn held(&self) -> usize {
        self.buffer.len()
    }

    /// Call when no more bytes will come.
    pub fn end(&self) -> Result<(), FrameError> {
        if self.buffer.is_empty() { Ok(()) } else { Err(FrameError::Cut) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Everything that can be read from these bytes, given in pieces of these sizes.
    fn read(bytes: &[u8], sizes: &[usize]) -> (Vec<Frame>, Result<(), FrameError>) {
        let (mut decoder, mut frames, mut rest) = (Decoder::default(), Vec::new(), bytes);
        let mut sizes = sizes.iter().copied().chain(std::iter::repeat(7));
        while !rest.is_empty() {
            let (piece, more) = rest.split_at(sizes.next().unwrap_or(1).clamp(1, rest.len()));
            decoder.push(piece);
            rest = more;
            loop {
                match decoder.frame() {
                    Ok(Some(frame)) => frames.push(frame),
                    Ok(None) => break,
                    Err(error) => return (frames, Err(error)),
                }
            }
            assert!(decoder.buffer.capacity() <= 2 * bytes.len() + 64, "{}", decoder.buffer.capacity());
        }
        (frames, decoder.end())
    }

    proptest! {
        #[test]
        fn any_bytes_are_frames_or_an_error(
            bytes in prop::collection::vec(any::<u8>(), 0..600),
            sizes in prop::collection::vec(1usize..100, 0..20),
        ) {
            let whole = read(&bytes, &[usize::MAX]);
            prop_assert_eq!(read(&bytes, &sizes), whole, "how the bytes are cut must not matter");
        }

        #[test]
        fn any_bytes_behind_a_sound_length_are_frames_or_an_error(
            parts in prop::collection::vec((0u8..3, prop::collection::vec(any::<u8>(), 0..40), 0u32..3), 0..20),
        ) {
            let mut bytes = Vec::new();
            for (kind, body, off) in parts {
                bytes.extend_from_slice(&(body.len() as u32 + off).to_be_bytes());
                bytes.push(kind);
                bytes.extend_from_slice(&body);
            }
            prop_assert_eq!(read(&bytes, &[3, 1, 4]), read(&bytes, &[usize::MAX]));
        }

        #[test]
        fn what_was_encoded_is_decoded(
            parts in prop::collection::vec(prop_oneof![
                ".{0,60}".prop_map(Ok::<String, Vec<u8>>),
                prop::collection::vec(any::<u8>(), 1..200).prop_map(Err),
            ], 0..12),
            sizes in prop::collection::vec(1usize..40, 0..30),
        ) {
            let mut bytes = BytesMut::new();
            for part in &parts {
                match part {
                    Ok(text) => encode(text, &mut bytes).unwrap(),
                    Err(raw) => encode_raw(raw, &mut bytes),
                }
            }
            let (frames, end) = read(&bytes, &sizes);
            prop_assert_eq!(end, Ok(()));
            let got: Vec<Result<String, Vec<u8>>> = frames.into_iter().map(|frame| match frame {
                Frame::Message(body) => Ok(decode(&body).unwrap()),
                Frame::Raw(body) => Err(body.to_vec()),
            }).collect();
            prop_assert_eq!(got, parts);
        }
    }

    #[test]
    fn a_frame_is_refused_by_its_head_alone() {
        for (kind, max) in [(KIND_MESSAGE, MESSAGE_LENGTH_MAX), (KIND_RAW, RAW_LENGTH_MAX)] {
            let head = |body: usize| {
                let mut decoder = Decoder::default();
                decoder.push(&length(body).to_be_bytes());
                decoder.push(&[kind]);
                decoder.frame()
            };
            assert_eq!(head(max), Ok(None));
            assert_eq!(head(max + 1), Err(FrameError::TooLong { length: max + 1, max }));
        }
        let mut decoder = Decoder::default();
        decoder.push(&u32::MAX.to_be_bytes());
        assert_eq!(decoder.frame(), Ok(None));
        decoder.push(&[9]);
        assert_eq!(decoder.frame(), Err(FrameError::Kind(9)));
        assert_eq!(read(&[0, 0, 0, 0], &[]).1, Err(FrameError::Empty));
        assert_eq!(read(&[0, 0, 0, 2, 1], &[]).1, Err(FrameError::Cut));
    }

    #[test]
    fn a_message_too_long_leaves_nothing_behind() {
        let mut out = BytesMut::new();
        encode(&"before", &mut out).unwrap();
        let before = out.clone();
        let text = "x".repeat(MESSAGE_LENGTH_MAX);
        assert!(matches!(encode(&text, &mut out), Err(EncodeError::TooLong(_))));
        assert_eq!(out, before);
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_stack_overflow() {
        let deep = "[".repeat(1_000_000);
        assert!(matches!(decode::<serde_json::Value>(deep.as_bytes()), Err(FrameError::Message(_))));
    }
}
