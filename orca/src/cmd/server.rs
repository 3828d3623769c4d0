//! `orca server`: control plane, agent and proxy of this node, in one process. What starts here in which order, and
//! what happens when one of them ends, is all this file knows.
//!
//! Where something ran before, proxy and agent start from the ledger and need no control plane; it is opened beside
//! them, and tried again for as long as it cannot be. Where nothing ran, a control plane that cannot be opened is the
//! end of the start: a person is about to see it.

mod introduce;
mod keeper;
pub mod place;

use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use orca_agent::docker::socket_from_environment;
use orca_agent::{Agent, wasm};
use orca_cluster::id::Label;
use orca_cluster::traffic::Legacy;
use orca_control::{Control, Founded, Front, UnsealSource};
use orca_dataplane::{AccessLog, DataPlane, FILES_PER_WORKER, Limits};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;
use tracing::{Level, info, warn};

pub use introduce::introduce;
use keeper::{Keeper, Standing, decided, not_started};
use place::{default_data_dir, lock, unseal_source};

use super::handover::{self, Door, Heir, Inheritance, Successor};
use crate::cli::ServerArgs;
use crate::exit::{Exit, Failure};
use crate::log;
use crate::moment::now;
use crate::output::Output;

/// Files that may be open besides the proxy's connections: the store, the engine, the CLI.
const FILES_RESERVED: u64 = 256;
/// A connection takes a file for the client and one for the replica.
const FILES_PER_CONNECTION: u64 = 2;
/// With fewer the proxy is of no use, whatever else then lacks files.
const CONNECTIONS_MIN: u64 = 64;
/// How long requests that are under way may take to end when the server stops.
const STOP_GRACE: Duration = Duration::from_secs(10);
/// And when it has handed over: nobody waits for the process to end.
const HANDOVER_GRACE: Duration = Duration::from_secs(60);
/// For the control plane after that: it hands over leadership and closes its store.
const CONTROL_STOP_MAX: Duration = Duration::from_secs(15);
/// For all of it: whoever asked it to stop is not left waiting for what never ends.
const STOP_MAX: Duration = Duration::from_secs(30);
/// How long a successor waits to know whether its control plane opens. Past it, it serves without.
const DECISION_MAX: Duration = Duration::from_secs(10);
/// Where the proxy listens unless it is told otherwise.
pub const PORT_PUBLIC: u16 = 80;
/// If it may not have that.
pub const PORT_UNPRIVILEGED: u16 = 8080;

/// A server that runs; [`stop`](Server::stop) it, or it is stopped where it is.
pub struct Server {
    pub proxy: Vec<SocketAddr>,
    pub data: PathBuf,
    /// Told once, by the start that founded the cluster.
    pub founded: Option<Founded>,
    /// Where the control plane is reached from this machine.
    control_address: SocketAddr,
    dataplane: DataPlane,
    agent: Agent,
    control: JoinHandle<Result<(), Failure>>,
    standing: watch::Receiver<Standing>,
    /// Ends the control plane.
    ending: CancellationToken,
    /// What the server that handed over to this one leaves.
    legacy: Option<watch::Receiver<Legacy>>,
    /// Nobody else works in the data directory meanwhile.
    lock: File,
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
    log::init_for_server(args.log_format, Level::INFO);
    block_on(async {
        let mut server = Server::start(args).await?;
        if let Some(founded) = server.founded.take() {
            introduce(&server, &founded, output);
        }
        for address in &server.proxy {
            info!(%address, "proxy listens");
        }
        let door = Door::open(&server.data);
        if let Err(error) = &door {
            warn!(%error, "`orca server --take-over` will not find this server; what runs is served all the same");
        }
        let asked = async {
            match &door {
                Ok(door) => door.asked().await,
                Err(_) => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            ended = server.until_told() => ended.map(|()| None),
            asked = asked => asked.map(Some).map_err(|error| Failure::from_error(Exit::General, &error)),
        };
        match (ended, door) {
            (Ok(Some(successor)), Ok(door)) => server.hand_over(door, successor).await,
            (Ok(_), _) => server.stop().await,
            (Err(failure), _) => {
                server.stop().await;
                return Err(failure);
            }
        }
        Ok(Exit::Done.into())
    })
}

/// Runs a server to its end.
pub fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = runtime()?;
    let ended = runtime.block_on(work);
    // A write that a broken disk never ends would be waited for.
    runtime.shutdown_background();
    ended
}

/// Where the control plane and the agent run; the proxy, Raft and modules have threads of their own.
fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|error| Failure::from_error(Exit::General, &error))
}

