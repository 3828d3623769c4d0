//! Runs [`Reconciler`]: the only loop of a node. It holds no opinion about any of what passes through.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use orca_cluster::goal::Goal;
use orca_cluster::node::{ActionId, Finished, Reconciler};
use orca_cluster::replica::{Engine, Facts, Observed};
use orca_cluster::time::Timestamp;
use orca_cluster::traffic::Legacy;
use orca_dataplane::DataPlane;
use orca_wire::cause::chain;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until};
use tracing::{error, info};

use crate::clock::now;
use crate::docker::{Events, Measurements, Notice};
use crate::facts;
use crate::hands::Hands;
use crate::ledger::Ledger;
use crate::module_files;

/// How often what replicas use is measured.
pub const USAGE_INTERVAL: Duration = Duration::from_secs(5);
/// Between two tries to write a goal into the ledger.
const LEDGER_PAUSE: Duration = Duration::from_secs(1);

/// A goal that could not be written, why, and when that is tried again.
#[derive(Debug)]
struct Unwritten {
    goal: Goal,
    fault: String,
    again: Instant,
}

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
        let mut unwritten: Option<Unwritten> = None;
        loop {
            while let Some(action) = self.brain.poll_action() {
                self.hands.start(action);
            }
            let due = reported + self.brain.report_interval();
            if self.brain.take_changed() || Instant::now() >= due {
                reported = Instant::now();
                self.report(&engine, unwritten.as_ref());
            }
            let wake = self.brain.poll_timeout().map(|(at, _why)| at);
            let retry = unwritten.as_ref().map(|unwritten| unwritten.again);
            tokio::select! {
                goal = self.goals.recv() => match goal {
                    Some(goal) => {
                        unwritten = self.take_goal(goal, unwritten.is_some()).await;
                        self.sweep_modules(&mut named);
                    }
                    None => return,
                },
                () = sleep_until(retry.unwrap_or(due)), if retry.is_some() => {
                    if let Some(Unwritten { goal, .. }) = unwritten.take() {
                        unwritten = self.take_goal(goal, true).await;
                        self.sweep_modules(&mut named);
                    }
                }
                Some((id, finished)) = self.finished.recv() => self.brain.handle_finished(id, finished, now()),
                notice = self.events.next() => match notice {
                    Notice::Seen(seen) => self.brain.handle_seen(seen, now()),
                    Notice::Engine(is) => {
                        engine = is;
                        self.report(&engine, unwritten.as_ref());
                    }
                },
                legacy = news(&mut self.legacy) => self.brain.handle_legacy(legacy, now()),
                usage = self.usage.next() => self.brain.handle_usage(usage),
                () = sleep_until(due) => {}
                () = sleep_to(wake) => self.brain.handle_timeout(now()),
            }
        }
    }

    /// In the ledger before anything is done about it: whoever starts here next goes by the ledger, and would undo what it
    /// does not know, or do it twice. What cannot be written is given back.
    async fn take_goal(&mut self, mut goal: Goal, is_known: bool) -> Option<Unwritten> {
        // Only the newest matters.
        while let Ok(newer) = self.goals.try_recv() {
            goal = newer;
        }
        if goal.number <= self.brain.goal().number {
            return None;
        }
        let (ledger, written) = (self.ledger.clone(), goal.clone());
        let fault = match tokio::task::spawn_blocking(move || ledger.write(&written)).await {
            Ok(Ok(())) => {
                if is_known {
                    info!("the ledger can be written again");
                }
                self.brain.handle_goal(goal, now());
                return None;
            }
            Ok(Err(fault)) => chain(&fault),
            Err(fault) => fault.to_string(),
        };
        if !is_known {
            error!(
                error = fault,
                "the ledger cannot be written: what runs goes on, and nothing new begins here before it can"
            );
        }
        Some(Unwritten { goal, fault, again: Instant::now() + LEDGER_PAUSE })
    }

    fn sweep_modules(&self, named: &mut BTreeSet<String>) {
        let names = module_files::named(self.brain.goal());
        if names != *named {
            named.clone_from(&names);
            self.hands.sweep_modules(names);
        }
    }

    fn report(&mut self, engine: &Engine, unwritten: Option<&Unwritten>) {
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
        let facts = self.facts(engine, unwritten);
        self.reports.send_replace(Some(Arc::new(Observed { at: now, replicas, acknowledged, traffic, facts })));
    }

    fn facts(&self, engine: &Engine, unwritten: Option<&Unwritten>) -> Facts {
        Facts {
            containers: engine.clone(),
            proxy: self.dataplane.addresses(),
            version: self.version.clone(),
            labels: self.labels.clone(),
            fault: unwritten.map(|unwritten| unwritten.fault.clone()),
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
