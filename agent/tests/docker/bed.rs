//! A test's own corner of the real engine: a cluster label and a project of its own, taken away at the end.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use orca_agent::docker::{Config, Docker, Events, Notice, Unopened, socket_from_environment};
use orca_cluster::goal::{Container, Duty, ReplicaGoal, Workload};
use orca_cluster::id::{Label, ReplicaId, Revision, ServiceName};
use orca_cluster::node::{Finished, Seen};
use orca_cluster::replica::Cause;
use orca_cluster::resource::Resources;
use orca_cluster::secret::SecretName;
use orca_cluster::spec::{Deploy, HostAccess, SecretsAs, Strategy};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::{JoinHandle, JoinSet};
use zeroize::Zeroizing;

/// Longest that anything a test waits for may take, on a machine under load.
pub const PATIENCE: Duration = Duration::from_secs(30);

pub struct Bed {
    pub docker: Docker,
    pub config: Config,
    pub project: Label,
}

impl Bed {
    pub fn new(name: &str) -> Bed {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let cluster = format!("test-{name}-{}-{number}", std::process::id());
        let project = Label::new(&cluster).unwrap();
        let config = Config {
            socket: socket_from_environment(),
            cluster,
            runtime_directory: "/run/orca-test".into(),
            state_directories: vec![],
        };
        assert!(
            run("docker", &["version", "--format", "{{.Server.Version}}"]).is_ok(),
            "no Docker engine answers; `cargo xtask test` starts one and builds the images"
        );
        Bed { docker: Docker::new(config.clone()), config, project }
    }

    /// A replica of the test service that does nothing special.
    pub fn goal(&self) -> ReplicaGoal {
        ReplicaGoal {
            service: ServiceName::new(self.project.clone(), Label::new("web").unwrap()),
            revision: Revision(1),
            duty: Duty::Run,
            workload: Workload::Container(Container {
                image: "orca-test/app:1".to_owned(),
                digest: None,
                pull: false,
                registry: None,
                command: vec![],
                secrets_as: SecretsAs::Env,
                volumes: vec![],
                host: HostAccess::default(),
            }),
            port: Some(8080),
            env: BTreeMap::new(),
            secrets: BTreeMap::new(),
            resources: Resources::default(),
            liveness: None,
            readiness: None,
            runs: BTreeMap::new(),
            deploy: Deploy {
                strategy: Strategy::Rolling,
                max_unavailable: 0,
                max_surge: 1,
                ready_timeout: Duration::from_secs(60),
                drain_timeout: Duration::from_secs(10),
                stop_grace: Duration::from_secs(10),
                auto_promote: None,
            },
        }
    }

    pub fn goal_with<'a>(&self, change: impl FnOnce(&mut ReplicaGoal, &mut BTreeMap<&'a str, &'a str>)) -> ReplicaGoal {
        let (mut goal, mut env) = (self.goal(), BTreeMap::new());
        change(&mut goal, &mut env);
        goal.env = env.into_iter().map(|(name, text)| (name.to_owned(), text.parse().unwrap())).collect();
        goal
    }

    pub async fn fetch(&self, goal: &ReplicaGoal) -> Result<(String, Option<String>, bool), Cause> {
        match self.docker.fetch(goal, &open, |_| {}).await {
            Finished::Fetched { image, digest, pulled } => Ok((image, digest, pulled.is_some())),
            Finished::Failed(cause) => Err(cause),
            other => panic!("{other:?}"),
        }
    }

    pub async fn create(&self, replica: ReplicaId, goal: &ReplicaGoal) -> Finished {
        let (image, _, _) = self.fetch(goal).await.unwrap();
        self.docker.create(replica, goal, &image, &[], &open).await
    }

    pub async fn start(&self, replica: ReplicaId, goal: &ReplicaGoal) -> Finished {
        self.docker.start(replica, goal, &open).await
    }

    /// Has a replica running, and gives where.
    pub async fn up(&self, replica: ReplicaId, goal: &ReplicaGoal) -> std::net::SocketAddr {
        assert_eq!(self.create(replica, goal).await, Finished::Created);
        match self.start(replica, goal).await {
            Finished::Started { address } => address.unwrap(),
            other => panic!("{other:?}"),
        }
    }

    pub fn container(&self, replica: ReplicaId) -> String {
        format!("orca-{}-web-{replica}", self.project)
    }

    pub fn inspect(&self, replica: ReplicaId) -> String {
        run("docker", &["inspect", &self.container(replica)]).unwrap()
    }

    /// The same corner by way of a relay, whose answers to some requests are these.
    pub fn relayed(&self, answer: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> (Docker, Relay) {
        let place = tempfile::tempdir().unwrap();
        let mut config = self.config.clone();
        config.socket = place.path().join("docker.sock");
        let mut relay = Relay::start(&config.socket, &self.config.socket, answer);
        relay.place = Some(place);
        (Docker::new(config), relay)
    }

    pub fn network_exists(&self) -> bool {
        run("docker", &["network", "inspect", &format!("orca-{}", self.project)]).is_ok()
    }
}

