//! Nothing is lost while tables, replicas and whole proxies change.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use orca_cluster::id::{ReplicaId, Revision};
use orca_dataplane::{AccessLog, Config, DataPlane, Limits, NoModules};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::world::*;

/// Clients that ask without a pause until told to stop; half of them on a new connection each time.
struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<tokio::task::JoinHandle<(u64, Vec<String>)>>,
}

impl Load {
    fn start(address: std::net::SocketAddr, kept: usize, closing: usize) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let client = |is_kept: bool| {
            let stop = Arc::clone(&stop);
            tokio::spawn(async move {
                let (mut asked, mut failures) = (0, Vec::new());
                let mut client: Option<Client> = None;
                while !stop.load(Ordering::SeqCst) {
                    let mut this = match client.take() {
                        Some(client) => client,
                        None => match Client::to(address).await {
                            Ok(client) => client,
                            Err(error) => {
                                failures.push(error);
                                continue;
                            }
                        },
                    };
                    let close = if is_kept { "" } else { "Connection: close\r\n" };
                    this.send(format!("GET / HTTP/1.1\r\nHost: a\r\n{close}\r\n")).await;
                    asked += 1;
                    match this.reply().await {
                        Ok(reply) if reply.status == 200 => {
                            // A server may end a connection after a response, if it says so.
                            if is_kept && reply.header("connection") != Some("close") {
                                client = Some(this);
                            }
                        }
                        Ok(reply) => failures.push(format!("{} {}", reply.status, reply.text())),
                        Err(error) => failures.push(error),
                    }
                }
                (asked, failures)
            })
        };
        let clients = (0..kept).map(|_| client(true)).chain((0..closing).map(|_| client(false))).collect();
        Load { stop, clients }
    }

    /// How many were asked; all must have been answered.
    async fn stop(self) -> u64 {
        self.stop.store(true, Ordering::SeqCst);
        let mut total = 0;
        for client in self.clients {
            let (asked, failures) = client.await.unwrap();
            assert!(failures.is_empty(), "{} of {asked} failed: {:?}", failures.len(), failures.first());
            total += asked;
        }
        total
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_changes_under_load_lose_nothing_and_take_effect_when_acknowledged() {
    let (one, two) = (named("one").await, named("two").await);
    let plane = start(2, limits());
    plane.apply(tables(&[(1, one)])).await;
    let load = Load::start(plane.addresses()[0], 4, 4);
    let mut probes = 0;
    let mut kept = Client::connect(&plane).await;
    for change in 0..50 {
        let (number, address, name) = if change % 2 == 0 { (2, two, "two") } else { (1, one, "one") };
        plane.apply(tables(&[(number, address)])).await;
        // Both on an old connection and on a new one, and the replica that left has nothing from before soon.
        for client in [&mut kept, &mut Client::connect(&plane).await] {
            assert_eq!(client.get("/").await.text(), name, "after change {change}");
            probes += 1;
        }
        let old = ReplicaId(3 - number);
        until("the old replica is through", || !traffic(&plane).in_flight.contains_key(&old)).await;
    }
    let asked = load.stop().await + probes;
    let total = traffic(&plane).services[&service()].total();
    assert_eq!((total.requests, total.statuses[1], total.cut), (asked, asked, 0));
    let revisions = &traffic(&plane).services[&service()].revisions;
    assert!(revisions[&Revision(1)].requests > 0 && revisions[&Revision(2)].requests > 0);
}

#[tokio::test]
async fn a_request_waits_for_a_replica_that_is_about_to_come() {
    let plane = proxy(&[]).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\nhi").await;
    let mut other = Client::connect(&plane).await;
    other.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    // The first table brings one where nobody listens yet, the second one that answers.
    plane.apply(tables(&[(1, nobody().await)])).await;
    plane.apply(tables(&[(2, named("two").await)])).await;
    assert_eq!(client.reply().await.unwrap().text(), "two");
    assert_eq!(other.reply().await.unwrap().text(), "two");
}

#[tokio::test]
async fn a_replica_that_restarts_at_its_address_loses_nothing() {
    let address = nobody().await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("the request waits", || plane.held() == 1).await;
    let listener = TcpListener::bind(address).await.unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = listener.accept().await.unwrap();
        while read_head(&mut stream).await.is_some() {
            stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nback").await.unwrap();
        }
    });
    assert_eq!(client.reply().await.unwrap().text(), "back");
}

