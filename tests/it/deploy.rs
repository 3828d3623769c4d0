//! Deploys under load: what is served meanwhile, what each ends in, and whether what Orca says it has cost is what the
//! load generator saw.

use std::collections::BTreeSet;
use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::support::{
    Kind, Load, Node, PATIENCE, Rates, Tally, container, container_ids, docker, probe, requires_docker, started_at,
    wait_for, wait_until,
};

/// Plain requests a second that a load must reach for its test to count.
const RATE_MIN: f64 = 200.0;
/// The ten seconds after a rollout, of which its receipt tells, and a while for them to be written.
const AFTER_MAX: Duration = Duration::from_secs(25);
/// A table that was swapped whole is in use within this, also on a busy machine: the requests under way at its
/// replacement.
const SWITCH_MAX: Duration = Duration::from_secs(2);

fn version(version: &str) -> String {
    format!("[service.env]\nVERSION = \"{version}\"\n")
}

/// Ids of the replicas that should serve.
fn replicas(node: &Node, service: &str) -> BTreeSet<u64> {
    let status = node.status(service);
    let all = status["replicas"].as_array().unwrap_or_else(|| panic!("no replicas in {status}"));
    all.iter().filter(|replica| replica["leaving"] == false).map(|replica| replica["id"].as_u64().unwrap()).collect()
}

#[track_caller]
fn assert_settled(node: &Node, service: &str, replicas: u64, version: &str) {
    let status = node.status(service);
    assert_eq!(status["state"], "running", "{status}");
    assert!(status["rollout"].is_null(), "{status}");
    assert_eq!((&status["wanted"], &status["ready"]), (&replicas.into(), &replicas.into()), "{status}");
    assert_eq!(status["replicas"].as_array().unwrap().len() as u64, replicas, "{status}");
    assert_eq!(node.text(service, "/version").trim(), version);
}

/// What the proxy counted is what was sent, and what the receipts of this one rollout say is that too.
#[track_caller]
pub fn assert_exact(node: &Node, service: &str, tally: &Tally) {
    let sent = tally.sent() as u64;
    // Reports of the proxy's counters are on their way for a moment.
    let counted = || node.metric("orca_requests_total", service);
    wait_until(&format!("{sent} requests in /metrics"), PATIENCE, || counted() >= sent);
    assert_eq!(counted(), sent, "counted by the proxy, sent by the clients: {tally}");
    let page = node.api("GET", "/metrics", "").body;
    for class in 1..=5 {
        let label = format!("service=\"{service}\",status=\"{class}xx\"");
        let line = page.lines().find(|line| line.starts_with("orca_requests_total") && line.contains(&label));
        let line = line.unwrap_or_else(|| panic!("nothing with {label} in {page}"));
        let counted: usize = line.rsplit_once(' ').unwrap().1.parse().unwrap();
        assert_eq!(counted, tally.statuses(class), "status {class}xx");
    }

    let (receipt, _) = wait_for("the receipt's last window", AFTER_MAX, || {
        Some(node.last_receipt(service)).filter(|receipt| !receipt["after"].is_null())
    });
    let windows = ["before", "during", "after"].map(|window| &receipt[window]);
    let of =
        |field: &str| windows.map(|window| window[field].as_u64().unwrap_or_else(|| panic!("no {field} in {window}")));
    assert_eq!(of("requests").iter().sum::<u64>(), sent, "before, during and after: {receipt}");
    assert_eq!(
        (windows[0]["to"].clone(), windows[1]["to"].clone()),
        (windows[1]["from"].clone(), windows[2]["from"].clone())
    );
    assert_eq!(of("cut").iter().sum::<u64>(), tally.cut_web_sockets() as u64, "{receipt}");
    assert_eq!(of("errors").iter().sum::<u64>(), tally.statuses(5) as u64, "{receipt}");
    assert!(of("requests")[1] > 0, "nothing was asked for during the rollout: {receipt}");
    assert_eq!(node.metric("orca_connections_cut_total", service), tally.cut_web_sockets() as u64);
}

