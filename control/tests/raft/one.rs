//! A cluster of one.

use orca_cluster::command::Applied;
use orca_cluster::state::State;
use orca_control::raft::{InitialiseError, ProposeError, Raft, RaftConfig, RaftId, StartError};
use orca_control::store::{FILE_NAME, OpenError};
use std::os::unix::fs::PermissionsExt;

use crate::support::{NoPeers, entry, found_alone, leads, member, start_alone, texts};

#[tokio::test]
async fn a_proposal_is_applied_and_survives_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let raft = found_alone(dir.path()).await;
    let first = raft.propose(entry("first")).await.unwrap();
    // Before it are only the membership and a new leader's blank: no entry of ours is ever at 0 or 1.
    assert_eq!(first.index, 2);
    let second = raft.propose(entry("second")).await.unwrap();
    assert_eq!(second.index, first.index + 1);

    // The same entries at the same indexes give the same state, by hand.
    let mut expected = State::default();
    let applied: Vec<Applied> =
        [(first.index, "first"), (second.index, "second")].map(|(at, text)| expected.apply(at, entry(text))).into();
    assert_eq!([first.applied, second.applied].as_slice(), applied);
    assert_eq!(*raft.state(), expected);
    assert_eq!(*raft.read().await.unwrap(), expected);
    raft.shutdown().await;

    let raft = start_alone(dir.path()).await;
    leads(&raft).await;
    assert_eq!(*raft.read().await.unwrap(), expected);
    let third = raft.propose(entry("third")).await.unwrap();
    assert!(third.index > second.index);
    assert_eq!(texts(&raft.state()), ["first", "second", "third"]);
    raft.shutdown().await;
}

#[tokio::test]
async fn the_log_is_cut_behind_a_snapshot_and_nothing_is_missing_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    let config = || RaftConfig { snapshot_every: 20, ..RaftConfig::new(RaftId(1), "test", dir.path()) };
    let raft = Raft::start(config(), NoPeers).await.unwrap();
    raft.initialise(member(1)).await.unwrap();
    let mut expected = Vec::new();
    // Until the log has been cut, and then on, so that there are entries behind the snapshot too.
    let mut after = 0;
    while after < 5 {
        let text = format!("change {}", expected.len());
        raft.propose(entry(&text)).await.unwrap();
        expected.push(text);
        assert!(expected.len() < 2_000, "the log was never cut: {:?}", raft.metrics());
        after += usize::from(raft.metrics().purged_index.is_some());
    }
    let before = raft.read().await.unwrap();
    raft.shutdown().await;

    let raft = Raft::start(config(), NoPeers).await.unwrap();
    leads(&raft).await;
    assert_eq!(texts(&raft.read().await.unwrap()), expected);
    assert_eq!(*raft.state(), *before);
    assert!(raft.metrics().purged_index.is_some());
    raft.shutdown().await;
}

#[tokio::test]
async fn many_proposals_at_once_are_all_answered_with_different_indexes() {
    let dir = tempfile::tempdir().unwrap();
    let raft = found_alone(dir.path()).await;
    let proposals = (0..200).map(|n| {
        let raft = raft.clone();
        async move { raft.propose(entry(n.to_string())).await.unwrap().index }
    });
    let indexes = futures_util::future::join_all(proposals).await;
    let distinct: std::collections::BTreeSet<_> = indexes.iter().collect();
    assert_eq!(distinct.len(), 200);
    assert_eq!(raft.state().events.len(), 200);
    raft.shutdown().await;
}

#[tokio::test]
async fn a_node_without_a_cluster_refuses_proposals() {
    let dir = tempfile::tempdir().unwrap();
    let raft = start_alone(dir.path()).await;
    let refused = raft.propose(entry("too early")).await.unwrap_err();
    assert!(matches!(refused, ProposeError::NotLeader { leader: None }), "{refused}");
    assert_eq!(*raft.leadership().borrow(), None);
    raft.shutdown().await;
}

#[tokio::test]
async fn a_cluster_is_founded_once() {
    let dir = tempfile::tempdir().unwrap();
    let raft = found_alone(dir.path()).await;
    let refused = raft.initialise(member(1)).await.unwrap_err();
    assert!(matches!(refused, InitialiseError::NotEmpty), "{refused}");
    raft.shutdown().await;
}

#[tokio::test]
async fn a_store_is_for_one_process_one_node_and_one_cluster() {
    let dir = tempfile::tempdir().unwrap();
    let raft = found_alone(dir.path()).await;
    let file = dir.path().join(FILE_NAME);
    assert_eq!(file.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    let start = |id, cluster: &str| Raft::start(RaftConfig::new(RaftId(id), cluster, dir.path()), NoPeers);
    let refused = start(1, "test").await.unwrap_err();
    assert!(matches!(&refused, StartError::Store(OpenError::InUse { path }) if *path == file), "{refused}");
    raft.shutdown().await;

    let refused = start(2, "test").await.unwrap_err();
    assert!(matches!(refused, StartError::Foreign { .. }), "{refused}");
    let refused = start(1, "other").await.unwrap_err();
    assert!(matches!(refused, StartError::Foreign { .. }), "{refused}");
}

#[tokio::test]
async fn an_entry_too_large_is_refused_before_it_is_proposed() {
    let dir = tempfile::tempdir().unwrap();
    let raft = found_alone(dir.path()).await;
    let refused = raft.propose(entry("x".repeat(5 << 20))).await.unwrap_err();
    assert!(matches!(refused, ProposeError::TooLarge { .. }), "{refused}");
    raft.propose(entry("small")).await.unwrap();
    raft.shutdown().await;
}
