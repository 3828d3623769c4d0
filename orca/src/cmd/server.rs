//! `orca server`: control plane, agent and proxy of this node, in one process. What starts here in which order, and
//! what happens when one of them ends, is all this file knows.

use std::io::IsTerminal as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use orca_agent::docker::socket_from_environment;
use orca_agent::hands::chain;
use orca_agent::{Agent, wasm};
use orca_cluster::id::Label;
use orca_control::vault::UNSEAL_KEY_VARIABLE;
use orca_control::{Control, Founded, Handle, Layout, StartError, UnsealSource};
use orca_dataplane::{AccessLog, DataPlane, Limits};
use orca_wire::identity::Identity;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use tracing_subscriber::EnvFilter;
use zeroize::Zeroizing;

use super::handover::{self, Door, Inheritance, Successor};
use crate::cli::{LogFormat, ServerArgs};
use crate::context::{Credential, write_founded};
use crate::exit::{Exit, Failure};
use crate::output::Output;

/// Files that may be open besides the proxy's connections: the store, the engine, the CLI.
const FILES_RESERVED: u64 = 256;
/// A connection takes a file for the client and one for the replica.
const FILES_PER_CONNECTION: u64 = 2;
/// How long requests that are under way may take to end when the server stops.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// And when it has handed over: nobody waits for the process to end.
const HANDOVER_GRACE: Duration = Duration::from_secs(60);
/// Before a control plane that has failed is opened again; doubles up to the second.
const REOPEN_PAUSE: Duration = Duration::from_secs(1);
const REOPEN_PAUSE_MAX: Duration = Duration::from_secs(30);
const PORT_PUBLIC: u16 = 80;
const PORT_UNPRIVILEGED: u16 = 8080;

/// A server that runs; [`stop`](Server::stop) it, or it is stopped where it is.
pub struct Server {
    pub handle: Handle,
    pub proxy: Vec<SocketAddr>,
    pub data: PathBuf,
    /// Told once, by the start that founded the cluster.
    pub founded: Option<Founded>,
    dataplane: DataPlane,
    agent: Agent,
    control: JoinHandle<()>,
    /// Ends the control plane.
    ending: CancellationToken,
    /// Modules run here; it must outlive the agent.
    _modules: Background,
}

/// A runtime that may be dropped anywhere: its threads are left to end by themselves.
struct Background(Option<tokio::runtime::Runtime>);

impl Background {
    fn handle(&self) -> tokio::runtime::Handle {
        self.0.as_ref().map(|runtime| runtime.handle().clone()).expect("taken only when it is dropped")
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

pub fn run(args: &ServerArgs, output: &Output) -> Result<ExitCode, Failure> {
    log(args.log_format, "info");
    runtime()?.block_on(async {
        let mut server = Server::start(args).await?;
        if let Some(founded) = server.founded.take() {
            introduce(&server, &founded, output);
        }
        for address in &server.proxy {
            info!(%address, "proxy listens");
        }
        let door = Door::open(&server.data).map_err(|error| Failure::from_error(Exit::General, &error))?;
        let ended = tokio::select! {
            ended = server.until_told() => ended.map(|()| None),
            asked = door.asked() => asked.map(Some).map_err(|error| Failure::from_error(Exit::General, &error)),
        };
        match ended {
            Ok(Some(successor)) => server.hand_over(door, successor).await,
            Ok(None) => server.stop().await,
            Err(failure) => {
                server.stop().await;
                return Err(failure);
            }
        }
        Ok(Exit::Done.into())
    })
}

/// Where the control plane and the agent run; the proxy, Raft and modules have threads of their own.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::from_error(Exit::General, &error))
}

pub fn log(format: LogFormat, level: &str) {
    // Whatever is asked for: bollard writes what it sends to the engine, secrets included.
    let always = "bollard=warn,hyper=warn,wasmtime=warn,cranelift=warn,openraft=warn";
    let wanted = std::env::var("ORCA_LOG").unwrap_or_else(|_| level.to_owned());
    let filter = EnvFilter::try_new(format!("{wanted},{always}")).unwrap_or_else(|_| EnvFilter::new(level));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::stderr().is_terminal())
        .with_writer(std::io::stderr);
    match format {
        LogFormat::Text => log.with_target(false).init(),
        LogFormat::Json => log.json().init(),
    }
}

