//! What breaks under the server, and the server itself: what runs goes on, what was acknowledged is there, and what
//! cannot work is refused with the reason.

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::deploy::assert_exact;
use crate::support::{
    Load, Node, PATIENCE, Rates, Running, Setup, container, container_ids, docker, probe, request, requires_docker,
    signal, started_at, wait_for, wait_until,
};

/// The product promises one second and the container's own start; a loaded machine gets more.
const SERVES_AGAIN_MAX: Duration = Duration::from_secs(5);
/// From the start of a server whose replicas run to the first answer.
const LISTENS_AGAIN_MAX: Duration = Duration::from_secs(8);
/// Adopting is over when the server's first judgement was made.
const ADOPTED_MAX: Duration = Duration::from_secs(20);
const KILLS: usize = 12;

#[track_caller]
fn wait_for_ready(node: &Node, service: &str, replicas: u64) -> Duration {
    wait_until(&format!("{replicas} ready replicas of {service}"), PATIENCE, || {
        let status = node.status(service);
        status["state"] == "running" && status["ready"] == replicas
    })
}

#[test]
fn a_container_that_is_killed_from_outside_serves_again_in_a_moment() {
    requires_docker!();
    let node = Node::start();
    node.deploy(&container("web", "1", "")).succeeded();
    let killed = container_ids(&node, "web");
    let before = started_at(&killed);
    let load = Load::start(node.target("web"), Rates { web_sockets: 0, ..Rates::default() });
    load.go_on(100);
    let begun = Instant::now();
    docker(&["kill", &killed[0]]);
    wait_until("another start", PATIENCE, || {
        let now = container_ids(&node, "web");
        !now.is_empty() && (now != killed || started_at(&now) != before)
    });
    wait_for_ready(&node, "web", 1);
    load.go_on(200);
    let tally = load.stop();
    // The proxy holds requests for a moment when a service has no replica, so that none may fail at all.
    let slowest = tally.records.iter().filter(|record| record.is_good()).map(|r| r.ended - r.begun).max().unwrap();
    let failing = tally.failures().map(|record| record.ended - begun).max().unwrap_or_default();
    eprintln!("{} failed, the last {failing:.1?} after the kill; the longest wait was {slowest:.1?}", tally.failed());
    assert!(failing < SERVES_AGAIN_MAX && slowest < SERVES_AGAIN_MAX, "{tally}");
    let status = node.status("web");
    assert_eq!(status["replicas"][0]["last_exit"]["code"], 137, "{status}");
    let events = node.orca(&["events", &node.name("web")]).succeeded().stdout;
    assert!(events.contains("exited with code 137"), "{events}");
}

/// The server goes, by `end`, and comes back, while three containers serve.
fn restart_under_load(end: impl FnOnce(&mut Node)) {
    let mut node = Node::start();
    let web = container("web", "1", "replicas = 2");
    node.deploy(&format!("{web}{}", container("other", "2", ""))).succeeded();
    let ids = [container_ids(&node, "web"), container_ids(&node, "other")].concat();
    assert_eq!(ids.len(), 3);
    let started = started_at(&ids);
    let load = Load::start(node.target("web"), Rates::default());
    load.go_on(300);

    let down = Instant::now();
    end(&mut node);
    let gone = Instant::now();
    node.spawn();
    let (back, _) = wait_for("the proxy to listen", LISTENS_AGAIN_MAX, || {
        node.get("web", "/version").ok().map(|answer| (Instant::now(), answer))
    });
    let (back, first_answer) = back;
    wait_until("health", PATIENCE, || node.is_healthy());
    wait_for_ready(&node, "web", 2);
    load.go_on(400);
    let tally = load.stop();
    let last_bad = tally.failures().map(|record| record.begun).max().unwrap_or(down);
    eprintln!(
        "went in {:?}; listened {:?} after its start and answered {}; no failures {:?} after its start\n{tally}",
        gone - down,
        back - gone,
        first_answer.status,
        last_bad.saturating_duration_since(gone),
    );
    assert!(tally.failures().any(|record| record.is_refused()), "it was away: {tally}");
    assert_eq!(first_answer.status, 200, "the first request that finds the listener is served: {first_answer:?}");
    // A connection of before has died with the server, and who keeps it learns of that when it is used next.
    let after = tally.records.iter().filter(|record| record.begun > back && record.connected > gone);
    let bad: Vec<_> = after.filter(|record| !record.is_good()).collect();
    assert!(bad.is_empty(), "failed although the listener was back: {bad:?}");

    wait_until("everything to be adopted", ADOPTED_MAX, || {
        node.status("web")["state"] == "running" && node.status("other")["state"] == "running"
    });
    assert_eq!(started_at(&ids), started, "nothing was restarted");
    assert_eq!([container_ids(&node, "web"), container_ids(&node, "other")].concat(), ids, "nothing was made anew");
    for service in ["web", "other"] {
        assert_eq!(node.status(service)["replicas"][0]["restarts"], 0);
    }
    // The adopted are as good as new: an update replaces them without a loss.
    let load = Load::start(node.target("web"), Rates::default());
    node.deploy(&container("web", "2", "replicas = 2")).succeeded();
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    assert_eq!(node.text("web", "/version").trim(), "2");
    assert!(container_ids(&node, "web").iter().all(|id| !ids.contains(id)));
}

