//! Logs: the lines of all replicas of a service, interleaved by time. Each replica's node sends its own in order.
//! What has been written is merged exactly; what is being written arrives a little out of order over several nodes,
//! so that it is held for a moment before it is passed on. Lines that cannot be had are told of, whatever else can.

use std::collections::{BTreeSet, VecDeque};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use orca_cluster::id::{NodeId, ReplicaId, ServiceName};
use orca_cluster::state::State;
use orca_cluster::time::Timestamp;
use orca_wire::cause::chain;
use orca_wire::message::agent::{Errand, LogLine, LogRead, LogStream, LogsErrand};
use orca_wire::message::client::{LogsQuery, Refused};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};

use super::{Core, Items, STREAM_QUEUE, failed, invalid, no_service, not_found};
use crate::auth::{Caller, Object, Verb};
use crate::clock::now;

/// How long a line that is followed waits for earlier ones of other replicas. Nodes are milliseconds apart.
const REORDER_WINDOW: Duration = Duration::from_millis(150);

/// Lines held back at most; more are passed on at once, in the order they came.
const HELD_MAX: usize = 10_000;

/// Most lines `tail` may ask for: they are held in memory until the last is known.
const TAIL_MAX: u32 = 100_000;

/// And most bytes of them: a line may have 256 KiB, and everybody who may read may ask.
const TAIL_BYTES_MAX: usize = 64 << 20;

/// A followed replica whose log ended is asked again after this: its container may not be there yet.
const AGAIN: Duration = Duration::from_secs(1);

/// As often in a row a followed replica's log cannot be read before that is told: a node that restarts is soon back.
const FAILURES_UNTOLD: u32 = 1;

/// Why not all lines of a replica came.
#[derive(Debug)]
struct Broken {
    replica: ReplicaId,
    node: NodeId,
    reason: String,
}

impl fmt::Display for Broken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Broken { replica, node, reason } = self;
        write!(f, "the log of {replica} on {node} could not be read to its end: {reason}")
    }
}

/// A line of a replica; or, as the last of it for now, why there are no more.
type Read = Result<LogLine, Broken>;

pub async fn logs(core: &Arc<Core>, caller: &Caller, mut query: LogsQuery) -> Result<Items<LogLine>, Refused> {
    core.authorise(caller, Verb::Logs, Object::Project(&query.service.project))?;
    if query.tail.is_some_and(|tail| tail > TAIL_MAX) {
        return Err(invalid(format!("at most the last {TAIL_MAX} lines can be asked for"), Some("use --since")));
    }
    let state = core.read().await?;
    let service = state.services.get(&query.service);
    let module = service.ok_or_else(|| no_service(&query.service))?.spec().is_module();
    let mut sources = sources(core, &state, &query);
    if let Some(replica) = query.replica.filter(|_| sources.is_empty()) {
        // Nobody knows any more whose it was, so only to those who may read everything.
        if caller.project.is_none() && !state.placements.contains_key(&replica) {
            sources = remembered(core, &query.service, replica, module).await?;
        }
        // It is over: nothing more will be written.
        query.follow = false;
    }
    if sources.is_empty() {
        match query.replica {
            Some(replica) => {
                let message = format!("{} has no replica {replica}, and no node has its lines", query.service);
                let history = format!("`orca history {}` has what a failed one wrote last", query.service);
                let hint = format!("`orca ps` lists its replicas; {history}");
                return Err(not_found(message, Some(&hint)));
            }
            None if !query.follow => {
                let hint = Some("`orca why` says why; `orca logs -f` waits for one");
                return Err(not_found(format!("{} has no replica at the moment", query.service), hint));
            }
            None => {}
        }
    }
    let connected = core.sessions.connected();
    if !query.follow
        && let Some((_, node)) = sources.iter().find(|(_, node)| !connected.contains(node))
        && !sources.iter().any(|(_, node)| connected.contains(node))
    {
        return Err(failed(format!("the logs are on {node}, which is not connected")));
    }

    let (send, lines) = mpsc::channel(STREAM_QUEUE);
    let core = core.clone();
    tokio::spawn(async move {
        let job = Job { core, query, module };
        let closed = send.clone();
        tokio::select! {
            () = async {
                match job.query.follow {
                    true => job.follow(sources, send).await,
                    false => job.read(sources, send).await,
                }
            } => {}
            () = closed.closed() => {}
        }
    });
    Ok(lines)
}