impl Server {
    pub async fn start(args: &ServerArgs) -> Result<Server, Failure> {
        let failed = |error: &dyn std::error::Error| Failure::from_error(Exit::General, error);
        forbid_core();
        let data = args.data_dir.clone().map_or_else(default_data_dir, Ok)?;
        let name = args.name.clone().unwrap_or_else(host_name);
        let unseal = unseal_source(args, &data)?;
        let unseal_file = match &unseal {
            UnsealSource::File(path) => Some(path.clone()),
            UnsealSource::Variable(_) => None,
        };
        let config = orca_control::Config {
            data_dir: data.clone(),
            listen_quic: args.listen,
            listen_http: args.listen,
            node_name: name.clone(),
            cluster_name: Label::new(&name.to_lowercase()).unwrap_or_else(|_| Label::new("orca").expect("a label")),
            unseal,
            advertise: args.advertise.clone(),
            labels: Default::default(),
        };
        // The proxy's port first: it is the likeliest to be taken, and nothing has been made yet.
        let modules_runtime = Background(Some(wasm::runtime().map_err(|error| failed(&error))?));
        let agent_directory = data.join("agent");
        let modules = Agent::modules(&agent_directory, modules_runtime.handle()).map_err(|error| failed(&error))?;
        let inheritance = match args.take_over {
            true => handover::ask(&data).await.map_err(|error| failed(&error))?,
            false => None,
        };
        let (listeners, predecessor) = inheritance.map(Inheritance::take_apart).unzip();
        let dataplane = start_proxy(args, listeners, &modules)?;

        let (mut control, handle) = Control::start(config.clone()).await.map_err(|error| {
            let failure = Failure::from_error(Exit::General, &error);
            match error {
                StartError::Http { .. } | StartError::Quic { .. } => {
                    failure.fix("stop what uses it, or choose another with --listen ADDR:PORT")
                }
                _ => failure,
            }
        })?;
        let founded = control.founded();
        let (ending, identity) = (CancellationToken::new(), watch::Sender::new(handle.identity().borrow().clone()));
        let identities = identity.subscribe();
        let control = tokio::spawn(keep_control(config, control, handle.clone(), identity, ending.clone()));

        let quic = handle.quic_address();
        let config = orca_agent::Config {
            keys: data.join("node"),
            runtime_directory: PathBuf::from("/run/orca"),
            state_directories: std::iter::once(data.clone()).chain(unseal_file).collect(),
            docker_socket: socket_from_environment(),
            control: vec![SocketAddr::new(reachable(quic.ip()), quic.port())],
            identity: identities,
            directory: agent_directory,
        };
        let agent = Agent::start(config, modules, dataplane.clone()).await.map_err(|error| failed(&error))?;
        if let Some(predecessor) = predecessor {
            dataplane.serving().await;
            Inheritance::serves(predecessor).await.map_err(|error| failed(&error))?;
            info!("taken over from the server that ran before");
        }
        let proxy = dataplane.addresses();
        Ok(Server { handle, proxy, data, founded, dataplane, agent, control, ending, _modules: modules_runtime })
    }

    /// Until somebody asks it to stop, or it cannot go on.
    pub async fn until_told(&mut self) -> Result<(), Failure> {
        let failed = |error: &dyn std::error::Error| Failure::from_error(Exit::General, error);
        let mut terminate = signal(SignalKind::terminate()).map_err(|error| failed(&error))?;
        tokio::select! {
            _ = terminate.recv() => Ok(()),
            interrupted = tokio::signal::ctrl_c() => interrupted.map_err(|error| failed(&error)),
            ended = &mut self.control => ended.map_err(|panicked| failed(&panicked)),
            ended = self.agent.ended() => Err(failed(&ended)),
        }
    }

