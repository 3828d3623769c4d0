//! RFC 6455, server side: echoes every message, answers pings, closes when asked.

use std::io::{self, Write as _};
use std::net::TcpStream;

use crate::http::{Reader, Request, field};
use crate::sha1::sha1;

/// Appended to the client's key before hashing (RFC 6455, section 1.3).
const MAGIC: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
const CLOSE: u8 = 8;
const PING: u8 = 9;
const PONG: u8 = 10;

pub fn serve(mut stream: &TcpStream, reader: &mut Reader<'_>, request: &Request) -> io::Result<()> {
    let Some(key) = field(&request.head, "sec-websocket-key") else {
        return stream.write_all(
            b"HTTP/1.1 426 Upgrade Required\r\nupgrade: websocket\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
        );
    };
    let accept = base64(&sha1(format!("{key}{MAGIC}").as_bytes()));
    let head = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n";
    stream.write_all(format!("{head}sec-websocket-accept: {accept}\r\n\r\n").as_bytes())?;
    loop {
        let start = reader.exactly(2)?;
        let (first, opcode) = (start[0], start[0] & 0x0f);
        let length = match start[1] & 0x7f {
            126 => u64::from(u16::from_be_bytes(array(&reader.exactly(2)?))),
            127 => u64::from_be_bytes(array(&reader.exactly(8)?)),
            short => u64::from(short),
        };
        let mask: [u8; 4] = if start[1] & 0x80 == 0 { [0; 4] } else { array(&reader.exactly(4)?) };
        let mut payload = reader.exactly(length)?;
        payload.iter_mut().zip(mask.iter().cycle()).for_each(|(byte, mask)| *byte ^= mask);
        match opcode {
            CLOSE => return frame(stream, 0x80 | CLOSE, &payload),
            PING => frame(stream, 0x80 | PONG, &payload)?,
            PONG => {}
            _ => frame(stream, first, &payload)?,
        }
    }
}

/// Close, with 1001: the server stops.
pub fn going_away(stream: &TcpStream) -> io::Result<()> {
    frame(stream, 0x80 | CLOSE, &1001u16.to_be_bytes())
}

fn frame(mut stream: &TcpStream, first: u8, payload: &[u8]) -> io::Result<()> {
    let mut bytes = vec![first];
    match payload.len() {
        short @ 0..126 => bytes.push(short as u8),
        medium @ 126..65536 => {
            bytes.push(126);
            bytes.extend((medium as u16).to_be_bytes());
        }
        long => {
            bytes.push(127);
            bytes.extend((long as u64).to_be_bytes());
        }
    }
    bytes.extend(payload);
    stream.write_all(&bytes)
}

fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    bytes.try_into().expect("so many were read")
}

fn base64(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for group in bytes.chunks(3) {
        let bits = group.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - group.len()));
        for place in 0..4 {
            let character = char::from(ALPHABET[(bits >> (18 - 6 * place) & 63) as usize]);
            text.push(if place <= group.len() { character } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_handshake_of_the_rfc() {
        let answer = base64(&sha1(format!("dGhlIHNhbXBsZSBub25jZQ=={MAGIC}").as_bytes()));
        assert_eq!(answer, "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