impl Drop for Bed {
    /// A test that failed has left things behind; the engine has room for few networks.
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(format!("/dev/shm/orca-0/{}", self.config.cluster));
        let label = format!("label=orca.cluster={}", self.config.cluster);
        for (list, remove) in [
            (&["ps", "--all", "--quiet"][..], &["rm", "--force", "--volumes"][..]),
            (&["network", "ls", "--quiet"], &["network", "rm"]),
            (&["volume", "ls", "--quiet"], &["volume", "rm", "--force"]),
        ] {
            let found = run("docker", &[list, &["--filter", &label]].concat()).unwrap_or_default();
            for id in found.lines() {
                let _ = run("docker", &[remove, &[id]].concat());
            }
        }
    }
}

/// What secrets are in these tests: `ORCA-CANARY-` and the name.
pub fn open(name: &SecretName) -> Result<Zeroizing<String>, Unopened> {
    match name.name() {
        "ABSENT" => Err(Unopened::Absent),
        "DAMAGED" => Err(Unopened::Damaged("it was sealed to another node".to_owned())),
        "REGISTRY_PASSWORD" => Ok("p?>~~~???w".to_owned().into()),
        other => Ok(format!("ORCA-CANARY-{other}").into()),
    }
}

/// Waits for a notice that this gives something for.
pub async fn wait<T>(events: &mut Events, mut find: impl FnMut(Notice) -> Option<T>) -> T {
    let search = async {
        loop {
            if let Some(found) = find(events.next().await) {
                return found;
            }
        }
    };
    tokio::time::timeout(PATIENCE, search).await.expect("it was not seen in time")
}

pub async fn wait_seen(events: &mut Events, is_it: impl Fn(&Seen) -> bool) -> Seen {
    wait(events, |notice| match notice {
        Notice::Seen(seen) if is_it(&seen) => Some(seen),
        _ => None,
    })
    .await
}

pub fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output().map_err(|e| e.to_string())?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

/// GET, as text.
pub async fn get(address: std::net::SocketAddr, target: &str) -> std::io::Result<String> {
    let mut stream = tokio::net::TcpStream::connect(address).await?;
    stream.write_all(format!("GET {target} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").as_bytes()).await?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await?;
    Ok(answer.split_once("\r\n\r\n").map_or(String::new(), |(_, body)| body.to_owned()))
}

/// Tries until it succeeds.
pub async fn eventually<T, E: std::fmt::Debug>(mut attempt: impl AsyncFnMut() -> Result<T, E>) -> T {
    let deadline = tokio::time::Instant::now() + PATIENCE;
    loop {
        match attempt().await {
            Ok(value) => return value,
            Err(error) => assert!(tokio::time::Instant::now() < deadline, "still: {error:?}"),
        }
        tokio::task::yield_now().await;
    }
}

/// Passes connections on to the real socket until it is dropped; then they all break. It may answer a connection's first
/// request in the engine's place, by its head, and then says no more.
pub struct Relay {
    connections: JoinHandle<()>,
    /// Where its socket is, if that is its own.
    place: Option<tempfile::TempDir>,
}

impl Relay {
    pub fn start(at: &Path, to: &Path, answer: impl Fn(&str) -> Option<String> + Send + Sync + 'static) -> Relay {
        let _ = std::fs::remove_file(at);
        let listener = UnixListener::bind(at).unwrap();
        let (to, answer) = (to.to_owned(), Arc::new(answer));
        let connections = tokio::spawn(async move {
            let mut passing = JoinSet::new();
            loop {
                let (near, _) = listener.accept().await.unwrap();
                let far = UnixStream::connect(&to).await.unwrap();
                let answer = Arc::clone(&answer);
                // A connection that breaks is for whoever made it to see.
                passing.spawn(async move { drop(pass(near, far, &*answer).await) });
            }
        });
        Relay { connections, place: None }
    }
}

async fn pass(
    mut near: UnixStream,
    mut far: UnixStream,
    answer: &(impl Fn(&str) -> Option<String> + Sync),
) -> std::io::Result<()> {
    let mut head = Vec::new();
    while !head.windows(4).any(|end| end == b"\r\n\r\n") {
        if near.read_buf(&mut head).await? == 0 {
            return Ok(());
        }
    }
    if let Some(answer) = answer(&String::from_utf8_lossy(&head)) {
        near.write_all(answer.as_bytes()).await?;
        return std::future::pending().await;
    }
    far.write_all(&head).await?;
    tokio::io::copy_bidirectional(&mut near, &mut far).await.map(drop)
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.connections.abort();
    }
}

/// A registry of the test's own, on a free port of this machine.
pub struct Registry {
    process: std::process::Child,
    pub address: String,
    _place: tempfile::TempDir,
}

impl Registry {
    /// One that serves the files in `storage`; with `password`, only to the user `reader`.
    pub async fn start(storage: &Path, password: Option<&str>) -> Registry {
        let place = tempfile::tempdir().unwrap();
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let address = format!("127.0.0.1:{port}");
        let mut config = format!(
            "version: 0.1\nlog: {{level: error}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: \"{address}\"}}\n",
            storage.display()
        );
        if let Some(hash) = password {
            let file: PathBuf = place.path().join("htpasswd");
            std::fs::write(&file, format!("reader:{hash}\n")).unwrap();
            config.push_str(&format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", file.display()));
        }
        let file = place.path().join("config.yml");
        std::fs::write(&file, config).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(&file).stdout(Stdio::null()).stderr(Stdio::null());
        let process = command.spawn().expect("docker-registry is missing; `cargo xtask test` installs it");
        eventually(async || tokio::net::TcpStream::connect(&address).await).await;
        Registry { process, address, _place: place }
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
