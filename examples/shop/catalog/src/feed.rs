//! The feed: every order, to everyone who looks at the page, over WebSocket (RFC 6455).

use std::io::{self, Read as _, Write as _};
use std::sync::Mutex;
use std::sync::mpsc::{RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::Duration;

use crate::http::{Connection, Request};
use crate::sha1::sha1;

/// Orders that wait for one visitor. One who is further behind is let go, and comes back.
const WAITING_MAX: usize = 32;
/// A ping this often tells who has gone without a word.
const PING_INTERVAL: Duration = Duration::from_secs(20);
/// Appended to the visitor's key before hashing (RFC 6455, section 1.3).
const MAGIC: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
const TEXT: u8 = 0x81;
const PING: u8 = 0x89;

#[derive(Default)]
pub struct Feed {
    visitors: Mutex<Vec<SyncSender<String>>>,
}

impl Feed {
    pub fn publish(&self, order: &str) {
        let mut visitors = self.visitors.lock().expect("nobody panics with it");
        visitors.retain(|visitor| match visitor.try_send(order.to_owned()) {
            Ok(()) => true,
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => false,
        });
    }

    pub fn serve(&self, mut connection: Connection, request: &Request) -> io::Result<()> {
        let key = request.key.as_deref().unwrap_or_default();
        let accept = base64(&sha1(format!("{key}{MAGIC}").as_bytes()));
        let mut to = connection.stream.get_ref().try_clone()?;
        let head = "HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n";
        to.write_all(format!("{head}sec-websocket-accept: {accept}\r\n\r\n").as_bytes())?;

        let (sender, orders) = sync_channel(WAITING_MAX);
        self.visitors.lock().expect("nobody panics with it").push(sender);
        std::thread::spawn(move || {
            // What a visitor says does not matter, only that there is one: pongs, and in the end a close.
            let _ = io::copy(&mut connection.stream.by_ref(), &mut io::sink());
            let _ = connection.stream.get_ref().shutdown(std::net::Shutdown::Both);
        });
        loop {
            match orders.recv_timeout(PING_INTERVAL) {
                Ok(order) => send(&mut to, TEXT, order.as_bytes())?,
                Err(RecvTimeoutError::Timeout) => send(&mut to, PING, b"")?,
                Err(RecvTimeoutError::Disconnected) => return to.shutdown(std::net::Shutdown::Both),
            }
        }
    }
}

fn send(to: &mut impl io::Write, kind: u8, payload: &[u8]) -> io::Result<()> {
    let mut frame = vec![kind];
    match payload.len() {
        short @ 0..126 => frame.push(short as u8),
        long => {
            frame.push(126);
            frame.extend(u16::try_from(long).expect("an order is short").to_be_bytes());
        }
    }
    frame.extend(payload);
    to.write_all(&frame)
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
