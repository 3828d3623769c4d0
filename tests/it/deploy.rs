//! Deploys under load: what is served meanwhile, and what it is said to have cost.

use crate::support::{Load, Node, Rates, probe, wait_until, PATIENCE};

#[test]
fn a_new_revision_of_a_module_costs_no_request() {
    let node = Node::start();
    node.deploy(&probe("web", "[service.env]\nVERSION = \"1\"")).succeeded();
    let load = Load::start(node.target("web"), Rates::plain());
    wait_until("requests", PATIENCE, || load.answered() > 400);
    let deployed = node.deploy(&probe("web", "[service.env]\nVERSION = \"2\"")).succeeded();
    wait_until("the new version", PATIENCE, || load.so_far().bodies.contains_key("2"));
    let tally = load.stop();
    eprintln!("{tally}\n{deployed}");
    assert_eq!(tally.failed(), 0, "{tally}");
    eprintln!("{}", node.status("web"));
    eprintln!("{}", node.history("web"));
}