/// One service goes from version 1 to 2 under load, and nobody notices.
#[track_caller]
fn update_under_load(first: &str, second: &str, count: u64, rates: Rates) {
    let node = Node::start();
    node.deploy(first).succeeded();
    let before = replicas(&node, "web");
    let load = Load::start(node.target("web"), rates);
    load.go_on(400);
    let deployed = node.deploy(second);
    load.go_on(300);
    let tally = load.stop();
    eprintln!("{tally}\n{deployed}");
    assert_eq!(deployed.code, 0, "{deployed}");
    assert_eq!(tally.failed(), 0, "{tally}");
    assert!(tally.rate() >= RATE_MIN, "{tally}");
    assert_eq!(tally.bodies().into_keys().collect::<Vec<_>>(), ["1", "2"], "both versions were reached");
    assert!(tally.of(Kind::WebSocket).count() >= rates.web_sockets as usize, "{tally}");
    assert_settled(&node, "web", count, "2");
    assert!(before.is_disjoint(&replicas(&node, "web")), "every replica is new");
    assert_exact(&node, "web", &tally_and_one(tally));
    let receipt = node.last_receipt("web");
    let replaced = before.len();
    assert_eq!((&receipt["outcome"], &receipt["replaced"]), (&"done".into(), &replaced.into()), "{receipt}");
}

/// The load and the one request with which [`assert_settled`] looked.
fn tally_and_one(mut tally: Tally) -> Tally {
    let last = tally.records.iter().find(|record| record.body.is_some()).unwrap().clone();
    tally.records.push(last);
    tally
}

#[test]
fn an_update_of_one_container_costs_no_request() {
    requires_docker!();
    let first = container("web", "1", "");
    update_under_load(&first, &container("web", "2", ""), 1, Rates::default());
}

#[test]
fn an_update_of_three_containers_costs_no_request() {
    requires_docker!();
    let first = container("web", "1", "replicas = 3");
    update_under_load(&first, &container("web", "2", "replicas = 3"), 3, Rates::default());
}

#[test]
fn an_update_of_a_module_costs_no_request() {
    update_under_load(&probe("web", &version("1")), &probe("web", &version("2")), 1, Rates::plain());
}

#[test]
fn an_update_of_a_module_that_another_asks_by_name_costs_no_request() {
    let node = Node::start();
    let both = |number: &str| format!("{}{}", probe("web", ""), probe("stock", &version(number)));
    node.deploy(&both("1")).succeeded();
    let load = Load::start(node.target("web").path("/fetch?http://stock/version"), Rates::plain());
    load.go_on(200);
    node.deploy(&both("2")).succeeded();
    load.go_on(200);
    let tally = load.stop();
    eprintln!("{tally}");
    assert_eq!(tally.failed(), 0, "{tally}");
    assert_eq!(tally.bodies().into_keys().collect::<Vec<_>>(), ["1", "2"]);
}

#[test]
fn an_image_and_the_number_of_replicas_change_together() {
    requires_docker!();
    let second = container("web", "2", "replicas = 3");
    update_under_load(&container("web", "1", ""), &second, 3, Rates::default());
}

#[test]
fn a_web_socket_that_outlives_the_drain_time_is_cut_and_counted() {
    requires_docker!();
    let node = Node::start();
    let short = "[service.deploy]\ndrain_timeout_secs = 2\n";
    node.deploy(&container("web", "1", short)).succeeded();
    let long = Rates { web_sockets: 5, web_socket_life: Duration::from_secs(120), ..Rates::default() };
    let load = Load::start(node.target("web"), long);
    load.go_on(300);
    let deployed = node.deploy(&container("web", "2", short)).succeeded();
    load.go_on(100);
    let tally = load.stop();
    eprintln!("{tally}\n{deployed}");
    assert_eq!(tally.cut_web_sockets(), 5, "{tally}");
    assert_eq!(tally.failed(), 5, "nothing but those: {tally}");
    assert!(deployed.stdout.contains("Cut connections: 5"), "{deployed}");
    assert_exact(&node, "web", &tally);
}

/// Version 2 does not come up; version 1 is not touched, and the deploy says why.
#[track_caller]
fn bad_revision_under_load(more: &str, says: &[&str]) {
    let node = Node::start();
    let timeout = "[service.deploy]\nready_timeout_secs = 4\nstop_grace_secs = 1\n";
    node.deploy(&container("web", "1", timeout)).succeeded();
    let ids = container_ids(&node, "web");
    let started = started_at(&ids);
    let load = Load::start(node.target("web"), Rates::default());
    load.go_on(300);
    let deployed = node.deploy(&container("web", "2", &format!("{timeout}{more}")));
    load.go_on(200);
    let tally = load.stop();
    eprintln!("{tally}\n{deployed}");
    let deployed = deployed.exited(7).says(&["nothing was switched", "exit code 7"]).says(says);
    assert!(deployed.took < PATIENCE, "{deployed}");
    assert_eq!(tally.failed(), 0, "{tally}");
    assert_eq!(tally.bodies().into_keys().collect::<Vec<_>>(), ["1"], "the new one served nothing");
    assert_eq!(started_at(&ids), started, "the old one runs as it ran");
    assert_settled(&node, "web", 1, "1");
    wait_until("the failed container to go", PATIENCE, || container_ids(&node, "web") == ids);
    let receipt = node.last_receipt("web");
    assert_eq!((&receipt["outcome"], &receipt["replaced"]), (&"rolled_back".into(), &0.into()), "{receipt}");
    assert!(receipt["failure"]["cause"].as_str().is_some_and(|cause| !cause.is_empty()), "{receipt}");
}