#[tokio::test]
async fn waiting_for_a_replica_ends_with_503_and_is_bounded() {
    let limits = Limits { hold_time_max: Duration::from_millis(200), held_max: 1, ..limits() };
    let plane = start(1, limits);
    plane.apply(tables(&[(1, nobody().await)])).await;
    let mut first = Client::connect(&plane).await;
    first.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("the first waits", || plane.held() == 1).await;
    let mut second = Client::connect(&plane).await;
    let reply = second.get("/").await;
    assert_eq!(reply.status, 503, "at once, since one waits already");
    let reply = first.reply().await.unwrap();
    assert_eq!(reply.status, 503);
    assert!(reply.text().contains("accepts no connections"), "{}", reply.text());
    assert_eq!(plane.held(), 0);
    let service = &traffic(&plane).services[&service()];
    assert_eq!((service.unserved.requests, service.total().requests), (2, 2));
}

#[tokio::test]
async fn one_dead_replica_of_two_fails_no_request_and_is_left_alone() {
    let plane = proxy(&[(1, nobody().await), (2, named("two").await)]).await;
    let mut client = Client::connect(&plane).await;
    for _ in 0..50 {
        let reply = client.get("/").await;
        assert_eq!((reply.status, reply.text()), (200, "two"));
    }
}

#[tokio::test]
async fn a_replica_that_left_the_tables_is_rid_of_kept_connections_at_once() {
    let ended = Count::default();
    let address = raw({
        let ended = ended.clone();
        move |mut stream| {
            let ended = ended.clone();
            async move {
                while read_head(&mut stream).await.is_some() {
                    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok").await.unwrap();
                }
                ended.add(1);
            }
        }
    })
    .await;
    // Not by growing old, then.
    let plane = start(1, Limits { replica_idle_time_max: Duration::from_secs(3600), ..limits() });
    plane.apply(tables(&[(1, address)])).await;
    assert_eq!(Client::connect(&plane).await.get("/").await.status, 200);
    assert_eq!(ended.get(), 0);
    plane.apply(tables(&[])).await;
    until("its connection ends", || ended.get() == 1).await;
}

#[tokio::test]
async fn a_canary_gets_its_share() {
    let plane = proxy(&[]).await;
    let mut both = upstream(&[(1, named("old").await), (2, named("new").await)]);
    (both.backends[0].weight, both.backends[1].weight) = (80, 20);
    plane.apply(Arc::new(tables_with(both))).await;
    let mut client = Client::connect(&plane).await;
    let mut new = 0;
    for _ in 0..500 {
        new += usize::from(client.get("/").await.text() == "new");
    }
    // 100 are expected; the chance to be this far off is less than one in a million.
    assert!((55..=150).contains(&new), "{new} of 500");
}

#[tokio::test]
async fn a_late_response_is_a_504() {
    let address = raw(|mut stream| async move {
        let _ = read_head(&mut stream).await;
        let _ = stream.read_u8().await;
    })
    .await;
    let plane = proxy(&[]).await;
    let mut slow = upstream(&[(1, address)]);
    slow.response_timeout = Duration::from_millis(200);
    plane.apply(Arc::new(tables_with(slow))).await;
    let reply = Client::connect(&plane).await.get("/").await;
    assert_eq!(reply.status, 504);
    assert!(reply.text().contains("shop/web did not begin to answer within 0.2 s (`response_timeout_secs`)"));
    assert_eq!(traffic(&plane).services[&service()].revisions[&Revision(1)].server_errors(), 1);
}

