//! Three nodes, each with its own store, in one process.

use std::collections::BTreeSet;
use std::time::Duration;

use orca_cluster::state::State;
use orca_control::raft::codec::{self, Ask, Ballot, LogId, Request, Response, Vote};
use orca_control::raft::{ProposeError, Raft, RaftConfig, RaftId, ReadError};
use tempfile::TempDir;

use crate::support::{Cable, PATIENCE, Switch, entry, leads, member, texts, until};

const SNAPSHOT_EVERY: u64 = 25;

struct Cluster {
    switch: Switch,
    dirs: Vec<TempDir>,
    nodes: Vec<Raft>,
}

impl Cluster {
    async fn start_node(switch: &Switch, id: u64, dir: &TempDir) -> Raft {
        let config = RaftConfig { snapshot_every: SNAPSHOT_EVERY, ..RaftConfig::new(RaftId(id), "test", dir.path()) };
        let node = Raft::start(config, Cable { from: RaftId(id), switch: switch.clone() }).await.unwrap();
        switch.plug(node.clone());
        node
    }

    /// The first founds it, and takes the others in as learners and then as voters.
    async fn found() -> Cluster {
        let switch = Switch::default();
        let dirs: Vec<TempDir> = (0..3).map(|_| tempfile::tempdir().unwrap()).collect();
        let mut nodes = Vec::new();
        for (id, dir) in (1..).zip(&dirs) {
            nodes.push(Cluster::start_node(&switch, id, dir).await);
        }
        nodes[0].initialise(member(1)).await.unwrap();
        for id in [2, 3] {
            nodes[0].add_learner(member(id)).await.unwrap();
        }
        nodes[0].set_voters(BTreeSet::from([RaftId(1), RaftId(2), RaftId(3)])).await.unwrap();
        Cluster { switch, dirs, nodes }
    }

    /// Whoever leads, other than these.
    async fn leader(&self, except: &[RaftId]) -> Raft {
        let others = self.nodes.iter().filter(|node| !except.contains(&node.id()));
        let led = others.map(|node| {
            Box::pin(async move {
                leads(node).await;
                node.clone()
            })
        });
        futures_util::future::select_all(led).await.0
    }

    async fn shutdown(self) {
        for node in &self.nodes {
            self.switch.unplug(node.id());
        }
        futures_util::future::join_all(self.nodes.iter().map(Raft::shutdown)).await;
    }
}

