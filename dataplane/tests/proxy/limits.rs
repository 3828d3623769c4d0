//! What a client may take of us.

use std::time::{Duration, Instant};

use orca_dataplane::Limits;
use tokio::io::AsyncWriteExt;

use crate::world::*;

#[tokio::test]
async fn a_client_that_never_ends_its_head_is_cut_off_however_slowly_it_goes_on() {
    let plane = start(1, Limits { head_time_max: Duration::from_millis(300), ..limits() });
    plane.apply(tables(&[(1, named("one").await)])).await;
    let mut client = Client::connect(&plane).await;
    // The second head of a connection is held to it like the first.
    assert_eq!(client.get("/").await.status, 200);
    let began = Instant::now();
    client.send("GET / HTTP/1.1\r\nHost: a\r\n").await;
    let (mut read, mut write) = client.stream.split();
    let trickle = async {
        while write.write_all(b"X: y\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let mut reply = Vec::new();
    let answer = tokio::io::AsyncReadExt::read_to_end(&mut read, &mut reply);
    tokio::select! {
        () = trickle => {}
        _ = answer => {}
        () = tokio::time::sleep(DEADLINE) => panic!("it is let go on"),
    }
    assert!(began.elapsed() >= Duration::from_millis(290), "too soon: {:?}", began.elapsed());
    let mut silent = Client::connect(&plane).await;
    assert!(silent.rest().await.is_empty(), "one that says nothing is closed, too");
}

#[tokio::test]
async fn a_slow_head_is_told_so() {
    let plane = start(1, Limits { head_time_max: Duration::from_millis(100), ..limits() });
    plane.apply(tables(&[])).await;
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTT").await;
    assert_eq!(client.reply().await.unwrap().status, 408);
}

#[tokio::test]
async fn an_idle_connection_is_closed_and_a_used_one_is_not() {
    let plane = start(1, Limits { idle_time_max: Duration::from_millis(400), ..limits() });
    plane.apply(tables(&[(1, named("one").await)])).await;
    let mut idle = Client::connect(&plane).await;
    let mut used = Client::connect(&plane).await;
    assert_eq!(idle.get("/").await.status, 200);
    let using = async {
        loop {
            assert_eq!(used.get("/").await.status, 200);
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::select! {
        rest = idle.rest() => assert!(rest.is_empty()),
        () = using => {}
    }
    assert_eq!(used.get("/").await.status, 200);
}

#[tokio::test]
async fn a_head_that_is_too_large_is_a_431() {
    // A server that is less strict than we are, since we add fields of our own.
    let address = raw(|mut stream| async move {
        while read_head(&mut stream).await.is_some() {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n").await.unwrap();
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    let fits = "x".repeat(30 << 10);
    client.send(format!("GET / HTTP/1.1\r\nHost: a\r\nX: {fits}\r\n\r\n")).await;
    assert_eq!(client.reply().await.unwrap().status, 200);
    let large = "x".repeat(40 << 10);
    client.send(format!("GET / HTTP/1.1\r\nHost: a\r\nX: {large}\r\n\r\n")).await;
    assert_eq!(client.reply().await.unwrap().status, 431);
    assert!(client.rest().await.is_empty());

    let fields = |count: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "X: y\r\n".repeat(count - 1));
    let mut client = Client::connect(&plane).await;
    client.send(fields(100)).await;
    assert_eq!(client.reply().await.unwrap().status, 200);
    client.send(fields(101)).await;
    assert_eq!(client.reply().await.unwrap().status, 431);
}

#[tokio::test]
async fn a_source_has_so_many_connections_and_no_more() {
    let plane = start(2, Limits { connections_per_source_max: 3, ..limits() });
    plane.apply(tables(&[(1, named("one").await)])).await;
    let mut open = Vec::new();
    for _ in 0..3 {
        let mut client = Client::connect(&plane).await;
        assert_eq!(client.get("/").await.status, 200);
        open.push(client);
    }
    // It may be turned away so soon that it never sees itself connected.
    if let Ok(mut fourth) = Client::to(plane.addresses()[0]).await {
        assert!(fourth.rest().await.is_empty(), "the fourth is turned away");
    }
    open.pop();
    // The place is free when the proxy has seen it go.
    let again = async {
        loop {
            let Ok(mut client) = Client::to(plane.addresses()[0]).await else { continue };
            // It may be turned away before it has asked.
            let _ = client.stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
            if client.reply().await.is_ok_and(|reply| reply.status == 200) {
                return;
            }
        }
    };
    tokio::time::timeout(DEADLINE, again).await.unwrap();
}

#[tokio::test]
async fn an_upload_that_stops_is_ended() {
    let plane = start(1, Limits { body_idle_time_max: Duration::from_millis(300), ..limits() });
    let address = raw(|mut stream| async move {
        let mut rest = Vec::new();
        let _ = tokio::io::AsyncReadExt::read_to_end(&mut stream, &mut rest).await;
    })
    .await;
    plane.apply(tables(&[(1, address)])).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\nhalf").await;
    assert!(client.rest().await.is_empty());
    until("it is counted", || traffic(&plane).services[&service()].total().requests == 1).await;
    assert_eq!(traffic(&plane).services[&service()].total().cut, 1);
}