impl Server {
    pub async fn start(args: &ServerArgs) -> Result<Server, Failure> {
        let failed = |error: &dyn std::error::Error| Failure::from_error(Exit::General, error);
        forbid_core();
        raise_files_max();
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
            listen_http: api_address(args.listen),
            node_name: name.clone(),
            cluster_name: Label::new(&name.to_lowercase()).unwrap_or_else(|_| Label::new("orca").expect("a label")),
            unseal,
            advertise: args.advertise.clone(),
        };
        let inheritance = match args.take_over {
            true => handover::ask(&data).await.map_err(|error| failed(&error))?,
            false => None,
        };
        let lock = lock(&data)?;
        // The proxy's port first: it is the likeliest to be taken, and nothing has been made yet.
        let modules_runtime = Background(Some(wasm::runtime().map_err(|error| failed(&error))?));
        let agent_directory = data.join("agent");
        let modules = Agent::modules(&agent_directory, modules_runtime.handle()).map_err(|error| failed(&error))?;
        let (listeners, predecessor) = inheritance.map(Inheritance::take_apart).unzip();
        let dataplane = start_proxy(args, listeners, &modules)?;

        let goal = Agent::recall(&agent_directory);
        let (front, opened, founded) = match goal.as_ref().is_some_and(|goal| !goal.replicas.is_empty()) {
            // Served whatever is wrong with the control plane, which is opened beside it.
            true => (Front::open(&config).await.map_err(not_started)?, None, None),
            false => {
                let (mut control, handle) = Control::start(config.clone()).await.map_err(not_started)?;
                let founded = control.founded();
                (handle.front().clone(), Some((control, handle)), founded)
            }
        };
        let (quic, identity) = (front.quic_address(), front.identity());
        let control_address = SocketAddr::new(reachable(quic.ip()), quic.port());
        let (ending, standing) = (CancellationToken::new(), watch::Sender::new(Standing::Opening));
        let mut stands = standing.subscribe();
        let keeper = Keeper { config, front, standing, ending: ending.clone() };

