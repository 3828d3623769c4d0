//! What a restart keeps, and what it refuses.

use std::sync::Arc;

use orca_cluster::state::{Role, State};
use orca_control::vault::VaultError;
use orca_control::{Config, Control, Layout, StartError, UnsealSource};
use orca_wire::Access;
use orca_wire::identity::SealingKey;
use orca_wire::message::client::{Request, Response, SetSecret};

use crate::support::{Asker, Node, config, web};

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
