//! Where secrets go, and where they do not.

use orca_cluster::id::NodeId;
use orca_cluster::secret::SecretName;
use orca_control::Layout;
use orca_wire::identity::{SealingKey, goal_context};
use orca_wire::message::client::{Reason, Request, Response, SetSecret};

use crate::support::{Node, PATIENCE, files, http, written};

const CANARY: &str = "ORCA-CANARY-5b1f";

fn set(name: &str, value: &str) -> Request {
    Request::SetSecrets { secrets: vec![SetSecret { name: name.parse().unwrap(), value: value.to_owned() }] }
}

const SERVICE: &str = "[[service]]\nname = \"web\"\nimage = \"web:1\"\n[service.env]\nKEY = \"${secrets.KEY}\"\n";

#[tokio::test]
async fn a_secret_is_opened_by_its_node_and_found_nowhere_else() {
    let node = Node::found().await;
    let mut agent = node.agent().await;
    let admin = node.admin().await;
    assert!(matches!(admin.ask(set("shop/KEY", CANARY)).await, Response::Done { .. }));
    admin.deploy(SERVICE).await;
    node.settled("shop/web").await;

    let name: SecretName = "shop/KEY".parse().unwrap();
    let goal = agent.until("the secret", |goal| goal.secrets.contains_key(&name)).await;
    let key = SealingKey::load_or_create(&Layout::new(&node.data()).node()).unwrap();
    let (id, _) = node.handle.state().borrow().nodes.first_key_value().map(|(id, node)| (*id, node.clone())).unwrap();
    assert_eq!(id, NodeId(2), "the founder's id is the index of the entry that founded");
    let context = goal_context(node.handle.cluster(), id, &name);
    let opened = key.open(context.as_bytes(), &goal.secrets[&name]).unwrap();
    assert_eq!(opened.as_slice(), CANARY.as_bytes());

    // Everything that says something about it.
    let token = node.token();
    let mut said = serde_json::to_string(&*node.handle.state().borrow().clone()).unwrap();
    said.push_str(&serde_json::to_string(&goal).unwrap());
    for path in [
        "status",
        "services/shop/web",
        "services/shop/web/why",
        "services/shop/web/history",
        "secrets",
        "events",
        "doctor",
        "tokens",
    ] {
        let answered = http(&node, Some(&token), "GET", &format!("/api/v1/{path}"), "").await;
        assert_eq!(answered.status, 200, "{path}: {}", answered.body);
        said.push_str(&answered.body);
    }
    let Response::Secrets { secrets } = admin.ask(Request::ListSecrets { project: None }).await else { panic!("none") };
    assert_eq!(secrets[0].used_by.len(), 1);
    said.push_str(&format!("{secrets:?}"));
    let root = node.stop().await;
    for form in [CANARY.to_owned(), base64(CANARY)] {
        assert!(!said.contains(&form));
        for (path, bytes) in files(&root.path().join("data")) {
            let found = bytes.windows(form.len()).any(|part| part == form.as_bytes());
            assert!(!found, "{} holds the secret", path.display());
        }
    }
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD_NO_PAD.encode(text)
}

#[tokio::test]
async fn rotation_changes_the_keys_and_not_the_values_and_restarts_nothing() {
    let node = Node::found().await;
    let mut agent = node.agent().await;
    let admin = node.admin().await;
    admin.ask(set("shop/KEY", "one")).await;
    admin.ask(set("shop/KEY", "two")).await;
    admin.deploy(SERVICE).await;
    node.settled("shop/web").await;
    let before = agent.pinned(1).await.replicas;

    let project = Some("shop".parse().unwrap());
    let rotated = admin.ask(Request::RotateSecrets { project }).await;
    assert!(matches!(rotated, Response::Done { .. }), "{rotated:?}");
    let state = node.handle.state().borrow().clone();
    let name: SecretName = "shop/KEY".parse().unwrap();
    assert_eq!((state.secrets[&name].version, state.secrets[&name].value.key.version), (2, 2));
    let keys: Vec<String> = state.data_keys.keys().map(ToString::to_string).collect();
    assert_eq!(keys, ["@cluster.1", "shop.2"], "the old key is gone");
    let told: Vec<&str> = state.events.iter().rev().take(2).map(|event| event.text.as_str()).collect();
    assert_eq!(
        told,
        ["1 secrets of shop sealed anew by data key 2", "data key 2 of shop made, to seal its secrets anew"]
    );
    assert!(state.events.iter().any(|event| event.text == "data key 1 of shop made, for new values"));

    // A change elsewhere makes a new goal, in which the value is still what it was.
    admin.deploy("[[service]]\nname = \"other\"\nimage = \"web:1\"\n[service.env]\nKEY = \"${secrets.KEY}\"\n").await;
    let goal = agent.until("the other service", |goal| goal.replicas.len() == 2).await;
    assert!(before.iter().all(|(id, replica)| goal.replicas.get(id) == Some(replica)));
    let key = SealingKey::load_or_create(&Layout::new(&node.data()).node()).unwrap();
    let context = goal_context(node.handle.cluster(), NodeId(2), &name);
    assert_eq!(key.open(context.as_bytes(), &goal.secrets[&name]).unwrap().as_slice(), b"two");
    node.stop().await;
}

