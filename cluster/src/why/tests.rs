//! Every sentence, as people read it.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use expect_test::{Expect, expect};

use super::{Diagnosis, failure, no_room, why};
use crate::event::Actor;
use crate::id::{Generation, GoalNumber, Label, NodeId, ReplicaId, Revision, ServiceName};
use crate::inventory::{Inventory, SUSPECT_AFTER};
use crate::replica::{
    Cause, Ending, Engine, Exit, Observed, Phase, Pulling, Purpose, ReplicaReport, Saw, Trouble, Usage,
};
use crate::resource::{Cpu, Memory};
use crate::route::RouteKey;
use crate::secret::{Opaque, SealingPublicKey};
use crate::spec::toml::{SourceFile, project};
use crate::state::{
    Deployed, Direction, Evidence, Failure, LastRun, Node, Outcome, Placement, PlacementState, Receipt, Removal,
    RevisionRecord, Rollout, RunEnding, ScheduleRecord, State, Window,
};
use crate::time::Timestamp;
use crate::traffic::Tally;
use crate::view::View;
use crate::waiting::{NoRoom, Waiting};

const N1: NodeId = NodeId(1);
const R7: ReplicaId = ReplicaId(7);
const NOW: Timestamp = Timestamp(1_000_000);

/// `shop/api` with one replica, r7, on node n1.
struct World {
    state: State,
    observed: Observed,
    recent: BTreeMap<ServiceName, Window>,
    waiting: Vec<Waiting>,
    /// The goal last sent to the node.
    sent: GoalNumber,
}

fn name(service: &str) -> ServiceName {
    ServiceName::new(Label::new("shop").unwrap(), Label::new(service).unwrap())
}

impl World {
    fn new(more: &str) -> World {
        let mut world = World {
            state: State::default(),
            observed: Observed::default(),
            recent: BTreeMap::new(),
            waiting: vec![],
            sent: GoalNumber::default(),
        };
        let node = Node {
            name: "n1".to_owned(),
            address: "10.0.0.1:6880".to_owned(),
            sealing_key: SealingPublicKey(Opaque(vec![0; 32])),
            admitted: NOW,
            dead: false,
        };
        world.state.nodes.insert(N1, node);
        world.add("api", R7, more);
        world
    }

    fn add(&mut self, service: &str, replica: ReplicaId, more: &str) {
        let text = format!("[[service]]\nname = \"{service}\"\nimage = \"myorg/{service}:1\"\nport = 8080\n{more}");
        let file = SourceFile { name: "service.toml".to_owned(), text };
        let read = project(&file, &Label::new("shop").unwrap());
        let spec = read.unwrap_or_else(|problems| panic!("{problems:?}")).services.into_values().next().unwrap();
        let revision = Revision(1);
        let record = RevisionRecord {
            spec,
            template: revision,
            digest: None,
            pull: false,
            at: NOW,
            by: Actor::Orca,
            note: "deploy".to_owned(),
        };
        let deployed = Deployed {
            revisions: [(revision, record)].into(),
            target: revision,
            settled: None,
            rollout: None,
            stopped: false,
            removal: None,
            receipts: Default::default(),
            home: Default::default(),
            schedules: Default::default(),
        };
        self.state.services.insert(name(service), deployed);
        let state = PlacementState::Serve;
        let placement = Placement { service: name(service), revision, node: N1, since: NOW, state };
        self.state.placements.insert(replica, placement);
        self.report(service, replica, Phase::Ready);
    }

    fn report(&mut self, service: &str, replica: ReplicaId, phase: Phase) -> &mut ReplicaReport {
        let report = ReplicaReport {
            service: name(service),
            revision: Revision(1),
            phase,
            since: Timestamp(NOW.0 - 9_000),
            address: None,
            digest: None,
            restarts: 0,
            failures: 0,
            last_exit: None,
            trouble: None,
            usage: Usage::default(),
            pulled: None,
            pulling: None,
            ready_after_ms: None,
            on_trial: false,
            runs: BTreeMap::new(),
        };
        self.observed.replicas.insert(replica, report);
        self.observed.replicas.get_mut(&replica).unwrap()
    }

    fn api(&mut self) -> &mut Deployed {
        self.state.services.get_mut(&name("api")).unwrap()
    }

    fn placement(&mut self) -> &mut Placement {
        self.state.placements.get_mut(&R7).unwrap()
    }

