//! The shop's front: a page, a small API, and a feed of orders over WebSocket. Everything it knows is in `db`, so
//! there can be as many of it as wanted, and each shows the orders taken by any.
//!
//! A thread for each connection and no dependencies: this is about what runs around it, not about what is in it.

mod feed;
mod http;
mod redis;
mod sha1;

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use feed::Feed;
use http::{Connection, Request};
use redis::{Database, Value};

/// What is for sale: key, name, price in cents, picture, and how many there are on the first day.
const GOODS: [(&str, &str, u32, &str, u32); 6] = [
    ("kelp", "Kelp crisps", 350, "🌿", 120),
    ("shrimp", "Popping shrimp", 890, "🦐", 80),
    ("squid", "Squid ink pasta", 640, "🦑", 60),
    ("salt", "Sea salt caramels", 420, "🧂", 200),
    ("shell", "Singing shell", 1_250, "🐚", 25),
    ("bottle", "Message in a bottle", 1_900, "🍾", 12),
];
/// Connections at once; the proxy in front keeps a few, and every visitor's feed is one.
const CONNECTIONS_MAX: usize = 1_000;
/// Most of one thing in one order.
const COUNT_MAX: u32 = 24;
/// Orders that are shown to someone who has just come in.
const SHOWN: &str = "12";

struct Shop {
    database: Database,
    feed: Feed,
    replica: String,
    open: AtomicUsize,
}

fn main() -> io::Result<()> {
    let variable = |name: &str| std::env::var(name).unwrap_or_default();
    let database = Database { address: variable("DB"), password: variable("DB_PASSWORD") };
    let shop = Arc::new(Shop { database, feed: Feed::default(), replica: variable("HOSTNAME"), open: 0.into() });

    let listener = TcpListener::bind("0.0.0.0:8080")?;
    println!("catalog listens on 0.0.0.0:8080, its database is {}", shop.database.address);
    let follower = Arc::clone(&shop);
    thread::spawn(move || follower.database.follow("orders", |order| follower.feed.publish(order)));

    for stream in listener.incoming() {
        let stream = stream?;
        if shop.open.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
            shop.open.fetch_sub(1, Ordering::Relaxed);
            continue;
        }
        let shop = Arc::clone(&shop);
        thread::spawn(move || {
            // Whoever leaves in the middle of something has nobody left to tell.
            let _ = shop.serve(stream);
            shop.open.fetch_sub(1, Ordering::Relaxed);
        });
    }
    Ok(())
}

impl Shop {
    /// One connection, for as many requests as its owner has.
    fn serve(&self, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        let mut connection = Connection::new(stream)?;
        while let Some(request) = connection.read()? {
            if request.path == "/feed" && request.key.is_some() {
                return self.feed.serve(connection, &request);
            }
            let (status, kind, body) = self.answer(&request).unwrap_or_else(|error| {
                eprintln!("{} {}: the database: {error}", request.method, request.path);
                (503, "application/json", r#"{"error":"the database does not answer"}"#.to_owned())
            });
            connection.respond(status, kind, &body)?;
        }
        Ok(())
    }

    fn answer(&self, request: &Request) -> io::Result<(u16, &'static str, String)> {
        const JSON: &str = "application/json";
        let mut path = request.path.trim_start_matches('/').split('/');
        Ok(match (request.method.as_str(), path.next(), path.next(), path.next()) {
            ("GET", Some(""), None, None) => (200, "text/html; charset=utf-8", include_str!("page.html").to_owned()),
            ("GET", Some("ready"), None, None) => {
                self.stock_up()?;
                (200, "text/plain", "open\n".to_owned())
            }
            ("GET", Some("api"), Some("goods"), None) => (200, JSON, self.goods()?),
            ("GET", Some("api"), Some("goods"), Some(key)) => match GOODS.iter().find(|good| good.0 == key) {
                Some((_, name, cents, ..)) => (200, JSON, format!(r#"{{"name":"{name}","cents":{cents}}}"#)),
                None => (404, JSON, r#"{"error":"not for sale"}"#.to_owned()),
            },
            ("GET", Some("api"), Some("orders"), None) => {
                let orders = self.database.ask(&["LRANGE", "orders", "0", SHOWN])?;
                (200, JSON, format!("[{}]", orders.texts().join(",")))
            }
            ("POST", Some("api"), Some("orders"), Some(key)) => self.order(key, &request.query)?,
            _ => (404, JSON, r#"{"error":"no such page"}"#.to_owned()),
        })
    }

    /// Puts the first day's goods on the shelves, unless that has been done.
    fn stock_up(&self) -> io::Result<()> {
        for (key, .., stock) in GOODS {
            self.database.ask(&["HSETNX", "stock", key, &stock.to_string()])?;
        }
        Ok(())
    }

    fn goods(&self) -> io::Result<String> {
        let keys = GOODS.map(|(key, ..)| key);
        let stock = self.database.ask(&[&["HMGET", "stock"], &keys[..]].concat())?;
        let goods = GOODS.iter().zip(stock.texts()).map(|((key, name, cents, picture, _), stock)| {
            let stock: i64 = stock.parse().unwrap_or(0);
            format!(r#"{{"key":"{key}","name":"{name}","cents":{cents},"picture":"{picture}","stock":{stock}}}"#)
        });
        let goods: Vec<String> = goods.collect();
        Ok(format!(r#"{{"replica":"{}","goods":[{}]}}"#, self.replica, goods.join(",")))
    }

    /// Takes goods off the shelf, writes the order down and tells every replica, or does none of it.
    fn order(&self, key: &str, query: &str) -> io::Result<(u16, &'static str, String)> {
        const JSON: &str = "application/json";
        let count = query.strip_prefix("count=").and_then(|count| count.parse().ok()).unwrap_or(1);
        let Some((_, name, _, picture, _)) = GOODS.iter().find(|good| good.0 == key) else {
            return Ok((404, JSON, r#"{"error":"not for sale"}"#.to_owned()));
        };
        if !(1..=COUNT_MAX).contains(&count) {
            return Ok((422, JSON, format!(r#"{{"error":"between 1 and {COUNT_MAX}, please"}}"#)));
        }
        // In one script: two customers never get the last bottle.
        const SCRIPT: &str = "local left = tonumber(redis.call('HGET', KEYS[1], ARGV[1]) or '0') - ARGV[2] \
             if left < 0 then return -1 end \
             redis.call('HSET', KEYS[1], ARGV[1], left) \
             local number = redis.call('INCR', KEYS[3]) \
             local order = string.format(ARGV[3], number, left, redis.call('TIME')[1]) \
             redis.call('LPUSH', KEYS[2], order) redis.call('LTRIM', KEYS[2], 0, 99) \
             redis.call('PUBLISH', 'orders', order) return number";
        let order = format!(
            r#"{{"number":%d,"left":%d,"at":%d,"key":"{key}","name":"{name}","picture":"{picture}","count":{count}}}"#
        );
        let count = count.to_string();
        let answer =
            self.database.ask(&["EVAL", SCRIPT, "3", "stock", "orders", "number", key, &count, &order])?;
        Ok(match answer {
            Value::Number(number) if number >= 0 => (201, JSON, format!(r#"{{"number":{number}}}"#)),
            _ => (409, JSON, r#"{"error":"not that many are left"}"#.to_owned()),
        })
    }
}