#[test]
fn a_revision_that_never_gets_ready_leaves_the_old_one_alone() {
    requires_docker!();
    bad_revision_under_load("[service.env]\nSTART_DELAY_MS = \"600000\"\n", &["listens on no port; 8080 is expected"]);
}

#[test]
fn a_revision_that_exits_at_once_leaves_the_old_one_alone() {
    requires_docker!();
    let says = ["code 3", "fatal: told to exit with 3 at start"];
    bad_revision_under_load("[service.env]\nEXIT_AT_START = \"3\"\n", &says);
}

#[test]
fn of_two_deploys_of_one_service_at_once_one_wins() {
    requires_docker!();
    let node = Node::start();
    node.deploy(&container("web", "1", "")).succeeded();
    let load = Load::start(node.target("web"), Rates::default());
    let slow = "[service.env]\nSTART_DELAY_MS = \"2000\"\n";
    let deploys = ["2", "3"].map(|version| (version, node.start_deploy(&container("web", version, slow), &[])));
    let ended = deploys.map(|(version, deploy)| (version, deploy.end()));
    let tally = load.stop();
    eprintln!("{tally}\n{}\n{}", ended[0].1, ended[1].1);
    assert_eq!(tally.failed(), 0, "{tally}");
    let (winners, losers): (Vec<_>, Vec<_>) = ended.iter().partition(|(_, ran)| ran.code == 0);
    assert_eq!((winners.len(), losers.len()), (1, 1), "one of them wins");
    losers[0].1.clone().exited(6).says(&["web", "--replace"]);
    assert_settled(&node, "web", 1, winners[0].0);
    assert_eq!(container_ids(&node, "web").len(), 1);
}

#[test]
fn the_same_deploy_twice_at_once_is_one_deploy() {
    requires_docker!();
    let node = Node::start();
    node.deploy(&container("web", "1", "")).succeeded();
    let second = container("web", "2", "[service.env]\nSTART_DELAY_MS = \"1500\"\n");
    let deploys = [node.start_deploy(&second, &[]), node.start_deploy(&second, &[])];
    let ended = deploys.map(|deploy| deploy.end().succeeded());
    eprintln!("{}\n{}", ended[0], ended[1]);
    assert_settled(&node, "web", 1, "2");
    assert_eq!(node.history("web")["revisions"].as_array().unwrap().len(), 2, "one revision came of both");
}

#[test]
fn a_deploy_takes_the_place_of_another_only_if_told_to() {
    requires_docker!();
    let node = Node::start();
    node.deploy(&container("web", "1", "")).succeeded();
    let load = Load::start(node.target("web"), Rates::default());
    load.go_on(100);
    let never = "[service.deploy]\nstop_grace_secs = 1\n[service.env]\nSTART_DELAY_MS = \"600000\"\n";
    let never = container("web", "2", never);
    let first = node.start_deploy(&never, &[]);
    wait_until("the first rollout", PATIENCE, || !node.status("web")["rollout"].is_null());
    node.deploy(&container("web", "3", "")).exited(6).says(&["--replace"]);
    let second = node.deploy_with(&container("web", "3", ""), &["--replace"]).succeeded();
    let first = first.end().exited(6);
    load.go_on(200);
    let tally = load.stop();
    eprintln!("{tally}\n{first}\n{second}");
    assert_eq!(tally.failed(), 0, "{tally}");
    assert_eq!(tally.bodies().into_keys().collect::<Vec<_>>(), ["1", "3"]);
    assert_settled(&node, "web", 1, "3");
    wait_until("one container", PATIENCE, || container_ids(&node, "web").len() == 1);
}

