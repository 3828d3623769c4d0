//! Requests there, responses back.

use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http::Response;
use http_body_util::{BodyExt, Full};
use orca_cluster::id::{ReplicaId, Revision};
use orca_cluster::route::Absence;
use orca_dataplane::{AccessLog, Config, DataPlane, Limits, NoModules, StartError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;

use crate::world::*;

#[tokio::test]
async fn one_connection_carries_many_requests_and_each_is_counted_once() {
    let plane = proxy(&[(1, named("one").await)]).await;
    let mut client = Client::connect(&plane).await;
    for _ in 0..100 {
        let reply = client.get("/").await;
        assert_eq!((reply.status, reply.text()), (200, "one"));
    }
    let traffic = traffic(&plane);
    let counters = &traffic.services[&service()].revisions[&Revision(1)];
    assert_eq!((counters.requests, counters.statuses, counters.cut), (100, [0, 100, 0, 0, 0], 0));
    assert_eq!(counters.latency.total(), 100);
    assert!(traffic.in_flight.is_empty(), "{:?}", traffic.in_flight);
}

/// A replica that gives everybody the same reply, and the heads it has seen, in lower case.
async fn listener(reply: &'static str) -> (SocketAddr, Arc<Mutex<Vec<String>>>) {
    let heads = Arc::new(Mutex::new(Vec::new()));
    let seen = Arc::clone(&heads);
    let address = raw(move |mut stream| {
        let seen = Arc::clone(&seen);
        async move {
            while let Some(head) = read_head(&mut stream).await {
                seen.lock().unwrap().push(head.to_lowercase());
                stream.write_all(reply.as_bytes()).await.unwrap();
            }
        }
    })
    .await;
    (address, heads)
}

#[tokio::test]
async fn a_replica_is_told_who_asks_and_nothing_that_a_client_made_up() {
    let (address, heads) =
        listener("HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\n\r\nok").await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client
        .send(
            "GET http://shop.example/a?b=%20 HTTP/1.1\r\nHost: other\r\nConnection: x-mine, keep-alive\r\nX-Mine: 1\r\n\
             Keep-Alive: 5\r\nProxy-Connection: close\r\nX-Forwarded-For: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\n\
             X-Forwarded-Proto: https\r\nX-Request-Id: mine\r\nTE: trailers\r\nCookie: a=b\r\n\r\n",
        )
        .await;
    let reply = client.reply().await.unwrap();
    assert_eq!((reply.header("x-hop"), reply.header("x-end")), (None, Some("2")));
    let head = heads.lock().unwrap().pop().unwrap();
    assert!(head.starts_with("get /a?b=%20 http/1.1\r\n"), "{head}");
    for there in [
        "host: shop.example",
        "x-forwarded-for: 127.0.0.1",
        "x-forwarded-proto: http",
        "x-forwarded-host: shop.example",
        "cookie: a=b",
        "te: trailers",
    ] {
        assert!(head.contains(&format!("\r\n{there}\r\n")), "{there} in {head}");
    }
    for gone in ["x-mine", "keep-alive", "proxy-connection", "6.6.6.6", "https", "x-request-id: mine", "\r\nforwarded"]
    {
        assert!(!head.contains(gone), "{gone} in {head}");
    }
}

#[tokio::test]
async fn what_a_trusted_proxy_says_of_its_client_is_passed_on() {
    let (address, heads) = listener("HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await;
    let config = Config {
        http: vec!["127.0.0.1:0".parse().unwrap()],
        workers: 1,
        access_log: AccessLog::Off,
        limits: limits(),
        trusted_proxies: vec!["10.0.0.0/8".parse().unwrap(), "127.0.0.0/8".parse().unwrap()],
    };
    let plane = DataPlane::start(config, Arc::new(NoModules)).unwrap();
    plane.apply(tables(&[(1, address)])).await;
    let mut client = Client::connect(&plane).await;
    let mut sent = async |fields: &str| {
        client.send(&format!("GET / HTTP/1.1\r\nHost: inner.test\r\n{fields}\r\n")).await;
        assert_eq!(client.reply().await.unwrap().status, 200);
        heads.lock().unwrap().pop().unwrap()
    };
    let through = sent(
        "X-Forwarded-For: 6.6.6.6, 7.7.7.7\r\nX-Forwarded-For: 8.8.8.8\r\nX-Forwarded-Proto: https\r\n\
         X-Forwarded-Host: shop.test\r\n",
    )
    .await;
    for there in [
        "x-forwarded-for: 6.6.6.6, 7.7.7.7, 8.8.8.8, 127.0.0.1",
        "x-forwarded-proto: https",
        "x-forwarded-host: shop.test",
        "host: inner.test",
    ] {
        assert!(through.contains(&format!("\r\n{there}\r\n")), "{there} in {through}");
    }
    let plain = sent("X-Forwarded-Proto: gopher\r\n").await;
    for there in ["x-forwarded-for: 127.0.0.1", "x-forwarded-proto: http", "x-forwarded-host: inner.test"] {
        assert!(plain.contains(&format!("\r\n{there}\r\n")), "{there} in {plain}");
    }
}

#[tokio::test]
async fn bodies_go_through_in_every_framing() {
    let echo =
        serve(
            |request| async move { Response::new(Full::new(request.into_body().collect().await.unwrap().to_bytes())) },
        )
        .await;
    let plane = proxy(&[(1, echo)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello").await;
    assert_eq!(client.reply().await.unwrap().text(), "hello");
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nhel\r\n2;x=y\r\nlo\r\n0\r\nT: 1\r\n\r\n").await;
    assert_eq!(client.reply().await.unwrap().text(), "hello");
    client.send("HEAD / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert_eq!(client.reply_to(true).await.unwrap().status, 200);
    // Two at once: answered in order.
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n1POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n2").await;
    assert_eq!(client.reply().await.unwrap().text(), "1");
    assert_eq!(client.reply().await.unwrap().text(), "2");
    // HTTP/1.0 without a host, and the connection ends.
    client.send("GET / HTTP/1.0\r\n\r\n").await;
    let rest = String::from_utf8(client.rest().await).unwrap();
    assert!(rest.starts_with("HTTP/1.0 200") || rest.starts_with("HTTP/1.1 200"), "{rest}");
}

#[tokio::test]
async fn chunks_and_trailers_reach_the_client_as_they_come() {
    let address = raw(|mut stream| async move {
        while read_head(&mut stream).await.is_some() {
            let reply = "HTTP/1.1 200 OK\r\nTrailer: X-Sum\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 6\r\n\r\n";
            stream.write_all(reply.as_bytes()).await.unwrap();
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\nTE: trailers\r\n\r\n").await;
    let reply = client.reply().await.unwrap();
    assert_eq!(reply.text(), "abc");
    assert!(reply.head.to_lowercase().ends_with("x-sum: 6\r\n"), "{}", reply.head);
    // A client of 1.0 knows no chunks: its response ends with the connection.
    client.send("GET / HTTP/1.0\r\n\r\n").await;
    assert!(client.rest().await.ends_with(b"\r\n\r\nabc"));
}

#[tokio::test]
async fn a_client_that_expects_100_is_told_to_continue_when_its_body_is_wanted() {
    let echo =
        serve(
            |request| async move { Response::new(Full::new(request.into_body().collect().await.unwrap().to_bytes())) },
        )
        .await;
    let plane = proxy(&[(1, echo)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n").await;
    assert_eq!(client.reply().await.unwrap().status, 100);
    client.send("hello").await;
    assert_eq!(client.reply().await.unwrap().text(), "hello");
}

#[tokio::test]
async fn an_upload_is_not_read_faster_than_the_replica_takes_it() {
    const TOTAL: usize = 64 << 20;
    let (go, gone) = tokio::sync::watch::channel(false);
    let address = raw(move |mut stream| {
        let mut gone = gone.clone();
        async move {
            read_head(&mut stream).await.unwrap();
            gone.wait_for(|go| *go).await.unwrap();
            let mut left = TOTAL;
            let mut buffer = vec![0; 1 << 16];
            while left > 0 {
                left -= stream.read(&mut buffer).await.unwrap();
            }
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send(format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {TOTAL}\r\n\r\n")).await;
    let piece = vec![7; 1 << 16];
    let mut sent = 0;
    // Write until it stays stuck: what was taken lies in the kernel's buffers and a few of ours.
    while let Ok(written) = tokio::time::timeout(Duration::from_millis(500), client.stream.write(&piece)).await {
        sent += written.unwrap();
    }
    assert!(sent < TOTAL / 2, "{sent} bytes were taken while nobody read them");
    go.send(true).unwrap();
    while sent < TOTAL {
        let end = piece.len().min(TOTAL - sent);
        sent += client.stream.write(&piece[..end]).await.unwrap();
    }
    assert_eq!(client.reply().await.unwrap().text(), "ok");
}

#[tokio::test]
async fn a_download_is_not_read_faster_than_the_client_takes_it() {
    let sent = Count::default();
    let address = raw({
        let sent = sent.clone();
        move |mut stream| {
            let sent = sent.clone();
            async move {
                read_head(&mut stream).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 67108864\r\n\r\n").await.unwrap();
                let piece = vec![7; 1 << 16];
                while sent.get() < 64 << 20 && stream.write_all(&piece).await.is_ok() {
                    sent.add(1 << 16);
                }
            }
        }
    })
    .await;
    let plane = start(1, Limits { body_idle_time_max: Duration::from_millis(400), ..limits() });
    plane.apply(tables(&[(1, address)])).await;
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    // Nobody takes it, so it is cut, and most of it was never asked of the replica.
    until("it is cut", || traffic(&plane).services[&service()].total().cut == 1).await;
    assert!(sent.get() < 32 << 20, "{} bytes were read for nobody", sent.get());
}

#[tokio::test]
async fn an_event_arrives_when_it_is_sent() {
    let (go, gone) = tokio::sync::watch::channel(0);
    let address = raw(move |mut stream| {
        let mut gone = gone.clone();
        async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n").await.unwrap();
            for event in 1..=3 {
                gone.wait_for(|go| *go >= event).await.unwrap();
                stream.write_all(b"6\r\nevent\n\r\n").await.unwrap();
            }
            stream.write_all(b"0\r\n\r\n").await.unwrap();
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    for event in 1..=3 {
        go.send(event).unwrap();
        let mut seen = Vec::new();
        while !seen.ends_with(b"event\n\r\n") {
            seen.extend(client.exactly(1).await.unwrap());
        }
    }
    assert_eq!(client.exactly(5).await.unwrap(), b"0\r\n\r\n");
}

#[tokio::test]
async fn a_replica_may_answer_before_it_has_the_whole_body() {
    let address = raw(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        let reply = "HTTP/1.1 413 Content Too Large\r\nContent-Length: 3\r\nConnection: close\r\n\r\nbig";
        stream.write_all(reply.as_bytes()).await.unwrap();
        stream.shutdown().await.unwrap();
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000000\r\n\r\nthe beginning").await;
    let reply = client.reply().await.unwrap();
    assert_eq!((reply.status, reply.text()), (413, "big"));
    // The rest of that body is no request, whatever it looks like.
    let _ = client.stream.write_all(b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n").await;
    assert!(client.rest().await.is_empty());
    assert_eq!(traffic(&plane).services[&service()].total().requests, 1);
}

#[tokio::test]
async fn a_replica_that_closes_kept_connections_costs_nobody_a_response() {
    let served = Count::default();
    let address = raw({
        let served = served.clone();
        move |mut stream| {
            let served = served.clone();
            async move {
                // It says nothing of closing, and closes after every second response.
                for _ in 0..2 {
                    if read_head(&mut stream).await.is_none() {
                        return;
                    }
                    served.add(1);
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
                }
            }
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    for _ in 0..200 {
        assert_eq!(client.get("/").await.status, 200);
    }
    assert_eq!(served.get(), 200);
}

#[tokio::test]
async fn what_may_have_been_done_is_not_done_again() {
    let (gets, posts) = (Count::default(), Count::default());
    let address = raw({
        let (gets, posts) = (gets.clone(), posts.clone());
        move |mut stream| {
            let (gets, posts) = (gets.clone(), posts.clone());
            async move {
                let head = read_head(&mut stream).await.unwrap();
                if head.starts_with("POST") {
                    posts.add(1);
                } else {
                    gets.add(1);
                }
                // And it breaks off without a byte.
            }
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx").await;
    let reply = client.reply().await.unwrap();
    assert_eq!(reply.status, 502);
    assert!(reply.text().contains("broke off before it answered"), "{}", reply.text());
    assert_eq!(posts.get(), 1);
    assert_eq!(client.get("/").await.status, 502);
    assert_eq!(gets.get(), 2, "once more, and no more than that");
}

#[tokio::test]
async fn a_replica_that_dies_inside_a_response_is_seen_as_a_break_and_counted_as_cut() {
    for head in ["Content-Length: 1000", "Transfer-Encoding: chunked"] {
        let address = raw(move |mut stream| async move {
            read_head(&mut stream).await.unwrap();
            stream.write_all(format!("HTTP/1.1 200 OK\r\n{head}\r\n\r\n5\r\nhello\r\n").as_bytes()).await.unwrap();
        })
        .await;
        let plane = proxy(&[(1, address)]).await;
        let mut client = Client::connect(&plane).await;
        client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
        assert!(client.reply().await.is_err(), "{head}: a clean end");
        until("it is counted", || traffic(&plane).services[&service()].total().requests == 1).await;
        let total = traffic(&plane).services[&service()].total();
        assert_eq!((total.cut, total.statuses), (1, [0, 1, 0, 0, 0]));
    }
}

#[tokio::test]
async fn a_client_that_leaves_is_counted_and_is_no_cut() {
    let address = raw(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nsome").await.unwrap();
        // Until the proxy lets go of it.
        let _ = stream.read_u8().await;
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("it is in flight", || traffic(&plane).in_flight.contains_key(&ReplicaId(1))).await;
    drop(client);
    until("it is counted", || traffic(&plane).services[&service()].total().requests == 1).await;
    let traffic = traffic(&plane);
    assert_eq!(traffic.services[&service()].total().cut, 0);
    assert!(traffic.in_flight.is_empty());
}

#[tokio::test]
async fn a_response_with_two_framings_is_not_passed_on() {
    let address = raw(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        let reply = "HTTP/1.1 200 OK\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
        stream.write_all(reply.as_bytes()).await.unwrap();
        let _ = stream.read_u8().await;
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    assert_eq!(Client::connect(&plane).await.get("/").await.status, 502);
}

#[tokio::test]
async fn each_failure_says_which_part_failed() {
    let plane = proxy(&[]).await;
    let mut upstream = upstream(&[]);
    upstream.absence = Absence::Stopped;
    plane.apply(Arc::new(tables_with(upstream.clone()))).await;
    let mut client = Client::connect(&plane).await;
    let reply = client.get("/").await;
    assert_eq!(reply.status, 503);
    assert!(reply.text().contains("shop/web was stopped"), "{}", reply.text());
    client.send("GET / HTTP/1.1\r\nHost: a\r\nAccept: application/json\r\n\r\n").await;
    let reply = client.reply().await.unwrap();
    let json: serde_json::Value = serde_json::from_slice(&reply.body).unwrap();
    assert_eq!(json["reason"], "service_stopped");
    assert_eq!(json["request"], reply.header("x-request-id").unwrap());
    client.send("GET / HTTP/1.1\r\nHost: a\r\nAccept: text/html\r\n\r\n").await;
    assert!(client.reply().await.unwrap().text().starts_with("<!doctype html>"));
    let total = traffic(&plane).services[&service()].unserved.clone();
    assert_eq!((total.requests, total.server_errors()), (3, 3));

    upstream.absence = Absence::ScaledToZero;
    plane.apply(Arc::new(tables_with(upstream))).await;
    let reply = client.get("/").await;
    assert_eq!((reply.status, reply.header("retry-after")), (503, None));
    assert!(reply.text().contains("shop/web has no replicas: it is scaled to 0"), "{}", reply.text());

    plane.apply(Arc::default()).await;
    assert_eq!(client.get("/").await.status, 404);
    client.send("CONNECT a:80 HTTP/1.1\r\nHost: a:80\r\n\r\n").await;
    assert_eq!(client.reply().await.unwrap().status, 405);
}

#[tokio::test]
async fn the_access_log_has_a_line_for_each_request() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let config = Config {
        http: vec!["127.0.0.1:0".parse().unwrap()],
        workers: 1,
        access_log: AccessLog::File(file.path().to_owned()),
        limits: limits(),
        trusted_proxies: vec!["127.0.0.1/32".parse().unwrap(), "10.0.0.0/8".parse().unwrap()],
    };
    let plane = DataPlane::start(config, Arc::new(NoModules)).unwrap();
    plane.apply(tables(&[(7, named("seven").await)])).await;
    let mut client = Client::connect(&plane).await;
    client.get("/a?secret=1").await;
    let told = [
        ("6.6.6.6, 7.7.7.7, 10.0.0.1", "7.7.7.7"),
        ("::ffff:7.7.7.7", "7.7.7.7"),
        ("10.0.0.2, 10.0.0.1", "10.0.0.2"),
        ("6.6.6.6, unknown, 10.0.0.1", "10.0.0.1"),
        ("\u{e9}, 7.7.7.7", "7.7.7.7"),
    ];
    for (addresses, _) in told {
        client.send(&format!("GET / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: {addresses}\r\n\r\n")).await;
        assert_eq!(client.reply().await.unwrap().status, 200);
    }
    let lines = || std::fs::read_to_string(file.path()).unwrap();
    until("the lines are written", || lines().matches('\n').count() == 1 + told.len()).await;
    let lines: Vec<serde_json::Value> = lines().lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let line = &lines[0];
    assert_eq!((&line["client"], &line["via"]), (&"127.0.0.1".into(), &serde_json::Value::Null));
    for (line, (addresses, client)) in lines[1..].iter().zip(told) {
        assert_eq!((&line["client"], &line["via"]), (&client.into(), &"127.0.0.1".into()), "{addresses}");
    }
    assert_eq!((&line["path"], &line["status"], &line["bytes"]), (&"/a".into(), &200.into(), &5.into()));
    assert_eq!((&line["service"], &line["replica"], &line["end"]), (&"shop/web".into(), &7.into(), &"done".into()));
}

#[tokio::test]
async fn a_port_that_is_used_has_its_own_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap();
    let start = |address| {
        let config = Config {
            http: vec![address],
            workers: 1,
            access_log: AccessLog::Off,
            limits: limits(),
            trusted_proxies: Vec::new(),
        };
        DataPlane::start(config, Arc::new(NoModules))
    };
    assert!(matches!(start(address), Err(StartError::InUse(at)) if at == address));
    // Our own kind shares ports in silence if it is let; it is not.
    let first = start("127.0.0.1:0".parse().unwrap()).unwrap();
    assert!(matches!(start(first.addresses()[0]), Err(StartError::InUse(_))));
}

#[tokio::test]
async fn a_body_that_nobody_reads_does_not_lose_the_answer() {
    let plane = proxy(&[]).await;
    plane.apply(Arc::default()).await;
    let socket = TcpSocket::new_v4().unwrap().connect(plane.addresses()[0]).await.unwrap();
    let (mut read, mut write) = socket.into_split();
    let writing = tokio::spawn(async move {
        let _ = write.write_all(b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 500000\r\n\r\n").await;
        let _ = write.write_all(&vec![0; 500_000]).await;
        write
    });
    let mut reply = [0; 12];
    read.read_exact(&mut reply).await.unwrap();
    assert_eq!(&reply, b"HTTP/1.1 404");
    drop(writing.await.unwrap());
}