    fn with<T>(&self, look: impl FnOnce(View<'_>) -> T) -> T {
        let mut inventory = Inventory::new(NOW);
        inventory.record(N1, self.observed.clone(), NOW);
        let sent = BTreeMap::from([(N1, (self.sent, Generation::default()))]);
        look(View { state: &self.state, inventory: &inventory, sent: &sent, recent: &self.recent, now: NOW })
    }

    fn why(&self) -> Option<Diagnosis> {
        self.with(|view| why(view, &name("api"), &self.waiting))
    }

    #[track_caller]
    fn says(&self, expect: &Expect) {
        expect.assert_eq(&text(self.why()));
    }
}

fn text(found: Option<Diagnosis>) -> String {
    let Some(Diagnosis { code, cause, evidence, fix, replica: _ }) = found else { return "nothing".to_owned() };
    let code = serde_json::to_string(&code).unwrap();
    let mut text = format!("{}: {cause}\n", code.trim_matches('"'));
    for line in evidence {
        writeln!(text, "  {line}").unwrap();
    }
    writeln!(text, "  fix: {}", fix.unwrap_or_else(|| "none".to_owned())).unwrap();
    text
}

/// r7 in trouble, in this phase.
#[track_caller]
fn troubled(more: &str, phase: Phase, cause: Cause, expect: &Expect) {
    let mut world = World::new(more);
    world.report("api", R7, phase).trouble = Some(Trouble { at: NOW, cause, retry_at: None });
    world.says(expect);
}

fn exit(code: i64, lines: &[&str]) -> Exit {
    Exit {
        at: Timestamp(NOW.0 - 12_000),
        code,
        out_of_memory: false,
        after_ms: 340,
        last_lines: lines.iter().map(|line| (*line).to_owned()).collect(),
        ending: Ending::Own,
    }
}

/// r7 has ended so, so many times in a row, and waits for its next try.
#[track_caller]
fn exits(more: &str, failures: u32, exit: Exit, expect: &Expect) {
    let mut world = World::new(more);
    let report = world.report("api", R7, Phase::BackOff);
    (report.failures, report.last_exit) = (failures, Some(exit));
    report.trouble = Some(Trouble { at: NOW, cause: Cause::Exited, retry_at: Some(NOW + Duration::from_secs(4)) });
    world.says(expect);
}

fn probe(saw: Saw, listening: Option<&[&str]>) -> Cause {
    let listening = listening.map(|sockets| sockets.iter().map(|socket| socket.parse().unwrap()).collect());
    Cause::ProbeFailing {
        purpose: Purpose::Readiness,
        check: "GET /healthz".to_owned(),
        saw,
        tries: 14,
        for_ms: 10_000,
        listening,
    }
}

/// Of the rollout that was given up, at this time.
fn rolled_back(ended: Timestamp) -> Receipt {
    Receipt {
        revision: Revision(2),
        from: Some(Revision(1)),
        outcome: Outcome::RolledBack,
        started: ended,
        ended,
        replaced: 0,
        before: Window::default(),
        during: Window::default(),
        after: None,
        failure: Some(given_up()),
        tally: Tally::default(),
    }
}

fn given_up() -> Failure {
    Failure {
        cause: "it exits with code 1 after 0.3 s".to_owned(),
        evidence: vec![Evidence::Printed("no DATABASE_URL".to_owned())],
        fix: Some("the reason is in its last lines".to_owned()),
        asked: false,
    }
}

#[test]
fn nothing_is_wrong_with_what_is_as_asked() {
    World::new("").says(&expect!["nothing"]);
}

#[test]
fn what_a_person_asked_for_comes_first() {
    let mut world = World::new("");
    world.report("api", R7, Phase::Pulling).pulling = Some(Pulling { bytes: 12_400_000, total: Some(80_100_000) });
    world.says(&expect![[r#"
        starting: shop/api/r7 is pulling 12.4 of 80.1 MB
          fix: none
    "#]]);
    world.report("api", R7, Phase::Starting);
    world.says(&expect![[r#"
        starting: shop/api/r7 is starting
          fix: none
    "#]]);
    world.api().stopped = true;
    world.says(&expect![[r#"
        stopped: it was stopped by `orca stop`
          fix: orca start shop/api
    "#]]);
}

#[test]
fn images() {
    let image = "reg.example/api:1".to_owned();
    let missing = Cause::ImageMissing { image: image.clone(), present: false };
    troubled(
        "",
        Phase::BackOff,
        missing,
        &expect![[r#"
        image-missing: image reg.example/api:1 does not exist, neither on the node nor in its registry
          fix: correct `image`, or push it; for a private one add [service.registry]
    "#]],
    );
    let denied = Cause::ImageDenied { image: image.clone() };
    troubled(
        "",
        Phase::BackOff,
        denied.clone(),
        &expect![[r#"
        image-denied: the registry gives reg.example/api:1 only to those who log in
          fix: set username and password in [service.registry], the password as a secret
    "#]],
    );
    let known = "[service.registry]\nusername = \"u\"\npassword = \"${secrets.P}\"";
    troubled(
        known,
        Phase::BackOff,
        denied,
        &expect![[r#"
        image-denied: the registry refuses to give reg.example/api:1 with the credentials in [service.registry]
          fix: correct them, and see that the account may read that image
    "#]],
    );
    let reason = "dial tcp: lookup reg.example: no such host".to_owned();
    troubled(
        "",
        Phase::BackOff,
        Cause::PullFailed { image: image.clone(), reason: reason.clone(), present: true },
        &expect![[r#"
        registry-unreachable: the node cannot reach the registry reg.example to pull reg.example/api:1 again; the node's own copy is unchanged
          dial tcp: lookup reg.example: no such host
          fix: to start what the node has, or what was built there: orca restart shop/api
    "#]],
    );
    troubled(
        "",
        Phase::BackOff,
        Cause::ImageMissing { image: image.clone(), present: true },
        &expect![[r#"
        image-missing: its registry has no image reg.example/api:1 that could be pulled; the node's own copy is unchanged
          fix: to start what the node has, or what was built there: orca restart shop/api
    "#]],
    );
    troubled(
        "",
        Phase::BackOff,
        Cause::PullFailed { image: image.clone(), reason, present: false },
        &expect![[r#"
        registry-unreachable: the node cannot reach the registry reg.example, and does not have image reg.example/api:1
          dial tcp: lookup reg.example: no such host
          fix: check the registry's name, and the node's network and DNS; it is tried again
    "#]],
    );
    let reason = "toomanyrequests: slow down".to_owned();
    troubled(
        "",
        Phase::BackOff,
        Cause::PullFailed { image: image.clone(), reason, present: false },
        &expect![[r#"
        pull-failed: image reg.example/api:1 could not be pulled: toomanyrequests: slow down
          fix: see what reg.example says; it is tried again
    "#]],
    );
    let wrong = Cause::WrongArchitecture { image, has: "arm64".to_owned(), needs: "amd64".to_owned() };
    troubled(
        "",
        Phase::BackOff,
        wrong,
        &expect![[r#"
        wrong-architecture: image reg.example/api:1 is built for arm64, and the node is amd64
          fix: build it for amd64 (docker build --platform linux/amd64)
    "#]],
    );
}

#[test]
fn what_keeps_it_from_starting() {
    let reason = "no such file in the image; looked in /bin/serve, /usr/bin/serve".to_owned();
    let command = Cause::NoSuchCommand { command: "serve".to_owned(), reason };
    troubled(
        "",
        Phase::BackOff,
        command,
        &expect![[r#"
        no-such-command: `serve` cannot be run: no such file in the image
          looked in /bin/serve, /usr/bin/serve
          fix: correct `command`, or the image's entry point; it must exist and be executable
    "#]],
    );
    let engine = Cause::NoEngine { reason: "nothing listens on /run/docker.sock".to_owned() };
    troubled(
        "",
        Phase::BackOff,
        engine,
        &expect![[r#"
        no-engine: it is a container, and no Docker engine answers on its node
          nothing listens on /run/docker.sock
          fix: install one (Debian: `apt-get install docker.io`) or start it (`systemctl start docker`); `orca doctor` checks
    "#]],
    );
    troubled(
        "",
        Phase::BackOff,
        Cause::SecretMissing { name: "DB_URL".to_owned() },
        &expect![[r#"
        secret-missing: secret DB_URL, which it needs, is not set
          fix: orca secrets set DB_URL --project shop
    "#]],
    );
    let taken = Cause::PortTaken { port: 53, by: "dnsmasq (process 812)".to_owned() };
    troubled(
        "",
        Phase::BackOff,
        taken,
        &expect![[r#"
        port-taken: port 53 of the host is taken by dnsmasq (process 812)
          fix: stop what holds it, or use another port
    "#]],
    );
    let busy = Cause::VolumeBusy { volume: "shop/data".to_owned(), by: R7 };
    troubled(
        "",
        Phase::Creating,
        busy,
        &expect![[r#"
        volume-busy: volume shop/data is held by shop/api/r7, and only one replica may write to it
          fix: it starts as soon as the other one is gone; two services that shall run together need two volumes
    "#]],
    );
    troubled(
        "",
        Phase::BackOff,
        Cause::DiskFull { reason: "no space left on device".to_owned() },
        &expect![[r#"
        disk-full: the node's disk is full
          no space left on device
          fix: free space there (`docker system df` shows what images and volumes take)
    "#]],
    );
    troubled(
        "",
        Phase::BackOff,
        Cause::Refused { reason: "invalid mount".to_owned() },
        &expect![[r#"
        refused: it cannot be started: invalid mount
          fix: change what it asks for; if that is right, `orca doctor` checks the engine
    "#]],
    );
    let reason = "RWLayer of container 0123456789ab is unexpectedly nil".to_owned();
    troubled(
        "",
        Phase::Pending,
        Cause::Unreadable { container: "0123456789ab".to_owned(), reason },
        &expect![[r#"
        refused: it is not known whether it runs: the engine cannot look into its container
          RWLayer of container 0123456789ab is unexpectedly nil
          fix: the engine is asked again and again; if it stays so, on the node: docker rm --force 0123456789ab
    "#]],
    );
    troubled(
        "",
        Phase::BackOff,
        Cause::Vanished,
        &expect![[r#"
        removed-outside: somebody other than Orca removed its container
          fix: find who runs `docker rm` or a clean-up on the node; to stop it for good: orca stop shop/api
    "#]],
    );
}

#[test]
fn modules() {
    let invalid = |reason: &str| Cause::ModuleInvalid { reason: reason.to_owned() };
    let core = "the module is a core module, not a component; build it as a component: `wasm-tools component new`";
    troubled(
        "",
        Phase::BackOff,
        invalid(core),
        &expect![[r#"
        module-invalid: its module cannot be run: the module is a core module, not a component
          fix: build it as a component: `wasm-tools component new`
    "#]],
    );
    let import = "the module imports `acme:pay/api@1.0.0`, which Orca does not offer: component imports instance";
    troubled(
        "",
        Phase::BackOff,
        invalid(import),
        &expect![[r#"
        module-invalid: its module cannot be run: the module imports `acme:pay/api@1.0.0`, which Orca does not offer
          component imports instance
          fix: build it without that import: a module is offered WASI 0.2 and wasi:http
    "#]],
    );
    troubled(
        "",
        Phase::BackOff,
        Cause::ModuleMissing { digest: "abcd".to_owned() },
        &expect![[r#"
        module-missing: the bytes of its module are neither on its node nor on a control node
          sha256:abcd
          fix: deploy it again from its files: that uploads them
    "#]],
    );
}

#[test]
fn exits_are_told_by_how_they_were() {
    exits(
        "",
        1,
        exit(1, &["connecting", "no DATABASE_URL"]),
        &expect![[r#"
        exited: it exited with code 1 after 0.3 s
          log: connecting
          log: no DATABASE_URL
          tried again after 4 s
          fix: the reason is in its last lines; more with `orca logs shop/api`
    "#]],
    );
    exits(
        "",
        4,
        exit(1, &["no DATABASE_URL"]),
        &expect![[r#"
        crash-looping: it exits with code 1 after 0.3 s, 4 times in a row (crash-looping)
          log: no DATABASE_URL
          tried again after 4 s
          fix: the reason is in its last lines; more with `orca logs shop/api`
    "#]],
    );
    exits(
        "",
        3,
        exit(0, &[]),
        &expect![[r#"
        crash-looping: it exits with code 0 after 0.3 s, 3 times in a row (crash-looping): it has ended well, but a service must go on running
          it wrote nothing
          tried again after 4 s
          fix: let its command stay in the foreground; for a job that ends, use a module with a schedule
    "#]],
    );
    exits(
        "",
        1,
        exit(139, &[]),
        &expect![[r#"
        exited: it was killed by SIGSEGV (code 139) after 0.3 s
          it wrote nothing
          tried again after 4 s
          fix: the program has crashed, which is a fault in it or in how it was built; `orca logs shop/api`
    "#]],
    );
    exits(
        "",
        1,
        exit(137, &[]),
        &expect![[r#"
        exited: it was killed by SIGKILL (code 137) after 0.3 s
          it wrote nothing
          tried again after 4 s
          fix: something on the node kills it, and not for its memory: look for who (`docker events`, `journalctl -k`)
    "#]],
    );
    exits(
        "[service.resources]\nmemory = \"512Mi\"",
        3,
        Exit { out_of_memory: true, ..exit(137, &[]) },
        &expect![[r#"
        out-of-memory: the kernel killed it for using more than its limit of 512Mi of memory, 3 times in a row (crash-looping)
          it wrote nothing
          tried again after 4 s
          fix: raise `memory` in [service.resources], or make it use less
    "#]],
    );
    exits(
        "",
        1,
        Exit { out_of_memory: true, ..exit(137, &[]) },
        &expect![[r#"
        out-of-memory: the kernel killed it for using more than its node has left
          it wrote nothing
          tried again after 4 s
          fix: set `memory` in [service.resources], so that room is set aside for it, or make it use less
    "#]],
    );
    exits(
        "",
        1,
        exit(1, &["listen tcp :80: bind: address already in use"]),
        &expect![[r#"
        port-taken: it exited with code 1 after 0.3 s: the port it wants to listen on is taken
          log: listen tcp :80: bind: address already in use
          tried again after 4 s
          fix: let it listen on another port, or stop what has this one
    "#]],
    );
    let ending = Ending::NotAlive { check: "GET /healthz".to_owned(), saw: Saw::TimedOut };
    exits(
        "",
        3,
        Exit { ending, ..exit(143, &["got signal 15"]) },
        &expect![[r#"
        not-alive: its liveness probe failed, so it was killed and started again, 3 times in a row (crash-looping): GET /healthz -> no answer in time
          log: got signal 15
          tried again after 4 s
          fix: see its logs for what it hangs on; if it is merely slow, raise `timeout_secs` or `failure_threshold`
    "#]],
    );
    exits(
        "",
        2,
        Exit { ending: Ending::Removed, ..exit(137, &["bye"]) },
        &expect![[r#"
        removed-outside: somebody other than Orca removed its container
          tried again after 4 s
          fix: find who runs `docker rm` or a clean-up on the node; to stop it for good: orca stop shop/api
    "#]],
    );
}

#[test]
fn an_engine_that_is_away_or_was_is_told_of() {
    let mut world = World::new("");
    let mut unreachable = |reason: &str| {
        world.observed.facts.containers = Engine::Unreachable { reason: reason.to_owned() };
        text(world.why())
    };
    assert_eq!(unreachable("connection refused"), "nothing", "a module needs no engine");
    world.report("api", R7, Phase::Ready).address = Some("172.18.0.2:8080".parse().unwrap());
    world.says(&expect![[r#"
        engine-away: it serves, but Docker on n1 does not answer: what ends there now is not started again
          connection refused
          fix: on n1: systemctl start docker
    "#]]);

    let report = world.report("api", R7, Phase::Unready);
    report.trouble = Some(Trouble { at: NOW, cause: probe(Saw::Status(503), None), retry_at: None });
    report.address = Some("172.18.0.2:8080".parse().unwrap());
    assert!(!text(world.why()).starts_with("engine-away"), "it answers");
    let report = world.report("api", R7, Phase::Unready);
    report.trouble = Some(Trouble { at: NOW, cause: probe(Saw::TimedOut, None), retry_at: None });
    assert!(!text(world.why()).starts_with("engine-away"), "a module needs no engine");
    world.report("api", R7, Phase::Unready).address = Some("172.18.0.2:8080".parse().unwrap());
    world.observed.replicas.get_mut(&R7).unwrap().trouble =
        Some(Trouble { at: NOW, cause: probe(Saw::TimedOut, None), retry_at: None });
    world.says(&expect![[r#"
        engine-away: Docker on n1 does not answer, nor does its container: it has most likely ended with Docker
          connection refused
          its probe: no answer in time
          fix: on n1: systemctl start docker
    "#]]);

    world.observed.facts.containers = Engine::Ready { version: "28".to_owned() };
    let exit = Exit { ending: Ending::WithEngine, ..exit(143, &["got signal 15"]) };
    let report = world.report("api", R7, Phase::Ready);
    (report.restarts, report.last_exit) = (1, Some(exit));
    world.says(&expect![[r#"
        ended-with-engine: it serves, but was restarted 12 s ago: it ended when Docker on its node was stopped or restarted
          fix: nothing, if that was meant; with `"live-restore": true` in /etc/docker/daemon.json containers run on without Docker
    "#]]);
}

#[test]
fn a_start_that_will_exit_again_is_not_blamed_on_its_probe() {
    let mut world = World::new("");
    let report = world.report("api", R7, Phase::Starting);
    (report.failures, report.last_exit) = (2, Some(exit(1, &["no DATABASE_URL"])));
    let trouble = |for_ms| {
        let (check, saw) = ("connect to port 8080".to_owned(), Saw::Refused);
        let purpose = Purpose::Readiness;
        let cause = Cause::ProbeFailing { purpose, check, saw, tries: 2, for_ms, listening: None };
        Some(Trouble { at: NOW, cause, retry_at: None })
    };
    report.trouble = trouble(100);
    world.says(&expect![[r#"
        exited: it exited with code 1 after 0.3 s
          log: no DATABASE_URL
          fix: the reason is in its last lines; more with `orca logs shop/api`
    "#]]);
    world.observed.replicas.get_mut(&R7).unwrap().trouble = trouble(20_000);
    world.says(&expect![[r#"
        probe-failing: its readiness probe fails: connect to port 8080 -> connection refused
          connect to port 8080 -> connection refused, 2 tries in 20.0 s
          fix: see its logs for why it does not answer
    "#]]);
}

#[test]
fn it_serves_again_and_that_it_did_not_is_told_for_a_while() {
    let mut world = World::new("");
    let report = world.report("api", R7, Phase::Ready);
    (report.restarts, report.last_exit) = (2, Some(exit(1, &["no DATABASE_URL"])));
    world.says(&expect![[r#"
        exited: it serves, but was restarted 12 s ago, for the 2nd time: it exited with code 1 after 0.3 s
          log: no DATABASE_URL
          fix: the reason is in its last lines; more with `orca logs shop/api`
    "#]]);
    let long_ago = Timestamp(NOW.0 - 601_000);
    world.observed.replicas.get_mut(&R7).unwrap().last_exit = Some(Exit { at: long_ago, ..exit(1, &[]) });
    world.says(&expect!["nothing"]);
}

#[test]
fn where_it_listens_is_the_cause_of_a_refused_probe() {
    let http = "[service.readiness]\npath = \"/healthz\"";
    let refused = |sockets: &[&str]| probe(Saw::Refused, Some(sockets));
    troubled(
        http,
        Phase::Starting,
        refused(&["127.0.0.1:8080"]),
        &expect![[r#"
        listens-on-loopback: the process listens on 127.0.0.1:8080; the proxy reaches it on the container's address
          GET /healthz -> connection refused, 14 tries in 10.0 s
          fix: bind to 0.0.0.0:8080, or to [::]:8080, instead
    "#]],
    );
    troubled(
        http,
        Phase::Starting,
        refused(&["0.0.0.0:3000", "[::]:3000"]),
        &expect![[r#"
        listens-elsewhere: the process listens on port 3000, not on 8080
          GET /healthz -> connection refused, 14 tries in 10.0 s
          fix: set `port = 3000`, or make it listen on 8080
    "#]],
    );
    troubled(
        http,
        Phase::Starting,
        refused(&[]),
        &expect![[r#"
        not-listening: the process runs, but listens on no port; 8080 is expected
          GET /healthz -> connection refused, 14 tries in 10.0 s
          fix: see its logs: it may be waiting for something; a slow start wants a larger `ready_timeout_secs`
    "#]],
    );
    troubled(
        http,
        Phase::Starting,
        refused(&["0.0.0.0:8080"]),
        &expect![[r#"
        probe-failing: its readiness probe fails: GET /healthz -> connection refused
          GET /healthz -> connection refused, 14 tries in 10.0 s
          fix: see its logs for why it does not answer
    "#]],
    );
    troubled(
        http,
        Phase::Starting,
        probe(Saw::Refused, None),
        &expect![[r#"
        probe-failing: its readiness probe fails: GET /healthz -> connection refused
          GET /healthz -> connection refused, 14 tries in 10.0 s
          fix: see its logs for why it does not answer
    "#]],
    );
}

#[test]
fn what_a_probe_got_is_the_cause_otherwise() {
    let http = "[service.readiness]\npath = \"/healthz\"\ntimeout_secs = 2";
    let up: &[&str] = &["0.0.0.0:8080"];
    troubled(
        http,
        Phase::Starting,
        probe(Saw::Status(404), None),
        &expect![[r#"
        probe-status: its readiness probe asks for /healthz, which it answers with 404: there is no such path
          GET /healthz -> status 404, 14 tries in 10.0 s
          fix: correct the path in [service.readiness] or `health`, or make it answer there with 200 when it is ready
    "#]],
    );
    troubled(
        http,
        Phase::Starting,
        probe(Saw::Status(401), None),
        &expect![[r#"
        probe-status: its readiness probe is refused with status 401: GET /healthz needs a login
          GET /healthz -> status 401, 14 tries in 10.0 s
          fix: give a path that answers without one
    "#]],
    );
    troubled(
        http,
        Phase::Starting,
        probe(Saw::Status(503), None),
        &expect![[r#"
        probe-status: its readiness probe gets status 503: GET /healthz
          GET /healthz -> status 503, 14 tries in 10.0 s
          fix: see its logs for why it is not ready; it must answer 200 to 399 when it is
    "#]],
    );
    troubled(
        http,
        Phase::Unready,
        probe(Saw::Status(503), None),
        &expect![[r#"
        probe-status: it was ready, and is not any more: its readiness probe gets status 503: GET /healthz
          GET /healthz -> status 503, 14 tries in 10.0 s
          fix: see its logs for why it is not ready; it must answer 200 to 399 when it is
    "#]],
    );
    troubled(
        http,
        Phase::Starting,
        probe(Saw::TimedOut, Some(up)),
        &expect![[r#"
        probe-timeout: it takes connections, but gives no answer to GET /healthz within 2 s
          GET /healthz -> no answer in time, 14 tries in 10.0 s
          fix: see its logs for what it hangs on; if it is merely slow, raise `timeout_secs` in [service.readiness]
    "#]],
    );
    let exec = "[service.readiness]\nexec = [\"pg_isready\"]\ntimeout_secs = 2";
    let output = "no response".to_owned();
    troubled(
        exec,
        Phase::Starting,
        probe(Saw::Exit { code: 2, output }, None),
        &expect![[r#"
        probe-exit: its readiness probe's command exits with 2: GET /healthz
          GET /healthz -> exit code 2, 14 tries in 10.0 s
          it printed: no response
          fix: run it with `orca exec` to see; it must exit with 0 when ready
    "#]],
    );
    troubled(
        exec,
        Phase::Starting,
        probe(Saw::TimedOut, Some(up)),
        &expect![[r#"
        probe-timeout: its readiness probe's command does not end within 2 s: GET /healthz
          GET /healthz -> no answer in time, 14 tries in 10.0 s
          fix: raise `timeout_secs` in [service.readiness], or let the command give up earlier
    "#]],
    );
    let gone = Saw::Error("\"pg_isready\": executable file not found in $PATH".to_owned());
    troubled(
        exec,
        Phase::Starting,
        probe(gone, None),
        &expect![[r#"
        probe-command: its readiness probe's command cannot be run in the container: "pg_isready": executable file not found in $PATH
          GET /healthz -> "pg_isready": executable file not found in $PATH, 14 tries in 10.0 s
          fix: correct `exec` in [service.readiness]: a program that is in the image, and its arguments
    "#]],
    );
    let foreign = Saw::Error("it does not speak HTTP/2, which gRPC needs".to_owned());
    troubled(
        "[service.readiness]\ngrpc = true",
        Phase::Starting,
        probe(foreign, None),
        &expect![[r#"
        probe-grpc: its gRPC health check fails: it does not speak HTTP/2, which gRPC needs
          GET /healthz -> it does not speak HTTP/2, which gRPC needs, 14 tries in 10.0 s
          fix: serve grpc.health.v1.Health on that port, or use `path` or `tcp` in [service.readiness]
    "#]],
    );
}

#[test]
fn a_probe_that_was_changed_under_a_ready_replica_is_told() {
    let mut world = World::new("[service.readiness]\npath = \"/healthz\"");
    let report = world.report("api", R7, Phase::Ready);
    report.on_trial = true;
    world.says(&expect!["nothing"]);
    let trouble = Trouble { at: NOW, cause: probe(Saw::Status(404), None), retry_at: None };
    world.observed.replicas.get_mut(&R7).unwrap().trouble = Some(trouble);
    world.says(&expect![[r#"
        probe-status: it serves, but does not pass a probe that was changed: its readiness probe asks for /healthz, which it answers with 404: there is no such path
          GET /healthz -> status 404, 14 tries in 10.0 s
          fix: correct the path in [service.readiness] or `health`, or make it answer there with 200 when it is ready
    "#]]);
}

#[test]
fn a_liveness_probe_that_was_changed_is_called_one() {
    let mut world = World::new("[service.liveness]\npath = \"/alive\"");
    let report = world.report("api", R7, Phase::Ready);
    report.on_trial = true;
    let (purpose, check, saw) = (Purpose::Liveness, "GET /alive".to_owned(), Saw::Status(404));
    let cause = Cause::ProbeFailing { purpose, check, saw, tries: 3, for_ms: 3_000, listening: None };
    report.trouble = Some(Trouble { at: NOW, cause, retry_at: None });
    world.says(&expect![[r#"
        probe-status: it serves, but does not pass a probe that was changed: its liveness probe asks for /alive, which it answers with 404: there is no such path
          GET /alive -> status 404, 3 tries in 3.0 s
          fix: correct the path in [service.liveness] or `health`, or make it answer there with 200 when it is alive
    "#]]);
}

#[test]
fn of_a_replica_on_a_silent_node_nothing_is_known() {
    let world = World::new("");
    let status = |now| {
        let mut inventory = Inventory::new(NOW);
        inventory.record(N1, world.observed.clone(), NOW);
        let (sent, recent) = (BTreeMap::new(), BTreeMap::new());
        let view = View { state: &world.state, inventory: &inventory, sent: &sent, recent: &recent, now };
        let status = crate::status::service(view, &name("api"), &world.state.services[&name("api")], &[]);
        let phase = serde_json::to_string(&status.replicas[0].phase).unwrap();
        format!("{:?}, {} ready, {phase}\n{}", status.state, status.ready, text(status.why))
    };
    expect![[r#"
        Running, 1 ready, "ready"
        nothing"#]]
    .assert_eq(&status(NOW));
    expect![[r#"
        Failing, 0 ready, "unknown"
        node-silent: n1 is not heard, so nothing is known of r7
          fix: look at that machine; `orca nodes` says since when
    "#]]
    .assert_eq(&status(NOW + SUSPECT_AFTER));
}

#[test]
fn errors_are_told_where_most_requests_end_in_one() {
    let mut world = World::new("");
    let mut window = |requests, errors| {
        world.recent.insert(name("api"), Window { requests, errors, ..Window::default() });
        text(world.why())
    };
    assert_eq!(window(4, 4), "nothing");
    assert_eq!(window(1000, 499), "nothing");
    expect![[r#"
        errors: it is ready, but 37 of its 40 requests in the last minute ended in an error (5xx)
          fix: its log says why: orca logs shop/api --tail 50; a 504 says that it takes longer than `response_timeout_secs`
    "#]]
    .assert_eq(&window(40, 37));
    // What was refused while it had no replica says nothing of those that it has.
    world.recent.insert(name("api"), Window { requests: 40, errors: 37, unserved: 36, ..Window::default() });
    assert_eq!(text(world.why()), "nothing");
}

#[test]
fn no_node_will_do() {
    let check = |reasons: &[NoRoom], expect: Expect| {
        let mut world = World::new("");
        world.state.placements.clear();
        let refused = reasons.iter().enumerate().map(|(at, reason)| (NodeId(at as u64 + 1), reason.clone())).collect();
        world.waiting = vec![Waiting::ForRoom { refused }];
        world.says(&expect);
    };
    let gib = |n: u64| Memory(n << 30);
    let memory = |free| NoRoom::Memory { wanted: gib(8), free: gib(free), total: gib(16) };
    check(
        &[memory(2), memory(3)],
        expect![[r#"
        no-room: no node has 8Gi of memory to set aside for it
          n1: memory: 8Gi wanted, 2Gi of 16Gi not set aside
          n2: memory: 8Gi wanted, 3Gi of 16Gi not set aside
          fix: lower [service.resources], stop something, or add a node
    "#]],
    );
    check(
        &[NoRoom::Cpu { wanted: Cpu(4000), free: Cpu(500), total: Cpu(2000) }],
        expect![[r#"
        no-room: no node has 4 CPUs to set aside for it
          n1: cpu: 4 wanted, 0.5 of 2 not set aside
          fix: lower [service.resources], stop something, or add a node
    "#]],
    );
    check(
        &[NoRoom::Pinned { to: "gpu-box".to_owned() }],
        expect![[r#"
        no-such-node: it is pinned to node `gpu-box`, and there is none of that name
          n1: the service is pinned to node `gpu-box`
          fix: correct `node` in [service.placement]; there is `n1`
    "#]],
    );
    check(
        &[NoRoom::NotHeard, NoRoom::Pinned { to: "n1".to_owned() }],
        expect![[r#"
        node-silent: it is pinned to node `n1`, which is not heard
          n1: it is not heard
          n2: the service is pinned to node `n1`
          fix: bring that node back, or correct `node` in [service.placement]
    "#]],
    );
    let elsewhere = NoRoom::VolumeElsewhere { on: "n1".to_owned() };
    check(
        &[NoRoom::NotHeard, elsewhere.clone()],
        expect![[r#"
        node-silent: its volumes are on node `n1`, which is not heard
          n1: it is not heard
          n2: the service's volumes are on node `n1`
          fix: bring that node back: no other has what is in them
    "#]],
    );
    check(
        &[memory(2), elsewhere.clone()],
        expect![[r#"
        no-room: its volumes are on node `n1`, which cannot take it: memory: 8Gi wanted, 2Gi of 16Gi not set aside
          n1: memory: 8Gi wanted, 2Gi of 16Gi not set aside
          n2: the service's volumes are on node `n1`
          fix: lower [service.resources], or stop something else on `n1`
    "#]],
    );
    check(
        &[NoRoom::Pinned { to: "n2".to_owned() }, elsewhere],
        expect![[r#"
        volume-elsewhere: its volumes are on node `n1`, which cannot take it: the service is pinned to node `n2`
          n1: the service is pinned to node `n2`
          n2: the service's volumes are on node `n1`
          fix: let [service.placement] allow `n1`: no other node has what is in them
    "#]],
    );
    let label = NoRoom::Label { key: "zone".to_owned(), wanted: "eu".to_owned(), has: Some("us".to_owned()) };
    check(
        std::slice::from_ref(&label),
        expect![[r#"
        no-such-label: no node has the label zone = `eu` that it wants
          n1: label zone is `us`, not `eu`
          fix: correct `labels` in [service.placement], or start a node with `orca server --label zone=eu`
    "#]],
    );
    check(
        &[label, memory(1)],
        expect![[r#"
        no-room: none of 2 nodes can take it, each for a reason of its own
          n1: label zone is `us`, not `eu`
          n2: memory: 8Gi wanted, 1Gi of 16Gi not set aside
          fix: lower [service.resources], stop something, or add a node
    "#]],
    );
    check(
        &[NoRoom::NotHeard],
        expect![[r#"
        no-node: no node is heard that it could run on
          n1: it is not heard
          fix: bring a node back; `orca nodes` lists them
    "#]],
    );
    check(
        &[],
        expect![[r#"
        no-node: there is no node it could run on
          fix: bring a node back; `orca nodes` lists them
    "#]],
    );
}

#[test]
fn a_dependency_is_named_with_its_own_cause() {
    let mut world = World::new("");
    world.state.placements.clear();
    world.add("db", ReplicaId(8), "");
    world.waiting = vec![Waiting::ForDependency { service: Label::new("db").unwrap() }];
    world.says(&expect![[r#"
        dependency: it waits for `db`, which it depends on, to be ready
          fix: orca why shop/db
    "#]]);
    let report = world.report("db", ReplicaId(8), Phase::BackOff);
    report.trouble = Some(Trouble { at: NOW, cause: Cause::SecretMissing { name: "PW".to_owned() }, retry_at: None });
    world.says(&expect![[r#"
        dependency: it depends on `db`, which is not ready: secret PW, which it needs, is not set
          fix: orca secrets set PW --project shop
    "#]]);
}

#[test]
fn an_update_that_was_given_up_is_told_until_the_next() {
    let mut world = World::new("");
    let rollout = Rollout {
        to: Revision(2),
        from: Some(Revision(1)),
        started: NOW,
        direction: Direction::Back { why: given_up() },
        promoted: false,
        baseline: None,
        replaced: 0,
        trial: None,
    };
    world.api().rollout = Some(rollout);
    world.says(&expect![[r#"
        rolled-back: v2 was given up: it exits with code 1 after 0.3 s
          log: no DATABASE_URL
          fix: the reason is in its last lines
    "#]]);
    world.api().rollout = None;
    world.api().receipts.push_back(rolled_back(NOW));
    world.says(&expect![[r#"
        rolled-back: it serves v1, because v2 was given up: it exits with code 1 after 0.3 s
          log: no DATABASE_URL
          fix: the reason is in its last lines
    "#]]);
}

#[test]
fn that_it_is_under_way_is_no_reason_to_give_it_up() {
    let mut world = World::new("");
    world.report("api", R7, Phase::Starting);
    let late = world.with(|view| {
        let spec = view.state.services[&name("api")].spec();
        failure(view, &name("api"), spec, R7, view.inventory.replica(N1, R7))
    });
    assert_eq!(late.cause, "it was not ready after 120 s");
    assert_eq!(lines(&late), "r7 has been starting for 8 s");
    assert_eq!(late.fix.unwrap(), "look at its logs, or raise `ready_timeout_secs`");
}

fn lines(failure: &Failure) -> String {
    failure.evidence.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

#[test]
fn a_revision_is_given_up_for_the_cause_and_how_long_it_took() {
    let mut world = World::new("");
    let report = world.report("api", R7, Phase::Starting);
    report.trouble = Some(Trouble { at: NOW, cause: probe(Saw::Status(500), None), retry_at: None });
    let failure = world.with(|view| {
        let (id, spec) = (name("api"), view.state.services[&name("api")].spec());
        failure(view, &id, spec, R7, view.inventory.replica(N1, R7))
    });
    expect![[r#"
        its readiness probe fails: GET /healthz -> status 500
        GET /healthz -> status 500, 14 tries in 10.0 s
        r7 has been starting for 8 s
    "#]]
    .assert_eq(&format!("{}\n{}\n", failure.cause, lines(&failure)));
    let none = world.with(|view| no_room(view, Some(&BTreeMap::new())));
    expect!["there is no node it could run on"].assert_eq(&none.cause);
}

#[test]
fn routes_are_named_as_they_are_written() {
    let mut world = World::new("routes = [\"/x/*\"]");
    let route = world.api().spec().routes.first().unwrap().clone();
    world.add("old", ReplicaId(8), "routes = [\"/x/*\"]");
    world.state.routes.insert(RouteKey(route.clone()), name("old"));
    world.says(&expect![[r#"
        route-held: /x/* is answered by shop/old, which had it before and has it still
          fix: take it out of shop/old or of shop/api, and deploy that
    "#]]);
    world.api().removal = Some(Removal { volumes: false, hands_over: true });
    world.waiting = vec![Waiting::ForTaker { route: RouteKey(route), service: name("old") }];
    world.says(&expect![[r#"
        removing: it is being removed, and answers /x/* until shop/old is ready to
          fix: orca why shop/old; a deploy with `api` in the files again keeps it, `orca rm shop/api` removes it at once
    "#]]);
}

#[test]
fn what_cannot_be_stopped_is_named_though_nothing_serves() {
    let mut world = World::new("");
    world.placement().state = PlacementState::Stop { erase: false };
    world.waiting = vec![Waiting::ForStop { replica: R7 }];
    world.says(&expect!["nothing"]);
    let reason = "nothing listens on /run/docker.sock".to_owned();
    let report = world.report("api", R7, Phase::Stopping);
    // It was wrong with it before it was told to stop.
    let before = Timestamp(report.since.0 - 1);
    report.trouble = Some(Trouble { at: before, cause: Cause::Exited, retry_at: None });
    world.says(&expect!["nothing"]);
    let report = world.report("api", R7, Phase::Stopping);
    let retry_at = Some(NOW + Duration::from_secs(4));
    report.trouble = Some(Trouble { at: NOW, cause: Cause::NoEngine { reason }, retry_at });
    world.says(&expect![[r#"
        no-engine: r7 is to stop, and cannot be stopped: it is a container, and no Docker engine answers on its node
          nothing listens on /run/docker.sock
          tried again after 4 s
          fix: install one (Debian: `apt-get install docker.io`) or start it (`systemctl start docker`); `orca doctor` checks
    "#]]);
    let cause = Cause::Refused { reason: "device or resource busy".to_owned() };
    world.report("api", R7, Phase::Stopping).trouble = Some(Trouble { at: NOW, cause, retry_at: None });
    world.says(&expect![[r#"
        refused: r7 is to stop, and cannot be stopped: device or resource busy
          fix: see what its engine's log says; it is tried again
    "#]]);
    world.report("api", R7, Phase::Ready);
    world.observed.facts.fault = Some("no space left on device".to_owned());
    world.says(&expect![[r#"
        goal-not-taken: r7 is to stop, and its node does not take that over: n1 begins nothing new, because it cannot write down what it is told
          no space left on device
          fix: free space on the disk of n1's data directory, or put right who may write there
    "#]]);
}

#[test]
fn a_removal_that_goes_nowhere_says_why() {
    let mut world = World::new("");
    world.add("other", ReplicaId(8), "");
    world.api().removal = Some(Removal { volumes: true, hands_over: false });
    world.placement().state = PlacementState::Stop { erase: true };
    world.report("api", R7, Phase::Stopping);
    world.says(&expect![[r#"
        removing: it is being removed
          fix: wait until its replicas are gone
    "#]]);
    let cause = Cause::VolumeBusy { volume: "shop/data".to_owned(), by: ReplicaId(8) };
    world.report("api", R7, Phase::Stopping).trouble = Some(Trouble { at: NOW, cause, retry_at: None });
    world.says(&expect![[r#"
        volume-busy: r7 and its volumes cannot be removed: volume shop/data is in use by shop/other/r8
          fix: orca stop shop/other, if what is in the volume may go
    "#]]);
}

#[test]
fn a_node_that_does_not_do_what_it_was_told_is_named() {
    let mut world = World::new("");
    world.observed.replicas.clear();
    world.says(&expect![[r#"
        starting: shop/api/r7 is pending
          fix: none
    "#]]);
    world.placement().since = Timestamp(NOW.0 - 12_000);
    world.says(&expect![[r#"
        goal-not-taken: n1 has not taken over what it was told 12 s ago
          fix: the log of `orca server` on n1 says what keeps it
    "#]]);
    world.observed.facts.fault = Some("no space left on device".to_owned());
    world.says(&expect![[r#"
        goal-not-taken: n1 begins nothing new, because it cannot write down what it is told
          no space left on device
          fix: free space on the disk of n1's data directory, or put right who may write there
    "#]]);
    let late = world.with(|view| failure(view, &name("api"), view.state.services[&name("api")].spec(), R7, None));
    expect!["it was not ready after 120 s: n1 begins nothing new, because it cannot write down what it is told"]
        .assert_eq(&late.cause);
}

#[test]
fn a_proxy_that_does_not_take_over_new_tables_is_named() {
    let mut world = World::new("");
    let at = Timestamp(NOW.0 - 40_000);
    world.placement().state = PlacementState::Drain { since: Generation(5), at };
    world.says(&expect![[r#"
        goal-not-taken: r7 is to go, and cannot before every proxy has let go of it: n1 has not taken over what it was told 40 s ago
          fix: the log of `orca server` on n1 says what keeps it
    "#]]);
    world.observed.acknowledged.1 = Generation(5);
    world.says(&expect!["nothing"]);
    world.placement().state = PlacementState::Serve;
    world.waiting = vec![Waiting::ForProxies];
    world.says(&expect!["nothing"]);
    world.sent = GoalNumber { term: 1, count: 2 };
    world.says(&expect![[r#"
        goal-not-taken: its proxies are to take over new routes: n1 has not taken over what it was told 9 s ago
          fix: the log of `orca server` on n1 says what keeps it
    "#]]);
}

#[test]
fn a_schedule_whose_last_run_failed_is_named() {
    let mut world = World::new("");
    let mut ended = |ending| {
        let last = Some(LastRun { due: Timestamp(600_000), replica: Some(R7), ending });
        let record = ScheduleRecord { last, ..ScheduleRecord::default() };
        world.api().schedules.insert("*/10 * * * *".to_owned(), record);
        text(world.why())
    };
    assert_eq!(ended(RunEnding::Done), "nothing");
    expect![[r#"
        schedule-failed: it serves, but the last run of its schedule `*/10 * * * *` failed: it exited with code 3
          it was due 1970-01-01 00:10 UTC on r7
          fix: what it wrote says why: orca logs shop/api/r7
    "#]]
    .assert_eq(&ended(RunEnding::Failed { reason: "it exited with code 3".to_owned() }));
    // It depends on nothing that a schedule does.
    world.waiting = vec![Waiting::ForDependency { service: Label::new("api").unwrap() }];
    assert!(!text(world.why()).contains("schedule"), "only that it is not ready keeps others");
}

#[test]
fn of_an_exit_and_a_rollback_the_later_one_is_told() {
    let mut world = World::new("");
    let report = world.report("api", R7, Phase::Ready);
    (report.restarts, report.last_exit) = (1, Some(exit(137, &[])));
    world.api().receipts.push_back(rolled_back(NOW));
    assert!(text(world.why()).starts_with("rolled-back: it serves v1, because v2 was given up"));
    world.api().receipts = [rolled_back(Timestamp(NOW.0 - 60_000))].into();
    assert!(text(world.why()).starts_with("exited: it serves, but was restarted 12 s ago"));
}
