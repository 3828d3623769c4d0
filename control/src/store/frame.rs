//! The envelope of every value we keep or send: who wrote it how, and whether it is still what was written.
//!
//! ```text
//!   0        4         5      6
//!   │ CRC32C │ version │ kind │ payload …
//! ```
//!
//! The checksum covers everything behind it. The kind is inside, so that a vote put where an entry belongs is
//! damage and not a strange entry. These six bytes never change; what the payload means is the version's to say.

/// The version this program writes, and the newest it reads.
pub const VERSION: u8 = 1;

const HEADER_BYTES: usize = 6;

/// What a frame holds. The numbers are on disk and on the wire: never reuse one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    Entry = 1,
    Vote = 2,
    Committed = 3,
    Purged = 4,
    Snapshot = 5,
    Identity = 6,
    Request = 16,
    Response = 17,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    #[error("{0} bytes are too few for a value")]
    Short(usize),
    #[error("the checksum does not match")]
    Checksum,
    #[error("written in format {found}, this program reads up to {VERSION}; install the newer orca again")]
    Newer { found: u8 },
    #[error("the value is of kind {found}, expected {expected:?}")]
    Kind { found: u8, expected: Kind },
}

pub fn seal(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::with_capacity(HEADER_BYTES + payload.len());
    frame.extend_from_slice(&[0; 4]);
    frame.push(VERSION);
    frame.push(kind as u8);
    frame.extend_from_slice(payload);
    let checksum = crc32c::crc32c(&frame[4..]);
    frame[..4].copy_from_slice(&checksum.to_le_bytes());
    frame
}

pub fn open(kind: Kind, frame: &[u8]) -> Result<&[u8], FrameError> {
    let Some((checksum, rest)) = frame.split_first_chunk::<4>() else {
        return Err(FrameError::Short(frame.len()));
    };
    let [version, found, payload @ ..] = rest else {
        return Err(FrameError::Short(frame.len()));
    };
    if crc32c::crc32c(rest) != u32::from_le_bytes(*checksum) {
        return Err(FrameError::Checksum);
    }
    if *version > VERSION {
        return Err(FrameError::Newer { found: *version });
    }
    if *found != kind as u8 {
        return Err(FrameError::Kind { found: *found, expected: kind });
    }
    Ok(payload)
}
