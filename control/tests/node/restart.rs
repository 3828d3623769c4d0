//! What a restart keeps, and what it refuses.

use std::sync::Arc;

use orca_cluster::state::{Role, State};
use orca_control::found::FoundError;
use orca_control::vault::VaultError;
use orca_control::{Config, Control, Front, Layout, StartError, UnsealSource};
use orca_wire::endpoint::DialError;
use orca_wire::identity::{Identity, SealingKey};
use orca_wire::message::client::{Request, Response, SetSecret};
use orca_wire::stream::StreamError;
use orca_wire::{Access, Endpoint, Plane, Wanted};

use crate::support::{Asker, Node, PATIENCE, config, now, web};

#[tokio::test]
async fn a_restart_keeps_everything() {
    let node = Node::found().await;
    let mut agent = node.agent().await;
    let (_, token) = node.user(Role::Viewer, None).await;
    node.admin().await.deploy(&web("web:1")).await;
    let secret = SetSecret { name: "shop/A".parse().unwrap(), value: "a".to_owned() };
    node.admin().await.ask(Request::SetSecrets { secrets: vec![secret] }).await;
    let before = node.settled("shop/web").await;
    let goal = agent.pinned(2).await;
    // A snapshot is the state as JSON.
    let text = serde_json::to_string(&*before).unwrap();
    assert_eq!(serde_json::from_str::<State>(&text).unwrap(), *before);
    drop(agent);
    let sealing = SealingKey::load_or_create(&Layout::new(&node.data()).node()).unwrap();
    let root = node.stop().await;

    let node = Node::open(root).await.unwrap();
    assert!(node.founded.is_none(), "a cluster is founded once");
    let mut agent = node.agent().await;
    let again = agent.pinned(2).await;
    assert_eq!(again.replicas, goal.replicas);
    assert!(again.number > goal.number, "{} after {}", again.number, goal.number);
    let after = node.handle.state().borrow().clone();
    assert_eq!((&after.services, &after.tokens, &after.cluster), (&before.services, &before.tokens, &before.cluster));
    assert_eq!(after.nodes.values().next().unwrap().sealing_key, *sealing.public());
    let viewer = Asker::dial(&node, Access::Token(token)).await.unwrap();
    assert!(matches!(viewer.ask(Request::Status { service: None }).await, Response::Status(_)));
    node.stop().await;
}

#[tokio::test]
async fn another_unseal_key_is_refused_with_its_place_and_the_right_one_still_opens() {
    let root = Node::found().await.stop().await;
    let (path, kept) = (root.path().join("unseal.key"), root.path().join("kept.key"));
    std::fs::rename(&path, &kept).unwrap();
    let refused = Node::open(root.clone()).await.err().unwrap();
    assert!(matches!(refused, StartError::Vault(VaultError::UnsealKeyMissing { .. })), "{refused}");
    let config = Config { unseal: UnsealSource::Variable("ab".repeat(32).into()), ..config(root.path()) };
    let refused = Control::start(config).await.err().unwrap();
    assert!(matches!(refused, StartError::Vault(VaultError::WrongUnsealKey { .. })), "{refused}");

    orca_control::vault::UnsealKey::create(&path, &root.path().join("data")).unwrap();
    let refused = Node::open(root.clone()).await.err().unwrap().to_string();
    assert!(refused.contains(path.to_str().unwrap()), "{refused}");
    std::fs::rename(&kept, &path).unwrap();
    Node::open(root).await.unwrap().stop().await;
}

#[tokio::test]
async fn a_key_without_its_data_is_of_another_cluster_unless_a_founding_was_interrupted() {
    let root = Arc::new(tempfile::tempdir().unwrap());
    let (data, key) = (root.path().join("data"), root.path().join("unseal.key"));
    orca_control::vault::UnsealKey::create(&key, &data).unwrap();
    let refused = Control::start(config(root.path())).await.err().unwrap();
    let StartError::Found(FoundError::OlderKey { data: named, key: of }) = &refused else { panic!("{refused}") };
    assert_eq!((named, of), (&data, &key));
    assert!(!data.exists(), "refused before anything was made");

    // What a founding leaves that ended right after it made the key.
    std::fs::create_dir_all(Layout::new(&data).founding()).unwrap();
    let node = Node::open(root).await.unwrap();
    assert!(node.founded.as_ref().is_some_and(|founded| founded.unseal_key.is_none()), "with the key that was there");
    node.stop().await;
}

#[tokio::test]
async fn what_cannot_be_opened_is_told_behind_ports_that_stay() {
    let root = Node::found().await.stop().await;
    let (key, kept) = (root.path().join("unseal.key"), root.path().join("kept.key"));
    std::fs::rename(&key, &kept).unwrap();
    let config = config(root.path());
    let front = Front::open(&config).await.unwrap();
    let refused = Control::open(&config, &front).await.err().unwrap();
    assert!(!refused.is_wrong_key(), "{refused}");
    front.say(refused.to_string());
    let dial = async || {
        let identity = Identity::load(&Layout::new(&config.data_dir).admin(), None, now()).unwrap();
        let endpoint = Endpoint::client(Access::Certificate(identity)).unwrap();
        endpoint.dial(front.quic_address(), Plane::Client, Wanted::Control).await
    };
    let told = dial().await.unwrap_err();
    assert!(matches!(&told, DialError::Unavailable { reason, .. } if *reason == refused.to_string()), "{told}");

    std::fs::rename(&kept, &key).unwrap();
    let (control, handle) = Control::open(&config, &front).await.unwrap();
    let running = tokio::spawn(control.run());
    let connection = dial().await.unwrap();
    let answer: Response = connection.request(&Request::Whoami, PATIENCE).await.unwrap();
    assert!(matches!(answer, Response::Whoami { .. }), "{answer:?}");
    handle.shutdown();
    running.await.unwrap().unwrap();
    let gone = connection.closed().await;
    assert!(matches!(&gone, StreamError::Refused(why) if why == "the control node stops"), "{gone:?}");
}

#[tokio::test]
async fn addresses_that_cannot_be_used_are_named() {
    let root = Arc::new(tempfile::tempdir().unwrap());
    let public = Config { listen_http: "0.0.0.0:0".parse().unwrap(), ..config(root.path()) };
    let refused = Control::start(public).await.err().unwrap().to_string();
    assert!(refused.contains("0.0.0.0") && refused.contains("loopback"), "{refused}");
    assert!(!root.path().join("data").exists(), "refused before anything was made");

    let node = Node::open(root.clone()).await.unwrap();
    let other = Arc::new(tempfile::tempdir().unwrap());
    let taken = Config { listen_http: node.handle.http_address(), ..config(other.path()) };
    let refused = Control::start(taken).await.err().unwrap().to_string();
    assert!(refused.contains(&node.handle.http_address().to_string()), "{refused}");
    let taken = Config { listen_quic: node.handle.quic_address(), ..config(other.path()) };
    let refused = Control::start(taken).await.err().unwrap().to_string();
    assert!(refused.contains(&node.handle.quic_address().to_string()), "{refused}");
    let refused = Node::open(root).await.err().unwrap().to_string();
    assert!(refused.contains("in use"), "{refused}");
    node.stop().await;
}
