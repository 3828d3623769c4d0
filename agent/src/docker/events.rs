//! What happens to our containers, as it happens. A stream of events says what changed and never what is, so on
//! connecting, and after every gap, everything is listed first; the events from just before the list follow, and an
//! exit that both show is told once. A container that the engine cannot look into, for a moment or because it was half
//! removed when the disk was full, hides no other: that it is there is told, and it is asked about until it is known how
//! it is or that it is gone.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use bollard::models::{ContainerInspectResponse, ContainerSummary, EventMessage};
use bollard::query_parameters::EventsOptionsBuilder;
use futures_util::StreamExt as _;
use orca_cluster::id::ReplicaId;
use orca_cluster::node::{Condition, Exited, Found, Seen};
use orca_cluster::replica::{Cause, Engine};
use orca_cluster::time::Timestamp;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, timeout_at};

use super::{Docker, Identity, LABEL_CLUSTER, LABEL_REPLICA, address, error, is_running, now, timestamp};

/// Notices that wait to be read; when it is full, reading the engine's stream waits as well.
const WAITING_MAX: usize = 256;
/// First and longest pause before connecting again.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// Silence after which the engine is asked whether it is still there, and how long it may take to say so.
const SILENCE_MAX: Duration = Duration::from_secs(15);
const PING_MAX: Duration = Duration::from_secs(10);
/// First and longest pause before containers that could not be looked into are asked about again. The first few fit into
/// the time before a node that starts has to report; the longest is for one that stays so.
const AGAIN_MIN: Duration = Duration::from_millis(100);
const AGAIN_MAX: Duration = Duration::from_secs(10);
/// What is left of a container's id where people read it, as Docker shows it.
const ID_SHOWN: usize = 12;
/// The events asked for begin this long before the list, for a clock that was read a moment late.
const OVERLAP: Duration = Duration::from_millis(50);
/// Between two lines in the log about gaps: an engine that stays away is said once, and again now and then.
const GAPS_SAID: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    Seen(Seen),
    /// The engine came, went, or is another version. Told before anything is seen through it.
    Engine(Engine),
}

/// What happens, until it is dropped. It connects again by itself.
#[derive(Debug)]
pub struct Events {
    notices: mpsc::Receiver<Notice>,
    task: JoinHandle<()>,
}