#[test]
fn containers_outlive_a_server_that_is_killed_and_are_adopted() {
    requires_docker!();
    restart_under_load(Node::kill9);
}

#[test]
fn containers_outlive_a_server_that_is_stopped_and_are_adopted() {
    requires_docker!();
    restart_under_load(|node| {
        let took = node.terminate();
        eprintln!("stopped in {took:?}");
    });
}

#[test]
fn a_server_hands_over_to_its_successor_without_losing_a_request() {
    requires_docker!();
    let mut node = Node::start();
    let web = container("web", "1", "replicas = 2");
    node.deploy(&format!("{web}{}", probe("wasm", ""))).succeeded();
    let ids = container_ids(&node, "web");
    let started = started_at(&ids);
    let loads = [Load::start(node.target("web"), Rates::default()), Load::start(node.target("wasm"), Rates::plain())];
    for _ in 0..2 {
        loads.iter().for_each(|load| load.go_on(200));
        let pid = node.pid();
        let took = node.hand_over();
        assert_ne!(node.pid(), pid);
        eprintln!("the predecessor ended {took:?} after its successor was started");
    }
    loads.iter().for_each(|load| load.go_on(200));
    for tally in loads.map(Load::stop) {
        eprintln!("{tally}");
        assert_eq!(tally.failed(), 0, "{tally}");
    }
    wait_for_ready(&node, "web", 2);
    assert_eq!((container_ids(&node, "web"), started_at(&ids)), (ids, started), "nothing was restarted");
    node.deploy(&container("web", "2", "replicas = 2")).succeeded();
    assert_eq!(node.text("web", "/version").trim(), "2");
}

#[test]
fn a_replica_is_not_stopped_under_a_request_that_the_predecessor_has_given_it() {
    requires_docker!();
    let mut node = Node::start();
    node.deploy(&container("web", "1", "")).succeeded();
    let proxy = node.proxy();
    let asked = thread::spawn(move || request(proxy, "GET", "/slow?12000", &[("host", "web.test")], b""));
    wait_until("the request to be in flight", PATIENCE, || node.metric("orca_requests_in_flight", "web") == 1);
    let mut predecessor = node.succeed();
    node.deploy(&container("web", "2", "")).succeeded();
    let answer = asked.join().unwrap().unwrap_or_else(|error| panic!("the request was cut: {error}"));
    assert_eq!(answer.status, 200, "{}", answer.body);
    wait_for("the end of the predecessor", PATIENCE, || predecessor.try_wait().unwrap());
    assert_eq!(node.text("web", "/version").trim(), "2");
}

/// Begins an update of `web` to version 2 and returns in its middle: the new answers already, and a replica of the old
/// drains for as long as somebody asks it for `/slow`.
fn update_to_its_middle(node: &Node, load: &Load) -> Running {
    wait_until("slow requests", PATIENCE, || node.metric("orca_requests_in_flight", "web") > 0);
    let deploying = node.start_deploy(&container("web", "2", ""), &[]);
    wait_until("the new version", PATIENCE, || load.so_far().bodies().contains_key("2"));
    assert!(!node.status("web")["rollout"].is_null(), "the old one has requests");
    deploying
}