/// Which replicas' logs are where: of those that are placed, and of those that a node still speaks of.
fn sources(core: &Core, state: &State, query: &LogsQuery) -> BTreeSet<(ReplicaId, NodeId)> {
    let placed = state.placements_of(&query.service).map(|(replica, placement)| (replica, placement.node));
    let wanted = |replica: ReplicaId| query.replica.is_none_or(|wanted| wanted == replica);
    let mut sources: BTreeSet<(ReplicaId, NodeId)> = placed.filter(|(replica, _)| wanted(*replica)).collect();
    let overview = core.overview.borrow();
    for (node, seen) in overview.inventory.all() {
        let of_service = seen.replicas.iter().filter(|(_, report)| report.service == query.service);
        sources.extend(of_service.filter(|(replica, _)| wanted(**replica)).map(|(replica, _)| (*replica, node)));
    }
    sources
}

/// The nodes that have something left of a replica that is gone: each is asked for its last line.
async fn remembered(
    core: &Arc<Core>,
    service: &ServiceName,
    replica: ReplicaId,
    module: bool,
) -> Result<BTreeSet<(ReplicaId, NodeId)>, Refused> {
    let service = service.clone();
    let errand = LogsErrand { replica, service, module, since: None, tail: Some(1), follow: false };
    let mut asked = JoinSet::new();
    for node in core.sessions.connected() {
        let (core, errand) = (core.clone(), errand.clone());
        asked.spawn(async move {
            // Kept open: one line fits.
            let (line, _lines) = mpsc::channel(STREAM_QUEUE);
            let (last, ended) = pass_on(&core, node, errand, &line).await;
            ended.map(|()| last.map(|_| (replica, node)))
        });
    }
    let (mut found, mut broken) = (BTreeSet::new(), Vec::new());
    while let Some(answer) = asked.join_next().await {
        match answer {
            Ok(Ok(source)) => found.extend(source),
            Ok(Err(why)) => broken.push(why),
            // One that panicked has told nothing.
            Err(_) => {}
        }
    }
    if found.is_empty() && !broken.is_empty() {
        return Err(incomplete(&broken));
    }
    Ok(found)
}

fn incomplete(broken: &[Broken]) -> Refused {
    let told: Vec<String> = broken.iter().map(ToString::to_string).collect();
    failed(told.join("; "))
}

struct Job {
    core: Arc<Core>,
    query: LogsQuery,
    module: bool,
}

impl Job {
    /// Everything that has been written, in order; then what of it could not be read.
    async fn read(&self, sources: BTreeSet<(ReplicaId, NodeId)>, send: mpsc::Sender<Result<LogLine, Refused>>) {
        // A tail of what matches is not what matches in a tail.
        let tail = self.query.tail.filter(|_| self.query.grep.is_none());
        let mut readers = JoinSet::new();
        let mut queues = Vec::new();
        for (replica, node) in sources {
            let (line, lines) = mpsc::channel(STREAM_QUEUE);
            let errand = self.errand(replica, self.query.since, tail, false);
            let core = self.core.clone();
            readers.spawn(async move {
                if let (_, Err(broken)) = pass_on(&core, node, errand, &line).await {
                    // Else nobody reads any more.
                    let _ = line.send(Err(broken)).await;
                }
            });
            queues.push(lines);
        }
        let mut broken = Vec::new();
        let mut heads: Vec<Option<LogLine>> = Vec::new();
        for queue in &mut queues {
            heads.push(next_line(queue, &mut broken).await);
        }
        let last = self.query.tail.map(|tail| usize::try_from(tail).unwrap_or(usize::MAX));
        let (mut kept, mut bytes) = (VecDeque::<LogLine>::new(), 0);
        loop {
            let earliest = heads.iter().enumerate().filter_map(|(at, head)| Some((head.as_ref()?.at, at))).min();
            let Some((_, at)) = earliest else { break };
            let next = next_line(&mut queues[at], &mut broken).await;
            let Some(line) = std::mem::replace(&mut heads[at], next) else { break };
            if !self.matches(&line) {
                continue;
            }
            match last {
                None => {
                    if send.send(Ok(line)).await.is_err() {
                        return;
                    }
                }
                Some(last) => {
                    bytes += line.text.len();
                    kept.push_back(line);
                    while (kept.len() > last || bytes > TAIL_BYTES_MAX)
                        && let Some(oldest) = kept.pop_front()
                    {
                        bytes -= oldest.text.len();
                    }
                }
            }
        }
        for line in kept {
            if send.send(Ok(line)).await.is_err() {
                return;
            }
        }
        if !broken.is_empty() {
            // Else nobody reads any more.
            let _ = send.send(Err(incomplete(&broken))).await;
        }
    }

