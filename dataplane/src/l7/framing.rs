//! Where each request begins and ends, read strictly and ahead of the HTTP library. Two parsers that disagree about
//! that are how requests are smuggled; the library is lenient where the standard allows it (a bare line feed, a
//! length beside chunks), another proxy in front of us may be lenient differently. So whatever could be read in two
//! ways is refused here before the library sees it, and what passes has one reading. Also keeps the bounds on a
//! head. Holds no body, and of a head only a line that was cut in two by the network.

/// Most bytes in the line that gives a chunk's size: 16 digits and extensions nobody uses.
const CHUNK_LINE_BYTES_MAX: usize = 256;

/// Follows one connection's bytes in the direction client to us.
#[derive(Debug)]
pub struct Framing {
    bounds: Bounds,
    place: Place,
    /// The beginning of a line whose end has not come yet.
    partial: Vec<u8>,
    head: Head,
}

#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    pub head_bytes_max: usize,
    pub fields_max: usize,
}

/// What a request does that no well-meant one needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    #[error("the request's head is larger than the limit")]
    HeadTooLarge,
    #[error("the request has more header fields than the limit")]
    TooManyFields,
    #[error("a line does not end in CR LF")]
    LineEnd,
    #[error("a header field is continued on the next line")]
    Folded,
    #[error("Content-Length is not one number")]
    Length,
    #[error("both Content-Length and Transfer-Encoding are given")]
    LengthAndEncoding,
    #[error("Transfer-Encoding is something other than chunked")]
    Encoding,
    #[error("a chunk is malformed")]
    Chunk,
}

