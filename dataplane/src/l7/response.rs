//! A replica's response as it comes off the wire: the reading half of an HTTP/1.1 client (RFC 9112). What a head says
//! about where the body ends has to have one reading, as in [`framing`](super::framing) for requests: a response
//! that two readers could cut differently is refused, since what one of them leaves over is the next client's
//! response. Decides and does nothing else.

use std::io;

use bytes::{Buf, Bytes, BytesMut};
use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{StatusCode, Version};

use super::framing::decimal;

/// Most bytes in a response's head. Offsets into it fit in 16 bits.
const HEAD_BYTES_MAX: usize = 60 << 10;
const FIELDS_MAX: usize = 128;
/// Most bytes in the line that gives a chunk's size.
const CHUNK_LINE_BYTES_MAX: usize = 256;
const TRAILERS_BYTES_MAX: usize = 16 << 10;
const TRAILER_FIELDS_MAX: usize = 32;

#[derive(Debug)]
pub struct Head {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub extent: Extent,
    /// The connection can carry another request behind this response.
    pub keeps_alive: bool,
}

/// Where a body ends (RFC 9112, section 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    Sized(u64),
    Chunked,
    /// With the connection.
    Open,
}

/// What makes a response one that cannot be passed on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Invalid {
    #[error("it is not HTTP/1")]
    Syntax,
    #[error("its head is larger than 60 KiB or has more than 128 fields")]
    HeadTooLarge,
    #[error("its Content-Length is not one number")]
    Length,
    #[error("it has both Content-Length and Transfer-Encoding")]
    LengthAndEncoding,
    #[error("its Transfer-Encoding is something other than chunked")]
    Encoding,
    #[error("a chunk of it is malformed")]
    Chunk,
    #[error("it ends inside its head")]
    HeadCut,
    #[error("it changes protocols, which nobody asked for")]
    Switch,
}

impl From<Invalid> for io::Error {
    fn from(invalid: Invalid) -> io::Error {
        io::Error::new(io::ErrorKind::InvalidData, invalid)
    }
}

/// Takes a head off the front of what was read, if all of it is there.
pub fn take_head(read: &mut BytesMut, is_answer_to_head: bool) -> Result<Option<Head>, Invalid> {
    let mut places = [[0_u16; 4]; FIELDS_MAX];
    let (status, version, length, count) = {
        let bytes: &[u8] = &read[..read.len().min(HEAD_BYTES_MAX)];
        let mut fields = [const { std::mem::MaybeUninit::uninit() }; FIELDS_MAX];
        let mut response = httparse::Response::new(&mut []);
        let parsed = httparse::ParserConfig::default()
            .parse_response_with_uninit_headers(&mut response, bytes, &mut fields)
            .map_err(|error| match error {
                httparse::Error::TooManyHeaders => Invalid::HeadTooLarge,
                _ => Invalid::Syntax,
            })?;
        let httparse::Status::Complete(length) = parsed else {
            return if read.len() >= HEAD_BYTES_MAX { Err(Invalid::HeadTooLarge) } else { Ok(None) };
        };
        let offset = |part: &[u8]| (part.as_ptr() as usize - bytes.as_ptr() as usize) as u16;
        for (place, field) in places.iter_mut().zip(response.headers.iter()) {
            let (name, value) = (offset(field.name.as_bytes()), offset(field.value));
            *place = [name, name + field.name.len() as u16, value, value + field.value.len() as u16];
        }
        (response.code, response.version, length, response.headers.len())
    };
    let status = status.and_then(|code| StatusCode::from_u16(code).ok()).ok_or(Invalid::Syntax)?;
    let version = if version == Some(0) { Version::HTTP_10 } else { Version::HTTP_11 };

    let head = read.split_to(length).freeze();
    // Room for what is put in on the way to the client.
    let mut headers = HeaderMap::with_capacity(count + 4);
    let mut said = Said::default();
    for place in &places[..count] {
        let [name, name_end, value, value_end] = place.map(usize::from);
        let name = HeaderName::from_bytes(&head[name..name_end]).map_err(|_| Invalid::Syntax)?;
        let value = HeaderValue::from_maybe_shared(head.slice(value..value_end)).map_err(|_| Invalid::Syntax)?;
        if said.is_new(&name, &value)? {
            headers.append(name, value);
        }
    }
    // Chunks are not HTTP/1.0 (RFC 9112, section 6.1): who sends them there may mean something else by the rest.
    let keeps_alive = !said.close && (version == Version::HTTP_11 || (said.keep_alive && !said.chunked));
    let extent = if is_answer_to_head || status.is_informational() || matches!(status.as_u16(), 204 | 304) {
        Extent::Sized(0)
    } else {
        said.extent()?
    };
    Ok(Some(Head { status, headers, extent, keeps_alive: keeps_alive && extent != Extent::Open }))
}