        let config = orca_agent::Config {
            keys: data.join("node"),
            runtime_directory: PathBuf::from("/run/orca"),
            state_directories: std::iter::once(data.clone()).chain(unseal_file).collect(),
            docker_socket: socket_from_environment(),
            control: vec![control_address],
            identity,
            directory: agent_directory,
            labels: args.labels.iter().cloned().collect(),
            goal,
            legacy: None,
        };
        let mut control = tokio::spawn(keeper.keep(opened));
        let begun = async {
            let (ancestor, legacy) = match predecessor {
                // Before there is an agent, with whose first tables connections are accepted: a successor that cannot go on
                // had better find out while all of them are still the other's.
                Some(predecessor) => {
                    let decided = timeout(DECISION_MAX, decided(&mut control, &mut stands)).await;
                    decided.unwrap_or(Ok(()))?;
                    Some(predecessor.goes_on().await.map_err(|error| failed(&error))?)
                }
                None => None,
            }
            .unzip();
            let config = orca_agent::Config { legacy: legacy.clone(), ..config };
            let mut agent = Agent::start(config, modules, dataplane.clone()).await.map_err(|error| failed(&error))?;
            if let Some(ancestor) = ancestor {
                tokio::select! {
                    () = dataplane.serving() => {}
                    ended = &mut control => {
                        ended.map_err(|panicked| failed(&panicked))??;
                        return Err(Failure::general("the control plane has ended without being told to"));
                    }
                    ended = agent.ended() => return Err(failed(&ended)),
                }
                ancestor.let_go().await;
                info!("taken over from the server that ran before");
            }
            Ok::<_, Failure>((agent, legacy))
        };
        let (agent, legacy) = match begun.await {
            Ok(begun) => begun,
            Err(failure) => {
                // Whatever was accepted is answered first.
                dataplane.shutdown(STOP_GRACE).await;
                end_control(&ending, control).await;
                return Err(failure);
            }
        };
        Ok(Server {
            proxy: dataplane.addresses(),
            data,
            founded,
            control_address,
            dataplane,
            agent,
            control,
            standing: stands,
            ending,
            legacy,
            lock,
            _modules: modules_runtime,
        })
    }

    /// Until the control plane is open, for whoever can do nothing without it.
    pub async fn opened(&mut self) -> Result<(), Failure> {
        decided(&mut self.control, &mut self.standing).await?;
        match &*self.standing.borrow() {
            Standing::Failed { why } => Err(Failure::general("the control plane cannot be opened").why(why)),
            Standing::Opening | Standing::Open => Ok(()),
        }
    }

    /// Until somebody asks it to stop, or it cannot go on.
    pub async fn until_told(&mut self) -> Result<(), Failure> {
        let failed = |error: &dyn std::error::Error| Failure::from_error(Exit::General, error);
        let mut signals = Signals::new();
        tokio::select! {
            () = signals.told() => Ok(()),
            ended = &mut self.control => ended.map_err(|panicked| failed(&panicked))?,
            ended = self.agent.ended() => Err(failed(&ended)),
        }
    }

    /// Lets a successor take over: everything but the proxy ends, and the proxy when the successor serves, or when
    /// somebody ends this process.
    async fn hand_over(self, door: Door, mut successor: Successor) {
        info!("handing over to a successor");
        let Server { dataplane, agent, control, ending, legacy: before, lock: held, data, _modules, .. } = self;
        let mut signals = Signals::new();
        drop(agent);
        end_control(&ending, control).await;
        let mut held = Some(held);
        let mut estate = Estate { dataplane: dataplane.clone(), before, lost: 0 };
        let mut telling = None;
        let handed_over = async {
            let heir = loop {
                // The successor's now.
                drop(held.take());
                let given = match dataplane.listeners() {
                    Ok(listeners) => successor.give(listeners).await,
                    Err(error) => Err(error),
                };
                let serves = match given {
                    Ok(mut heir) => {
                        let serves = heir.serves(|| estate.left()).await;
                        estate.lost += u64::from(serves.is_err());
                        serves.map(|()| heir)
                    }
                    Err(error) => Err(error),
                };
                match serves {
                    Ok(heir) => break Some(heir),
                    Err(error) => warn!(
                        %error,
                        "the successor does not serve; this process goes on serving by the routes it has, without \
                         control plane and agent: start `orca server --take-over` again"
                    ),
                }
                // Nobody else is to begin here while this process serves. It may be somebody else's already.
                held = lock(&data).ok();
                match door.asked().await {
                    Ok(next) => successor = next,
                    Err(error) => {
                        warn!(%error, "nobody can ask for a handover any more");
                        break None;
                    }
                }
            };
            // By itself, so that it goes on when somebody ends this process meanwhile.
            telling = heir.map(|heir| tokio::spawn(tell(heir, estate)));
            dataplane.clone().shutdown(HANDOVER_GRACE).await;
            told(&mut telling).await;
        };
        tokio::select! {
            () = handed_over => {}
            () = signals.told() => {
                let ending = async {
                    dataplane.shutdown(STOP_GRACE).await;
                    told(&mut telling).await;
                };
                end_within(STOP_MAX, ending).await;
            }
        }
    }

    /// Ends what this process does, in good order if that is possible in time. Containers go on.
    pub async fn stop(self) {
        let Server { dataplane, agent, control, ending, lock, _modules, .. } = self;
        end_within(STOP_MAX, async {
            dataplane.shutdown(STOP_GRACE).await;
            drop(agent);
            end_control(&ending, control).await;
        })
        .await;
        drop(lock);
    }

    pub fn address(&self) -> String {
        self.control_address.to_string()
    }
}

/// What this server leaves to a successor.
struct Estate {
    dataplane: DataPlane,
    /// What was left to this server.
    before: Option<watch::Receiver<Legacy>>,
    /// Successors that went on and died: what they counted, and may have reported, is lost.
    lost: u64,
}

impl Estate {
    fn left(&self) -> Legacy {
        let mut legacy = self.dataplane.legacy(now());
        legacy.traffic.gaps += self.lost;
        if let Some(before) = &self.before {
            legacy.inherit(&before.borrow());
        }
        legacy
    }
}

async fn tell(heir: Heir, estate: Estate) {
    if let Err(error) = heir.follow(|| estate.left()).await {
        warn!(%error, "the successor does not hear what is not finished here");
    }
}

/// Until the last has been told. It may be another's: of the server that handed over to this one.
async fn told(telling: &mut Option<JoinHandle<()>>) {
    if let Some(telling) = telling {
        // A panic in it was reported.
        let _ = telling.await;
    }
}

async fn end_control(ending: &CancellationToken, control: JoinHandle<Result<(), Failure>>) {
    ending.cancel();
    if !control.is_finished() && timeout(CONTROL_STOP_MAX, control).await.is_err() {
        warn!("the control plane does not end; a write to its disk may hang");
    }
}

/// Waits for an end in good order, but no longer than it may take, and not when somebody asks again.
async fn end_within(max: Duration, ending: impl Future<Output = ()>) {
    let mut signals = Signals::new();
    tokio::select! {
        ended = timeout(max, ending) => {
            if ended.is_err() {
                warn!("not everything ended in {} s; ending all the same", max.as_secs());
            }
        }
        () = signals.told() => info!("asked again: ending at once"),
    }
}