    /// Lets a successor take over: everything but the proxy ends, and the proxy when the successor serves.
    async fn hand_over(self, door: Door, mut successor: Successor) {
        info!("handing over to a successor");
        drop(self.agent);
        self.ending.cancel();
        if !self.control.is_finished() {
            // It has nothing more to say: it was told to stop.
            let _ = self.control.await;
        }
        loop {
            let given = match self.dataplane.listeners() {
                Ok(listeners) => successor.give(listeners).await,
                Err(error) => Err(error),
            };
            match given {
                Ok(()) => break,
                Err(error) => warn!(
                    %error,
                    "the successor does not serve; this process goes on serving by the routes it has, without control \
                     plane and agent: start `orca server --take-over` again"
                ),
            }
            match door.asked().await {
                Ok(next) => successor = next,
                Err(error) => {
                    warn!(%error, "nobody can ask for a handover any more");
                    break;
                }
            }
        }
        self.dataplane.shutdown(HANDOVER_GRACE).await;
    }

    /// Ends what this process does. Containers go on.
    pub async fn stop(self) {
        self.dataplane.shutdown(STOP_GRACE).await;
        drop(self.agent);
        self.ending.cancel();
        if !self.control.is_finished() {
            // It has nothing more to say: it was told to stop.
            let _ = self.control.await;
        }
    }

    pub fn address(&self) -> String {
        let quic = self.handle.quic_address();
        SocketAddr::new(reachable(quic.ip()), quic.port()).to_string()
    }
}

/// Runs the control plane, and opens it again when it could not go on: a disk that was full may have room again. What
/// runs is not touched, and requests are served by the routes there are; nothing can be changed meanwhile.
async fn keep_control(
    config: orca_control::Config,
    mut control: Control,
    mut handle: Handle,
    identity: watch::Sender<Identity>,
    ending: CancellationToken,
) {
    loop {
        let mut identities = handle.identity();
        let running = control.run();
        tokio::pin!(running);
        let ended = loop {
            tokio::select! {
                ended = &mut running => break ended,
                () = ending.cancelled() => {
                    handle.shutdown();
                    break running.await;
                }
                Ok(()) = identities.changed() => {
                    identity.send_replace(identities.borrow_and_update().clone());
                }
            }
        };
        let Err(fault) = ended else { return };
        error!(error = chain(&fault), "the control plane has stopped: what runs goes on, and nothing can be changed");
        let mut pause = REOPEN_PAUSE;
        (control, handle) = loop {
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = ending.cancelled() => return,
            }
            // A disk that is away is no reason to found another cluster in its place.
            let store = Layout::new(&config.data_dir).raft();
            if !store.try_exists().unwrap_or(false) {
                error!(path = %store.display(), "the store is not there; mount or restore it");
                pause = (pause * 2).min(REOPEN_PAUSE_MAX);
                continue;
            }
            match Control::start(config.clone()).await {
                Ok(opened) => break opened,
                Err(fault) => error!(error = chain(&fault), "the control plane cannot be opened again yet"),
            }
            pause = (pause * 2).min(REOPEN_PAUSE_MAX);
        };
        info!("the control plane is open again");
    }
}