/// What the fields say about the body's end and the connection's.
#[derive(Debug, Default)]
struct Said {
    length: Option<u64>,
    chunked: bool,
    close: bool,
    keep_alive: bool,
}

impl Said {
    /// Takes note of a field, and says whether it says anything: the same length once more means that length.
    fn is_new(&mut self, name: &HeaderName, value: &HeaderValue) -> Result<bool, Invalid> {
        if name == header::CONTENT_LENGTH {
            let length = decimal(value.as_bytes()).ok_or(Invalid::Length)?;
            return match self.length.replace(length) {
                None => Ok(true),
                Some(before) if before == length => Ok(false),
                Some(_) => Err(Invalid::Length),
            };
        }
        if name == header::TRANSFER_ENCODING {
            if self.chunked || !value.as_bytes().trim_ascii().eq_ignore_ascii_case(b"chunked") {
                return Err(Invalid::Encoding);
            }
            self.chunked = true;
        } else if name == header::CONNECTION {
            for token in value.as_bytes().split(|byte| *byte == b',').map(<[u8]>::trim_ascii) {
                self.close |= token.eq_ignore_ascii_case(b"close");
                self.keep_alive |= token.eq_ignore_ascii_case(b"keep-alive");
            }
        }
        Ok(true)
    }

    fn extent(&self) -> Result<Extent, Invalid> {
        match (self.chunked, self.length) {
            (true, Some(_)) => Err(Invalid::LengthAndEncoding),
            (true, None) => Ok(Extent::Chunked),
            (false, Some(length)) => Ok(Extent::Sized(length)),
            (false, None) => Ok(Extent::Open),
        }
    }
}

/// Takes the coding of chunks (RFC 9112, section 7.1) off a body.
#[derive(Debug, Default)]
pub struct Chunks(Place);

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    #[default]
    Size,
    Data(u64),
    /// The CR LF behind a chunk's data.
    DataEnd,
    Trailers,
    End,
}

/// The next of a chunked body.
#[derive(Debug, PartialEq, Eq)]
pub enum Piece {
    Data(Bytes),
    Trailers(HeaderMap),
    End,
}

impl Chunks {
    pub fn is_at_end(&self) -> bool {
        self.0 == Place::End
    }

    /// Takes the next piece off the front of what was read; nothing if more has to be read first.
    pub fn next(&mut self, read: &mut BytesMut) -> Result<Option<Piece>, Invalid> {
        loop {
            match self.0 {
                // The library takes a line without a size for the last chunk's.
                Place::Size if read.first().is_some_and(|byte| !byte.is_ascii_hexdigit()) => {
                    return Err(Invalid::Chunk);
                }
                Place::Size => match httparse::parse_chunk_size(read) {
                    Ok(httparse::Status::Complete((line, size))) => {
                        read.advance(line);
                        self.0 = if size == 0 { Place::Trailers } else { Place::Data(size) };
                    }
                    Ok(httparse::Status::Partial) if read.len() < CHUNK_LINE_BYTES_MAX => return Ok(None),
                    Ok(httparse::Status::Partial) | Err(_) => return Err(Invalid::Chunk),
                },
                Place::Data(_) if read.is_empty() => return Ok(None),
                Place::Data(left) => {
                    let here = read.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    let left = left - here as u64;
                    self.0 = if left == 0 { Place::DataEnd } else { Place::Data(left) };
                    return Ok(Some(Piece::Data(read.split_to(here).freeze())));
                }
                Place::DataEnd => match read.get(..2) {
                    Some(b"\r\n") => {
                        read.advance(2);
                        self.0 = Place::Size;
                    }
                    Some(_) => return Err(Invalid::Chunk),
                    None => return Ok(None),
                },
                Place::Trailers => {
                    let mut fields = [httparse::EMPTY_HEADER; TRAILER_FIELDS_MAX];
                    let (length, trailers) = match httparse::parse_headers(read, &mut fields) {
                        Ok(httparse::Status::Complete((length, fields))) => (length, trailers(fields)?),
                        Ok(httparse::Status::Partial) if read.len() < TRAILERS_BYTES_MAX => return Ok(None),
                        Ok(httparse::Status::Partial) | Err(_) => return Err(Invalid::Chunk),
                    };
                    read.advance(length);
                    self.0 = Place::End;
                    return Ok(Some(if trailers.is_empty() { Piece::End } else { Piece::Trailers(trailers) }));
                }
                Place::End => return Ok(Some(Piece::End)),
            }
        }
    }
}