impl Violation {
    pub fn status(self) -> http::StatusCode {
        match self {
            Violation::HeadTooLarge | Violation::TooManyFields => http::StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Violation::Encoding => http::StatusCode::NOT_IMPLEMENTED,
            Violation::LineEnd
            | Violation::Folded
            | Violation::Length
            | Violation::LengthAndEncoding
            | Violation::Chunk => http::StatusCode::BAD_REQUEST,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Between two requests, or inside a head.
    Head,
    /// So many bytes of a body are still to come.
    Sized(u64),
    ChunkSize,
    ChunkData(u64),
    /// The CR LF behind a chunk's data.
    ChunkEnd,
    Trailers,
}

#[derive(Debug, Default)]
struct Head {
    bytes: usize,
    lines: usize,
    length: Option<u64>,
    chunked: bool,
}

impl Framing {
    pub fn new(bounds: Bounds) -> Framing {
        Framing { bounds, place: Place::Head, partial: Vec::new(), head: Head::default() }
    }

    /// Whether a head has begun and not ended.
    pub fn is_in_head(&self) -> bool {
        self.place == Place::Head && self.head.bytes > 0
    }

    pub fn is_in_body(&self) -> bool {
        self.place != Place::Head
    }

    /// Takes the next bytes that arrived. After a violation the connection is of no use.
    pub fn feed(&mut self, mut bytes: &[u8]) -> Result<(), Violation> {
        while !bytes.is_empty() {
            match self.place {
                Place::Sized(left) => {
                    let left = skip(&mut bytes, left);
                    self.place = if left == 0 { Place::Head } else { Place::Sized(left) };
                }
                Place::ChunkData(left) => {
                    let left = skip(&mut bytes, left);
                    self.place = if left == 0 { Place::ChunkEnd } else { Place::ChunkData(left) };
                }
                Place::Head | Place::ChunkSize | Place::ChunkEnd | Place::Trailers => self.line(&mut bytes)?,
            }
        }
        Ok(())
    }

    /// Takes bytes to the end of a line, or all of them if it does not end here.
    fn line(&mut self, bytes: &mut &[u8]) -> Result<(), Violation> {
        let rest = *bytes;
        // A CR that was the last byte before decides with the first byte now.
        let resumed = self.partial.last() == Some(&b'\r');
        let end = if resumed { Some(0) } else { memchr::memchr2(b'\r', b'\n', rest) };
        let line_feed = match end {
            Some(0) if resumed => 0,
            Some(at) if rest[at] == b'\r' => at + 1,
            // Not behind a CR: another parser may take it for an end of line, or may not.
            Some(_) => return Err(Violation::LineEnd),
            None => rest.len(),
        };
        let Some(&ending) = rest.get(line_feed) else {
            self.count(rest.len())?;
            self.partial.extend_from_slice(rest);
            *bytes = &[];
            return Ok(());
        };
        if ending != b'\n' {
            return Err(Violation::LineEnd);
        }
        let (taken, left) = rest.split_at(line_feed + 1);
        *bytes = left;
        self.count(taken.len())?;
        if self.partial.is_empty() {
            self.ended(&taken[..taken.len() - 2])
        } else {
            let mut whole = std::mem::take(&mut self.partial);
            whole.extend_from_slice(taken);
            let result = self.ended(&whole[..whole.len() - 2]);
            // The room is kept for the next line that is cut in two.
            whole.clear();
            self.partial = whole;
            result
        }
    }

    /// Bounds a head, the trailers, or the line of a chunk's size.
    fn count(&mut self, bytes: usize) -> Result<(), Violation> {
        self.head.bytes += bytes;
        match self.place {
            Place::ChunkSize | Place::ChunkEnd if self.head.bytes > CHUNK_LINE_BYTES_MAX => Err(Violation::Chunk),
            Place::Head | Place::Trailers if self.head.bytes > self.bounds.head_bytes_max => {
                Err(Violation::HeadTooLarge)
            }
            _ => Ok(()),
        }
    }

    /// A whole line, without its CR LF.
    fn ended(&mut self, line: &[u8]) -> Result<(), Violation> {
        match self.place {
            Place::Head if line.is_empty() && self.head.lines == 0 => {
                // An empty line before a request is allowed and means nothing.
                self.head.bytes = 0;
            }
            Place::Head if line.is_empty() => {
                let head = std::mem::take(&mut self.head);
                self.place = match (head.chunked, head.length) {
                    (true, Some(_)) => return Err(Violation::LengthAndEncoding),
                    (true, None) => Place::ChunkSize,
                    (false, Some(0) | None) => Place::Head,
                    (false, Some(length)) => Place::Sized(length),
                };
            }
            Place::Head => self.head_line(line)?,
            Place::ChunkSize => {
                self.head = Head::default();
                self.place = match chunk_size(line)? {
                    0 => Place::Trailers,
                    size => Place::ChunkData(size),
                };
            }
            Place::ChunkEnd => {
                if !line.is_empty() {
                    return Err(Violation::Chunk);
                }
                self.head = Head::default();
                self.place = Place::ChunkSize;
            }
            Place::Trailers if line.is_empty() => {
                self.head = Head::default();
                self.place = Place::Head;
            }
            Place::Trailers => self.field(line)?,
            Place::Sized(_) | Place::ChunkData(_) => unreachable!("a body has no lines"),
        }
        Ok(())
    }

    fn head_line(&mut self, line: &[u8]) -> Result<(), Violation> {
        if self.head.lines == 0 {
            // The request line: what it says is the library's to judge.
            self.head.lines = 1;
            return Ok(());
        }
        self.field(line)?;
        match line[0] | 0x20 {
            b'c' => {
                if let Some(value) = value_of(line, b"content-length") {
                    let length = decimal(value).ok_or(Violation::Length)?;
                    if self.head.length.replace(length).is_some() {
                        return Err(Violation::Length);
                    }
                }
            }
            b't' => {
                if let Some(value) = value_of(line, b"transfer-encoding") {
                    if self.head.chunked || !value.eq_ignore_ascii_case(b"chunked") {
                        return Err(Violation::Encoding);
                    }
                    self.head.chunked = true;
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn field(&mut self, line: &[u8]) -> Result<(), Violation> {
        self.head.lines += 1;
        if matches!(line[0], b' ' | b'\t') {
            return Err(Violation::Folded);
        }
        if self.head.lines > self.bounds.fields_max + 1 {
            return Err(Violation::TooManyFields);
        }
        Ok(())
    }
}

fn skip(bytes: &mut &[u8], left: u64) -> u64 {
    let here = usize::try_from(left).unwrap_or(usize::MAX).min(bytes.len());
    *bytes = &bytes[here..];
    left - here as u64
}

/// The value of a field if it has this name, given in lower case. A name with a space behind it is no name: the
/// library refuses it.
fn value_of<'a>(line: &'a [u8], name: &[u8]) -> Option<&'a [u8]> {
    let (start, rest) = line.split_at_checked(name.len())?;
    let value = rest.strip_prefix(b":")?;
    start.eq_ignore_ascii_case(name).then(|| value.trim_ascii())
}

/// A length as the standard writes it: digits and nothing else.
pub fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() || text.len() > 19 || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn chunk_size(line: &[u8]) -> Result<u64, Violation> {
    let digits = line.iter().take_while(|byte| byte.is_ascii_hexdigit()).count();
    let (size, extension) = line.split_at(digits);
    if !(1..=16).contains(&digits) || !(extension.is_empty() || extension[0] == b';') {
        return Err(Violation::Chunk);
    }
    let size = std::str::from_utf8(size).map_err(|_| Violation::Chunk)?;
    u64::from_str_radix(size, 16).map_err(|_| Violation::Chunk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOUNDS: Bounds = Bounds { head_bytes_max: 256, fields_max: 4 };

    fn feed(text: &str) -> Result<Framing, Violation> {
        let mut framing = Framing::new(BOUNDS);
        framing.feed(text.as_bytes()).map(|()| framing)
    }

    #[test]
    fn what_can_be_read_in_two_ways_is_refused() {
        use Violation::*;
        let head = "POST / HTTP/1.1\r\nHost: a\r\n";
        for (rest, expected) in [
            ("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", LengthAndEncoding),
            ("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n", LengthAndEncoding),
            ("tRANSFER-eNCODING:\tchunked \r\ncontent-length:0\r\n\r\n", LengthAndEncoding),
            ("Content-Length: 3\r\nContent-Length: 4\r\n\r\n", Length),
            ("Content-Length: 3\r\nContent-Length: 3\r\n\r\n", Length),
            ("Content-Length: 3, 3\r\n\r\n", Length),
            ("Content-Length: +3\r\n\r\n", Length),
            ("Content-Length: 0x3\r\n\r\n", Length),
            ("Content-Length:\r\n\r\n", Length),
            ("Content-Length: 99999999999999999999\r\n\r\n", Length),
            ("Transfer-Encoding: identity\r\n\r\n", Encoding),
            ("Transfer-Encoding: gzip, chunked\r\n\r\n", Encoding),
            ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", Encoding),
            ("Transfer-Encoding: xchunked\r\n\r\n", Encoding),
            ("X: a\n\r\n", LineEnd),
            ("X: a\rb\r\n", LineEnd),
            ("X: a\r\r\n", LineEnd),
            ("X: a\r\n b\r\n", Folded),
            ("A: 1\r\nB: 1\r\nC: 1\r\nD: 1\r\n", TooManyFields),
            ("Transfer-Encoding: chunked\r\n\r\nx\r\n", Chunk),
            ("Transfer-Encoding: chunked\r\n\r\n3 \r\nabc", Chunk),
            ("Transfer-Encoding: chunked\r\n\r\n0x3\r\nabc", Chunk),
            ("Transfer-Encoding: chunked\r\n\r\n3\r\nabcX\r\n", Chunk),
            ("Transfer-Encoding: chunked\r\n\r\n3\nabc", LineEnd),
            ("Transfer-Encoding: chunked\r\n\r\n11111111111111111\r\n", Chunk),
        ] {
            assert_eq!(feed(&format!("{head}{rest}")).err(), Some(expected), "{rest:?}");
        }
        assert_eq!(feed(&format!("GET /{} HTTP/1.1\r\n", "a".repeat(256))).err(), Some(HeadTooLarge));
        assert_eq!(feed(&"a".repeat(257)).err(), Some(HeadTooLarge));
    }

    #[test]
    fn a_body_that_looks_like_a_request_is_a_body() {
        let framing =
            feed("POST / HTTP/1.1\r\nContent-Length: 20\r\n\r\nGET / HTTP/1.1\nX\n\n\n\nGET /").expect("fine");
        assert!(framing.is_in_head());
    }

    #[test]
    fn it_knows_where_it_is() {
        let place = |text: &str| feed(text).map(|f| (f.is_in_head(), f.is_in_body())).expect("fine");
        assert_eq!(place(""), (false, false));
        assert_eq!(place("\r\n"), (false, false));
        assert_eq!(place("G"), (true, false));
        assert_eq!(place("GET / HTTP/1.1\r\n\r\n"), (false, false));
        assert_eq!(place("GET / HTTP/1.1\r\nContent-Length: 2\r\n\r\na"), (false, true));
        assert_eq!(place("GET / HTTP/1.1\r\nContent-Length: 2\r\n\r\nab"), (false, false));
        let chunks = "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n2;x=y\r\nab\r\n0\r\nT: x\r\n";
        assert_eq!(place(chunks), (false, true));
        assert_eq!(place(&format!("{chunks}\r\n")), (false, false));
    }

    fn request() -> impl Strategy<Value = Vec<u8>> {
        let body = proptest::collection::vec(any::<u8>(), 0..40);
        let sized = body.clone().prop_map(|body| {
            [format!("POST /x HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len()).into_bytes(), body]
                .concat()
        });
        let chunked = proptest::collection::vec(body, 0..4).prop_map(|chunks| {
            let mut all = b"POST /x HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
            for chunk in chunks.iter().filter(|chunk| !chunk.is_empty()) {
                all.extend_from_slice(format!("{:x}\r\n", chunk.len()).as_bytes());
                all.extend_from_slice(chunk);
                all.extend_from_slice(b"\r\n");
            }
            all.extend_from_slice(b"0\r\nT: 1\r\n\r\n");
            all
        });
        prop_oneof![Just(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n".to_vec()), sized, chunked]
    }

    proptest! {
        #[test]
        fn requests_end_at_their_ends_however_the_network_cuts_them(
            requests in proptest::collection::vec(request(), 1..6), size in 1_usize..60,
        ) {
            let mut framing = Framing::new(BOUNDS);
            for piece in requests.concat().chunks(size) {
                prop_assert_eq!(framing.feed(piece), Ok(()));
            }
            prop_assert!(!framing.is_in_head() && !framing.is_in_body());
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let head = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n";
            let _ = Framing::new(BOUNDS).feed(&bytes);
            let _ = Framing::new(BOUNDS).feed(&[head.as_slice(), &bytes].concat());
        }

        #[test]
        fn how_bytes_are_cut_changes_no_verdict(
            bytes in proptest::collection::vec(prop_oneof![
                Just(b"GET / HTTP/1.1\r\n".to_vec()), Just(b"\r".to_vec()), Just(b"\n".to_vec()),
                Just(b"\r\n".to_vec()), Just(b"Content-Length: 3\r\n".to_vec()), Just(b" ".to_vec()),
                Just(b"Transfer-Encoding: chunked\r\n".to_vec()), Just(b"3\r\nabc\r\n".to_vec()), Just(b"0\r\n".to_vec()),
            ], 0..12),
            size in 1_usize..8,
        ) {
            let bytes = bytes.concat();
            let mut whole = Framing::new(BOUNDS);
            let mut cut = Framing::new(BOUNDS);
            let at_once = whole.feed(&bytes);
            let in_pieces = bytes.chunks(size).try_for_each(|piece| cut.feed(piece));
            prop_assert_eq!(at_once, in_pieces);
        }
    }
}
