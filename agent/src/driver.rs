//! Runs [`Reconciler`]: the only loop of a node. It holds no opinion about any of what passes through, and waits for
//! nothing but the next thing to happen: a node that stands still for seconds is taken for one that is gone.

mod intake;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use orca_cluster::goal::Goal;
use orca_cluster::node::{ActionId, Finished, Reconciler};
use orca_cluster::replica::{Engine, Facts, Observed};
use orca_cluster::time::Timestamp;
use orca_cluster::traffic::Legacy;
use orca_dataplane::DataPlane;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};

use self::intake::Intake;
use crate::clock::now;
use crate::docker::{Events, Measurements, Notice};
use crate::facts;
use crate::hands::Hands;
use crate::ledger::Ledger;
use crate::module_files;

/// How often what replicas use is measured.
pub const USAGE_INTERVAL: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct Driver {
    pub brain: Reconciler,
    pub hands: Arc<Hands>,
    pub finished: mpsc::UnboundedReceiver<(ActionId, Finished)>,
    pub ledger: Ledger,
    pub events: Events,
    pub usage: Measurements,
    pub dataplane: DataPlane,
    pub goals: mpsc::Receiver<Goal>,
    /// Of the proxy that hands over to ours.
    pub legacy: Option<watch::Receiver<Legacy>>,
    pub reports: watch::Sender<Option<Arc<Observed>>>,
    pub data: std::path::PathBuf,
    pub version: String,
    pub labels: BTreeMap<String, String>,
}

impl Driver {
    /// Until the session's end of `goals` is dropped.
    pub async fn run(mut self) {
        let mut engine = Engine::Unknown;
        let mut reported = Instant::now();
        let mut named = BTreeSet::new();
        let mut intake = Intake::new(self.ledger.clone());
        loop {
            while let Some(action) = self.brain.poll_action() {
                self.hands.start(action);
            }
            let due = reported + self.brain.report_interval();
            if self.brain.take_changed() || Instant::now() >= due {
                reported = Instant::now();
                self.report(&engine, intake.fault());
            }
            let wake = self.brain.poll_timeout().map(|(at, _why)| at);
            tokio::select! {
                goal = self.goals.recv() => match goal {
                    Some(goal) if goal.number > self.brain.goal().number => intake.take(goal),
                    Some(_old) => {}
                    None => return,
                },
                goal = intake.written() => {
                    self.brain.handle_goal(goal, now());
                    self.sweep_modules(&mut named);
                }
                Some((id, finished)) = self.finished.recv() => self.brain.handle_finished(id, finished, now()),
                notice = self.events.next() => match notice {
                    Notice::Seen(seen) => self.brain.handle_seen(seen, now()),
                    Notice::Engine(is) => {
                        engine = is;
                        self.report(&engine, intake.fault());
                    }
                },
                legacy = news(&mut self.legacy) => self.brain.handle_legacy(legacy, now()),
                usage = self.usage.next() => self.brain.handle_usage(usage),
                () = sleep_until(due) => {}
                () = sleep_to(wake) => self.brain.handle_timeout(now()),
            }
        }
    }

    fn sweep_modules(&self, named: &mut BTreeSet<String>) {
        let names = module_files::named(self.brain.goal());
        if names != *named {
            named.clone_from(&names);
            self.hands.sweep_modules(names);
        }
    }

    fn report(&mut self, engine: &Engine, fault: Option<&str>) {
        let now = now();
        if !self.brain.is_oriented(now) {
            return;
        }
        self.brain.handle_pulls(&self.hands.pulls());
        // Counted before the tables are named: what is in flight was let in by these tables or earlier ones.
        let (replicas, acknowledged) = self.brain.observed();
        let mut traffic = self.dataplane.traffic(now);
        if let Some(legacy) = self.brain.legacy() {
            traffic.inherit(&legacy.traffic);
        }
        let facts = self.facts(engine, fault);
        self.reports.send_replace(Some(Arc::new(Observed { at: now, replicas, acknowledged, traffic, facts })));
    }

    fn facts(&self, engine: &Engine, fault: Option<&str>) -> Facts {
        Facts {
            containers: engine.clone(),
            proxy: self.dataplane.addresses(),
            version: self.version.clone(),
            labels: self.labels.clone(),
            fault: fault.map(str::to_owned),
            ..facts::host(&self.data)
        }
    }
}

/// What is new of it; for ever silent where there is nobody to say anything.
async fn news(legacy: &mut Option<watch::Receiver<Legacy>>) -> Legacy {
    if let Some(legacy) = legacy
        && legacy.changed().await.is_ok()
    {
        return legacy.borrow_and_update().clone();
    }
    std::future::pending().await
}

