//! A small world to look at in tests: a shop with an API that is being updated and a worker that crashes.

use jiff::tz::TimeZone;
use std::collections::BTreeMap;

use orca_cluster::id::{Generation, NodeId, ReplicaId, Revision, ServiceName};
use orca_cluster::replica::{Cause, Engine, Exit, Facts, Phase, Pulled, Trouble, Usage};
use orca_cluster::resource::{Cpu, Memory};
use orca_cluster::spec::Strategy;
use orca_cluster::state::{Evidence, Failure, Outcome, Receipt, Window};
use orca_cluster::status::{
    NodeCondition, NodeStatus, ReplicaStatus, RolloutStatus, ServiceState, ServiceStatus, Status,
};
use orca_cluster::time::Timestamp;
use orca_cluster::traffic::{InFlight, Tally};
use orca_cluster::why::{Code, Diagnosis};
use orca_wire::message::client::Progress;

use super::Screen;
use super::text::Text;

/// 2026-01-31T14:02:11Z.
pub const NOW: Timestamp = Timestamp(1_769_868_131_000);

pub fn screen() -> Screen {
    Screen { width: 100, colour: false, now: NOW, zone: TimeZone::UTC }
}

pub fn at(seconds: u64) -> Timestamp {
    Timestamp(NOW.0 - 1000 * seconds)
}

pub fn show(lines: &[Text]) -> String {
    lines.iter().map(|line| line.render(false).trim_end().to_owned() + "\n").collect()
}

pub fn name(text: &str) -> ServiceName {
    text.parse().unwrap()
}

pub fn replica(id: u64, revision: u64, phase: Phase) -> ReplicaStatus {
    ReplicaStatus {
        id: ReplicaId(id),
        node: NodeId(1),
        node_name: "n1".to_owned(),
        revision: Revision(revision),
        phase,
        leaving: false,
        since: at(1),
        placed: at(1),
        address: Some("172.18.0.4:8080".parse().unwrap()),
        restarts: 0,
        failures: 0,
        last_exit: None,
        trouble: None,
        usage: Usage { memory: Memory(48 << 20), cpu: Cpu(120) },
        in_flight: InFlight::default(),
        pulled: None,
        pulling: None,
        ready_after_ms: None,
    }
}

pub fn service(text: &str, source: &str, revision: u64) -> ServiceStatus {
    ServiceStatus {
        name: name(text),
        state: ServiceState::Running,
        source: source.to_owned(),
        module: false,
        revision: Revision(revision),
        digest: None,
        strategy: Strategy::Rolling,
        wanted: 1,
        ready: 1,
        replicas: Vec::new(),
        routes: Vec::new(),
        rollout: None,
        waiting: Vec::new(),
        why: None,
        recent: Window::default(),
        last_receipt: None,
        schedules: BTreeMap::new(),
    }
}

pub fn window(requests: u64, errors: u64, p99_us: u64) -> Window {
    Window { from: at(60), to: NOW, requests, errors, p99_us: Some(p99_us), ..Window::default() }
}

pub fn receipt(revision: u64, outcome: Outcome, failure: Option<Failure>) -> Receipt {
    Receipt {
        revision: Revision(revision),
        from: Some(Revision(revision - 1)),
        outcome,
        started: Timestamp(at(7_200).0 - 11_600),
        ended: at(7_200),
        replaced: if outcome.is_done() { 3 } else { 0 },
        before: window(700, 0, 40_000),
        during: window(48_211, 0, 41_000),
        after: None,
        failure,
        tally: Tally::default(),
    }
}

pub fn loopback() -> Failure {
    Failure {
        cause: "the process listens on 127.0.0.1:8080; the proxy reaches it on the container's address".to_owned(),
        evidence: vec![
            Evidence::Seen("GET /healthz -> connection refused, 14 tries in 10.0 s".to_owned()),
            Evidence::Printed("listening on http://127.0.0.1:8080".to_owned()),
        ],
        fix: Some("bind to 0.0.0.0, or the port of all addresses".to_owned()),
        asked: false,
    }
}

pub fn rollout(to: u64, from: u64) -> RolloutStatus {
    RolloutStatus {
        to: Revision(to),
        from: Some(Revision(from)),
        started: at(4),
        back: false,
        because: None,
        ready_timeout_secs: 120,
    }
}

