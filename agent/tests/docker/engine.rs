//! The engine comes and goes, refuses a thing, or stops in the middle of a word.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use orca_agent::docker::{Docker, Notice};
use orca_cluster::id::ReplicaId;
use orca_cluster::node::{Condition, Exited, Finished, Found, Seen};
use orca_cluster::replica::{Cause, Engine};
use tokio::net::UnixListener;

use super::bed::{Bed, Relay, open, run, wait, wait_seen};

#[tokio::test]
async fn without_an_engine_everything_says_what_to_do() {
    requires_docker!();
    let bed = Bed::new("none");
    let place = tempfile::tempdir().unwrap();
    let mut config = bed.config.clone();
    config.socket = place.path().join("docker.sock");
    let docker = Docker::new(config);
    let reason = |engine: Engine| match engine {
        Engine::Unreachable { reason } => reason,
        other => panic!("{other:?}"),
    };
    assert!(reason(docker.engine().await).contains("apt-get install docker.io"));
    let failed = docker.fetch(&bed.goal(), &open, |_| {}).await;
    assert!(matches!(failed, Finished::Failed(Cause::NoEngine { .. })), "{failed:?}");
    // A socket nobody listens on any more.
    drop(UnixListener::bind(place.path().join("docker.sock")).unwrap());
    assert!(reason(docker.engine().await).contains("systemctl start docker"));
}

#[tokio::test]
async fn after_every_gap_everything_is_listed() {
    requires_docker!();
    let bed = Bed::new("gap");
    let place = tempfile::tempdir().unwrap();
    let mut config = bed.config.clone();
    config.socket = place.path().join("docker.sock");
    let docker = Docker::new(config.clone());
    let mut events = docker.events();
    let engine = |notice| match notice {
        Notice::Engine(engine) => Some(engine),
        Notice::Seen(_) => None,
    };
    assert!(matches!(wait(&mut events, engine).await, Engine::Unreachable { .. }));

    let relay = Relay::start(&config.socket, &bed.config.socket, |_| None);
    assert!(matches!(wait(&mut events, engine).await, Engine::Ready { version } if !version.is_empty()));
    assert_eq!(wait_seen(&mut events, |_| true).await, Seen::All(vec![]));
    let replica = ReplicaId(1);
    bed.up(replica, &bed.goal()).await;
    wait_seen(&mut events, |seen| matches!(seen, Seen::Running { .. })).await;

    drop(relay);
    assert!(matches!(wait(&mut events, engine).await, Engine::Unreachable { .. }));
    run("docker", &["kill", &bed.container(replica)]).unwrap();
    let _relay = Relay::start(&config.socket, &bed.config.socket, |_| None);
    let all = wait_seen(&mut events, |_| true).await;
    let Seen::All(found) = all else { panic!("{all:?}") };
    assert!(matches!(&found[..], [found] if found.replica == replica));
}

#[tokio::test]
async fn a_container_that_cannot_be_looked_into_hides_no_other() {
    requires_docker!();
    let bed = Bed::new("unreadable");
    let (broken, whole) = (ReplicaId(1), ReplicaId(2));
    for replica in [broken, whole] {
        bed.up(replica, &bed.goal()).await;
    }
    let (path, answer) = unreadable(&bed, broken);
    let (docker, _relay) = bed.relayed(move |request| request.contains(&path).then(|| answer.clone()));
    let mut events = docker.events();

    let all = wait_seen(&mut events, |_| true).await;
    let Seen::All(mut found) = all else { panic!("{all:?}") };
    found.sort_by_key(|found| found.replica);
    let [first, second] = &found[..] else { panic!("{found:?}") };
    assert_eq!((first.replica, &first.service), (broken, &bed.goal().service));
    let Condition::Unreadable { container, reason } = &first.condition else { panic!("{first:?}") };
    assert!(reason.contains("unexpectedly nil") && reason.contains(container.as_str()), "{reason}");
    assert_eq!(second.replica, whole);
    assert!(matches!(second.condition, Condition::Running { .. }), "{second:?}");
    // That it ended is known all the same; only nothing more of it.
    run("docker", &["kill", &bed.container(broken)]).unwrap();
    let exited = wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
    assert_eq!(exited, Seen::Exited { replica: broken, exited: killed() });
    run("docker", &["kill", &bed.container(whole)]).unwrap();
    let exited = wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
    let Seen::Exited { replica, exited } = exited else { panic!("{exited:?}") };
    assert_eq!((replica, exited.code), (whole, 137));
}