#[test]
fn a_rollout_with_a_handover_in_its_middle_is_counted_to_the_request() {
    requires_docker!();
    let mut node = Node::start();
    node.deploy(&container("web", "1", "")).succeeded();
    let load = Load::start(node.target("web"), Rates::default());
    let slow = Load::start(node.target("web").path("/slow?3000"), Rates { keep_alive: 4, close: 0, ..Rates::plain() });
    load.go_on(100);
    let deploying = update_to_its_middle(&node, &load);
    let took = node.hand_over();
    deploying.end().succeeded();
    load.go_on(200);
    let mut tally = load.stop();
    tally.records.extend(slow.stop().records);
    eprintln!("the predecessor ended {took:?} after its successor was started\n{tally}");
    assert_eq!(tally.failed(), 0, "{tally}");
    assert_exact(&node, "web", &tally);
    let receipt = node.last_receipt("web");
    for window in ["before", "during", "after"] {
        assert!(receipt[window].get("at_least").is_none(), "no proxy has lost anything: {receipt}");
    }
}

#[test]
fn a_rollout_whose_predecessor_is_killed_says_that_there_may_have_been_more() {
    requires_docker!();
    let mut node = Node::start();
    node.deploy(&container("web", "1", "")).succeeded();
    let load = Load::start(node.target("web"), Rates::plain());
    let slow = Load::start(node.target("web").path("/slow?10000"), Rates { keep_alive: 4, close: 0, ..Rates::plain() });
    let deploying = update_to_its_middle(&node, &load);
    let mut predecessor = node.succeed();
    predecessor.kill().unwrap();
    predecessor.wait().unwrap();
    deploying.end().succeeded();
    drop((load.stop(), slow.stop()));
    let receipt = node.last_receipt("web");
    assert_eq!(receipt["during"]["at_least"], true, "what it counted last is lost: {receipt}");
}

#[test]
fn a_server_that_cannot_go_on_takes_nothing_over() {
    let mut node = Node::start();
    node.deploy(&probe("web", "")).succeeded();
    let load = Load::start(node.target("web"), Rates::plain());
    load.go_on(100);
    let mut successor = node.server_command();
    successor.arg("--take-over").env("ORCA_UNSEAL_KEY", "00".repeat(32));
    Running::start(successor, b"").end().exited(1);
    load.go_on(200);
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
    assert!(node.is_running(), "the predecessor serves on");
}

#[test]
fn a_server_that_is_stopped_lets_requests_end() {
    let mut node = Node::start();
    node.deploy(&probe("web", "")).succeeded();
    let slow =
        Load::start(node.target("web").path("/sleep?1000"), Rates { keep_alive: 10, close: 10, ..Rates::plain() });
    wait_until("requests under way", PATIENCE, || slow.answered() > 5);
    node.terminate();
    let tally = slow.stop();
    let cut: Vec<_> = tally.failures().filter(|record| !record.is_refused()).collect();
    assert!(cut.is_empty(), "{cut:?}");
}

#[test]
fn after_a_reboot_everything_comes_back() {
    requires_docker!();
    let mut node = Node::start();
    node.set_secret("GREETING", "still here");
    let web = container("web", "1", "replicas = 2\n[service.env]\nGREETING = \"${secrets.GREETING}\"\n");
    node.deploy(&format!("{web}{}", probe("wasm", ""))).succeeded();
    let before = container_ids(&node, "web");
    node.kill9();
    // What a power cut leaves: containers that were killed, with no engine event for anybody.
    docker(&[&["kill"], before.iter().map(String::as_str).collect::<Vec<_>>().as_slice()].concat());
    assert_eq!(container_ids(&node, "web"), [""; 0]);
    node.boot();
    let took = wait_for_ready(&node, "web", 2);
    eprintln!("all back {took:?} after the server was healthy");
    assert_eq!(node.text("web", "/env?GREETING"), "still here");
    assert_eq!(node.text("wasm", "/"), "probe\n");
    assert_eq!(container_ids(&node, "web").len(), 2);
    let all = docker(&["ps", "--all", "--quiet", "--filter", &format!("label=orca.service={}", node.name("web"))]);
    assert_eq!(all.lines().count(), 2, "no remains of the old ones");
}

