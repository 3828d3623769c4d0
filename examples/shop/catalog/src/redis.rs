//! As much of Redis' protocol as the shop speaks: a command is an array of texts, and there are five kinds of answer.

use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::net::{TcpStream, ToSocketAddrs as _};
use std::thread;
use std::time::Duration;

const PATIENCE: Duration = Duration::from_secs(2);
/// Before it is tried again to reach a database that was lost.
const PAUSE: Duration = Duration::from_millis(500);
/// Longest text that is accepted; our own are much shorter.
const TEXT_BYTES_MAX: usize = 64 << 10;
/// Longest list; see the LRANGE and HMGET we send.
const LIST_MAX: usize = 100;

pub struct Database {
    pub address: String,
    pub password: String,
}

pub enum Value {
    Nothing,
    Number(i64),
    Text(String),
    List(Vec<Value>),
}

impl Value {
    /// The texts of a list, empty where there is none.
    pub fn texts(self) -> Vec<String> {
        let Value::List(values) = self else { return Vec::new() };
        let text = |value| if let Value::Text(text) = value { text } else { String::new() };
        values.into_iter().map(text).collect()
    }
}

impl Database {
    /// One command on a connection of its own: the simplest thing that survives a database that comes and goes.
    pub fn ask(&self, command: &[&str]) -> io::Result<Value> {
        let mut stream = self.connect()?;
        send(&mut stream, command)
    }

    /// Hands on what is published, for ever, over as many connections as that takes.
    pub fn follow(&self, channel: &str, publish: impl Fn(&str)) -> ! {
        loop {
            if let Err(error) = self.follow_once(channel, &publish) {
                eprintln!("the feed of orders is interrupted: {error}");
            }
            thread::sleep(PAUSE);
        }
    }

    fn follow_once(&self, channel: &str, publish: &impl Fn(&str)) -> io::Result<()> {
        let mut stream = self.connect()?;
        send(&mut stream, &["SUBSCRIBE", channel])?;
        // Orders may be far apart.
        stream.get_ref().set_read_timeout(None)?;
        loop {
            if let Some(message) = read(&mut stream)?.texts().get(2) {
                publish(message);
            }
        }
    }

    fn connect(&self) -> io::Result<BufReader<TcpStream>> {
        // Looked up every time: another replica has another address.
        let address = self.address.to_socket_addrs()?.next().ok_or(io::ErrorKind::NotFound)?;
        let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let mut stream = BufReader::new(stream);
        send(&mut stream, &["AUTH", &self.password])?;
        Ok(stream)
    }
}

fn send(stream: &mut BufReader<TcpStream>, command: &[&str]) -> io::Result<Value> {
    let mut bytes = format!("*{}\r\n", command.len());
    for word in command {
        bytes.push_str(&format!("${}\r\n{word}\r\n", word.len()));
    }
    stream.get_mut().write_all(bytes.as_bytes())?;
    read(stream)
}

fn read(stream: &mut BufReader<TcpStream>) -> io::Result<Value> {
    let mut line = String::new();
    stream.take(TEXT_BYTES_MAX as u64).read_line(&mut line)?;
    let line = line.trim_end();
    let broken = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let (kind, rest) = line.split_at_checked(1).ok_or(io::ErrorKind::UnexpectedEof)?;
    let number = || rest.parse::<i64>().map_err(|_| broken(line));
    match kind {
        "+" => Ok(Value::Text(rest.to_owned())),
        "-" => Err(broken(rest)),
        ":" => Ok(Value::Number(number()?)),
        "$" | "*" if rest == "-1" => Ok(Value::Nothing),
        "$" => {
            let length = usize::try_from(number()?).ok().filter(|length| *length <= TEXT_BYTES_MAX);
            let mut bytes = vec![0; length.ok_or_else(|| broken("too long a text"))? + 2];
            stream.read_exact(&mut bytes)?;
            bytes.truncate(bytes.len() - 2);
            Ok(Value::Text(String::from_utf8(bytes).map_err(|_| broken("not UTF-8"))?))
        }
        "*" => {
            let length = usize::try_from(number()?).ok().filter(|length| *length <= LIST_MAX);
            (0..length.ok_or_else(|| broken("too long a list"))?).map(|_| read(stream)).collect::<io::Result<_>>().map(Value::List)
        }
        _ => Err(broken(line)),
    }
}