#[tokio::test]
async fn what_could_not_be_looked_into_is_told_as_soon_as_it_can() {
    requires_docker!();
    let bed = Bed::new("momentary");
    let replica = ReplicaId(1);
    let address = bed.up(replica, &bed.goal()).await;
    let (path, answer) = unreadable(&bed, replica);
    let fails = Arc::new(AtomicBool::new(true));
    let failing = Arc::clone(&fails);
    // Each time once: the next question is answered.
    let (docker, _relay) = bed.relayed(move |request| {
        let fails = request.contains(&path) && failing.swap(false, Ordering::SeqCst);
        fails.then(|| answer.clone())
    });
    let mut events = docker.events();
    let Seen::All(found) = wait_seen(&mut events, |_| true).await else { panic!("the list comes first") };
    assert!(matches!(&found[..], [Found { condition: Condition::Unreadable { .. }, .. }]), "{found:?}");
    let is_it = |seen: &Seen| match seen {
        // Its start, if that was a moment ago only.
        Seen::Found(Found { condition: Condition::Running { address: at, .. }, .. })
        | Seen::Running { address: at, .. } => *at == Some(address),
        _ => false,
    };
    wait_seen(&mut events, is_it).await;

    // Nor is a start lost that somebody else made.
    run("docker", &["stop", "--time", "0", &bed.container(replica)]).unwrap();
    wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
    fails.store(true, Ordering::SeqCst);
    run("docker", &["start", &bed.container(replica)]).unwrap();
    let again = wait_seen(&mut events, |_| true).await;
    assert!(matches!(again, Seen::Found(Found { condition: Condition::Running { .. }, .. })), "{again:?}");
}

/// What was ended by SIGKILL and has written nothing.
fn killed() -> Exited {
    Exited { code: 137, ..Exited::default() }
}

/// What is asked to look into this replica's container, and how an engine answers of one that it had half removed when
/// its disk was full.
fn unreadable(bed: &Bed, replica: ReplicaId) -> (String, String) {
    let id = run("docker", &["inspect", "--format", "{{.Id}}", &bed.container(replica)]).unwrap();
    let body = format!("{{\"message\":\"RWLayer of container {} is unexpectedly nil\"}}", id.trim());
    let head = "HTTP/1.1 500 Internal Server Error\r\ncontent-type: application/json\r\n";
    let answer = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    (format!("/containers/{}/json", id.trim()), answer)
}

#[tokio::test]
async fn an_exit_is_told_also_when_the_engine_never_ends_its_last_lines() {
    requires_docker!();
    let bed = Bed::new("stalled");
    let replica = ReplicaId(1);
    bed.up(replica, &bed.goal()).await;
    let (asked, mut was_asked) = tokio::sync::watch::channel(false);
    let (docker, _relay) = bed.relayed(move |request| {
        request.contains("/logs?").then(|| {
            asked.send_replace(true);
            "HTTP/1.1 200 OK\r\ncontent-type: application/octet-stream\r\ntransfer-encoding: chunked\r\n\r\n".to_owned()
        })
    });
    let mut events = docker.events();
    wait_seen(&mut events, |seen| matches!(seen, Seen::All(_))).await;
    run("docker", &["kill", &bed.container(replica)]).unwrap();
    was_asked.wait_for(|asked| *asked).await.unwrap();
    // From here on nothing but time passes, and that at once.
    tokio::time::pause();
    let exited = wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
    assert_eq!(exited, Seen::Exited { replica, exited: killed() });
}
