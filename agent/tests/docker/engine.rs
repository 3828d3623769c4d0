//! The engine comes and goes.

use std::path::Path;

use orca_agent::docker::{Docker, Notice};
use orca_cluster::id::ReplicaId;
use orca_cluster::node::{Finished, Seen};
use orca_cluster::replica::{Cause, Engine};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinSet;

use super::bed::{Bed, open, run, wait, wait_seen};

/// Passes connections on to the real socket until it is dropped; then they all break.
struct Relay {
    connections: tokio::task::JoinHandle<()>,
}

impl Relay {
    fn start(at: &Path, to: &Path) -> Relay {
        let _ = std::fs::remove_file(at);
        let listener = UnixListener::bind(at).unwrap();
        let to = to.to_owned();
        let connections = tokio::spawn(async move {
            let mut passing = JoinSet::new();
            loop {
                let (mut near, _) = listener.accept().await.unwrap();
                let mut far = UnixStream::connect(&to).await.unwrap();
                passing.spawn(async move { drop(tokio::io::copy_bidirectional(&mut near, &mut far).await) });
            }
        });
        Relay { connections }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.connections.abort();
    }
}

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

    let relay = Relay::start(&config.socket, &bed.config.socket);
    assert!(matches!(wait(&mut events, engine).await, Engine::Ready { version } if !version.is_empty()));
    assert_eq!(wait_seen(&mut events, |_| true).await, Seen::All(vec![]));
    let replica = ReplicaId(1);
    bed.up(replica, &bed.goal()).await;
    wait_seen(&mut events, |seen| matches!(seen, Seen::Running { .. })).await;

    drop(relay);
    assert!(matches!(wait(&mut events, engine).await, Engine::Unreachable { .. }));
    run("docker", &["kill", &bed.container(replica)]).unwrap();
    let _relay = Relay::start(&config.socket, &bed.config.socket);
    let all = wait_seen(&mut events, |_| true).await;
    let Seen::All(found) = all else { panic!("{all:?}") };
    assert!(matches!(&found[..], [found] if found.replica == replica));
}
