//! Real endpoints on loopback: who is let in, what a request and a stream do, and what happens when one goes wrong.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use orca_cluster::id::{ClusterId, NodeId};
use orca_cluster::time::Timestamp;
use orca_wire::client::ClientError;
use orca_wire::endpoint::{Caller, DialError, Stranger};
use orca_wire::identity::{Authority, Identity, KeyRequest, Token};
use orca_wire::stream::{Item, StreamError};
use orca_wire::{Access, Client, Connection, Endpoint, Listener, Peer, Plane, Rejection, Stream, Wanted};
use serde::{Deserialize, Serialize};
use tokio::net::UdpSocket;
use tokio::sync::{mpsc, watch};
use tokio::time::timeout;

const SOON: Duration = Duration::from_secs(10);
const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

fn now() -> Timestamp {
    let since_1970 = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    Timestamp(since_1970.as_millis() as u64)
}

fn authority() -> Authority {
    Authority::create(ClusterId(7), now())
}

fn node_at(authority: &Authority, node: u64, raft: Option<u64>, at: Timestamp) -> Identity {
    let request = KeyRequest::generate();
    let issued = authority.issue_node(&request.request(), NodeId(node), raft, at).unwrap();
    request.into_identity(&issued).unwrap()
}

fn node(authority: &Authority, node: u64, raft: Option<u64>) -> Identity {
    node_at(authority, node, raft, now())
}

fn user(authority: &Authority) -> Identity {
    let request = KeyRequest::generate();
    let token = Token::create(authority.fingerprint());
    let issued = authority.issue_user(&request.request(), token.id, Duration::from_secs(3600), now()).unwrap();
    request.into_identity(&issued).unwrap()
}

fn server(identity: Identity) -> (Endpoint, Listener, SocketAddr) {
    let (endpoint, listener) = Endpoint::server(ANY_PORT, identity, |_: &Caller<'_>| Ok(())).unwrap();
    let address = endpoint.local_address().unwrap();
    (endpoint, listener, address)
}

async fn dial(access: Access, address: SocketAddr, plane: Plane, wanted: Wanted) -> Result<Connection, DialError> {
    Endpoint::client(access).unwrap().dial(address, plane, wanted).await
}

/// Both ends of one connection on the agent plane, and the two endpoints to keep alive.
async fn pair() -> (Connection, Connection, (Endpoint, Endpoint, Listener)) {
    let authority = authority();
    let (server, mut listener, address) = server(node(&authority, 1, Some(1)));
    let client = Endpoint::client(Access::Certificate(node(&authority, 2, None))).unwrap();
    let dialed = client.dial(address, Plane::Agent, Wanted::Node(NodeId(1))).await.unwrap();
    let accepted = listener.accept().await.unwrap();
    (dialed, accepted, (server, client, listener))
}

#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    Double(u64),
    Count(u64),
    Echo,
    Silence,
    Flood,
    Panic,
}

/// Pieces of a flood, of 64 KiB each: with so many a stream's window is almost full, and with twice as many more than full.
const ALMOST_FULL: usize = 15;
const PIECE: usize = 64 << 10;

async fn answer(ask: Ask, mut stream: Stream, seen: mpsc::UnboundedSender<&'static str>) {
    match ask {
        Ask::Double(number) => stream.answer(&(number * 2)).await.unwrap(),
        Ask::Count(to) => {
            for number in 0..to {
                if stream.send(&number).await.is_err() {
                    return;
                }
            }
            stream.finish().await.unwrap();
        }
        Ask::Echo => {
            while let Some(item) = stream.next_item::<String>().await.unwrap() {
                match item {
                    Item::Message(text) => stream.send(&text).await.unwrap(),
                    Item::Bytes(bytes) => stream.send_bytes(&bytes).await.unwrap(),
                }
            }
            stream.finish().await.unwrap();
        }
        Ask::Silence => {
            seen.send("began").unwrap();
            stream.closed().await;
            seen.send("closed").unwrap();
        }
        Ask::Flood => {
            stream.sender.set_stall(Duration::from_millis(1));
            stream.may_rest();
            for piece in 0..2 * ALMOST_FULL {
                stream.send_bytes(&[0; PIECE]).await.unwrap();
                if piece + 1 == ALMOST_FULL {
                    seen.send("almost full").unwrap();
                }
            }
            stream.finish().await.unwrap();
        }
        Ask::Panic => panic!("as asked"),
    }
}