impl Events {
    /// Waits for the next. Nothing is lost when the wait is given up.
    pub async fn next(&mut self) -> Notice {
        match self.notices.recv().await {
            Some(notice) => notice,
            // The task ends only by a panic, and has no more to say.
            None => std::future::pending().await,
        }
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The reader is gone.
struct Closed;

impl Docker {
    pub fn events(&self) -> Events {
        let (sender, notices) = mpsc::channel(WAITING_MAX);
        let watch = Watch {
            docker: self.clone(),
            sender,
            engine: Engine::Unknown,
            told: BTreeMap::new(),
            oom: BTreeSet::new(),
            unreadable: BTreeSet::new(),
            again: Instant::now(),
            pause: AGAIN_MIN,
        };
        Events { notices, task: tokio::spawn(watch.run()) }
    }
}

struct Exit {
    /// As the engine writes it; two exits of one container differ in it.
    finished: String,
    /// A time after its last line and before the first of the next run.
    end: Timestamp,
}

struct Watch {
    docker: Docker,
    sender: mpsc::Sender<Notice>,
    engine: Engine,
    /// The newest exit that was told of each replica.
    told: BTreeMap<ReplicaId, Exit>,
    /// Containers in which the kernel killed for memory since their start.
    oom: BTreeSet<String>,
    /// Containers that could not be looked into, when they are asked about again, and how long after the last time that is.
    unreadable: BTreeSet<String>,
    again: Instant,
    pause: Duration,
}

/// What the engine says when it is asked about one container.
enum Look {
    Here(Box<ContainerInspectResponse>),
    Gone,
    /// It cannot say, and why: that is about this container, and no gap.
    Unreadable(String),
}

impl Watch {
    async fn run(mut self) {
        let mut pause = PAUSE_MIN;
        let mut said: Option<Instant> = None;
        loop {
            let engine = self.docker.engine().await;
            let is_ready = matches!(engine, Engine::Ready { .. });
            if engine != self.engine {
                self.engine = engine.clone();
                if self.tell(Notice::Engine(engine)).await.is_err() {
                    return;
                }
            }
            if is_ready {
                match self.follow(&mut pause).await {
                    Ok(()) => {}
                    Err(Gap::Closed) => return,
                    Err(Gap::Engine(cause)) if said.is_none_or(|said| said.elapsed() >= GAPS_SAID) => {
                        said = Some(Instant::now());
                        let cause = error::words(&cause);
                        tracing::warn!(
                            cause,
                            "the engine's events broke off; what happens meanwhile is seen when they are back"
                        );
                    }
                    Err(Gap::Engine(cause)) => {
                        tracing::debug!(cause = error::words(&cause), "the engine's events broke off again");
                    }
                }
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Lists everything, then passes events on until they break off.
    async fn follow(&mut self, pause: &mut Duration) -> Result<(), Gap> {
        let since = now() - OVERLAP;
        self.list().await?;
        *pause = PAUSE_MIN;

        let filters = HashMap::from([
            ("type", vec!["container".to_owned()]),
            ("event", ["start", "die", "destroy", "oom"].map(str::to_owned).to_vec()),
            ("label", vec![format!("{LABEL_CLUSTER}={}", self.docker.config().cluster)]),
        ]);
        let options = EventsOptionsBuilder::default().since(&seconds(since)).filters(&filters).build();
        let client = self.docker.client()?;
        let mut events = std::pin::pin!(client.events(Some(options)));
        loop {
            let silent = Instant::now() + SILENCE_MAX;
            let again = (!self.unreadable.is_empty()).then_some(self.again);
            match timeout_at(again.unwrap_or(silent), events.next()).await {
                Ok(Some(Ok(event))) => self.event(event).await?,
                Ok(Some(Err(error))) => return Err(self.docker.cause(error).into()),
                Ok(None) => return Ok(()),
                // That it answers is seen by this as well.
                Err(_elapsed) if again.is_some() => self.ask_again().await?,
                Err(_silence) => {
                    let client = self.docker.client_within(PING_MAX)?;
                    client.ping().await.map_err(|error| self.docker.cause(error))?;
                }
            }
        }
    }

    async fn list(&mut self) -> Result<(), Gap> {
        let mut all = Vec::new();
        self.told.clear();
        self.unreadable.clear();
        for ContainerSummary { id, labels, .. } in self.docker.list(&[]).await? {
            let Some(id) = id else { continue };
            let found = match self.look(&id).await? {
                Look::Here(inspected) => self.found(*inspected).await,
                Look::Gone => None,
                Look::Unreadable(reason) => {
                    let container = id.chars().take(ID_SHOWN).collect();
                    self.ask_later(id);
                    let identity = labels.as_ref().and_then(Identity::of);
                    identity.map(|identity| identity.found(Condition::Unreadable { container, reason }))
                }
            };
            all.extend(found);
        }
        self.see(Seen::All(all)).await
    }

    async fn found(&mut self, inspected: ContainerInspectResponse) -> Option<Found> {
        let found = self.docker.found(&inspected).await?;
        if let Condition::Exited(_) = found.condition
            && let Some(finished) = inspected.state.and_then(|state| state.finished_at)
        {
            let end = timestamp(&finished).unwrap_or_default();
            self.told.insert(found.replica, Exit { finished, end });
        }
        Some(found)
    }

    fn ask_later(&mut self, id: String) {
        self.unreadable.insert(id);
        self.pause = AGAIN_MIN;
        self.again = Instant::now() + self.pause;
    }

    async fn ask_again(&mut self) -> Result<(), Gap> {
        for id in self.unreadable.clone() {
            match self.look(&id).await? {
                Look::Here(inspected) => {
                    self.unreadable.remove(&id);
                    if let Some(found) = self.found(*inspected).await {
                        self.see(Seen::Found(found)).await?;
                    }
                }
                // An event tells that.
                Look::Gone => drop(self.unreadable.remove(&id)),
                Look::Unreadable(_) => {}
            }
        }
        self.pause = (self.pause * 2).min(AGAIN_MAX);
        self.again = Instant::now() + self.pause;
        Ok(())
    }

    async fn event(&mut self, event: EventMessage) -> Result<(), Gap> {
        let Some(actor) = event.actor else { return Ok(()) };
        let (Some(id), labels) = (actor.id, actor.attributes.unwrap_or_default()) else { return Ok(()) };
        let Some(replica) = labels.get(LABEL_REPLICA).and_then(|label| label.parse().ok()) else { return Ok(()) };
        match event.action.as_deref() {
            Some("oom") => {
                self.oom.insert(id);
                Ok(())
            }
            Some("start") => match self.look(&id).await? {
                Look::Here(inspected) if is_running(&inspected) => {
                    self.unreadable.remove(&id);
                    self.see(Seen::Running { replica, address: address(&inspected) }).await
                }
                // What became of it is another event.
                Look::Here(_) | Look::Gone => Ok(()),
                Look::Unreadable(_) => {
                    self.ask_later(id);
                    Ok(())
                }
            },
            Some("die") => {
                self.unreadable.remove(&id);
                let code = labels.get("exitCode").and_then(|code| code.parse().ok()).unwrap_or_default();
                // The engine tells of a death when it has all that was written.
                let end = event.time_nano.and_then(|nanos| u64::try_from(nanos / 1_000_000).ok()).unwrap_or_default();
                self.died(replica, &id, code, Timestamp(end)).await
            }
            Some("destroy") => {
                self.unreadable.remove(&id);
                self.oom.remove(&id);
                self.told.remove(&replica);
                self.see(Seen::Vanished { replica }).await
            }
            _ => Ok(()),
        }
    }

    async fn died(&mut self, replica: ReplicaId, id: &str, code: i64, end: Timestamp) -> Result<(), Gap> {
        let mut out_of_memory = self.oom.remove(id);
        let mut last_lines = Vec::new();
        if let Look::Here(inspected) = self.look(id).await? {
            let state = inspected.state.clone().unwrap_or_default();
            let finished = state.finished_at.unwrap_or_default();
            let before = self.told.get(&replica);
            if before.is_some_and(|before| before.finished == finished) {
                return Ok(());
            }
            out_of_memory |= state.oom_killed.unwrap_or_default();
            last_lines = self.docker.last_lines(&inspected, before.map(|before| before.end)).await;
            self.told.insert(replica, Exit { finished, end });
        }
        self.see(Seen::Exited { replica, exited: Exited { code, out_of_memory, last_lines } }).await
    }

    async fn look(&self, id: &str) -> Result<Look, Gap> {
        match self.docker.inspect(id).await {
            Ok(Some(inspected)) => Ok(Look::Here(Box::new(inspected))),
            Ok(None) => Ok(Look::Gone),
            Err(cause @ Cause::NoEngine { .. }) => Err(cause.into()),
            Err(cause) => {
                let cause = error::words(&cause);
                if !self.unreadable.contains(id) {
                    tracing::warn!(
                        container = id,
                        cause,
                        "the engine cannot look into a container and is asked again; if it stays so, remove it: docker rm --force"
                    );
                }
                Ok(Look::Unreadable(cause))
            }
        }
    }

    async fn see(&self, seen: Seen) -> Result<(), Gap> {
        self.tell(Notice::Seen(seen)).await.map_err(|Closed| Gap::Closed)
    }

    async fn tell(&self, notice: Notice) -> Result<(), Closed> {
        self.sender.send(notice).await.map_err(|_| Closed)
    }
}

/// Why following ended.
enum Gap {
    Closed,
    Engine(Cause),
}

impl From<Cause> for Gap {
    fn from(cause: Cause) -> Gap {
        Gap::Engine(cause)
    }
}

/// As the engine reads a time with a fraction.
fn seconds(at: Timestamp) -> String {
    format!("{}.{:03}000000", at.0 / 1000, at.0 % 1000)
}