/// One change that was asked for.
#[derive(Debug, Clone)]
enum Write {
    Deploy { service: String },
    Secret { name: String },
    Scale { replicas: u64 },
}

/// Whether its acknowledgement came is known; without one, it may have been done or not.
#[derive(Debug, Clone)]
struct Asked {
    write: Write,
    acknowledged: bool,
}

impl Write {
    fn choose(round: usize, number: usize) -> Write {
        let name = format!("r{round}n{number}");
        match number % 3 {
            0 => Write::Deploy { service: name },
            1 => Write::Secret { name },
            _ => Write::Scale { replicas: ((round * 3 + number) % 7 + 1) as u64 },
        }
    }

    fn start(&self, node: &Node) -> Running {
        match self {
            Write::Deploy { service } => node.start_deploy(&probe(service, ""), &["--detach"]),
            Write::Secret { name } => {
                node.start_orca_with_input(&["secrets", "set", name, "--project", node.project()], name)
            }
            Write::Scale { replicas } => {
                node.start_orca(&["scale", "--detach", &node.name("counter"), &replicas.to_string()])
            }
        }
    }
}

/// Everything acknowledged is there.
#[track_caller]
fn assert_kept(node: &Node, asked: &[Asked]) {
    let status = node.json(&["status"]);
    let services = status["services"].as_array().unwrap();
    let secrets = node.json(&["secrets", "list", "--project", node.project()]);
    let mut replicas_possible = vec![1];
    for Asked { write, acknowledged } in asked {
        match write {
            Write::Deploy { service } if *acknowledged => {
                let name = node.name(service);
                assert!(services.iter().any(|one| one["name"] == *name), "{service} is lost: {status}");
            }
            Write::Secret { name } if *acknowledged => {
                let listed = secrets["secrets"].as_array().unwrap();
                let full = node.name(name);
                assert!(listed.iter().any(|secret| secret["name"] == *full), "secret {full} is lost: {secrets}");
            }
            Write::Deploy { .. } | Write::Secret { .. } => {}
            Write::Scale { replicas } => {
                if *acknowledged {
                    replicas_possible.clear();
                }
                replicas_possible.push(*replicas);
            }
        }
    }
    let wanted = node.status("counter")["wanted"].as_u64().unwrap();
    assert!(
        replicas_possible.contains(&wanted),
        "{wanted} replicas, acknowledged or asked after: {replicas_possible:?}"
    );
}

#[test]
fn what_was_acknowledged_outlives_kills_at_any_moment() {
    let mut node = Node::start();
    node.deploy(&probe("counter", "")).succeeded();
    let asked = Mutex::new(Vec::<Asked>::new());
    let acknowledged = || asked.lock().unwrap().iter().filter(|asked| asked.acknowledged).count();
    let begun = Instant::now();
    for round in 0..KILLS {
        let killed = AtomicBool::new(false);
        let before = acknowledged();
        thread::scope(|scope| {
            let (node, asked, killed) = (&node, &asked, &killed);
            scope.spawn(move || {
                for number in 0.. {
                    if killed.load(Ordering::SeqCst) {
                        return;
                    }
                    let write = Write::choose(round, number);
                    let mut command = write.start(node);
                    wait_until("an answer", PATIENCE, || !command.is_running() || killed.load(Ordering::SeqCst));
                    // Whoever waits for a dead server need not be waited for.
                    command.kill();
                    let acknowledged = command.end().code == 0;
                    asked.lock().unwrap().push(Asked { write, acknowledged });
                }
            });
            // A different moment each time: after so many acknowledged writes, in the middle of the next.
            wait_until("acknowledged writes", PATIENCE, || acknowledged() > before + round % 5);
            signal(node.pid(), "KILL");
            killed.store(true, Ordering::SeqCst);
        });
        node.kill9();
        node.boot();
        assert_kept(&node, &asked.lock().unwrap());
    }
    let asked = asked.into_inner().unwrap();
    let lost = asked.iter().filter(|asked| !asked.acknowledged).count();
    eprintln!("{KILLS} kills in {:.1?}: {} writes, {lost} of them unanswered", begun.elapsed(), asked.len());
    assert!(lost > 0, "no kill met a write under way");
    wait_until("all services to run", PATIENCE, || {
        let status = node.json(&["status"]);
        status["services"].as_array().unwrap().iter().all(|service| service["state"] == "running")
    });
    // It is a cluster that works.
    node.deploy(&probe("counter", "replicas = 2\n[service.env]\nVERSION = \"new\"\n")).succeeded();
    assert_eq!(node.text("counter", "/version").trim(), "new");
}