/// A connection whose other end answers [`Ask`]s.
struct Served {
    connection: Connection,
    seen: mpsc::UnboundedReceiver<&'static str>,
    accepted: Connection,
    _endpoints: (Endpoint, Endpoint, Listener),
}

async fn served() -> Served {
    let (connection, accepted, _endpoints) = pair().await;
    let (tell, seen) = mpsc::unbounded_channel();
    let serving = accepted.clone();
    tokio::spawn(async move { serving.serve(move |ask, stream| answer(ask, stream, tell.clone())).await });
    Served { connection, seen, accepted, _endpoints }
}

#[tokio::test]
async fn a_request_is_answered_and_both_sides_know_each_other() {
    let served = served().await;
    assert_eq!(served.connection.peer(), &Peer::Node { node: NodeId(1), raft: Some(1) });
    assert_eq!(served.accepted.peer(), &Peer::Node { node: NodeId(2), raft: None });
    assert_eq!(served.accepted.plane(), Plane::Agent);
    let answer: u64 = served.connection.request(&Ask::Double(21), SOON).await.unwrap();
    assert_eq!(answer, 42);
}

#[tokio::test]
async fn every_certificate_opens_its_own_planes_only() {
    let authority = authority();
    let stranger = Authority::create(ClusterId(7), now());
    let token = Token::create(authority.fingerprint());
    let week = Duration::from_secs(8 * 24 * 3600);
    let (_server, _listener, address) = server(node(&authority, 1, Some(1)));

    let holders = [
        ("worker", Access::Certificate(node(&authority, 2, None)), vec![Plane::Agent]),
        ("voter", Access::Certificate(node(&authority, 3, Some(3))), vec![Plane::Peer, Plane::Agent]),
        ("user", Access::Certificate(user(&authority)), vec![Plane::Client]),
        ("token", Access::Token(token), vec![Plane::Client]),
        ("expired voter", Access::Certificate(node_at(&authority, 4, Some(4), now() - week)), vec![]),
        ("voter of another authority", Access::Certificate(node(&stranger, 5, Some(5))), vec![]),
        ("token of another authority", Access::Token(Token::create(stranger.fingerprint())), vec![]),
    ];
    for (name, access, opens) in holders {
        for plane in Plane::ALL {
            let dialed = dial(access.clone(), address, plane, Wanted::Anyone).await;
            assert_eq!(dialed.is_ok(), opens.contains(&plane), "{name} on the {plane} plane: {dialed:?}");
        }
    }
}

#[tokio::test]
async fn a_server_whose_certificate_has_ended_is_not_trusted() {
    let authority = authority();
    let week = Duration::from_secs(8 * 24 * 3600);
    let (_server, _listener, address) = server(node_at(&authority, 1, Some(1), now() - week));
    let token = Access::Token(Token::create(authority.fingerprint()));
    for access in [token, Access::Certificate(user(&authority))] {
        let error = dial(access, address, Plane::Client, Wanted::Anyone).await.unwrap_err();
        assert!(matches!(&error, DialError::Stranger { stranger: Stranger::Certificate(_), .. }), "{error:?}");
    }
}

#[tokio::test]
async fn only_the_owner_admits_a_token_and_its_reason_is_told() {
    let authority = authority();
    let good = Token::create(authority.fingerprint());
    let hash = good.secret.hash();
    let admit = move |caller: &Caller<'_>| match caller.token {
        Some((_, secret)) if secret.matches(&hash) => Ok(()),
        _ => Err(Rejection::Denied("the token is used up; ask for another".to_owned())),
    };
    let (server, mut listener) = Endpoint::server(ANY_PORT, node(&authority, 1, Some(1)), admit).unwrap();
    let address = server.local_address().unwrap();

    let connection = dial(Access::Token(good.clone()), address, Plane::Client, Wanted::Anyone).await.unwrap();
    assert!(!connection.is_closed());
    let accepted = listener.accept().await.unwrap();
    assert_eq!((accepted.peer(), accepted.token()), (&Peer::Anonymous, Some(&good.id)));

    let other = Token::create(authority.fingerprint());
    let error = dial(Access::Token(other), address, Plane::Client, Wanted::Anyone).await.unwrap_err();
    assert!(matches!(&error, DialError::Refused { reason, .. } if reason.contains("used up")), "{error:?}");
}

