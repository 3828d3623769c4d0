//! A node to test with, an agent that says every replica is ready, and somebody who asks.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use orca_cluster::goal::{Duty, Goal, Workload};
use orca_cluster::id::{Label, ServiceName};
use orca_cluster::replica::{Facts, Observed, Phase, ReplicaReport, Usage};
use orca_cluster::spec::toml::{SourceFile, project};
use orca_cluster::state::{Role, State};
use orca_cluster::time::Timestamp;
use orca_control::{Config, Control, Founded, Handle, Layout, RunError, StartError, UnsealSource};
use orca_wire::identity::{Identity, Token};
use orca_wire::message::agent::{
    AgentRequest, Attach, Errand, ExecOutput, FromAgent, LogLine, LogRead, LogStream, ToAgent,
};
use orca_wire::message::client::{CreateToken, Deploy, Request, Response};
use orca_wire::{Access, Connection, Endpoint, Plane, Stream, Wanted};
use tempfile::TempDir;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;

/// Generous: two cores that others use too.
pub const PATIENCE: Duration = Duration::from_secs(20);
const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

pub fn now() -> Timestamp {
    Timestamp(SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_millis() as u64)
}

pub fn config(root: &Path) -> Config {
    Config {
        data_dir: root.join("data"),
        listen_quic: ANY_PORT,
        listen_http: ANY_PORT,
        node_name: "one".to_owned(),
        cluster_name: Label::new("test").unwrap(),
        unseal: UnsealSource::File(root.join("unseal.key")),
        advertise: None,
    }
}

pub struct Node {
    pub handle: Handle,
    pub root: Arc<TempDir>,
    pub founded: Option<Founded>,
    running: JoinHandle<Result<(), RunError>>,
}

impl Node {
    pub async fn found() -> Node {
        Node::open(Arc::new(tempfile::tempdir().unwrap())).await.unwrap()
    }

    pub async fn open(root: Arc<TempDir>) -> Result<Node, StartError> {
        let (mut control, handle) = Control::start(config(root.path())).await?;
        let founded = control.founded();
        let running = tokio::spawn(control.run());
        let mut overviews = handle.overview();
        let led = timeout(PATIENCE, overviews.wait_for(|overview| overview.term.is_some())).await;
        led.expect("a node that is alone soon leads").unwrap();
        Ok(Node { handle, root, founded, running })
    }

    pub async fn stop(self) -> Arc<TempDir> {
        self.handle.shutdown();
        timeout(PATIENCE, self.running).await.unwrap().unwrap().unwrap();
        self.root
    }

    pub fn data(&self) -> PathBuf {
        self.root.path().join("data")
    }

    pub fn token(&self) -> Token {
        self.founded.as_ref().unwrap().token.parse().unwrap()
    }

    pub async fn admin(&self) -> Asker {
        let identity = Identity::load(&Layout::new(&self.data()).admin(), None, now()).unwrap();
        Asker::dial(self, Access::Certificate(identity)).await.unwrap()
    }

    /// Somebody with a new token.
    pub async fn user(&self, role: Role, project: Option<&str>) -> (Asker, Token) {
        let project = project.map(|name| Label::new(name).unwrap());
        let create = CreateToken { name: format!("{role:?}").to_lowercase(), role, project, expires: None };
        let Response::Token { text, .. } = self.admin().await.ask(Request::CreateToken(create)).await else {
            panic!("no token");
        };
        let token: Token = text.parse().unwrap();
        (Asker::dial(self, Access::Token(token.clone())).await.unwrap(), token)
    }

    pub async fn agent(&self) -> Agent {
        Agent::attach(self).await
    }

    pub async fn until(&self, what: &str, holds: impl Fn(&State) -> bool) -> Arc<State> {
        let mut states = self.handle.state();
        let found = timeout(PATIENCE, states.wait_for(|state| holds(state))).await;
        match found {
            Ok(found) => found.unwrap().clone(),
            Err(_) => panic!("never: {what}; {:#?}", self.handle.state().borrow().services),
        }
    }

    /// Waits until the service's rollout is over.
    pub async fn settled(&self, service: &str) -> Arc<State> {
        let name: ServiceName = service.parse().unwrap();
        self.until(&format!("{service} settled"), |state| {
            state.services.get(&name).is_some_and(|one| one.rollout.is_none() && one.settled == Some(one.target))
        })
        .await
    }
}