/// What whoever founded the cluster must know: the token, once, and what to keep safe.
pub fn introduce(server: &Server, founded: &Founded, output: &Output) {
    let name =
        server.handle.state().borrow().cluster.as_ref().map(|cluster| cluster.name.to_string()).unwrap_or_default();
    output.complain(&format!("cluster `{name}` founded in {}\n", server.data.display()));
    match write_founded(&name, vec![server.address()], Credential::Identity(&founded.user)) {
        Ok(contexts) => output.complain(&format!("  this user's access is in {}\n", contexts.display())),
        // A service may have no home. The cluster is there all the same, and the token below opens it.
        Err(failure) => output.complain(&format!("  this user's access could not be kept: {}\n", failure.message)),
    }
    if let Some(key) = &founded.unseal_key {
        output
            .complain(&format!("  keep a copy of {}: without it a backup's secrets cannot be opened\n", key.display()));
    }
    output.complain(&format!("  administrator's token, shown this once: {}\n", *founded.token));
}

/// Keys that are open in memory would be in a core.
fn forbid_core() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    if let Err(error) = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        warn!(%error, "a crash of this process may leave a core with keys in it");
    }
}

fn start_proxy(
    args: &ServerArgs,
    inherited: Option<Vec<TcpListener>>,
    modules: &orca_agent::config::Modules,
) -> Result<DataPlane, Failure> {
    let workers = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let config = |address| orca_dataplane::Config {
        http: vec![address],
        workers,
        access_log: args.access_log.clone().map_or(AccessLog::Off, AccessLog::File),
        limits: Limits { connections_max: connections_max(), ..Limits::default() },
    };
    let any = |port| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    let started = match (inherited, args.http) {
        (Some(listeners), address) => {
            DataPlane::start_with(config(address.unwrap_or(any(PORT_PUBLIC))), listeners, modules.replicas.clone())
        }
        (None, Some(address)) => DataPlane::start(config(address), modules.replicas.clone()),
        (None, None) => DataPlane::start(config(any(PORT_PUBLIC)), modules.replicas.clone())
            .or_else(|_| DataPlane::start(config(any(PORT_UNPRIVILEGED)), modules.replicas.clone())),
    };
    started.map_err(|error| {
        Failure::from_error(Exit::General, &error).fix("choose where the proxy listens with --http ADDR:PORT")
    })
}

/// Four fifths of the files the process may open are for the proxy's connections.
fn connections_max() -> usize {
    let limit = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(1024);
    let connections = limit.saturating_sub(FILES_RESERVED) * 4 / 5 / FILES_PER_CONNECTION;
    usize::try_from(connections.max(64)).unwrap_or(usize::MAX)
}

/// An address of this machine under which a socket bound to `ip` is reached.
fn reachable(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn home() -> Result<PathBuf, Failure> {
    std::env::var_os("HOME")
        .map(PathBuf::from)
        .ok_or_else(|| Failure::input("there is no home directory to keep data in").fix("give --data-dir DIR"))
}

pub fn default_data_dir() -> Result<PathBuf, Failure> {
    if is_root() {
        return Ok(PathBuf::from("/var/lib/orca"));
    }
    let share = std::env::var_os("XDG_DATA_HOME").map(PathBuf::from);
    Ok(share.map_or_else(|| home().map(|home| home.join(".local/share")), Ok)?.join("orca"))
}

/// The variable, the flag, or a file beside the data directory: never in it, or each copy of the data would hold
/// its own key.
fn unseal_source(args: &ServerArgs, data: &Path) -> Result<UnsealSource, Failure> {
    if let Ok(value) = std::env::var(UNSEAL_KEY_VARIABLE) {
        return Ok(UnsealSource::Variable(Zeroizing::new(value)));
    }
    if let Some(path) = &args.unseal_key {
        return Ok(UnsealSource::File(path.clone()));
    }
    if is_root() && args.data_dir.is_none() {
        return Ok(UnsealSource::File(PathBuf::from("/etc/orca/unseal.key")));
    }
    let absolute = std::path::absolute(data).map_err(|error| Failure::from_error(Exit::General, &error))?;
    let mut name = absolute.file_name().unwrap_or_default().to_owned();
    name.push(".unseal-key");
    Ok(UnsealSource::File(absolute.with_file_name(name)))
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}