/// How a full disk is named, to whoever asks and in the log.
const NO_SPACE: &str = "no space left on the control node's disk";

/// A small file system for the data of a server.
#[derive(Debug)]
struct SmallDisk {
    place: PathBuf,
}

impl SmallDisk {
    /// Nothing where it may not be mounted.
    fn mount(place: &Path, size: &str) -> Option<SmallDisk> {
        fs::create_dir_all(place).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &format!("size={size},mode=755"), "orca-test"]).arg(place);
        let mounted = mount.stderr(Stdio::null()).status().is_ok_and(|status| status.success());
        mounted.then(|| SmallDisk { place: place.to_owned() })
    }

    /// Leaves no byte free.
    fn fill(&self) {
        let mut file = fs::File::create(self.place.join("filler")).unwrap();
        for size in [1 << 20, 1 << 12, 1] {
            let block = vec![b'x'; size];
            while file.write_all(&block).is_ok() {}
        }
    }

    fn free(&self) {
        fs::remove_file(self.place.join("filler")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Lazily: a server of a failed test may still have files open.
        drop(Command::new("umount").arg("--lazy").arg(&self.place).status());
    }
}

#[test]
fn a_full_disk_is_named_and_loses_nothing() {
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some(disk) = SmallDisk::mount(place.path(), "64m") else {
        eprintln!("skipped: file systems can be mounted by root only");
        return;
    };
    let mut node = Node::with(Setup { data_dir: Some(place.path().join("data")), ..Setup::default() });
    node.deploy(&probe("web", "")).succeeded();
    node.set_secret("BEFORE", "before");
    let load = Load::start(node.target("web"), Rates::plain());
    load.go_on(100);
    disk.fill();
    // Space that the store has already may take a few more.
    let mut acknowledged = Vec::new();
    let mut numbers = 0..;
    let (refused, _) = wait_for("a write to be refused", PATIENCE, || {
        let name = format!("FULL{}", numbers.next().unwrap());
        let value = "v".repeat(8 << 10);
        let ran = node.orca_with_input(&["secrets", "set", &name, "--project", node.project()], &value);
        if ran.code == 0 {
            acknowledged.push(name);
            return None;
        }
        Some(ran)
    });
    eprintln!("{} more went in; then {refused}", acknowledged.len());
    refused.exited(1).says(&[NO_SPACE, "free some", "not acknowledged", "orca status"]);
    wait_until("the log to name the cause", PATIENCE, || node.log().contains(NO_SPACE));
    load.go_on(200);
    disk.free();
    wait_until("writes to work again", PATIENCE, || {
        node.orca_with_input(&["secrets", "set", "AFTER", "--project", node.project()], "after").code == 0
    });
    let listed = node.orca(&["secrets", "list", "--json", "--project", node.project()]).succeeded().stdout;
    for name in acknowledged.iter().map(String::as_str).chain(["BEFORE", "AFTER"]) {
        assert!(listed.contains(name), "{name} is lost: {listed}");
    }
    load.go_on(200);
    assert!(node.is_running(), "it needed no restart");
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "what runs does not need the disk: {tally}");

    node.kill9();
    node.boot();
    let again = node.orca(&["secrets", "list", "--json", "--project", node.project()]).succeeded().stdout;
    assert_eq!(again, listed);
}

/// Whoever asks is told that there is no control plane, and why.
#[track_caller]
fn assert_told_why(node: &Node, parts: &[&str]) {
    wait_until("the log to name the cause", PATIENCE, || parts.iter().all(|part| node.log().contains(part)));
    wait_until("the API to name the cause", PATIENCE, || {
        let answer = request(node.control(), "GET", "/api/v1/health", &[], b"");
        answer.is_ok_and(|answer| answer.status == 503 && parts.iter().all(|part| answer.body.contains(part)))
    });
    let status = wait_for("the command line to name the cause", PATIENCE, || {
        let status = node.orca(&["status"]);
        parts.iter().all(|part| status.stderr.contains(part)).then_some(status)
    });
    eprintln!("{}", status.0);
    status.0.exited(10);
    assert!(node.orca(&["doctor"]).stdout.contains(parts[0]), "the doctor says it too");
}