/// A person or program, over QUIC.
pub struct Asker {
    pub connection: Connection,
    _endpoint: Endpoint,
}

impl Asker {
    pub async fn dial(node: &Node, access: Access) -> Result<Asker, String> {
        let endpoint = Endpoint::client(access).unwrap();
        let dialed = endpoint.dial(node.handle.quic_address(), Plane::Client, Wanted::Anyone).await;
        Ok(Asker { connection: dialed.map_err(|error| error.to_string())?, _endpoint: endpoint })
    }

    pub async fn ask(&self, request: Request) -> Response {
        self.connection.request(&request, PATIENCE).await.unwrap()
    }

    pub async fn open(&self, request: Request) -> Stream {
        self.connection.open(&request).await.unwrap()
    }

    pub async fn deploy(&self, text: &str) -> Response {
        self.ask(Request::Deploy(written(text))).await
    }
}

/// The deploy of a file, as the CLI would send it.
pub fn written(text: &str) -> Deploy {
    let file = SourceFile { name: "service.toml".to_owned(), text: text.to_owned() };
    let project = project(&file, &Label::new("shop").unwrap()).unwrap();
    Deploy { project, only: Vec::new(), prune: false, replace: false, if_generation: None, settings: None }
}

pub fn web(image: &str) -> String {
    format!("[[service]]\nname = \"web\"\nimage = \"{image}\"\nport = 80\nreplicas = 2\n")
}

/// Speaks for a node whose replicas are all ready at once.
pub struct Agent {
    pub goals: watch::Receiver<Goal>,
    work: JoinHandle<()>,
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.work.abort();
    }
}

impl Agent {
    async fn attach(node: &Node) -> Agent {
        let identity = Identity::load(&Layout::new(&node.data()).node(), None, now()).unwrap();
        let endpoint = Endpoint::client(Access::Certificate(identity)).unwrap();
        let connection = endpoint.dial(node.handle.quic_address(), Plane::Agent, Wanted::Anyone).await.unwrap();
        let attach = AgentRequest::Attach(Attach { version: "test".to_owned() });
        let stream = connection.open(&attach).await.unwrap();
        let (told, goals) = watch::channel(Goal::default());
        let work = tokio::spawn(async move {
            let errands = connection.clone();
            tokio::select! {
                () = work(stream, told) => {}
                _ = errands.serve(run) => {}
            }
            drop(endpoint);
        });
        Agent { goals, work }
    }

    /// A goal with so many replicas, all of images whose digest is known: nothing about them changes any more.
    pub async fn pinned(&mut self, count: usize) -> Goal {
        let is_pinned = |workload: &Workload| match workload {
            Workload::Container(container) => container.digest.is_some(),
            Workload::Module(_) => true,
        };
        let all = |goal: &Goal| goal.replicas.values().all(|replica| is_pinned(&replica.workload));
        self.until("pinned replicas", |goal| goal.replicas.len() == count && all(goal)).await
    }

    pub async fn until(&mut self, what: &str, holds: impl Fn(&Goal) -> bool) -> Goal {
        let found = timeout(PATIENCE, self.goals.wait_for(|goal| holds(goal))).await;
        found.unwrap_or_else(|_| panic!("no goal with {what}")).unwrap().clone()
    }
}

async fn work(mut stream: Stream, told: watch::Sender<Goal>) {
    let mut interval = tokio::time::interval(Duration::from_millis(100));
    let mut last = Observed::default();
    loop {
        tokio::select! {
            goal = stream.receiver.next::<ToAgent>() => {
                let Ok(Some(ToAgent::Goal(goal))) = goal else { return };
                last = observed(&goal, &last);
                told.send_replace(*goal);
            }
            _ = interval.tick() => {}
        }
        last.at = now();
        last.traffic.at = now();
        if stream.sender.send(&FromAgent::Report(Box::new(last.clone()))).await.is_err() {
            return;
        }
    }
}