fn trailers(fields: &[httparse::Header<'_>]) -> Result<HeaderMap, Invalid> {
    let mut trailers = HeaderMap::with_capacity(fields.len());
    for field in fields {
        let name = HeaderName::from_bytes(field.name.as_bytes()).map_err(|_| Invalid::Chunk)?;
        let value = HeaderValue::from_bytes(field.value).map_err(|_| Invalid::Chunk)?;
        trailers.append(name, value);
    }
    Ok(trailers)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn head(text: &str) -> Result<Option<Head>, Invalid> {
        take_head(&mut BytesMut::from(text), false)
    }

    fn extent(fields: &str) -> Result<Extent, Invalid> {
        head(&format!("HTTP/1.1 200 OK\r\n{fields}\r\n")).map(|head| head.expect("it is whole").extent)
    }

    #[test]
    fn where_a_body_ends_has_one_reading() {
        assert_eq!(extent(""), Ok(Extent::Open));
        assert_eq!(extent("Content-Length: 0\r\n"), Ok(Extent::Sized(0)));
        assert_eq!(extent("content-length:12 \r\n"), Ok(Extent::Sized(12)));
        assert_eq!(extent("Content-Length: 12\r\nContent-Length: 12\r\n"), Ok(Extent::Sized(12)));
        assert_eq!(extent("Transfer-Encoding: Chunked\r\n"), Ok(Extent::Chunked));
        for (fields, expected) in [
            ("Content-Length: 1\r\nContent-Length: 2\r\n", Invalid::Length),
            ("Content-Length: 1, 1\r\n", Invalid::Length),
            ("Content-Length: -1\r\n", Invalid::Length),
            ("Content-Length: +1\r\n", Invalid::Length),
            ("Content-Length: 0x1\r\n", Invalid::Length),
            ("Content-Length:\r\n", Invalid::Length),
            ("Content-Length: 99999999999999999999\r\n", Invalid::Length),
            ("Content-Length: 1\r\nTransfer-Encoding: chunked\r\n", Invalid::LengthAndEncoding),
            ("Transfer-Encoding: gzip, chunked\r\n", Invalid::Encoding),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n", Invalid::Encoding),
            ("Transfer-Encoding: identity\r\n", Invalid::Encoding),
            ("A : b\r\n", Invalid::Syntax),
            ("A: b\r\n c\r\n", Invalid::Syntax),
        ] {
            assert_eq!(extent(fields), Err(expected), "{fields}");
        }
    }

    #[test]
    fn some_responses_have_no_body_whatever_they_say() {
        for status in [100, 101, 204, 304] {
            let head = head(&format!("HTTP/1.1 {status} X\r\nContent-Length: 5\r\n\r\n"));
            assert_eq!(head.expect("valid").expect("whole").extent, Extent::Sized(0), "{status}");
        }
        let mut read = BytesMut::from("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nrest");
        let head = take_head(&mut read, true).expect("valid").expect("whole");
        assert_eq!((head.extent, &read[..]), (Extent::Sized(0), &b"rest"[..]));
        assert_eq!(head.headers["content-length"], "5");
    }

    #[test]
    fn a_connection_is_kept_where_both_sides_know_the_end() {
        let keeps = |text: &str| head(text).expect("valid").expect("whole").keeps_alive;
        assert!(keeps("HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"));
        assert!(!keeps("HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: x, Close\r\n\r\n"));
        assert!(!keeps("HTTP/1.1 200 OK\r\n\r\n"));
        assert!(!keeps("HTTP/1.0 200 OK\r\nContent-Length: 0\r\n\r\n"));
        assert!(keeps("HTTP/1.0 200 OK\r\nContent-Length: 0\r\nConnection: keep-alive\r\n\r\n"));
        assert!(!keeps("HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: keep-alive\r\n\r\n"));
    }

    #[test]
    fn heads_are_bounded() {
        assert!(head("HTTP/1.1 200 OK\r\nA: b").expect("so far").is_none());
        let endless = format!("HTTP/1.1 200 OK\r\nA: {}", "x".repeat(HEAD_BYTES_MAX));
        assert_eq!(head(&endless).err(), Some(Invalid::HeadTooLarge));
        let many = format!("HTTP/1.1 200 OK\r\n{}\r\n", "A: b\r\n".repeat(FIELDS_MAX + 1));
        assert_eq!(head(&many).err(), Some(Invalid::HeadTooLarge));
        for text in ["SSH-2.0-OpenSSH\r\n", "HTTP/2 200\r\n\r\n", "HTTP/1.1 99 X\r\n\r\n", "\u{16}\u{3}\u{1}"] {
            assert_eq!(head(text).err(), Some(Invalid::Syntax), "{text}");
        }
    }

    /// A body, its trailers, and what came behind it.
    type Unchunked = (Vec<u8>, Option<HeaderMap>, Vec<u8>);

    /// All pieces of a body that comes in parts of this size.
    fn unchunk(bytes: &[u8], size: usize) -> Result<Unchunked, Invalid> {
        let (mut chunks, mut read, mut body) = (Chunks::default(), BytesMut::new(), Vec::new());
        let mut parts = bytes.chunks(size);
        let mut trailers = None;
        loop {
            match chunks.next(&mut read)? {
                Some(Piece::Data(data)) => body.extend_from_slice(&data),
                Some(Piece::Trailers(fields)) => trailers = Some(fields),
                Some(Piece::End) => {
                    let rest = parts.fold(read.to_vec(), |rest, part| [&rest, part].concat());
                    return Ok((body, trailers, rest));
                }
                None => match parts.next() {
                    Some(part) => read.extend_from_slice(part),
                    None => return Err(Invalid::HeadCut),
                },
            }
        }
    }

    #[test]
    fn malformed_chunks_are_refused() {
        for text in [
            "x\r\n",
            "\r\n\r\n",
            ";x\r\n\r\n",
            " \r\n",
            "3\r\nabc\r\n\r\n\r\n",
            "3\r\nabcd\r\n0\r\n\r\n",
            "3 abc",
            "-1\r\n",
            "11111111111111111\r\n",
            "3\nabc\r\n",
        ] {
            assert_eq!(unchunk(text.as_bytes(), 100).err(), Some(Invalid::Chunk), "{text:?}");
        }
        let endless = format!("1;{}", "x".repeat(CHUNK_LINE_BYTES_MAX));
        assert_eq!(unchunk(endless.as_bytes(), 100).err(), Some(Invalid::Chunk));
        let trailers = format!("0\r\n{}", "a: b\r\n".repeat(TRAILER_FIELDS_MAX + 1));
        assert_eq!(unchunk(trailers.as_bytes(), 1000).err(), Some(Invalid::Chunk));
    }

    proptest! {
        #[test]
        fn chunks_are_put_together_however_the_network_cuts_them(
            data in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..300), 0..5),
            has_trailers in any::<bool>(), size in 1_usize..400,
        ) {
            let mut coded = Vec::new();
            for chunk in &data {
                coded.extend(format!("{:X};ext=1\r\n", chunk.len()).bytes());
                coded.extend(chunk);
                coded.extend(b"\r\n");
            }
            coded.extend(if has_trailers { &b"0\r\nx-sum: 1\r\n\r\nrest"[..] } else { b"0\r\n\r\nrest" });
            let (body, trailers, rest) = unchunk(&coded, size).expect("well formed");
            prop_assert_eq!(body, data.concat());
            prop_assert_eq!(trailers.is_some(), has_trailers);
            prop_assert_eq!(rest, b"rest");
        }

        #[test]
        fn heads_are_read_however_the_network_cuts_them(
            fields in proptest::collection::vec(("[a-z][a-z0-9-]{0,20}", "[!-~]{0,30}"), 0..10), size in 1_usize..100,
        ) {
            let mut text = "HTTP/1.1 200 OK\r\n".to_owned();
            for (name, value) in &fields {
                text.push_str(&format!("x-{name}: {value}\r\n"));
            }
            text.push_str("Content-Length: 4\r\n\r\n");
            let mut read = BytesMut::new();
            let mut found = None;
            for part in text.as_bytes().chunks(size) {
                prop_assert!(found.is_none());
                read.extend_from_slice(part);
                found = take_head(&mut read, false).expect("valid");
            }
            let head = found.expect("whole");
            prop_assert!(read.is_empty());
            prop_assert_eq!(head.headers.len(), fields.len() + 1);
            for (name, value) in &fields {
                let all: Vec<_> = head.headers.get_all(format!("x-{name}")).iter().collect();
                prop_assert!(all.iter().any(|found| found.as_bytes() == value.as_bytes()));
            }
        }

        #[test]
        fn how_chunks_are_cut_changes_no_verdict(
            parts in proptest::collection::vec(proptest::sample::select(vec![
                "3\r\nabc", "3\r\nabc\r\n", "A;x=y\r\n", "0\r\n", "0;\r\n", "x-sum: 1\r\n", "\r\n", "\r", "\n", " ", ";", "f", "-",
            ]), 0..12),
            size in 1_usize..8,
        ) {
            let bytes = parts.concat().into_bytes();
            prop_assert_eq!(unchunk(&bytes, size), unchunk(&bytes, bytes.len().max(1)));
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400), size in 1_usize..100) {
            let _ = take_head(&mut BytesMut::from(&bytes[..]), false);
            let _ = take_head(&mut BytesMut::from(&[b"HTTP/1.1 200 OK\r\n", &bytes[..]].concat()[..]), false);
            let _ = unchunk(&bytes, size);
            let _ = unchunk(&[b"3\r\nabc\r\n", &bytes[..]].concat(), size);
        }
    }
}