async fn sleep_to(at: Option<Timestamp>) {
    match at {
        Some(at) => tokio::time::sleep(at.since(now())).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use orca_cluster::id::{ClusterId, GoalNumber, NodeId};
    use orca_cluster::route::Tables;
    use orca_dataplane::{AccessLog, Limits, NoModules};
    use orca_wire::identity::SealingKey;
    use orca_wire::{Client, Plane};
    use tokio::time::timeout;

    use super::*;
    use crate::docker::{self, Docker};
    use crate::hands::Tools;
    use crate::module_log::Logs;
    use crate::session::Session;
    use crate::testing::control_and_agent;
    use crate::wasm;

    const SOON: Duration = Duration::from_secs(20);

    fn goal(count: u64) -> Goal {
        let number = GoalNumber { term: 1, count };
        Goal { number, tables: Tables { number, ..Tables::default() }, ..Goal::default() }
    }

    type Reports = watch::Receiver<Option<Arc<Observed>>>;

    /// The loop of a node without an engine or a control node; who is to be told has the other ends.
    fn driver(directory: &std::path::Path) -> (Driver, mpsc::Sender<Goal>, Reports) {
        let docker = Docker::new(docker::Config {
            socket: directory.join("docker.sock"),
            cluster: "c".to_owned(),
            runtime_directory: PathBuf::new(),
            state_directories: Vec::new(),
        });
        let config = orca_dataplane::Config {
            http: vec!["127.0.0.1:0".parse().unwrap()],
            workers: 1,
            access_log: AccessLog::Off,
            limits: Limits::default(),
            trusted_proxies: Vec::new(),
        };
        let dataplane = DataPlane::start(config, Arc::new(NoModules)).unwrap();
        let (_server, _accepted, endpoint) = control_and_agent();
        let (hands, finished) = Hands::new(Tools {
            docker: docker.clone(),
            wasm: wasm::Engine::new(directory.join("compiled"), tokio::runtime::Handle::current()).unwrap(),
            replicas: Arc::default(),
            logs: Logs::open(directory.join("logs")).unwrap(),
            dataplane: dataplane.clone(),
            session: Session::new(Client::new(endpoint, Plane::Agent, Vec::new())),
            cluster: ClusterId(7),
            node: NodeId(2),
            sealing_key: SealingKey::load_or_create(&directory.join("keys")).unwrap(),
            modules: directory.join("modules"),
        });
        let (goals, goals_taken) = mpsc::channel(4);
        let (reports, reports_sent) = watch::channel(None);
        let driver = Driver {
            brain: Reconciler::new(None, now()),
            hands,
            finished,
            ledger: Ledger::in_directory(directory),
            events: docker.events(),
            usage: docker.measure(USAGE_INTERVAL),
            dataplane,
            goals: goals_taken,
            legacy: None,
            reports,
            data: directory.to_owned(),
            version: "test".to_owned(),
            labels: BTreeMap::new(),
        };
        (driver, goals, reports_sent)
    }

    #[test]
    fn a_disk_that_takes_its_time_for_a_goal_stops_nothing_else() {
        // The one thread for what blocks stands for the disk: it is as slow as it is held.
        let runtime =
            tokio::runtime::Builder::new_current_thread().enable_all().max_blocking_threads(1).build().unwrap();
        runtime.block_on(async {
            let directory = tempfile::tempdir().unwrap();
            let (driver, goals, mut reports) = driver(directory.path());
            let ledger = driver.ledger.clone();
            let driving = tokio::spawn(driver.run());
            timeout(SOON, reports.changed()).await.unwrap().unwrap();

            let (release, held) = std::sync::mpsc::channel::<()>();
            let disk = tokio::task::spawn_blocking(move || held.recv());
            for count in 1..=3 {
                goals.send(goal(count)).await.unwrap();
            }
            for _ in 0..3 {
                reports.mark_unchanged();
                timeout(SOON, reports.changed()).await.expect("it stands still, and would be taken for gone").unwrap();
            }
            let acknowledged = |report: &Option<Arc<Observed>>| report.as_ref().unwrap().acknowledged.0;
            assert_eq!(acknowledged(&reports.borrow()), GoalNumber::default(), "and nothing of it is in the ledger");
            assert_eq!(ledger.read().unwrap(), None);

            drop(release);
            let newest = goal(3).number;
            timeout(SOON, reports.wait_for(|report| acknowledged(report) == newest)).await.unwrap().unwrap();
            assert_eq!(ledger.read().unwrap(), Some(goal(3)));
            drop(goals);
            driving.await.unwrap();
            assert!(disk.await.unwrap().is_err());
        });
    }
}