/// What `spoil` does, having killed the server, keeps the control plane from opening: what ran is served all the same,
/// and after `mend` everything works without another start.
fn without_control(node: &mut Node, spoil: impl FnOnce(&mut Node), said: &[&str], mend: impl FnOnce(&Node)) {
    node.deploy(&probe("web", "")).succeeded();
    spoil(node);
    node.spawn();
    wait_until("what ran to be served", PATIENCE, || node.get("web", "/").is_ok_and(|answer| answer.status == 200));
    let load = Load::start(node.target("web"), Rates::plain());
    assert_told_why(node, said);
    load.go_on(100);
    mend(node);
    wait_until("the control plane to open", PATIENCE, || node.is_healthy());
    assert!(node.is_running(), "it needed no restart");
    node.deploy(&probe("web", "[service.env]\nVERSION = \"2\"\n")).succeeded();
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "what runs does not need the control plane: {tally}");
    assert_eq!(node.text("web", "/version").trim(), "2");
}

#[test]
fn a_disk_that_is_full_at_boot_keeps_nothing_from_being_served() {
    let place = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let Some(disk) = SmallDisk::mount(place.path(), "64m") else {
        eprintln!("skipped: file systems can be mounted by root only");
        return;
    };
    let mut node = Node::with(Setup { data_dir: Some(place.path().join("data")), ..Setup::default() });
    node.deploy(&probe("web", "")).succeeded();
    // Whether the store can be opened depends on the room it has inside, so both before and after the start.
    let refused = |node: &Node| {
        let mut numbers = 0..;
        let set = |name: &str| node.orca_with_input(&["secrets", "set", name, "--project", node.project()], "v");
        let refused = || Some(set(&format!("FULL{}", numbers.next()?))).filter(|ran| ran.stderr.contains(NO_SPACE));
        let (ran, _) = wait_for("a write to be refused with the reason", PATIENCE, refused);
        assert!(matches!(ran.code, 1 | 10), "{ran}");
    };
    disk.fill();
    refused(&node);
    node.kill9();
    node.spawn();
    wait_until("what ran to be served", PATIENCE, || node.get("web", "/").is_ok_and(|answer| answer.status == 200));
    let load = Load::start(node.target("web"), Rates::plain());
    refused(&node);
    load.go_on(100);
    disk.free();
    wait_until("writes to work again", PATIENCE, || {
        node.orca_with_input(&["secrets", "set", "AFTER", "--project", node.project()], "after").code == 0
    });
    assert!(node.is_running(), "it needed no restart");
    node.deploy(&probe("web", "[service.env]\nVERSION = \"2\"\n")).succeeded();
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "what runs does not need the disk: {tally}");
    assert_eq!(node.text("web", "/version").trim(), "2");
}

#[test]
fn what_cannot_be_written_into_the_ledger_is_not_begun_before_it_can() {
    let node = Node::start();
    let version = |version: u32| probe("web", &format!("[service.env]\nVERSION = \"{version}\"\n"));
    node.deploy(&version(1)).succeeded();
    // In the way of the file that is to replace the ledger.
    let obstacle = node.data_dir().join("agent").join(format!("ledger.{}.new", node.pid()));
    // It is there for a moment while the ledger is written.
    wait_until("the ledger to be written", PATIENCE, || fs::create_dir(&obstacle).is_ok());
    let deploying = node.start_deploy(&version(2), &[]);
    wait_until("the ledger's trouble in the log", PATIENCE, || node.log().contains("the ledger cannot be written"));
    let load = Load::start(node.target("web"), Rates::plain());
    load.go_on(300);
    assert_eq!(node.text("web", "/version").trim(), "1", "who starts next would undo it");
    fs::remove_dir(&obstacle).unwrap();
    deploying.end().succeeded();
    assert_eq!(node.text("web", "/version").trim(), "2");
    let tally = load.stop();
    assert_eq!(tally.failed(), 0, "{tally}");
}