pub fn node() -> NodeStatus {
    NodeStatus {
        id: NodeId(1),
        name: "n1".to_owned(),
        address: "127.0.0.1:6880".to_owned(),
        condition: NodeCondition::Alive,
        last_heard: Some(at(0)),
        replicas: 4,
        facts: Some(Facts {
            cpu: Cpu(8000),
            memory: Memory(16 << 30),
            memory_available: Memory(9 << 30),
            disk_available: Memory(120 << 30),
            containers: Engine::Ready { version: "29.1".to_owned() },
            proxy: vec!["0.0.0.0:8080".parse().unwrap()],
            ..Facts::default()
        }),
    }
}

/// A worker that exits at once, again and again.
pub fn worker() -> ServiceStatus {
    let mut crashing = replica(9, 2, Phase::BackOff);
    crashing.restarts = 4;
    crashing.failures = 4;
    crashing.usage = Usage::default();
    crashing.address = None;
    crashing.since = at(12);
    crashing.placed = at(41);
    crashing.last_exit = Some(Exit {
        at: at(12),
        code: 1,
        out_of_memory: false,
        after_ms: 300,
        last_lines: vec!["no DATABASE_URL".to_owned()],
        ending: orca_cluster::replica::Ending::Own,
    });
    crashing.trouble = Some(Trouble { at: at(12), cause: Cause::Exited, retry_at: None });
    let mut worker = service("shop/worker", "myorg/worker:2", 2);
    worker.state = ServiceState::CrashLooping;
    worker.ready = 0;
    worker.replicas = vec![crashing];
    worker.why = Some(Diagnosis {
        code: Code::CrashLooping,
        cause: "it exits with code 1 after 0.3 s, 4 times in a row (crash-looping)".to_owned(),
        evidence: vec![Evidence::Printed("no DATABASE_URL".to_owned())],
        fix: Some("the reason is in its last lines; more with `orca logs shop/worker`".to_owned()),
        replica: Some(ReplicaId(9)),
    });
    worker
}

pub fn api() -> ServiceStatus {
    let mut api = service("shop/api", "docker.io/myorg/api:1.4.3", 5);
    api.wanted = 3;
    api.ready = 3;
    api.routes = vec!["shop.example.com/api/*".to_owned(), "/*".to_owned()];
    api.recent = window(744, 2, 41_000);
    api.last_receipt = Some(receipt(5, Outcome::Done, None));
    api.replicas = (1..=3).map(|id| replica(id, 5, Phase::Ready)).collect();
    api
}

pub fn status() -> Status {
    Status {
        cluster: "main".to_owned(),
        cluster_id: "0".repeat(32),
        generation: Generation(4182),
        at: NOW,
        nodes: vec![node()],
        services: vec![service("blog/web", "./web.wasm", 1), api(), worker()],
    }
}

/// The API as it is updated from v4 to v5, by one moment after the other.
pub fn update() -> Vec<Progress> {
    let progress = |second: u64, service: ServiceStatus| Progress {
        generation: Generation(4190 + second),
        at: at(4 - second),
        services: vec![service],
        events: Vec::new(),
    };
    let mut service = service("shop/api", "myorg/api:1.4.3", 5);
    service.wanted = 2;
    service.state = ServiceState::Updating;
    service.rollout = Some(rollout(5, 4));
    let mut olds: Vec<ReplicaStatus> = [1, 2].map(|id| replica(id, 4, Phase::Ready)).to_vec();
    olds[0].in_flight = InFlight { requests: 200, upgraded: 14 };
    olds[1].in_flight = InFlight { requests: 31, upgraded: 0 };
    let begun = ServiceStatus { replicas: olds.clone(), ..service.clone() };

    let mut new = replica(3, 5, Phase::Ready);
    new.pulled = Some(Pulled { bytes: 12_400_000, millis: 1_100 });
    new.ready_after_ms = Some(800);
    let mut leaving = olds[0].clone();
    leaving.leaving = true;
    let first = ServiceStatus { replicas: vec![leaving, olds[1].clone(), new.clone()], ..service.clone() };

    let mut second_new = replica(4, 5, Phase::Ready);
    second_new.ready_after_ms = Some(700);
    let mut second_leaving = olds[1].clone();
    second_leaving.leaving = true;
    let last = ServiceStatus { replicas: vec![second_leaving, new.clone(), second_new.clone()], ..service.clone() };

    let mut done = ServiceStatus { replicas: vec![new, second_new], rollout: None, ..service };
    done.state = ServiceState::Running;
    done.last_receipt = Some(receipt(5, Outcome::Done, None));
    vec![progress(0, begun), progress(1, first), progress(3, last), progress(4, done)]
}