fn observed(goal: &Goal, last: &Observed) -> Observed {
    let replicas = goal.replicas.iter().map(|(id, replica)| {
        let phase = match replica.duty {
            Duty::Run => Phase::Ready,
            Duty::Stop | Duty::StopAndErase => Phase::Gone,
        };
        let before = last.replicas.get(id).filter(|before| before.phase == phase);
        let report = ReplicaReport {
            service: replica.service.clone(),
            revision: replica.revision,
            phase,
            since: before.map_or(now(), |before| before.since),
            address: Some(SocketAddr::from(([127, 0, 0, 1], 80))),
            digest: match &replica.workload {
                Workload::Container(container) => Some(format!("sha256:of {}", container.image)),
                Workload::Module(_) => None,
            },
            restarts: 0,
            failures: 0,
            last_exit: None,
            trouble: None,
            usage: Usage::default(),
            pulled: None,
            pulling: None,
            ready_after_ms: Some(1),
            on_trial: false,
            runs: BTreeMap::new(),
        };
        (*id, report)
    });
    Observed {
        at: now(),
        replicas: replicas.collect(),
        acknowledged: (goal.tables.number, goal.tables.generation),
        traffic: Default::default(),
        facts: Facts { host_name: "one".to_owned(), version: "test".to_owned(), ..Facts::default() },
    }
}

/// Lines are alternately of one replica and of the other, the first of which has no end for `shop/cut` and cannot be
/// read further for `shop/torn`; a command prints what is typed.
async fn run(errand: Errand, mut stream: Stream) {
    match errand {
        Errand::Logs(errand) => {
            for at in 0..3 {
                let line = LogLine {
                    at: Timestamp(1_000 + at * 10 + errand.replica.0 % 10),
                    replica: errand.replica,
                    node: orca_cluster::id::NodeId(2),
                    stream: LogStream::Stdout,
                    text: format!("line {at}"),
                };
                if errand.since.is_none_or(|since| line.at >= since) {
                    stream.send(&line).await.unwrap();
                }
            }
            if errand.service.service.as_str() == "cut" && errand.replica.0 % 2 == 1 {
                // Dropped, it breaks off; what was sent may be lost with it.
                return;
            }
            if errand.service.service.as_str() == "torn" && errand.replica.0 % 2 == 1 {
                let failed = LogRead::Failed { failed: "too many open files".to_owned() };
                return stream.answer(&failed).await.unwrap();
            }
            stream.finish().await.unwrap();
        }
        Errand::Exec(errand) => {
            let text = errand.command.join(" ").into_bytes();
            stream.send(&ExecOutput::Stdout(orca_cluster::secret::Opaque(text))).await.unwrap();
            stream.send(&ExecOutput::Exit { code: 3 }).await.unwrap();
            stream.finish().await.unwrap();
        }
    }
}

/// What an HTTP request was answered with.
pub struct Answered {
    pub status: u16,
    pub body: String,
}

impl Answered {
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {}", self.body))
    }
}

pub async fn http(node: &Node, token: Option<&Token>, method: &str, path: &str, body: &str) -> Answered {
    http_with(node, token, method, path, body, None).await
}

pub async fn http_with(
    node: &Node,
    token: Option<&Token>,
    method: &str,
    path: &str,
    body: &str,
    media: Option<&str>,
) -> Answered {
    let (answered, is_whole) = http_cut_or_whole(node, token, method, path, body, media).await;
    assert!(is_whole, "cut off after {}", answered.body);
    answered
}

/// Also tells whether the body came to its end.
pub async fn http_cut_or_whole(
    node: &Node,
    token: Option<&Token>,
    method: &str,
    path: &str,
    body: &str,
    media: Option<&str>,
) -> (Answered, bool) {
    let socket = tokio::net::TcpStream::connect(node.handle.http_address()).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(socket)).await.unwrap();
    let connection = tokio::spawn(connection);
    let mut request = hyper::Request::builder().method(method).uri(path).header("host", "localhost");
    if let Some(token) = token {
        request = request.header("authorization", format!("Bearer {}", token.reveal().as_str()));
    }
    if let Some(media) = media {
        request = request.header("content-type", media).header("accept", media);
    }
    let request = request.body(Full::new(Bytes::from(body.to_owned()))).unwrap();
    let answer = async {
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let (mut body, mut bytes) = (response.into_body(), Vec::new());
        let is_whole = loop {
            match body.frame().await {
                Some(Ok(frame)) => bytes.extend_from_slice(&frame.into_data().unwrap_or_default()),
                Some(Err(_)) => break false,
                None => break true,
            }
        };
        (Answered { status, body: String::from_utf8(bytes).unwrap() }, is_whole)
    };
    let answered = timeout(PATIENCE, answer).await.unwrap();
    connection.abort();
    answered
}

/// Every byte under a directory.
pub fn files(directory: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => found.extend(files(&path)),
            false => found.push((path.clone(), std::fs::read(&path).unwrap())),
        }
    }
    found
}
