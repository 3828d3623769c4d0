//! WebSockets and other protocols that begin as HTTP.

use orca_cluster::id::{ReplicaId, Revision};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::world::*;

const ASK: &str = "GET /ws HTTP/1.1\r\nHost: a\r\nConnection: keep-alive, Upgrade\r\nUpgrade: websocket\r\n\
                   Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// Agrees to upgrade, says hello at once, and echoes.
async fn echo() -> std::net::SocketAddr {
    raw(|mut stream| async move {
        let head = read_head(&mut stream).await.unwrap();
        assert!(head.contains("upgrade: websocket") && head.to_lowercase().contains("connection: upgrade"), "{head}");
        let agreed = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\nhello";
        stream.write_all(agreed.as_bytes()).await.unwrap();
        let (mut read, mut write) = stream.split();
        let _ = tokio::io::copy(&mut read, &mut write).await;
    })
    .await
}

#[tokio::test]
async fn a_websocket_outlives_a_change_of_tables() {
    let (one, two) = (echo().await, named("two").await);
    let plane = proxy(&[(1, one)]).await;
    let mut client = Client::connect(&plane).await;
    client.send(ASK).await;
    let reply = client.reply().await.unwrap();
    assert_eq!((reply.status, reply.header("upgrade")), (101, Some("websocket")));
    assert_eq!(client.exactly(5).await.unwrap(), b"hello");
    plane.apply(tables(&[(2, two)])).await;
    // Bytes that HTTP would refuse, and more than any buffer of ours.
    let message = b"\r\r\n\n\0GET".repeat(50_000);
    let (mut read, mut write) = client.stream.split();
    let sending = async { write.write_all(&message).await.unwrap() };
    let mut echoed = vec![0; message.len()];
    let receiving = async { read.read_exact(&mut echoed).await.unwrap() };
    tokio::join!(sending, receiving);
    assert_eq!(echoed, message);
    let before = traffic(&plane);
    assert_eq!((before.in_flight[&ReplicaId(1)].upgraded, before.in_flight[&ReplicaId(1)].requests), (1, 0));
    assert_eq!(before.services[&service()].total().requests, 0, "it has not ended");
    drop(client);
    until("it is counted", || traffic(&plane).services[&service()].total().requests == 1).await;
    let after = traffic(&plane);
    let counters = &after.services[&service()].revisions[&Revision(1)];
    assert_eq!((counters.statuses, counters.cut), ([1, 0, 0, 0, 0], 0));
    until("the replica is free", || traffic(&plane).in_flight.is_empty()).await;
}

#[tokio::test]
async fn a_websocket_that_ends_because_its_replica_is_stopped_is_cut() {
    for (is_stopped, cut) in [(false, 0), (true, 1)] {
        let (stop, stopped) = tokio::sync::watch::channel(false);
        let address = raw(move |mut stream| {
            let mut stopped = stopped.clone();
            async move {
                read_head(&mut stream).await.unwrap();
                let agreed = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
                stream.write_all(agreed.as_bytes()).await.unwrap();
                stopped.wait_for(|stop| *stop).await.unwrap();
            }
        })
        .await;
        let plane = proxy(&[(1, address)]).await;
        let mut client = Client::connect(&plane).await;
        client.send(ASK).await;
        assert_eq!(client.reply().await.unwrap().status, 101);
        if is_stopped {
            plane.apply(tables(&[])).await;
        }
        stop.send(true).unwrap();
        assert!(client.rest().await.is_empty());
        drop(client);
        until("it is counted", || traffic(&plane).services[&service()].total().requests == 1).await;
        assert_eq!(traffic(&plane).services[&service()].total().cut, cut);
    }
}

#[tokio::test]
async fn an_upgraded_connection_that_we_end_is_cut() {
    let plane = proxy(&[(1, echo().await)]).await;
    let mut client = Client::connect(&plane).await;
    client.send(ASK).await;
    assert_eq!(client.reply().await.unwrap().status, 101);
    plane.clone().shutdown(std::time::Duration::from_millis(20)).await;
    client.rest().await;
    let total = traffic(&plane).services[&service()].total();
    assert_eq!((total.requests, total.cut), (1, 1));
}

#[tokio::test]
async fn only_the_replica_can_agree_to_an_upgrade() {
    // It declines, and what follows is a request like any other: it is not carried past us.
    let plane = proxy(&[(1, named("no").await)]).await;
    let mut client = Client::connect(&plane).await;
    client.send(format!("{ASK}GET /second HTTP/1.1\r\nHost: a\r\n\r\n")).await;
    for _ in 0..2 {
        let reply = client.reply().await.unwrap();
        assert_eq!((reply.status, reply.text()), (200, "no"));
    }
    assert_eq!(traffic(&plane).services[&service()].total().requests, 2);
}

#[tokio::test]
async fn a_replica_cannot_upgrade_what_nobody_asked_to() {
    let address = raw(|mut stream| async move {
        read_head(&mut stream).await.unwrap();
        let agreed = "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n";
        stream.write_all(agreed.as_bytes()).await.unwrap();
        let _ = stream.read_u8().await;
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    assert_eq!(Client::connect(&plane).await.get("/").await.status, 502);
    // Nor can HTTP/2 be reached through it.
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n").await;
    assert_eq!(client.reply().await.unwrap().status, 502);
}