/// SIGTERM and Ctrl-C from now on, and none of before.
struct Signals {
    terminate: io::Result<Signal>,
    interrupt: io::Result<Signal>,
}

impl Signals {
    fn new() -> Signals {
        Signals { terminate: signal(SignalKind::terminate()), interrupt: signal(SignalKind::interrupt()) }
    }

    /// What cannot be listened for never comes.
    async fn told(&mut self) {
        let next = async |signal: &mut io::Result<Signal>| match signal {
            Ok(signal) => drop(signal.recv().await),
            Err(_) => std::future::pending().await,
        };
        tokio::select! {
            () = next(&mut self.terminate) => {}
            () = next(&mut self.interrupt) => {}
        }
    }
}

/// Keys that are open in memory would be in a core.
fn forbid_core() {
    use rustix::process::{Resource, Rlimit, setrlimit};
    if let Err(error) = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }) {
        warn!(%error, "a crash of this process may leave a core with keys in it");
    }
}

/// A shell or systemd gives a process few files, though it may have many more: that low number is for select(2), which
/// nothing here uses.
fn raise_files_max() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let given = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: given.maximum, ..given }) {
        warn!(%error, files = given.current, "the proxy serves fewer connections: it may open no more files");
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
        limits: Limits { connections_max: connections_max(workers), ..Limits::default() },
        trusted_proxies: args.trusted_proxies.clone(),
    };
    let any = |port| SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port);
    let started = match (inherited, args.http) {
        (Some(listeners), address) => {
            DataPlane::start_with(config(address.unwrap_or(any(PORT_PUBLIC))), listeners, modules.replicas.clone())
        }
        (None, Some(address)) => DataPlane::start(config(address), modules.replicas.clone()),
        (None, None) => match DataPlane::start(config(any(PORT_PUBLIC)), modules.replicas.clone()) {
            Err(orca_dataplane::StartError::Denied(_)) => {
                DataPlane::start(config(any(PORT_UNPRIVILEGED)), modules.replicas.clone())
            }
            started => started,
        },
    };
    started.map_err(|error| {
        Failure::from_error(Exit::General, &error).fix("choose where the proxy listens with --http ADDR:PORT")
    })
}

/// Four fifths of the files the process may open are for the proxy's connections, up to what a proxy usually takes.
fn connections_max(workers: usize) -> usize {
    let files = rustix::process::getrlimit(rustix::process::Resource::Nofile).current.unwrap_or(u64::MAX);
    connections_of(files, workers).min(Limits::default().connections_max)
}

fn connections_of(files: u64, workers: usize) -> usize {
    let reserved = FILES_RESERVED + FILES_PER_WORKER * workers as u64;
    let connections = files.saturating_sub(reserved) / 5 * 4 / FILES_PER_CONNECTION;
    usize::try_from(connections.max(CONNECTIONS_MIN)).unwrap_or(usize::MAX)
}

/// Where the HTTP API goes with QUIC at `listen`: it has no TLS yet, so never on the network.
fn api_address(listen: SocketAddr) -> SocketAddr {
    let ip = match listen.ip() {
        ip if ip.to_canonical().is_loopback() => ip,
        IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
    };
    SocketAddr::new(ip, listen.port())
}

/// An address of this machine under which a socket bound to `ip` is reached.
pub fn reachable(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(ip) if ip.is_unspecified() => Ipv4Addr::LOCALHOST.into(),
        IpAddr::V6(ip) if ip.is_unspecified() => Ipv6Addr::LOCALHOST.into(),
        ip => ip,
    }
}

fn host_name() -> String {
    rustix::system::uname().nodename().to_string_lossy().into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_end_that_never_comes_is_not_waited_for() {
        let patience = Duration::from_secs(20);
        timeout(patience, end_within(Duration::ZERO, std::future::pending())).await.unwrap();
    }

    #[test]
    fn all_files_that_are_allowed_are_used_and_connections_leave_some_to_the_rest() {
        use rustix::process::{Resource, getrlimit};
        raise_files_max();
        let files = getrlimit(Resource::Nofile);
        assert_eq!(files.current, files.maximum);
        for (files, workers) in [(1024, 2), (4096, 64), (524_288, 8), (u64::MAX, 1)] {
            let taken = connections_of(files, workers) as u64;
            let rest = FILES_RESERVED + FILES_PER_WORKER * workers as u64;
            assert!(taken == CONNECTIONS_MIN || taken * FILES_PER_CONNECTION + rest <= files, "{files} {workers}");
        }
    }
}