#[test]
fn a_canary_gets_its_share_and_then_all_or_nothing() {
    requires_docker!();
    let canary = "replicas = 2\n[service.deploy]\nstrategy = \"canary\"\ncanary_weight = 20\n";
    let node = Node::start();
    node.deploy(&container("web", "1", canary)).succeeded();
    let settled = replicas(&node, "web");
    node.deploy(&container("web", "2", canary)).succeeded();
    assert_eq!(node.status("web")["state"], "canary");

    // Without WebSockets: whoever has more of those gets fewer requests.
    let load = Load::start(node.target("web"), Rates::plain());
    load.go_on(1000);
    let tally = load.so_far();
    let (bodies, all) = (tally.bodies(), tally.bodies().values().sum::<usize>());
    let share = 100 * bodies.get("2").copied().unwrap_or_default() / all;
    assert!((15..=25).contains(&share), "{share} % of {all} instead of 20 %");
    assert!(settled.is_subset(&replicas(&node, "web")), "all that served before still serve");

    node.orca(&["promote", &node.name("web")]).succeeded();
    assert_settled(&node, "web", 2, "2");
    node.deploy(&container("web", "3", canary)).succeeded();
    load.go_on(300);
    node.orca(&["rollback", &node.name("web")]).succeeded();
    assert_settled(&node, "web", 2, "2");
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    assert_eq!(tally.bodies().into_keys().collect::<Vec<_>>(), ["1", "2", "3"], "each had its time");
    node.orca(&["promote", &node.name("web")]).exited(6);
}

#[test]
fn a_canary_takes_over_by_what_it_answered() {
    let service = |version: u32| {
        let auto = "strategy = \"canary\"\nauto_promote = { after_secs = 1, success_rate = 99 }";
        let env = format!("[service.env]\nVERSION = \"{version}\"");
        probe("web", &format!("replicas = 2\n{env}\n[service.deploy]\n{auto}\n"))
    };
    let node = Node::start();
    node.deploy(&service(1)).succeeded();
    let load = Load::start(node.target("web").path("/version"), Rates::plain());
    node.deploy(&service(2)).succeeded();
    wait_until("the canary takes over", PATIENCE, || node.last_receipt("web")["revision"] == 2);
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    let receipt = node.last_receipt("web");
    assert_eq!(receipt["outcome"], "done");
    assert!(receipt["during"].get("at_least").is_none(), "no proxy was restarted: {receipt}");
    assert_eq!(node.text("web", "/version"), "2");
}

#[test]
fn blue_green_moves_everything_at_once() {
    requires_docker!();
    let colours = "replicas = 2\n[service.deploy]\nstrategy = \"blue-green\"\n";
    let node = Node::start();
    node.deploy(&container("web", "1", colours)).succeeded();
    let load = Load::start(node.target("web"), Rates::default());
    load.go_on(200);
    node.deploy(&container("web", "2", colours)).succeeded();
    load.go_on(200);
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    let of = |version| tally.records.iter().filter(move |record| record.body.as_deref() == Some(version));
    let first_new = of("2").map(|record| record.ended).min().unwrap();
    let last_old = of("1").map(|record| record.begun).max().unwrap();
    let both = last_old.saturating_duration_since(first_new);
    assert!(both < SWITCH_MAX, "for {both:?} both were served");
    assert_settled(&node, "web", 2, "2");
}

#[test]
fn two_replicas_never_hold_one_volume() {
    requires_docker!();
    let volume = "[[service.volume]]\nname = \"data\"\npath = \"/data\"\n";
    let node = Node::start();
    node.deploy(&container("web", "1", volume)).succeeded();
    assert_eq!(node.status("web")["strategy"], "recreate");
    let old = container_ids(&node, "web");
    let written = node.directory().join("written");
    fs::write(&written, "kept\n").unwrap();
    docker(&["cp", written.to_str().unwrap(), &format!("{}:/data/file", old[0])]);

    let since = docker(&["info", "--format", "{{.SystemTime}}"]);
    node.deploy(&container("web", "2", volume)).succeeded();
    assert_settled(&node, "web", 1, "2");
    assert_eq!(node.text("web", "/file?/data/file"), "kept\n");
    let until = docker(&["info", "--format", "{{.SystemTime}}"]);
    let label = format!("label=orca.service={}", node.name("web"));
    let events = docker(&[
        "events",
        "--since",
        &since,
        "--until",
        &until,
        "--filter",
        &label,
        "--filter",
        "event=die",
        "--filter",
        "event=start",
        "--format",
        "{{.Action}} {{.Actor.ID}}",
    ]);
    let new = container_ids(&node, "web");
    assert_eq!(events, format!("die {}\nstart {}", old[0], new[0]), "the new one started when the old one was gone");

    node.orca(&["rm", "-y", &node.name("web")]).succeeded();
    let volumes = || docker(&["volume", "ls", "--quiet", "--filter", &format!("name=orca-{}", node.project())]);
    assert_eq!(volumes().lines().count(), 1, "rm keeps the volume");
    node.deploy(&container("web", "2", volume)).succeeded();
    assert_eq!(node.text("web", "/file?/data/file"), "kept\n");
    node.orca(&["rm", "-y", "--volumes", &node.name("web")]).succeeded();
    wait_until("the volume to go", PATIENCE, || volumes().is_empty());
}

