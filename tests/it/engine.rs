//! The Docker engine breaks under the server: what runs is served all the while, and when the engine is back all is as
//! it should be without a person.

use crate::support::{Engine, Load, Node, PATIENCE, Rates, Setup, container, requires_docker, wait_until};

fn node_with(engine: &Engine) -> Node {
    Node::with(Setup { env: vec![("DOCKER_HOST".to_owned(), engine.host())], ..Setup::default() })
}

fn is_ready(node: &Node, replicas: u64) -> bool {
    let status = node.status("web");
    status["state"] == "running" && status["ready"] == replicas
}

/// Waits until `orca why` says this, and shows what it said last if it never does.
#[track_caller]
fn wait_for_why(node: &Node, words: &str) {
    let mut last = String::new();
    let said = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        wait_until(&format!("{words:?} from `orca why`"), PATIENCE, || {
            last = node.orca(&["why", &node.name("web")]).stdout;
            last.contains(words)
        })
    }));
    assert!(said.is_ok(), "{last}");
}

fn running(engine: &Engine) -> Vec<String> {
    let mut ids: Vec<String> = engine.docker(&["ps", "--quiet", "--no-trunc"]).lines().map(str::to_owned).collect();
    ids.sort();
    ids
}

#[test]
fn an_engine_that_is_killed_and_comes_back_costs_no_request_and_no_container() {
    requires_docker!();
    let mut engine = Engine::start(true);
    let node = node_with(&engine);
    node.deploy(&container("web", "1", "replicas = 2")).succeeded();
    let before = running(&engine);
    assert_eq!(before.len(), 2);
    let load = Load::start(node.target("web"), Rates::default());
    load.go_on(200);
    engine.kill9();
    load.go_on(1_000);
    wait_for_why(&node, "Docker on n1 does not answer");
    engine.boot();
    load.go_on(500);
    wait_until("two ready replicas with the engine back", PATIENCE, || is_ready(&node, 2));
    assert_eq!(running(&engine), before, "nothing was made anew");
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");

    // It is listened to again: what happens now is seen at once.
    engine.docker(&["kill", &before[0]]);
    wait_until("another start after the engine came back", PATIENCE, || {
        is_ready(&node, 2) && {
            let status = node.status("web");
            status["replicas"].as_array().is_some_and(|all| all.iter().any(|one| one["last_exit"]["code"] == 137))
        }
    });
    node.deploy(&container("web", "2", "replicas = 2")).succeeded();
    assert_eq!(node.text("web", "/version").trim(), "2");
}

#[test]
fn an_engine_that_stops_its_containers_with_it_gets_them_back() {
    requires_docker!();
    let mut engine = Engine::start(false);
    let node = node_with(&engine);
    node.deploy(&container("web", "1", "replicas = 2")).succeeded();
    engine.terminate();
    wait_for_why(&node, "Docker on n1 does not answer");
    engine.boot();
    let took = wait_until("two ready replicas without a person", PATIENCE, || is_ready(&node, 2));
    eprintln!("two replicas were ready {took:.1?} after the engine answered");
    assert_eq!(node.text("web", "/version").trim(), "1");
    wait_for_why(&node, "it ended when Docker on its node was stopped");
}