#[tokio::test]
async fn a_token_is_never_shown_to_a_server_of_another_authority() {
    let (real, false_one) = (authority(), authority());
    let seen = Arc::new(AtomicUsize::new(0));
    let counting = seen.clone();
    let (server, _listener) = Endpoint::server(ANY_PORT, node(&false_one, 1, Some(1)), move |_: &Caller<'_>| {
        counting.fetch_add(1, Ordering::Relaxed);
        Ok(())
    })
    .unwrap();
    let token = Token::create(real.fingerprint());
    let address = server.local_address().unwrap();
    let error = dial(Access::Token(token), address, Plane::Client, Wanted::Anyone).await.unwrap_err();
    assert!(matches!(error, DialError::Stranger { stranger: Stranger::OtherAuthority, .. }), "{error:?}");
    assert_eq!(seen.load(Ordering::Relaxed), 0);
}

#[tokio::test]
async fn a_node_that_is_no_voter_cannot_stand_in_for_a_control_node() {
    let authority = authority();
    let seen = Arc::new(AtomicUsize::new(0));
    let counting = seen.clone();
    let (server, _listener) = Endpoint::server(ANY_PORT, node(&authority, 1, None), move |_: &Caller<'_>| {
        counting.fetch_add(1, Ordering::Relaxed);
        Ok(())
    })
    .unwrap();
    let address = server.local_address().unwrap();
    let agent = Access::Certificate(node(&authority, 2, None));
    let token = Access::Token(Token::create(authority.fingerprint()));
    for (access, plane) in [(agent, Plane::Agent), (token, Plane::Client)] {
        let client = Client::new(Endpoint::client(access).unwrap(), plane, vec![address]);
        let error = client.connection(Duration::from_secs(2)).await.unwrap_err();
        let ClientError::Dial(DialError::Stranger { stranger: Stranger::Other { wanted, .. }, .. }) = error else {
            panic!("{error:?}");
        };
        assert_eq!(wanted, Wanted::Control);
    }
    assert_eq!(seen.load(Ordering::Relaxed), 0, "and no token was shown");
}

#[tokio::test]
async fn the_node_that_answers_must_be_the_one_that_is_wanted() {
    let authority = authority();
    let (_server, _listener, address) = server(node(&authority, 1, Some(10)));
    let own = || Access::Certificate(node(&authority, 2, Some(20)));
    for right in [Wanted::Anyone, Wanted::Node(NodeId(1)), Wanted::Raft(10)] {
        dial(own(), address, Plane::Peer, right).await.unwrap();
    }
    for wrong in [Wanted::Node(NodeId(2)), Wanted::Raft(20)] {
        let error = dial(own(), address, Plane::Peer, wrong).await.unwrap_err();
        assert!(matches!(&error, DialError::Stranger { stranger: Stranger::Other { .. }, .. }), "{error:?}");
    }
    let text = dial(own(), address, Plane::Peer, Wanted::Raft(20)).await.unwrap_err().to_string();
    assert!(text.contains("it is node n1 (raft 10), not the voter with raft id 20"), "{text}");
}