#[test]
fn the_same_files_again_change_nothing() {
    let node = Node::start();
    let services = format!("{}{}", probe("web", &version("1")), probe("other", ""));
    node.deploy(&services).succeeded();
    let before = node.json(&["status"]);
    let again = node.deploy(&services).succeeded();
    eprintln!("a deploy that changes nothing took {:?} in all", again.took);
    assert!(again.stdout.starts_with("Nothing to change"), "{again}");
    let after = node.json(&["status"]);
    assert_eq!(before["generation"], after["generation"]);
    let started = |status: &Value| {
        status["services"].as_array().unwrap().iter().map(|s| s["replicas"].clone()).collect::<Vec<_>>()
    };
    let ids =
        |replicas: Vec<Value>| replicas.iter().map(|r| (r[0]["id"].clone(), r[0]["since"].clone())).collect::<Vec<_>>();
    assert_eq!(ids(started(&before)), ids(started(&after)));
}

#[test]
fn a_service_goes_back_to_any_revision() {
    let node = Node::start();
    for number in ["1", "2", "3"] {
        node.deploy(&probe("web", &version(number))).succeeded();
    }
    node.orca(&["rollback", &node.name("web"), "--to", "1"]).succeeded();
    assert_settled(&node, "web", 1, "1");
    node.orca(&["rollback", &node.name("web")]).succeeded();
    assert_settled(&node, "web", 1, "3");
    node.orca(&["rollback", &node.name("web"), "--to", "77"]).exited(5).says(&["77"]);
    let revisions = node.history("web")["revisions"].clone();
    let notes: Vec<&str> = revisions.as_array().unwrap().iter().map(|one| one["note"].as_str().unwrap()).collect();
    assert_eq!(notes, ["deploy", "deploy", "deploy", "rollback to v1", "rollback to v3"]);
}

#[test]
fn a_service_is_scaled_stopped_started_restarted_and_removed() {
    requires_docker!();
    let node = Node::start();
    let web = node.name("web");
    node.deploy(&container("web", "1", "")).succeeded();
    let load = Load::start(node.target("web"), Rates::default());
    load.go_on(100);
    let first = container_ids(&node, "web");
    node.orca(&["scale", &web, "3"]).succeeded();
    assert_settled(&node, "web", 3, "1");
    assert!(container_ids(&node, "web").contains(&first[0]), "the first goes on");
    node.orca(&["scale", &web, "1"]).succeeded();
    assert_settled(&node, "web", 1, "1");
    let one = container_ids(&node, "web");
    node.orca(&["restart", &web]).succeeded();
    assert_settled(&node, "web", 1, "1");
    assert_ne!(container_ids(&node, "web"), one, "a restart makes new containers");
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");

    node.orca(&["stop", &web]).succeeded();
    assert_eq!(node.status("web")["state"], "stopped");
    assert_eq!(container_ids(&node, "web"), [""; 0]);
    let answer = node.get("web", "/version").unwrap();
    assert_eq!(answer.status, 503, "{answer:?}");
    assert!(answer.body.contains("stopped"), "{answer:?}");
    node.orca(&["start", &web]).succeeded();
    assert_settled(&node, "web", 1, "1");

    node.orca(&["rm", &web]).exited(2).says(&["-y"]);
    node.orca(&["rm", "-y", &web]).succeeded();
    assert!(node.status("web").is_null());
    assert_eq!(node.get("web", "/version").unwrap().status, 404);
    wait_until("its network to go", PATIENCE, || {
        docker(&["network", "ls", "--quiet", "--filter", &format!("name=orca-{}", node.project())]).is_empty()
    });
    assert_eq!(docker(&["ps", "--all", "--quiet", "--filter", &format!("name=orca-{}", node.project())]), "");
    node.orca(&["scale", &web, "2"]).exited(5);
}