#[test]
fn a_store_that_is_damaged_or_away_keeps_nothing_from_being_served() {
    let mut node = Node::start();
    let store = node.data_dir().join("raft");
    let away = node.directory().join("away");
    let take_away = |node: &mut Node| {
        node.kill9();
        fs::rename(&store, &away).unwrap();
    };
    let put_back = |_: &Node| fs::rename(&away, &store).unwrap();
    without_control(&mut node, take_away, &["raft is not there", "mount the disk"], put_back);
    assert!(!node.data_dir().join("raft.founding").exists(), "no other cluster was founded");

    let (file, kept) = (store.join("raft.redb"), node.directory().join("kept"));
    let damage = |node: &mut Node| {
        node.kill9();
        fs::copy(&file, &kept).unwrap();
        fs::write(&file, "not a store").unwrap();
    };
    let restore = |_: &Node| fs::write(&file, fs::read(&kept).unwrap()).unwrap();
    without_control(&mut node, damage, &["raft.redb is damaged", "restore"], restore);
}

#[test]
fn an_unseal_key_that_is_missing_keeps_nothing_from_being_served() {
    let mut node = Node::start();
    let (key, kept) = (node.unseal_key(), node.directory().join("kept.key"));
    let lose = |node: &mut Node| {
        node.kill9();
        fs::rename(&key, &kept).unwrap();
    };
    let find = |_: &Node| {
        assert!(!key.exists(), "no new key is made for an old cluster");
        fs::rename(&kept, &key).unwrap();
    };
    without_control(&mut node, lose, &["unseal key", "is missing", "restore it"], find);
}

#[test]
fn a_data_directory_that_is_away_is_not_taken_for_a_new_one() {
    let mut node = Node::start();
    node.deploy(&probe("web", "")).succeeded();
    node.terminate();
    let (data, away) = (node.data_dir(), node.directory().join("away"));
    fs::rename(&data, &away).unwrap();
    // The mount point of a disk that is not there.
    fs::create_dir(&data).unwrap();
    let refused = node.server_fails().exited(1);
    eprintln!("{refused}");
    let key = node.unseal_key();
    refused.says(&[data.to_str().unwrap(), key.to_str().unwrap(), "mount the disk", "move that key away"]);
    assert!(!data.join("raft").exists() && !data.join("node").exists(), "nothing was founded");
    fs::remove_dir_all(&data).unwrap();
    fs::rename(&away, &data).unwrap();
    node.boot();
    wait_until("what ran to be served", PATIENCE, || node.get("web", "/").is_ok_and(|answer| answer.status == 200));
}

#[test]
fn the_first_token_is_kept_for_its_owner_and_not_told_to_a_journal() {
    let node = Node::start();
    assert_eq!(fs::metadata(node.token_file()).unwrap().permissions().mode() & 0o777, 0o600);
    // The server works already when it says where the token is.
    let file = node.token_file();
    wait_until("where the token is", PATIENCE, || node.log().contains(file.to_str().unwrap()));
    let log = node.log();
    assert!(!log.contains(node.token()) && !log.contains("orca1."), "{log}");
    assert_eq!(node.api("GET", "/api/v1/status", "").status, 200, "it is the token");
}

