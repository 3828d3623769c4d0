//! The engine comes and goes, refuses a thing, or stops in the middle of a word.

use orca_agent::docker::{Docker, Notice};
use orca_cluster::id::ReplicaId;
use orca_cluster::node::{Finished, Seen};
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
    let id = run("docker", &["inspect", "--format", "{{.Id}}", &bed.container(broken)]).unwrap();
    let path = format!("/containers/{}/json", id.trim());
    // As an engine answers of a container that it had half removed when its disk was full.
    let body = format!("{{\"message\":\"RWLayer of container {} is unexpectedly nil\"}}", id.trim());
    let head = "HTTP/1.1 500 Internal Server Error\r\ncontent-type: application/json\r\n";
    let answer = format!("{head}content-length: {}\r\n\r\n{body}", body.len());
    let (docker, _relay) = bed.relayed(move |request| request.contains(&path).then(|| answer.clone()));
    let mut events = docker.events();

    let all = wait_seen(&mut events, |_| true).await;
    let Seen::All(found) = all else { panic!("{all:?}") };
    assert!(matches!(&found[..], [found] if found.replica == whole), "{found:?}");
    // That it ended is known all the same; only nothing more of it.
    run("docker", &["kill", &bed.container(broken)]).unwrap();
    let exited = wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
    assert_eq!(exited, Seen::Exited { replica: broken, code: 137, out_of_memory: false, last_lines: vec![] });
    run("docker", &["kill", &bed.container(whole)]).unwrap();
    let exited = wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
    assert!(matches!(exited, Seen::Exited { replica, code: 137, .. } if replica == whole), "{exited:?}");
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
    assert_eq!(exited, Seen::Exited { replica, code: 137, out_of_memory: false, last_lines: vec![] });
}