#[tokio::test]
async fn shutting_down_finishes_what_is_under_way() {
    let (go, gone) = tokio::sync::watch::channel(false);
    let address = raw(move |mut stream| {
        let mut gone = gone.clone();
        async move {
            while read_head(&mut stream).await.is_some() {
                gone.wait_for(|go| *go).await.unwrap();
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nlate").await.unwrap();
            }
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut idle = Client::connect(&plane).await;
    let mut busy = Client::connect(&plane).await;
    busy.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("it is in flight", || traffic(&plane).in_flight.contains_key(&ReplicaId(1))).await;
    let at = plane.addresses()[0];
    let counted = plane.clone();
    let ending = tokio::spawn(plane.shutdown(DEADLINE));
    assert!(idle.rest().await.is_empty(), "an idle connection is closed");
    assert!(legacy(&counted).is_choosing, "if its replica breaks off, the busy one may be given to another");
    assert!(TcpStream::connect(at).await.is_err(), "nobody accepts any more");
    go.send(true).unwrap();
    let reply = busy.reply().await.unwrap();
    assert_eq!((reply.text(), reply.header("connection")), ("late", Some("close")));
    ending.await.unwrap();
    let left = legacy(&counted);
    assert!(left.is_final && !left.is_choosing && left.traffic.in_flight.is_empty(), "{left:?}");
    let total = left.traffic.services[&service()].total();
    assert_eq!((total.requests, total.cut), (1, 0));
}

#[tokio::test]
async fn a_proxy_that_ends_says_what_it_still_has_and_when_it_chooses_no_more() {
    let (go, gone) = tokio::sync::watch::channel(false);
    let address = raw(move |mut stream| {
        let mut gone = gone.clone();
        async move {
            while read_head(&mut stream).await.is_some() {
                stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\n\r\nhalf").await.unwrap();
                gone.wait_for(|go| *go).await.unwrap();
                stream.write_all(b"half").await.unwrap();
            }
        }
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let _idle = Client::connect(&plane).await;
    let mut busy = Client::connect(&plane).await;
    busy.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("it is in flight", || traffic(&plane).in_flight.contains_key(&ReplicaId(1))).await;
    assert!(legacy(&plane).is_choosing, "it accepts");
    let ending = tokio::spawn(plane.clone().shutdown(DEADLINE));
    until("nothing is chosen any more", || !legacy(&plane).is_choosing).await;
    let left = legacy(&plane);
    assert_eq!((left.is_final, left.traffic.in_flight[&ReplicaId(1)].requests), (false, 1));
    go.send(true).unwrap();
    assert_eq!(busy.reply().await.unwrap().text(), "halfhalf");
    ending.await.unwrap();
    let left = legacy(&plane);
    assert!(left.is_final && left.traffic.in_flight.is_empty(), "{left:?}");
    assert_eq!(left.traffic.services[&service()].total().requests, 1);
}

#[tokio::test]
async fn what_outlasts_the_grace_is_cut_and_counted_so() {
    let address = raw(|mut stream| async move {
        let _ = read_head(&mut stream).await;
        stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nsome").await.unwrap();
        let _ = stream.read_u8().await;
    })
    .await;
    let plane = proxy(&[(1, address)]).await;
    let mut client = Client::connect(&plane).await;
    client.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("it is in flight", || traffic(&plane).in_flight.contains_key(&ReplicaId(1))).await;
    plane.clone().shutdown(Duration::from_millis(50)).await;
    assert!(client.reply().await.is_err());
    let total = traffic(&plane).services[&service()].total();
    assert_eq!((total.requests, total.cut), (1, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_proxy_takes_over_from_another_without_losing_a_request() {
    let one = named("one").await;
    let old = start(2, limits());
    old.apply(tables(&[(1, one)])).await;
    let load = Load::start(old.addresses()[0], 2, 4);
    let mut planes = vec![old];
    for _ in 0..5 {
        let old = planes.pop().unwrap();
        let config = Config {
            http: Vec::new(),
            workers: 2,
            access_log: AccessLog::Off,
            limits: limits(),
            trusted_proxies: Vec::new(),
        };
        let new = DataPlane::start_with(config, old.listeners().unwrap(), Arc::new(NoModules)).unwrap();
        new.apply(tables(&[(1, one)])).await;
        old.shutdown(DEADLINE).await;
        let mut probe = Client::connect(&new).await;
        assert_eq!(probe.get("/").await.status, 200);
        planes.push(new);
    }
    assert!(load.stop().await > 0);
}