#[test]
fn the_first_token_is_told_to_a_terminal() {
    let node = Node::prepare(Setup::default());
    let server = node.server_command();
    let words = std::iter::once(server.get_program()).chain(server.get_args());
    let words: Vec<_> = words.map(|word| word.to_str().unwrap()).collect();
    let mut script = node.command();
    script.args(["--quiet", "--command", &format!("exec {}", words.join(" ")), "/dev/null"]);
    let mut terminal = Command::new("script");
    terminal.env_clear().envs(script.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let mut terminal = Running::start(
        {
            terminal.args(script.get_args());
            terminal
        },
        b"",
    );
    wait_until("the token", PATIENCE, || terminal.stdout().contains("orca1."));
    assert!(!node.token_file().exists(), "and is nowhere else");
    // Without its terminal the server ends.
    terminal.kill();
    terminal.end();
    wait_until("the server's end", PATIENCE, || TcpListener::bind(node.control()).is_ok());
}

#[test]
fn a_server_that_is_told_twice_ends_at_once() {
    let mut node = Node::start();
    node.deploy(&probe("web", "")).succeeded();
    // Longer than a stop waits for requests.
    let slow = Load::start(node.target("web").path("/sleep?20000"), Rates { keep_alive: 10, ..Rates::plain() });
    let ready = Load::start(node.target("web"), Rates::plain());
    ready.go_on(50);
    signal(node.pid(), "TERM");
    wait_until("the listener to close", PATIENCE, || node.get("web", "/").is_err());
    assert!(node.is_running(), "it waits for the requests under way");
    let took = node.terminate();
    eprintln!("ended {took:?} after it was told again");
    assert!(took < Duration::from_secs(5), "{took:?}");
    drop((slow.stop(), ready.stop()));
}

#[test]
fn a_wrong_unseal_key_is_refused() {
    let mut node = Node::start();
    node.set_secret("KEPT", "kept");
    node.deploy(&probe("web", "[service.env]\nKEPT = \"${secrets.KEPT}\"\n")).succeeded();
    let stranger = Node::start();
    node.terminate();
    let right = fs::read(node.unseal_key()).unwrap();
    assert_eq!(fs::metadata(node.unseal_key()).unwrap().permissions().mode() & 0o777, 0o600);
    fs::write(node.unseal_key(), fs::read(stranger.unseal_key()).unwrap()).unwrap();
    let refused = node.server_fails();
    eprintln!("{refused}");
    assert_ne!(refused.code, 0);
    refused.says(&["unseal key"]);
    fs::write(node.unseal_key(), "not a key").unwrap();
    let refused = node.server_fails();
    eprintln!("{refused}");
    assert_ne!(refused.code, 0);
    fs::write(node.unseal_key(), right).unwrap();
    fs::set_permissions(node.unseal_key(), fs::Permissions::from_mode(0o600)).unwrap();
    node.boot();
    wait_until("the secret in its workload", PATIENCE, || {
        node.get("web", "/env?KEPT").is_ok_and(|answer| answer.body == "kept")
    });
}

#[test]
fn a_port_that_is_taken_is_named_and_nothing_is_founded() {
    let node = Node::prepare(Setup::default());
    let taken = TcpListener::bind(node.proxy()).unwrap();
    let refused = node.server_fails();
    eprintln!("{refused}");
    assert_ne!(refused.code, 0);
    refused.says(&[&node.proxy().to_string(), "--http"]);
    drop(taken);

    let taken = TcpListener::bind(node.control()).unwrap();
    let refused = node.server_fails();
    eprintln!("{refused}");
    assert_ne!(refused.code, 0);
    refused.says(&[&node.control().to_string(), "--listen"]);
    drop(taken);

    // Neither has left anything behind that keeps the next from founding.
    let mut node = node;
    node.boot();
    node.deploy(&probe("web", "")).succeeded();
}

#[test]
fn two_servers_never_share_a_data_directory() {
    let node = Node::start();
    node.deploy(&probe("web", "")).succeeded();
    let second = Node::prepare(Setup { data_dir: Some(node.data_dir()), ..Setup::default() });
    let refused = second.server_fails();
    eprintln!("{refused}");
    assert_ne!(refused.code, 0);
    refused.says(&[node.data_dir().to_str().unwrap()]);
    assert_eq!(node.text("web", "/"), "probe\n");
    node.deploy(&probe("web", "[service.env]\nVERSION = \"2\"\n")).succeeded();
}

#[test]
fn without_an_engine_modules_run_and_containers_say_what_is_missing() {
    let nowhere = ("DOCKER_HOST".to_owned(), "unix:///nonexistent/docker.sock".to_owned());
    let node = Node::with(Setup { env: vec![nowhere], ..Setup::default() });
    node.deploy(&probe("wasm", "")).succeeded();
    let refused = node.deploy(&container("web", "1", "[service.deploy]\nready_timeout_secs = 6\n"));
    eprintln!("{refused}");
    let said = refused.exited(8).says(&["Docker", "/nonexistent/docker.sock", "apt-get install docker.io"]);
    assert!(said.took < PATIENCE);
    let why = node.orca(&["why", &node.name("web")]);
    eprintln!("{why}");
    assert!(why.stdout.contains("Docker"), "{why}");
    assert_eq!(node.text("wasm", "/"), "probe\n");
}
