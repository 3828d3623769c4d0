//! Both ends of a WebSocket for `bench/proxy.sh`: a server that sends back what it gets, and clients that each send
//! a message, await it, and send the next. A thread for each connection: what is measured is between the two.

#![expect(clippy::print_stdout, reason = "the count is what it is run for")]

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// A frame of 64 bytes, as a client sends it: final, text, masked with zeros.
const FRAME_BYTES: usize = 64;
const HEAD_BYTES: usize = 6;
/// The key and its answer are the example of RFC 6455, 1.3.
const REQUEST: &str = "GET /ws HTTP/1.1\r\nHost: bench\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";
const RESPONSE: &str = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\
    Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n";
const PLAIN: &str = "HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n";
const HTTP_HEAD_BYTES_MAX: usize = 4096;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve", address] => serve(address.parse()?)?,
        ["load", address, connections, seconds] => {
            let until = Instant::now() + Duration::from_secs(seconds.parse()?);
            println!("{}", load(address.parse()?, connections.parse()?, until)?);
        }
        _ => return Err("usage: websocket serve ADDRESS | websocket load ADDRESS CONNECTIONS SECONDS".into()),
    }
    Ok(())
}

fn serve(address: SocketAddr) -> io::Result<()> {
    for stream in TcpListener::bind(address)?.incoming() {
        let stream = stream?;
        std::thread::spawn(move || echo(stream));
    }
    Ok(())
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let head = read_head(&mut stream)?.to_ascii_lowercase();
    if !head.contains("upgrade: websocket") {
        return stream.write_all(PLAIN.as_bytes());
    }
    stream.write_all(RESPONSE.as_bytes())?;
    let mut bytes = [0; 4096];
    loop {
        match stream.read(&mut bytes)? {
            0 => return Ok(()),
            read => stream.write_all(&bytes[..read])?,
        }
    }
}

/// Messages there and back on all connections.
fn load(address: SocketAddr, connections: usize, until: Instant) -> io::Result<u64> {
    let clients: Vec<_> = (0..connections).map(|_| std::thread::spawn(move || exchange(address, until))).collect();
    clients.into_iter().map(|client| client.join().expect("a client does not panic")).sum()
}

fn exchange(address: SocketAddr, until: Instant) -> io::Result<u64> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_nodelay(true)?;
    stream.write_all(REQUEST.as_bytes())?;
    let head = read_head(&mut stream)?;
    if !head.starts_with("HTTP/1.1 101 ") {
        return Err(io::Error::other(format!("no upgrade: {head}")));
    }
    let mut frame = [b'x'; FRAME_BYTES];
    frame[..HEAD_BYTES].copy_from_slice(&[0x81, 0x80 | (FRAME_BYTES - HEAD_BYTES) as u8, 0, 0, 0, 0]);
    let mut back = [0; FRAME_BYTES];
    let mut messages = 0;
    while Instant::now() < until {
        stream.write_all(&frame)?;
        stream.read_exact(&mut back)?;
        messages += 1;
    }
    Ok(messages)
}

/// Byte by byte: what follows the head is not ours to take yet, and it happens once.
fn read_head(stream: &mut TcpStream) -> io::Result<String> {
    let mut head = Vec::new();
    let mut byte = [0];
    while !head.ends_with(b"\r\n\r\n") {
        if head.len() == HTTP_HEAD_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        stream.read_exact(&mut byte)?;
        head.push(byte[0]);
    }
    String::from_utf8(head).map_err(io::Error::other)
}