/// Proposes as a client would: wherever the leader is, and again if nothing can have happened.
async fn propose(cluster: &Cluster, except: &[RaftId], text: &str) {
    let proposed = async {
        loop {
            match cluster.leader(except).await.propose(entry(text)).await {
                Ok(_) => return,
                Err(ProposeError::NotLeader { .. } | ProposeError::NoQuorum) => tokio::task::yield_now().await,
                Err(error) => panic!("{text}: {error}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, proposed).await.expect("somebody leads in time");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_leader_is_replaced_and_nothing_acknowledged_is_lost() {
    let mut cluster = Cluster::found().await;
    for n in 0..10 {
        propose(&cluster, &[], &format!("before {n}")).await;
    }
    let old = cluster.leader(&[]).await;
    let place = cluster.nodes.iter().position(|node| node.id() == old.id()).unwrap();

    // Cut first, so that it cannot hand over: for the others it has died.
    cluster.switch.cut(old.id());
    cluster.switch.unplug(old.id());
    propose(&cluster, &[old.id()], "after").await;
    let new = cluster.leader(&[old.id()]).await;
    assert_ne!(new.id(), old.id());
    let mut expected: Vec<String> = (0..10).map(|n| format!("before {n}")).collect();
    expected.push("after".into());
    assert_eq!(texts(&new.read().await.unwrap()), expected);

    // The dead one comes back from its own disk, and catches up.
    old.shutdown().await;
    cluster.switch.heal(old.id());
    cluster.nodes[place] = Cluster::start_node(&cluster.switch, old.id().0, &cluster.dirs[place]).await;
    until(&cluster.nodes[place], "what it missed", |state| texts(state) == expected).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_too_far_behind_gets_a_snapshot() {
    let cluster = Cluster::found().await;
    let leader = cluster.leader(&[]).await;
    let lagging = cluster.nodes.iter().find(|node| node.id() != leader.id()).unwrap();
    cluster.switch.cut(lagging.id());
    let carried = cluster.switch.snapshots();
    let last = lagging.metrics().last_index;
    let mut count = 0;
    // Until what it would need next is gone.
    while leader.metrics().purged_index <= last {
        leader.propose(entry(format!("change {count}"))).await.unwrap();
        count += 1;
        assert!(count < 2_000, "the log was never cut: {:?}", leader.metrics());
    }
    cluster.switch.heal(lagging.id());
    let expected = leader.state();
    until(lagging, "everything", |state| *state == *expected).await;
    assert!(cluster.switch.snapshots() > carried, "it caught up without a snapshot");
    // And goes on by the log.
    leader.propose(entry("one more")).await.unwrap();
    until(lagging, "one more", |state| texts(state).last().is_some_and(|text| text == "one more")).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_without_a_majority_says_so_and_is_leader_no_more() {
    let cluster = Cluster::found().await;
    let old = cluster.leader(&[]).await;
    cluster.switch.cut(old.id());
    let refused = old.read().await.unwrap_err();
    assert!(matches!(refused, ReadError::NoQuorum | ReadError::NotLeader { .. }), "{refused}");
    let mut leadership = old.leadership();
    tokio::time::timeout(PATIENCE, leadership.wait_for(Option::is_none)).await.unwrap().unwrap();
    let refused = old.propose(entry("lost")).await.unwrap_err();
    assert!(
        matches!(refused, ProposeError::NoQuorum | ProposeError::NotLeader { .. } | ProposeError::Unknown(_)),
        "{refused}"
    );

    // The others go on, in a later term, and what was never acknowledged does not come back.
    propose(&cluster, &[old.id()], "kept").await;
    cluster.switch.heal(old.id());
    until(&old, "what the others agreed on", |state| texts(state) == ["kept"]).await;
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leadership_is_handed_over_without_an_election_timeout() {
    let cluster = Cluster::found().await;
    propose(&cluster, &[], "one").await;
    let old = cluster.leader(&[]).await;
    let term = old.leadership().borrow().unwrap();
    assert!(old.transfer_leader().await.unwrap());
    let new = cluster.leader(&[old.id()]).await;
    assert!(new.leadership().borrow().unwrap() > term);
    propose(&cluster, &[old.id()], "two").await;
    assert_eq!(texts(&new.state()), ["one", "two"]);
    cluster.shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_removed_voter_is_out_and_the_rest_goes_on() {
    let cluster = Cluster::found().await;
    let leader = cluster.leader(&[]).await;
    let removed = cluster.nodes.iter().find(|node| node.id() != leader.id()).unwrap();
    let rest: BTreeSet<RaftId> = cluster.nodes.iter().map(Raft::id).filter(|id| *id != removed.id()).collect();
    leader.set_voters(rest.clone()).await.unwrap();
    assert_eq!(leader.metrics().voters, rest);
    assert_eq!(leader.members().iter().map(|member| member.id).collect::<BTreeSet<_>>(), rest);
    cluster.switch.cut(removed.id());
    propose(&cluster, &[removed.id()], "without it").await;
    cluster.shutdown().await;
}

#[tokio::test]
async fn a_peer_that_lies_about_who_it_is_or_speaks_nonsense_is_refused() {
    let cluster = Cluster::found().await;
    let before = cluster.nodes[1].metrics();
    let ballot = |node| {
        let vote = Vote { term: before.term.0 + 100, node, committed: false };
        Ask::Vote(Ballot { vote, last: Some(LogId { term: 999, index: 999 }), transfer: true })
    };
    let request = |to, node| codec::encode(&Request::<State> { to, ask: ballot(node) });
    let cases = [
        (Vec::new(), "too few"),
        (b"nonsense that is long enough for a header".to_vec(), "checksum"),
        (request(RaftId(2), RaftId(1)), "control node 3 spoke in the name of control node 1"),
        (request(RaftId(9), RaftId(3)), "this is control node 2, not control node 9"),
    ];
    for (request, why) in cases {
        let answer = cluster.nodes[1].handle(RaftId(3), request.into()).await;
        let Response::Refused(refused) = codec::decode(&answer).unwrap() else { panic!("{why}: {answer:?}") };
        assert!(refused.contains(why), "{refused}");
    }
    let after = cluster.nodes[1].metrics();
    assert_eq!((before.term, before.voters), (after.term, after.voters));
    tokio::time::timeout(Duration::from_secs(30), cluster.shutdown()).await.unwrap();
}