#[tokio::test]
async fn a_renewed_certificate_is_used_at_once_and_open_connections_stay() {
    let served = served().await;
    let authority = authority();
    let (server, mut listener, address) = server(node(&authority, 1, Some(1)));
    let client = Endpoint::client(Access::Certificate(node(&authority, 2, None))).unwrap();
    let before = client.dial(address, Plane::Agent, Wanted::Anyone).await.unwrap();
    server.renew(node(&authority, 1, Some(11))).unwrap();
    client.renew(node(&authority, 3, None)).unwrap();
    let after = client.dial(address, Plane::Agent, Wanted::Anyone).await.unwrap();
    assert_eq!(before.peer(), &Peer::Node { node: NodeId(1), raft: Some(1) });
    assert_eq!(after.peer(), &Peer::Node { node: NodeId(1), raft: Some(11) });
    assert!(!before.is_closed());
    assert_eq!(listener.accept().await.unwrap().peer(), &Peer::Node { node: NodeId(2), raft: None });
    assert_eq!(listener.accept().await.unwrap().peer(), &Peer::Node { node: NodeId(3), raft: None });
    let _: u64 = served.connection.request(&Ask::Double(1), SOON).await.unwrap();
}

#[tokio::test]
async fn a_stream_carries_many_messages_and_says_when_it_ends() {
    let served = served().await;
    let mut stream = served.connection.open(&Ask::Count(1_000)).await.unwrap();
    for expect in 0..1_000 {
        assert_eq!(stream.next::<u64>().await.unwrap(), Some(expect));
    }
    assert_eq!(stream.next::<u64>().await.unwrap(), None);
    assert_eq!(stream.next::<u64>().await.unwrap(), None);
}

#[tokio::test]
async fn bytes_and_messages_go_both_ways_at_once() {
    let served = served().await;
    let Stream { mut sender, mut receiver } = served.connection.open(&Ask::Echo).await.unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| n as u8).collect();
    let sent = bytes.clone();
    let sending = tokio::spawn(async move {
        sender.send(&"before").await.unwrap();
        sender.send_bytes(&sent).await.unwrap();
        sender.send(&"after").await.unwrap();
        sender.finish().await.unwrap();
        sender
    });
    let (mut texts, mut got) = (Vec::new(), Vec::new());
    while let Some(item) = receiver.next_item::<String>().await.unwrap() {
        match item {
            Item::Message(text) => texts.push(text),
            Item::Bytes(bytes) => got.extend_from_slice(&bytes),
        }
    }
    sending.await.unwrap();
    assert_eq!(texts, ["before", "after"]);
    assert!(got == bytes);
}

#[tokio::test]
async fn dropping_a_stream_tells_the_other_side() {
    let mut served = served().await;
    let stream = served.connection.open(&Ask::Silence).await.unwrap();
    assert_eq!(timeout(SOON, served.seen.recv()).await.unwrap(), Some("began"));
    drop(stream);
    assert_eq!(timeout(SOON, served.seen.recv()).await.unwrap(), Some("closed"));
}

#[tokio::test]
async fn streams_that_rest_lose_nothing_and_leave_the_others_their_room() {
    // Together more than one connection takes unread.
    const RESTING: usize = 20;
    let mut served = served().await;
    let mut resting = Vec::new();
    for _ in 0..RESTING {
        let mut stream = served.connection.open(&Ask::Flood).await.unwrap();
        stream.may_rest();
        resting.push(stream);
    }
    for _ in 0..RESTING {
        assert_eq!(timeout(SOON, served.seen.recv()).await.expect("they hold each other up"), Some("almost full"));
    }
    let answer: u64 = served.connection.request(&Ask::Double(21), SOON).await.unwrap();
    assert_eq!(answer, 42);
    for mut stream in resting {
        let mut length = 0;
        while let Some(bytes) = stream.next_bytes().await.unwrap() {
            length += bytes.len();
        }
        assert_eq!(length, 2 * ALMOST_FULL * PIECE);
    }
}

#[tokio::test]
async fn a_deadline_ends_the_request_and_not_the_connection() {
    let mut served = served().await;
    for _ in 0..4 {
        let asked = served.connection.request::<_, u64>(&Ask::Silence, Duration::from_millis(300)).await;
        assert!(matches!(asked, Err(StreamError::Deadline(_))), "{asked:?}");
        assert_eq!(timeout(SOON, served.seen.recv()).await.unwrap(), Some("began"));
        assert_eq!(timeout(SOON, served.seen.recv()).await.unwrap(), Some("closed"));
    }
    let answer: u64 = served.connection.request(&Ask::Double(1), SOON).await.unwrap();
    assert_eq!(answer, 2, "it was slow, not deaf");
}