#[tokio::test]
async fn a_rotation_in_several_steps_leaves_every_value_what_it_was() {
    let node = Node::found().await;
    let mut agent = node.agent().await;
    let admin = node.admin().await;
    let value = |at: usize| format!("{at}{}", ".".repeat(60 << 10));
    for at in 0..6 {
        admin.ask(set(&format!("shop/S{at}"), &value(at))).await;
    }
    let before = node.handle.state().borrow().generation;
    let rotated = admin.ask(Request::RotateSecrets { project: Some("shop".parse().unwrap()) }).await;
    let Response::Done { generation } = rotated else { panic!("{rotated:?}") };
    assert_eq!(generation.0 - before.0, 4, "a key, two times some values, the end");
    let env: String = (0..6).map(|at| format!("S{at} = \"${{secrets.S{at}}}\"\n")).collect();
    admin.deploy(&format!("[[service]]\nname = \"web\"\nimage = \"web:1\"\n[service.env]\n{env}")).await;
    let goal = agent.until("the secrets", |goal| goal.secrets.len() == 6).await;
    let key = SealingKey::load_or_create(&Layout::new(&node.data()).node()).unwrap();
    for at in 0..6 {
        let name: SecretName = format!("shop/S{at}").parse().unwrap();
        let context = goal_context(node.handle.cluster(), NodeId(2), &name);
        let opened = key.open(context.as_bytes(), &goal.secrets[&name]).unwrap();
        assert!(opened.as_slice() == value(at).as_bytes(), "{name}");
    }
    node.stop().await;
}

#[tokio::test]
async fn more_than_a_goal_can_hold_is_refused_with_what_to_do() {
    let node = Node::found().await;
    let admin = node.admin().await;
    let large = |at: usize| SetSecret { name: format!("shop/S{at}").parse().unwrap(), value: "x".repeat(64 << 10) };
    let Response::Refused(refused) = admin.ask(Request::SetSecrets { secrets: (0..40).map(large).collect() }).await
    else {
        panic!("forty were taken");
    };
    assert_eq!(refused.reason, Reason::Invalid);
    assert!(refused.message.contains("of project shop would be") && refused.message.contains("orca secrets rm"));
    assert_eq!(node.handle.state().borrow().secrets.len(), 31, "those that fit are set");

    let values: String = (0..30).map(|at| format!("V{at} = \"{}\"\n", "x".repeat(4_000))).collect();
    let text = format!("[[service]]\nname = \"web\"\nimage = \"web:1\"\nreplicas = 100\n[service.env]\n{values}");
    for request in [Request::Plan(written(&text)), Request::Deploy(written(&text))] {
        let Response::Refused(refused) = admin.ask(request).await else { panic!("it was accepted") };
        assert!(refused.message.contains("use fewer replicas"), "{}", refused.message);
    }
    assert!(node.handle.state().borrow().services.is_empty());
    node.stop().await;
}

#[tokio::test]
async fn secrets_set_at_the_same_time_all_get_their_version() {
    let node = Node::found().await;
    let admin = node.admin().await;
    let sets = (0..4).map(|value| admin.ask(set("A", &value.to_string())));
    let answers = tokio::time::timeout(PATIENCE, futures_util::future::join_all(sets)).await.unwrap();
    assert!(answers.iter().all(|answer| matches!(answer, Response::Done { .. })), "{answers:?}");
    let state = node.handle.state().borrow().clone();
    assert_eq!(state.secrets[&"A".parse().unwrap()].version, 4);
    assert_eq!(state.data_keys.len(), 2, "one for the cluster, one for global secrets");
    node.stop().await;
}
