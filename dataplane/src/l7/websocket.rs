//! Whether a side of a WebSocket has asked for its end, read from the heads of its frames (RFC 6455, section 5.2).
//! The server closes the TCP connection after a closing handshake, whoever began it (section 7.1.1), so which side's
//! bytes end first says nothing: only the first Close frame does. Payloads are passed over unread.

/// How a Close frame begins: opcode 8, and, as of every control frame, in one piece and untouched by extensions.
const CLOSE: u8 = 0x88;
/// Two bytes, at most eight of length, four of mask.
const HEAD_LENGTH_MAX: usize = 14;

/// Follows one direction of a WebSocket, in whatever pieces it comes.
#[derive(Debug, Clone, Default)]
pub struct Frames {
    head: [u8; HEAD_LENGTH_MAX],
    /// Bytes of the head that have come.
    filled: usize,
    /// Bytes of the payload that are still to come.
    payload: u64,
    closed: bool,
}

impl Frames {
    /// Whether a Close frame has begun.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    pub fn read(&mut self, mut bytes: &[u8]) {
        // Nothing after a Close frame means anything.
        while !bytes.is_empty() && !self.closed {
            if self.payload > 0 {
                let passed = usize::try_from(self.payload).unwrap_or(usize::MAX).min(bytes.len());
                self.payload -= passed as u64;
                bytes = &bytes[passed..];
                continue;
            }
            self.head[self.filled] = bytes[0];
            self.filled += 1;
            bytes = &bytes[1..];
            if self.filled >= 2 && self.filled == self.head_length() {
                self.closed = self.head[0] == CLOSE;
                self.payload = self.payload_length();
                self.filled = 0;
            }
        }
    }

    fn head_length(&self) -> usize {
        let mask = if self.head[1] & 0x80 == 0 { 0 } else { 4 };
        let length = match self.head[1] & 0x7f {
            126 => 2,
            127 => 8,
            _ => 0,
        };
        2 + length + mask
    }

    fn payload_length(&self) -> u64 {
        let extended = |bytes: &[u8]| bytes.iter().fold(0, |length, byte| length << 8 | u64::from(*byte));
        match self.head[1] & 0x7f {
            126 => extended(&self.head[2..4]),
            127 => extended(&self.head[2..10]),
            short => u64::from(short),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A masked frame, as clients send them.
    fn frame(opcode: u8, length: usize) -> Vec<u8> {
        let mut frame = vec![0x80 | opcode];
        match length {
            0..126 => frame.push(0x80 | length as u8),
            126..65_536 => {
                frame.push(0x80 | 126);
                frame.extend((length as u16).to_be_bytes());
            }
            _ => {
                frame.push(0x80 | 127);
                frame.extend((length as u64).to_be_bytes());
            }
        }
        frame.extend([1, 2, 3, 4]);
        // Looks like Close frames to whoever loses count.
        frame.resize(frame.len() + length, 0x88);
        frame
    }

    proptest! {
        #[test]
        fn a_close_is_seen_when_it_comes_and_never_before(
            frames in prop::collection::vec((prop::sample::select(vec![0_u8, 1, 2, 9, 10]), 0_usize..70_000), 0..6),
            piece in 1_usize..5_000,
        ) {
            let before: Vec<u8> = frames.iter().flat_map(|(opcode, length)| frame(*opcode, *length)).collect();
            let mut tracker = Frames::default();
            before.chunks(piece).for_each(|bytes| tracker.read(bytes));
            prop_assert!(!tracker.is_closed());
            frame(CLOSE, 2).chunks(piece).for_each(|bytes| tracker.read(bytes));
            prop_assert!(tracker.is_closed());
        }

        #[test]
        fn nonsense_is_read_without_harm(bytes in prop::collection::vec(any::<u8>(), 0..2_000), piece in 1_usize..64) {
            let mut tracker = Frames::default();
            bytes.chunks(piece).for_each(|bytes| tracker.read(bytes));
        }
    }
}
