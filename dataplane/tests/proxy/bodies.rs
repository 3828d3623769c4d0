//! Bodies of every size, whichever way they take: copied, or past our memory through a pipe.

use std::io::ErrorKind;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::world::*;

/// Bytes in which any that are missing, doubled or exchanged are noticed.
fn pattern(size: usize) -> Vec<u8> {
    let mut state = size as u64 | 1;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    };
    (0..size).map(next).collect()
}

/// A server that answers `/SIZE/PIECE` with so many bytes, written in pieces of so many.
async fn sized() -> std::net::SocketAddr {
    raw(|mut stream| async move {
        while let Some(head) = read_head(&mut stream).await {
            let mut path =
                head.split(' ').nth(1).unwrap().split('/').skip(1).map(|part| part.parse::<usize>().unwrap());
            let (size, piece) = (path.next().unwrap(), path.next().unwrap());
            let head_only = head.starts_with("HEAD");
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n");
            if stream.write_all(head.as_bytes()).await.is_err() {
                return;
            }
            for piece in pattern(if head_only { 0 } else { size }).chunks(piece) {
                if stream.write_all(piece).await.is_err() {
                    return;
                }
            }
        }
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bodies_of_any_size_arrive_byte_for_byte_on_one_connection() {
    let plane = proxy(&[(1, sized().await)]).await;
    let mut client = Client::connect(&plane).await;
    for size in [0, 1, 1 << 10, (32 << 10) - 1, 32 << 10, 40_000, 102_400, 1 << 20, (5 << 20) + 3] {
        for piece in [1 << 10, 1 << 16, 1 << 22] {
            let reply = client.get(&format!("/{size}/{piece}")).await;
            assert!(reply.body == pattern(size), "{size} in pieces of {piece}: {} came", reply.body.len());
        }
        client.send(format!("HEAD /{size}/1 HTTP/1.1\r\nHost: a\r\n\r\n")).await;
        let reply = client.reply_to(true).await.unwrap();
        assert_eq!(reply.header("content-length"), Some(size.to_string().as_str()));
    }
    // Asked for at once, and answered in order.
    client.send("GET /200000/9000 HTTP/1.1\r\nHost: a\r\n\r\nGET /99999/100000 HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(client.reply().await.unwrap().body == pattern(200_000));
    assert!(client.reply().await.unwrap().body == pattern(99_999));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_all_speeds_get_their_own_bodies() {
    let plane = proxy(&[(1, sized().await)]).await;
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..48_usize {
        let address = plane.addresses()[0];
        clients.spawn(async move {
            let size = 300_000 + number * 1_111;
            let mut stream = TcpStream::connect(address).await.unwrap();
            let ask = format!("GET /{size}/50000 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n");
            stream.write_all(ask.as_bytes()).await.unwrap();
            if number % 3 == 0 {
                // Leaves in the middle; what was under way for it is nobody else's.
                let mut some = vec![0; 20_000 + number];
                stream.read_exact(&mut some).await.unwrap();
                return;
            }
            let mut all = Vec::new();
            let mut piece = vec![0; 700 * (number + 1)];
            loop {
                match stream.read(&mut piece).await {
                    Ok(0) => break,
                    Ok(count) => all.extend_from_slice(&piece[..count]),
                    Err(error) => panic!("{number}: {error}"),
                }
            }
            let body = all.windows(4).position(|end| end == b"\r\n\r\n").unwrap() + 4;
            assert!(all[body..] == pattern(size), "{number}: {} of {size} bytes", all.len() - body);
        });
    }
    while let Some(done) = clients.join_next().await {
        done.unwrap();
    }
    until("all are counted", || traffic(&plane).services[&service()].total().requests == 48).await;
    assert_eq!(traffic(&plane).services[&service()].total().cut, 0);
}

#[tokio::test]
async fn a_replica_that_dies_inside_a_large_body_is_seen_as_a_break() {
    let address = raw(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n").await.unwrap();
        stream.write_all(&pattern(500_000)).await.unwrap();
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(client.reply().await.is_err());
    until("it is counted", || traffic(&plane).services[&service()].total().cut == 1).await;
}

#[tokio::test]
async fn a_body_may_go_up_while_the_response_comes_down() {
    const TOTAL: usize = 3 << 20;
    // It answers each piece when it comes.
    let address = raw(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        stream.write_all(format!("HTTP/1.1 200 OK\r\nContent-Length: {TOTAL}\r\n\r\n").as_bytes()).await.unwrap();
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {TOTAL}\r\n\r\n")).await;
    let body = pattern(TOTAL);
    let mut head = [0; 1];
    let (mut read, mut write) = client.stream.split();
    // The response has begun before the body has.
    read.read_exact(&mut head).await.unwrap();
    let (sent, received) = tokio::join!(write.write_all(&body), async {
        let mut all = Vec::new();
        while !all.ends_with(&body[TOTAL - 64..]) {
            assert!(read.read_buf(&mut all).await.unwrap() > 0);
        }
        all
    });
    sent.unwrap();
    assert!(received.ends_with(&body));
}

#[tokio::test]
async fn what_a_replica_says_before_its_response_is_not_its_response() {
    let address = raw(|mut stream| async move {
        while read_head(&mut stream).await.is_some() {
            let reply = "HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n\
                         HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok";
            for byte in reply.as_bytes() {
                stream.write_all(&[*byte]).await.unwrap();
            }
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    for _ in 0..2 {
        let reply = client.get("/").await;
        assert_eq!((reply.status, reply.text()), (200, "ok"));
    }
}

#[tokio::test]
async fn a_response_that_ends_with_its_connection_is_whole() {
    let address = raw(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\n").await.unwrap();
        stream.write_all(&pattern(70_000)).await.unwrap();
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    for _ in 0..2 {
        assert!(client.get("/").await.body == pattern(70_000));
    }
}

#[tokio::test]
async fn nothing_is_kept_of_a_replica_that_says_more_than_it_announced() {
    let address = raw(|mut stream| async move {
        while read_head(&mut stream).await.is_some() {
            let reply =
                "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nevil";
            if let Err(error) = stream.write_all(reply.as_bytes()).await {
                assert!(matches!(error.kind(), ErrorKind::BrokenPipe | ErrorKind::ConnectionReset));
            }
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    for _ in 0..20 {
        assert_eq!(client.get("/").await.text(), "ok");
    }
}

#[tokio::test]
async fn a_client_that_breaks_off_inside_its_request_is_not_its_replicas_fault() {
    let address = raw(|mut stream| async move {
        while let Some(head) = read_head(&mut stream).await {
            if head.starts_with("POST") {
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
                return;
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    for count in 1..=8 {
        let mut client = Client::connect(&plane).await;
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\nsome").await;
        until("it is in flight", || !traffic(&plane).in_flight.is_empty()).await;
        drop(client);
        until("it is counted", || traffic(&plane).services[&service()].total().requests == count).await;
    }
    assert_eq!(traffic(&plane).services[&service()].total().server_errors(), 0);
    assert_eq!(Client::connect(&plane).await.get("/").await.text(), "ok", "it was not ejected");
}

#[tokio::test]
async fn a_body_of_unknown_length_reaches_the_replica_in_chunks() {
    let address = raw(|mut stream| async move {
        let head = read_head(&mut stream).await.unwrap();
        assert!(head.contains("\r\ntransfer-encoding: chunked\r\n") && !head.contains("content-length"), "{head}");
        let mut body = Vec::new();
        while !body.ends_with(b"\r\n0\r\nx-sum: 9\r\n\r\n") {
            stream.read_buf(&mut body).await.unwrap();
        }
        let size = body.len();
        let reply = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", size);
        stream.write_all(reply.as_bytes()).await.unwrap();
        stream.write_all(&body).await.unwrap();
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    client.send("5\r\nhello\r\n").await;
    client.send("2710\r\n").await;
    client.send(vec![b'x'; 10_000]).await;
    client.send("\r\n0\r\nX-Sum: 9\r\nContent-Length: 3\r\n\r\n").await;
    let reply = client.reply().await.unwrap();
    assert!(reply.text().starts_with("5\r\nhello\r\n"), "{}", reply.text());
    assert_eq!(reply.text().matches('x').count(), 10_001);
}

/// A client that breaks off inside its upload while the response is on its way must not be taken for one that is through.
#[tokio::test]
async fn an_upload_that_breaks_off_during_the_response_is_not_made_whole_and_leaves_no_connection() {
    for upload in ["Content-Length: 100\r\n\r\nsome", "Transfer-Encoding: chunked\r\n\r\n4\r\nsome\r\n"] {
        let (seen, mut sees) = tokio::sync::mpsc::unbounded_channel();
        let address = raw(move |mut stream| {
            let seen = seen.clone();
            async move {
                let head = read_head(&mut stream).await.unwrap();
                // Enough that the end of the upload is known before the end of the response.
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 3000000\r\n\r\n").await.unwrap();
                stream.write_all(&pattern(3_000_000)).await.unwrap();
                let mut rest = Vec::new();
                let _ = stream.read_to_end(&mut rest).await;
                seen.send((head, rest)).unwrap();
            }
        })
        .await;
        let plane = proxy(&[(1, address)]).await;
        let mut client = Client::connect(&plane).await;
        client.send(format!("POST / HTTP/1.1\r\nHost: a\r\n{upload}")).await;
        // The response has begun.
        let mut first = [0; 9];
        client.stream.read_exact(&mut first).await.unwrap();
        client.stream.shutdown().await.unwrap();
        let mut all = Vec::new();
        let _ = client.stream.read_to_end(&mut all).await;
        // The next request must not become the rest of that one.
        let mut next = Client::connect(&plane).await;
        next.send("GET /next HTTP/1.1\r\nHost: a\r\n\r\n").await;
        let (_, rest) = tokio::time::timeout(DEADLINE, sees.recv()).await.expect("the replica sees an end").unwrap();
        assert!(!rest.ends_with(b"0\r\n\r\n"), "it was made whole: {}", String::from_utf8_lossy(&rest));
        assert!(!rest.windows(4).any(|part| part == b"HTTP"), "another request came on the same connection");
    }
}

#[tokio::test]
async fn an_upload_in_small_pieces_is_not_read_faster_than_the_replica_takes_it() {
    const TOTAL: usize = 64 << 20;
    let (go, gone) = tokio::sync::watch::channel(false);
    let address = raw(move |mut stream| {
        let mut gone = gone.clone();
        async move {
            read_head(&mut stream).await.unwrap();
            gone.wait_for(|go| *go).await.unwrap();
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n").await;
    let chunk = [b"400\r\n".as_slice(), &[7; 1 << 10], b"\r\n"].concat();
    let mut sent = 0;
    // Until it stays stuck.
    let stuck = std::time::Duration::from_millis(500);
    while let Ok(written) = tokio::time::timeout(stuck, client.stream.write_all(&chunk)).await {
        written.unwrap();
        sent += chunk.len();
        assert!(sent < TOTAL / 2, "{sent} bytes were taken while nobody read them");
    }
    go.send(true).unwrap();
}

#[tokio::test]
async fn an_upload_goes_on_while_the_client_takes_no_response() {
    const UP: usize = 24 << 20;
    // It says more than lies in any buffer, without reading, and reads without minding that.
    let address = raw(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        let (mut read, mut write) = stream.split();
        let down = async {
            write.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
            for _ in 0..24 {
                write.write_all(b"100000\r\n").await.unwrap();
                write.write_all(&pattern(1 << 20)).await.unwrap();
                write.write_all(b"\r\n").await.unwrap();
            }
        };
        let up = async {
            let (mut left, mut piece) = (UP, vec![0; 1 << 16]);
            while left > 0 {
                left -= read.read(&mut piece).await.unwrap();
            }
        };
        tokio::join!(down, up);
        stream.write_all(b"0\r\n\r\n").await.unwrap();
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {UP}\r\n\r\n")).await;
    let piece = vec![7; 1 << 16];
    for _ in 0..UP >> 16 {
        let sent = tokio::time::timeout(DEADLINE, client.stream.write_all(&piece)).await;
        sent.expect("the upload goes on").unwrap();
    }
    assert_eq!(client.reply().await.unwrap().body.len(), 24 << 20);
}