    /// What is being written, by the replicas there are and those that come.
    async fn follow(&self, mut sources: BTreeSet<(ReplicaId, NodeId)>, send: mpsc::Sender<Result<LogLine, Refused>>) {
        let (line, mut lines) = mpsc::channel(STREAM_QUEUE);
        let mut readers = JoinSet::new();
        let start = |readers: &mut JoinSet<()>, replica, node, first| {
            // One that comes later is read from its beginning.
            let (since, tail) = if first { (self.query.since, self.query.tail) } else { (None, None) };
            let errand = self.errand(replica, since, tail, true);
            readers.spawn(keep_following(self.core.clone(), node, errand, line.clone()));
        };
        for (replica, node) in &sources {
            start(&mut readers, *replica, *node, true);
        }
        let mut states = self.core.raft.watch();
        let mut held: Vec<LogLine> = Vec::new();
        let mut due: Option<Instant> = None;
        loop {
            tokio::select! {
                Some(read) = lines.recv() => {
                    // What is ours to say is said whatever is looked for.
                    let line = read.map_or_else(|broken| Some(broken.line()), |line| self.matches(&line).then_some(line));
                    if let Some(line) = line {
                        held.push(line);
                        due.get_or_insert_with(|| Instant::now() + REORDER_WINDOW);
                    }
                    if held.len() >= HELD_MAX {
                        due = Some(Instant::now());
                    }
                }
                () = sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {
                    due = None;
                    // Stable: lines of the same moment stay as they came.
                    held.sort_by_key(|line| line.at);
                    for line in held.drain(..) {
                        if send.send(Ok(line)).await.is_err() {
                            return;
                        }
                    }
                }
                changed = states.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    let state = states.borrow_and_update().clone();
                    if self.query.replica.is_none() {
                        for (replica, placement) in state.placements_of(&self.query.service) {
                            if sources.insert((replica, placement.node)) {
                                start(&mut readers, replica, placement.node, false);
                            }
                        }
                    }
                }
                // Readers end with their replicas.
                Some(_) = readers.join_next() => {}
            }
        }
    }

    fn matches(&self, line: &LogLine) -> bool {
        self.query.grep.as_ref().is_none_or(|wanted| line.text.contains(wanted.as_str()))
    }

    fn errand(&self, replica: ReplicaId, since: Option<Timestamp>, tail: Option<u32>, follow: bool) -> LogsErrand {
        let service: ServiceName = self.query.service.clone();
        LogsErrand { replica, service, module: self.module, since, tail, follow }
    }
}

impl Broken {
    /// Among the lines that are followed.
    fn line(&self) -> LogLine {
        let Broken { replica, node, .. } = *self;
        LogLine {
            at: now(),
            replica,
            node,
            stream: LogStream::Stderr,
            text: format!("orca: {self}; it is tried again"),
        }
    }
}

/// A replica's next line. That it breaks off is kept for the end.
async fn next_line(queue: &mut mpsc::Receiver<Read>, broken: &mut Vec<Broken>) -> Option<LogLine> {
    queue.recv().await?.map_err(|why| broken.push(why)).ok()
}

/// Passes one replica's lines on, until there are no more; tells the time of the last, and how it ended.
async fn pass_on(
    core: &Core,
    node: NodeId,
    errand: LogsErrand,
    to: &mpsc::Sender<Read>,
) -> (Option<Timestamp>, Result<(), Broken>) {
    let replica = errand.replica;
    let broken = |reason| Err(Broken { replica, node, reason });
    let mut last = None;
    let mut stream = match core.sessions.errand(node, &Errand::Logs(errand)).await {
        Ok(stream) => stream,
        Err(error) => return (last, broken(chain(&error))),
    };
    loop {
        match stream.next::<LogRead>().await {
            Ok(Some(LogRead::Line(line))) => {
                last = Some(line.at);
                if to.send(Ok(line)).await.is_err() {
                    return (last, Ok(()));
                }
            }
            Ok(Some(LogRead::Failed { failed })) => return (last, broken(failed)),
            Ok(None) => return (last, Ok(())),
            Err(error) => return (last, broken(chain(&error))),
        }
    }
}

/// The same again and again, as long as the replica is placed: its container may be restarted, or its node away.
async fn keep_following(core: Arc<Core>, node: NodeId, mut errand: LogsErrand, to: mpsc::Sender<Read>) {
    let mut failures = 0;
    loop {
        let replica = errand.replica;
        let (last, ended) = pass_on(&core, node, errand.clone(), &to).await;
        if let Some(last) = last {
            errand.since = Some(last + Duration::from_millis(1));
            errand.tail = None;
        }
        if ended.is_ok() || last.is_some() {
            failures = 0;
        }
        if let Err(broken) = ended {
            failures += 1;
            if failures == FAILURES_UNTOLD + 1 && to.send(Err(broken)).await.is_err() {
                return;
            }
        }
        if !core.raft.state().placements.contains_key(&replica) {
            return;
        }
        sleep(AGAIN).await;
    }
}