#[tokio::test]
async fn one_bad_stream_leaves_the_others_alone() {
    let served = served().await;
    let mut good = served.connection.open(&Ask::Echo).await.unwrap();

    let nonsense = served.connection.request::<_, u64>(&"neither of the requests", SOON).await;
    assert!(matches!(nonsense, Err(StreamError::NotUnderstood)), "{nonsense:?}");
    let panicked = served.connection.request::<_, u64>(&Ask::Panic, SOON).await;
    assert!(matches!(panicked, Err(StreamError::Panicked)), "{panicked:?}");
    let misread = served.connection.request::<_, String>(&Ask::Double(1), SOON).await;
    assert!(matches!(misread, Err(StreamError::Malformed(_))), "{misread:?}");

    good.send(&"still here").await.unwrap();
    assert_eq!(good.next::<String>().await.unwrap().as_deref(), Some("still here"));
    assert_eq!((served.accepted.fault_count(), served.connection.fault_count()), (1, 1));
}

#[tokio::test]
async fn closing_a_connection_is_told_with_its_reason() {
    let served = served().await;
    served.accepted.close("this node was removed from the cluster");
    let end = timeout(SOON, served.connection.closed()).await.unwrap();
    assert!(matches!(&end, StreamError::Refused(reason) if reason.contains("removed")), "{end:?}");
    assert!(served.connection.request::<_, u64>(&Ask::Double(1), SOON).await.is_err());
}

#[tokio::test]
async fn a_client_finds_a_node_that_answers_and_another_when_it_is_gone() {
    let authority = authority();
    let start = |number: u64| {
        let (endpoint, mut listener, address) = server(node(&authority, number, Some(number)));
        tokio::spawn(async move {
            while let Some(connection) = listener.accept().await {
                let answer = move |_: (), stream: Stream| async move { stream.answer(&number).await.unwrap() };
                tokio::spawn(async move { connection.serve(answer).await });
            }
        });
        (endpoint, address)
    };
    let nobody = std::net::UdpSocket::bind(ANY_PORT).unwrap();
    let ((first, first_address), (_second, second_address)) = (start(1), start(2));
    let endpoint = Endpoint::client(Access::Certificate(user(&authority))).unwrap();
    let addresses = vec![nobody.local_addr().unwrap(), first_address, second_address];
    let client = Client::new(endpoint, Plane::Client, addresses);

    assert_eq!(client.request::<_, u64>(&(), SOON).await.unwrap(), 1);
    first.close("shutting down").await;
    let again = async {
        loop {
            // The request that meets the end of the connection fails: it is not sent twice.
            match client.request::<_, u64>(&(), SOON).await {
                Ok(number) => break number,
                Err(ClientError::Request(_)) => {}
                Err(error) => panic!("{error:?}"),
            }
        }
    };
    assert_eq!(timeout(SOON, again).await.unwrap(), 2);
}

#[tokio::test]
async fn who_cannot_serve_now_says_why_and_is_not_taken_for_one_that_denies() {
    let authority = authority();
    let closed = |_: &Caller<'_>| Err(Rejection::Unavailable("the disk is full".to_owned()));
    let (server, _listener) = Endpoint::server(ANY_PORT, node(&authority, 1, Some(1)), closed).unwrap();
    let address = server.local_address().unwrap();
    let token = Access::Token(Token::create(authority.fingerprint()));
    for access in [token, Access::Certificate(user(&authority))] {
        let error = dial(access, address, Plane::Client, Wanted::Control).await.unwrap_err();
        assert!(matches!(&error, DialError::Unavailable { reason, .. } if reason == "the disk is full"), "{error:?}");
    }
}

