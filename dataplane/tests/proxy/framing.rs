//! A request that could be read in two ways is read in none.

use std::sync::{Arc, Mutex};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::world::*;

/// Each tries to get a second request past us, inside what is one request to somebody.
const CORPUS: [(&str, &str); 20] = [
    (
        "length, then chunks",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "chunks, then length",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n0\r\n\r\n",
    ),
    ("two lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\nContent-Length: 44\r\n\r\n"),
    ("a list of lengths", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0, 44\r\n\r\n"),
    ("a signed length", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: +0\r\n\r\n"),
    ("a length in hexadecimal", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0x0\r\n\r\n"),
    ("a space before the colon", "POST / HTTP/1.1\r\nHost: a\r\nContent-Length : 44\r\n\r\n"),
    (
        "a space before the encoding's colon",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding : chunked\r\n\r\n0\r\n\r\n",
    ),
    ("a tab before the name", "POST / HTTP/1.1\r\nHost: a\r\n\tContent-Length: 44\r\n\r\n"),
    ("a folded encoding", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding:\r\n chunked\r\n\r\n0\r\n\r\n"),
    ("an unknown encoding", "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: xchunked\r\n\r\n"),
    (
        "an encoding in front of chunked",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n",
    ),
    (
        "chunked twice",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ),
    ("chunks in HTTP/1.0", "POST / HTTP/1.0\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ("bare line feeds", "POST / HTTP/1.1\nHost: a\nContent-Length: 0\n\n"),
    ("a bare line feed in front of a field", "GET / HTTP/1.1\r\nHost: a\r\nX: y\nTransfer-Encoding: chunked\r\n\r\n"),
    ("a bare carriage return", "GET / HTTP/1.1\r\nHost: a\r\nX: y\rContent-Length: 44\r\n\r\n"),
    ("a null in a value", "GET / HTTP/1.1\r\nHost: a\r\nX: y\0\r\n\r\n"),
    ("two hosts", "GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n"),
    ("no host", "GET / HTTP/1.1\r\n\r\n"),
];

#[tokio::test]
async fn no_smuggled_request_reaches_a_replica() {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let address = raw({
        let seen = Arc::clone(&seen);
        move |mut stream| {
            let seen = Arc::clone(&seen);
            async move {
                while let Some(head) = read_head(&mut stream).await {
                    seen.lock().unwrap().push(head);
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
                }
            }
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    for (name, request) in CORPUS {
        let is_about_hosts = name.ends_with("host") || name.ends_with("hosts");
        // Whole, and cut between every two bytes: where the network cuts must not matter.
        for cut in [request.len(), 1] {
            let mut client = Client::connect(&plane).await;
            let smuggled = if is_about_hosts { "" } else { "GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n" };
            for piece in request.as_bytes().chunks(cut) {
                // It may be refused before all of it is sent.
                let _ = client.stream.write_all(piece).await;
            }
            let _ = client.stream.write_all(smuggled.as_bytes()).await;
            let reply = client.reply().await.unwrap_or_else(|error| panic!("{name}: {error}"));
            assert!(matches!(reply.status, 400 | 501), "{name}: {}", reply.head);
            if !is_about_hosts {
                assert_eq!(client.rest().await, b"", "{name}: the connection goes on");
            }
        }
    }
    assert_eq!(*seen.lock().unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn a_body_that_turns_out_malformed_ends_both_connections() {
    let ended = Count::default();
    let address = raw({
        let ended = ended.clone();
        move |mut stream| {
            let ended = ended.clone();
            async move {
                read_head(&mut stream).await.unwrap();
                let mut rest = Vec::new();
                let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest).await;
                assert!(!rest.ends_with(b"0\r\n\r\n"), "it looks whole");
                ended.add(1);
            }
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n").await;
    until("it is in flight", || !traffic(&plane).in_flight.is_empty()).await;
    client.send("0x\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n").await;
    client.rest().await;
    until("the replica's connection ends", || ended.get() == 1).await;
}

#[tokio::test]
async fn a_violation_is_not_answered_in_the_middle_of_a_response() {
    let address = raw(|mut stream| async move {
        let _ = read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsome").await.unwrap();
        let _ = tokio::io::AsyncReadExt::read_u8(&mut stream).await;
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    let mut begun = Vec::new();
    while !begun.ends_with(b"\r\n\r\nsome") {
        begun.extend(client.exactly(1).await.unwrap());
    }
    client.send("\n").await;
    assert_eq!(String::from_utf8_lossy(&client.rest().await), "", "it would be taken for the rest of the body");
}

#[tokio::test]
async fn a_violation_behind_a_whole_request_is_not_that_requests_answer() {
    let address = raw(|mut stream| async move {
        let _ = read_head(&mut stream).await;
        let _ = tokio::io::AsyncReadExt::read_u8(&mut stream).await;
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("it is in flight", || !traffic(&plane).in_flight.is_empty()).await;
    client.send("\n").await;
    assert_eq!(String::from_utf8_lossy(&client.rest().await), "");
}

/// What a replica does with a request whose body turns out malformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Replica {
    /// It waits for the body's end.
    Waits,
    /// It has begun a response, and ends it when there is no more of the body.
    IsInside,
    /// It has given a whole response, and has not looked at the body.
    HasAnswered,
}

/// Everything that the replica got and that the client got.
async fn malformed_chunk(replica: Replica, rest: &'static str) -> (String, String) {
    let (seen, mut sees) = tokio::sync::mpsc::unbounded_channel();
    let address = raw(move |mut stream| {
        let seen = seen.clone();
        async move {
            let mut got = read_head(&mut stream).await.unwrap().into_bytes();
            match replica {
                Replica::Waits => {}
                Replica::IsInside => {
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf").await.unwrap()
                }
                Replica::HasAnswered => {
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nwhole").await.unwrap();
                }
            }
            // A reset is an end, too.
            let _ = stream.read_to_end(&mut got).await;
            let _ = stream.write_all(b"half").await;
            seen.send(String::from_utf8(got).unwrap()).unwrap();
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n").await;
    let mut got = Vec::new();
    let begun: &[u8] = match replica {
        Replica::Waits => b"",
        Replica::IsInside => b"half",
        Replica::HasAnswered => b"whole",
    };
    if replica == Replica::Waits {
        until("it is in flight", || !traffic(&plane).in_flight.is_empty()).await;
    }
    while !got.ends_with(begun) {
        got.extend(client.exactly(1).await.unwrap());
    }
    // It may be closed already.
    let _ = client.stream.write_all(rest.as_bytes()).await;
    got.extend(client.rest().await);
    let seen = tokio::time::timeout(DEADLINE, sees.recv()).await.unwrap().unwrap();
    (seen, String::from_utf8(got).unwrap())
}

#[tokio::test]
async fn a_request_with_a_malformed_chunk_has_one_response_at_most() {
    for replica in [Replica::Waits, Replica::IsInside, Replica::HasAnswered] {
        for rest in ["0x\r\n\r\n", "0x\r\n\r\nGET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n"] {
            let (seen, got) = malformed_chunk(replica, rest).await;
            let all = format!("{replica:?}, {rest:?}: the replica got {seen:?}, the client {got:?}");
            assert_eq!(got.matches("HTTP/1.1 ").count(), 1, "{all}");
            let (status, end) = match replica {
                Replica::Waits => ("HTTP/1.1 400 ", ""),
                Replica::IsInside => ("HTTP/1.1 200 ", "halfhalf"),
                Replica::HasAnswered => ("HTTP/1.1 200 ", "whole"),
            };
            assert!(got.starts_with(status) && got.ends_with(end), "{all}");
            assert!(!seen.contains("smuggled") && !seen.ends_with("0\r\n\r\n"), "{all}");
        }
    }
}

#[tokio::test]
async fn a_malformed_chunk_that_comes_with_the_head_is_answered_once() {
    let plane = proxy(&[(1, nobody().await)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0x\r\n\r\n").await;
    let got = String::from_utf8(client.rest().await).unwrap();
    assert!(got.starts_with("HTTP/1.1 400 ") && got.matches("HTTP/1.1 ").count() == 1, "{got}");
}