#[tokio::test]
async fn a_client_reports_the_most_telling_answer_without_asking_again() {
    let authority = authority();
    let nobody = std::net::UdpSocket::bind(ANY_PORT).unwrap();
    let refuse = |_: &Caller<'_>| Err(Rejection::Denied("the token has ended".to_owned()));
    let (refusing, _listener) = Endpoint::server(ANY_PORT, node(&authority, 1, Some(1)), refuse).unwrap();
    let endpoint = Endpoint::client(Access::Certificate(user(&authority))).unwrap();
    let addresses = vec![nobody.local_addr().unwrap(), refusing.local_address().unwrap()];
    let client = Client::new(endpoint.clone(), Plane::Client, addresses);
    let forever = Duration::from_secs(3600);
    let error = timeout(SOON, client.request::<_, u64>(&(), forever)).await.unwrap().unwrap_err();
    assert!(matches!(error, ClientError::Dial(DialError::Refused { .. })), "{error:?}");
    let client = Client::new(endpoint, Plane::Client, vec![]);
    assert!(matches!(client.request::<_, u64>(&(), forever).await, Err(ClientError::NoAddress)));
}

/// Passes packets between the two that talk through it, until it is told not to.
async fn relay(to: SocketAddr) -> (SocketAddr, watch::Sender<bool>) {
    let (front, back) = (UdpSocket::bind(ANY_PORT).await.unwrap(), UdpSocket::bind(ANY_PORT).await.unwrap());
    let address = front.local_addr().unwrap();
    let (passes, passing) = watch::channel(true);
    tokio::spawn(async move {
        let (mut forth, mut returned, mut dialer) = (vec![0; 65_536], vec![0; 65_536], None);
        loop {
            tokio::select! {
                Ok((length, from)) = front.recv_from(&mut forth) => {
                    dialer = Some(from);
                    if *passing.borrow() {
                        back.send_to(&forth[..length], to).await.unwrap();
                    }
                }
                Ok((length, _)) = back.recv_from(&mut returned) => {
                    if let Some(dialer) = dialer && *passing.borrow() {
                        front.send_to(&returned[..length], dialer).await.unwrap();
                    }
                }
            }
        }
    });
    (address, passes)
}

#[tokio::test]
async fn a_connection_over_which_nothing_is_heard_is_given_up_and_a_new_one_works_at_once() {
    let authority = authority();
    let (_server, mut listener, address) = server(node(&authority, 1, Some(1)));
    let (relayed, passes) = relay(address).await;
    tokio::spawn(async move {
        while let Some(connection) = listener.accept().await {
            let answer = |number: u64, stream: Stream| async move { stream.answer(&number).await.unwrap() };
            tokio::spawn(async move { connection.serve(answer).await });
        }
    });
    let endpoint = Endpoint::client(Access::Certificate(node(&authority, 2, None))).unwrap();
    let client = Client::new(endpoint, Plane::Agent, vec![relayed]);
    assert_eq!(client.request::<_, u64>(&1u64, SOON).await.unwrap(), 1);

    let connection = client.connection(SOON).await.unwrap();
    passes.send_replace(false);
    for _ in 0..2 {
        let lost = connection.request::<_, u64>(&2u64, Duration::from_millis(200)).await;
        assert!(matches!(lost, Err(StreamError::Deadline(_))), "{lost:?}");
    }
    assert!(connection.is_closed(), "long before it would be found idle");
    passes.send_replace(true);
    assert_eq!(client.request::<_, u64>(&3u64, SOON).await.unwrap(), 3);
}

#[tokio::test]
async fn a_silent_agent_is_missed_within_its_idle_time() {
    let authority = authority();
    let (_server, mut listener, address) = server(node(&authority, 1, Some(1)));
    let (relayed, passes) = relay(address).await;
    let dialed = dial(Access::Certificate(node(&authority, 2, None)), relayed, Plane::Agent, Wanted::Anyone);
    let dialed = dialed.await.unwrap();
    let accepted = listener.accept().await.unwrap();
    passes.send_replace(false);
    // Five seconds of silence; the rest is for a slow machine.
    let (here, there) = timeout(SOON, async { tokio::join!(dialed.closed(), accepted.closed()) }).await.unwrap();
    assert!(matches!(here, StreamError::Lost(_)) && matches!(there, StreamError::Lost(_)), "{here:?} {there:?}");
}
