//! Carries out the reconciler's actions: a `match`, and a task for each. Every action ends in exactly one result,
//! also when it fails, so that nothing stays under way for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use orca_cluster::goal::{ModuleGoal, ReplicaGoal, Workload};
use orca_cluster::id::{ClusterId, NodeId, ReplicaId, ServiceName};
use orca_cluster::node::{Action, ActionId, Finished, Secrets, Task};
use orca_cluster::replica::{Cause, Pulling, RunState, Saw};
use orca_cluster::secret::SecretName;
use orca_cluster::time::Timestamp;
use orca_dataplane::DataPlane;
use orca_wire::cause::chain;
use orca_wire::identity::{SealingKey, goal_context};
use tokio::sync::mpsc;
use tracing::{error, info, warn};
use zeroize::Zeroizing;

use crate::clock::now;
use crate::docker::{Docker, Unopened, resolve};
use crate::module_files;
use crate::module_log::{Logs, Source};
use crate::probe::probe;
use crate::session::Session;
use crate::wasm::{self, LoadError};

/// A file with a module's bytes is its digest and this.
const MODULE_SUFFIX: &str = ".wasm";

/// What the node has to work with, as its owner gives it.
#[expect(missing_debug_implementations, reason = "most of it is handles, and keys are among them")]
pub struct Tools {
    pub docker: Docker,
    pub wasm: wasm::Engine,
    pub replicas: Arc<wasm::Replicas>,
    pub logs: Logs,
    pub dataplane: DataPlane,
    pub session: Session,
    pub cluster: ClusterId,
    pub node: NodeId,
    pub sealing_key: SealingKey,
    /// Where the bytes of modules are kept, by digest.
    pub modules: PathBuf,
}

pub struct Hands {
    tools: Tools,
    /// What is compiled, by digest, as long as a replica of it is wanted.
    components: Mutex<BTreeMap<ReplicaId, wasm::Component>>,
    /// Replicas of one module ask for it at the same moment: one fetches, the others find it here.
    fetching: tokio::sync::Mutex<()>,
    /// How far each pull is that goes on.
    pulls: Mutex<BTreeMap<ActionId, Pulling>>,
    finished: mpsc::UnboundedSender<(ActionId, Finished)>,
}

impl std::fmt::Debug for Hands {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hands").field("node", &self.tools.node).finish_non_exhaustive()
    }
}

impl Hands {
    /// Results come out of the receiver. At most a few actions for each replica are under way, so it needs no bound
    /// of its own.
    pub fn new(tools: Tools) -> (Arc<Hands>, mpsc::UnboundedReceiver<(ActionId, Finished)>) {
        let (finished, results) = mpsc::unbounded_channel();
        let (components, fetching, pulls) = Default::default();
        (Arc::new(Hands { tools, components, fetching, pulls, finished }), results)
    }

    /// How far each pull is that goes on.
    pub fn pulls(&self) -> BTreeMap<ActionId, Pulling> {
        self.pulls.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn start(self: &Arc<Hands>, action: Action) {
        let Action { id, task } = action;
        let (hands, worker) = (Arc::clone(self), Arc::clone(self));
        let after_panic = after_panic(&task);
        tokio::spawn(async move {
            let finished = match tokio::spawn(async move { worker.carry_out(id, task).await }).await {
                Ok(finished) => finished,
                Err(failed) => {
                    error!(%failed, "an action panicked");
                    after_panic
                }
            };
            hands.pulls.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
            // Else the driver has ended, and with it everyone who would want to know.
            let _ = hands.finished.send((id, finished));
        });
    }

    async fn carry_out(&self, action: ActionId, task: Task) -> Finished {
        match task {
            Task::Fetch { replica, goal, secrets } => match &goal.workload {
                Workload::Container(_) => {
                    let open = |name: &SecretName| self.open(&secrets, name);
                    let progress = |pulling| {
                        self.pulls.lock().unwrap_or_else(PoisonError::into_inner).insert(action, pulling);
                    };
                    self.tools.docker.fetch(&goal, &open, progress).await
                }
                Workload::Module(module) => self.fetch_module(replica, module).await,
            },
            Task::Create { replica, goal, image, secrets } => match &goal.workload {
                Workload::Container(_) => {
                    let open = |name: &SecretName| self.open(&secrets, name);
                    self.tools.docker.create(replica, &goal, &image, &[], &open).await
                }
                Workload::Module(_) => Finished::Created,
            },
            Task::Start { replica, goal, secrets } => match &goal.workload {
                Workload::Container(_) => {
                    let open = |name: &SecretName| self.open(&secrets, name);
                    self.tools.docker.start(replica, &goal, &open).await
                }
                Workload::Module(module) => {
                    self.start_module(replica, &goal, module, &secrets).unwrap_or_else(Finished::Failed)
                }
            },
            Task::Probe { replica, purpose: _, check, address, timeout } => {
                let exec = async |argv: &[String], longest| self.tools.docker.run(replica, argv, longest).await;
                Finished::Probed(probe(&check, address, timeout, exec).await)
            }
            Task::Inspect { replica } => Finished::Listening(self.tools.docker.listening(replica).await),
            Task::Stop { replica, grace } => match self.tools.replicas.remove(replica) {
                Some(module) => {
                    module.stop();
                    Finished::Stopped
                }
                None => self.tools.docker.stop(replica, grace).await,
            },
            Task::Remove { replica, service, goal, erase } => {
                self.remove(replica, &service, goal.as_deref(), erase).await
            }
            Task::Apply { tables, generation } => {
                self.tools.dataplane.apply(Arc::clone(&tables)).await;
                Finished::Applied { number: tables.number, generation }
            }
            Task::Run { replica, cron, due, until } => self.run_scheduled(replica, &cron, due, until).await,
        }
    }

    /// A secret of the goal, by the node's own key.
    fn open(&self, secrets: &Secrets, name: &SecretName) -> Result<Zeroizing<String>, Unopened> {
        let sealed = secrets.get(name).ok_or(Unopened::Absent)?;
        let context = goal_context(self.tools.cluster, self.tools.node, name);
        let bytes = self
            .tools
            .sealing_key
            .open(context.as_bytes(), sealed)
            .map_err(|error| Unopened::Damaged(format!("secret {name}: {error}")))?;
        let text = std::str::from_utf8(&bytes).map_err(|_| Unopened::Damaged(format!("secret {name} is not text")))?;
        Ok(Zeroizing::new(text.to_owned()))
    }

    /// Has the module's bytes here and compiled.
    async fn fetch_module(&self, replica: ReplicaId, module: &ModuleGoal) -> Finished {
        let digest = &module.digest;
        match self.component(digest).await {
            Ok(component) => {
                self.components.lock().unwrap_or_else(PoisonError::into_inner).insert(replica, component);
                let digest = Some(format!("sha256:{digest}"));
                Finished::Fetched { image: module.digest.clone(), digest, pulled: None }
            }
            Err(cause) => Finished::Failed(cause),
        }
    }

    async fn component(&self, digest: &str) -> Result<wasm::Component, Cause> {
        // A digest is hex, so it cannot lead out of the directory; one that is not has no module.
        if digest.is_empty() || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(Cause::ModuleMissing { digest: digest.to_owned() });
        }
        let path = self.tools.modules.join(format!("{digest}{MODULE_SUFFIX}"));
        if let Some(loaded) = self.load_kept(digest, &path).await {
            return loaded;
        }
        // What is here waits for no transfer. Behind the lock it may have come meanwhile.
        let alone = self.fetching.lock().await;
        if let Some(loaded) = self.load_kept(digest, &path).await {
            return loaded;
        }
        let (bytes, is_kept) = self.fetch_bytes(digest, path).await?;
        if is_kept {
            drop(alone);
        }
        self.tools.wasm.load(digest, async { Ok(bytes) }).await.map_err(|error| invalid(&error))
    }

    /// From the file that is kept; nothing if there is none, or it is not what was kept.
    async fn load_kept(&self, digest: &str, path: &Path) -> Option<Result<wasm::Component, Cause>> {
        let bytes = async { tokio::fs::read(path).await.map(Bytes::from) };
        match self.tools.wasm.load(digest, bytes).await {
            Err(LoadError::Read(error)) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error @ (LoadError::Read(_) | LoadError::Digest { .. } | LoadError::TooLarge { .. })) => {
                warn!(path = %path.display(), error = chain(&error), "a module's file is damaged; it is fetched again");
                None
            }
            loaded => Some(loaded.map_err(|error| invalid(&error))),
        }
    }

    /// From a control node, and whether they are kept from now on.
    async fn fetch_bytes(&self, digest: &str, path: PathBuf) -> Result<(Bytes, bool), Cause> {
        let missing = || Cause::ModuleMissing { digest: digest.to_owned() };
        let bytes = self.tools.session.module(digest).await.map_err(|error| {
            warn!(digest, error = chain(&error), "a module could not be fetched");
            missing()
        })?;
        let bytes = bytes.ok_or_else(missing)?;
        let (received, wanted) = (bytes.clone(), digest.to_owned());
        let keeping = tokio::task::spawn_blocking(move || {
            let found = wasm::module_digest(&received);
            if found != wanted {
                return Err(LoadError::Digest { wanted, found });
            }
            let kept = orca_wire::identity::file::replace(&path, &received);
            if let Err(error) = &kept {
                // It runs all the same; after a restart it is fetched again.
                warn!(path = %path.display(), error = chain(error), "a module's bytes could not be kept");
            }
            Ok(kept.is_ok())
        });
        let is_kept =
            keeping.await.expect("keeping neither panics nor is cancelled").map_err(|error| invalid(&error))?;
        Ok((bytes, is_kept))
    }

    /// Lets go of the files of modules that are not named by the goal any more.
    pub fn sweep_modules(self: &Arc<Hands>, named: BTreeSet<String>) {
        let hands = Arc::clone(self);
        tokio::task::spawn_blocking(move || {
            let swept = module_files::sweep(&hands.tools.modules, MODULE_SUFFIX, &named);
            if let Err(error) = swept.and_then(|()| hands.tools.wasm.sweep(&named)) {
                warn!(%error, "old modules could not be removed");
            }
        });
    }

    fn start_module(
        &self,
        replica: ReplicaId,
        goal: &ReplicaGoal,
        module: &ModuleGoal,
        secrets: &Secrets,
    ) -> Result<Finished, Cause> {
        let component = self.components.lock().unwrap_or_else(PoisonError::into_inner).get(&replica).cloned();
        let component = component.ok_or_else(|| Cause::ModuleMissing { digest: module.digest.clone() })?;
        let open = |name: &SecretName| self.open(secrets, name);
        let env = goal
            .env
            .iter()
            .map(|(name, template)| Ok((name.clone(), resolve(template, goal, &open)?)))
            .collect::<Result<Vec<_>, Cause>>()?;
        let log = self
            .tools
            .logs
            .writer(replica)
            .map_err(|error| Cause::Refused { reason: format!("its log cannot be opened: {error}") })?;
        log.line(Source::Orca, &format!("{} {} starts", goal.service, goal.revision));
        let start = wasm::Start {
            replica,
            service: goal.service.clone(),
            env,
            limits: module.limits.clone(),
            log,
            services: self.tools.dataplane.services(),
        };
        self.tools.replicas.insert(self.tools.wasm.start(&component, start));
        Ok(Finished::Started { address: None })
    }

    async fn remove(
        &self,
        replica: ReplicaId,
        service: &ServiceName,
        goal: Option<&ReplicaGoal>,
        erase: bool,
    ) -> Finished {
        let Some(goal) = goal else {
            return self.tools.docker.remove_found(replica, service).await;
        };
        self.components.lock().unwrap_or_else(PoisonError::into_inner).remove(&replica);
        match &goal.workload {
            Workload::Container(_) => self.tools.docker.remove(replica, goal, erase).await,
            Workload::Module(_) => {
                if let Some(module) = self.tools.replicas.remove(replica) {
                    module.stop();
                }
                if let Err(error) = self.tools.logs.remove(replica) {
                    warn!(%replica, %error, "its log could not be removed");
                }
                Finished::Removed
            }
        }
    }

    async fn run_scheduled(&self, replica: ReplicaId, cron: &str, due: Timestamp, until: Timestamp) -> Finished {
        let Some(module) = self.tools.replicas.get(replica) else {
            return Finished::Ran(RunState::NotBegun { reason: "it is not running".to_owned() });
        };
        info!(%replica, cron, due = due.to_minute(), "a scheduled run begins");
        Finished::Ran(match module.run(until.since(now())).await {
            Ok(()) => RunState::Done,
            Err(error) if error.precedes_run() => RunState::NotBegun { reason: chain(&error) },
            Err(error) => RunState::Failed { reason: chain(&error) },
        })
    }
}

fn invalid(error: &LoadError) -> Cause {
    Cause::ModuleInvalid { reason: chain(error) }
}

/// What is said of an action that panicked: one replica fails then, and not the node. Tables count as not applied, since
/// it is not known which of the proxy's threads use them.
fn after_panic(task: &Task) -> Finished {
    let reason = "the agent failed at it; its log says how".to_owned();
    match task {
        Task::Fetch { .. }
        | Task::Create { .. }
        | Task::Start { .. }
        | Task::Stop { .. }
        | Task::Remove { .. }
        | Task::Apply { .. } => Finished::Failed(Cause::Refused { reason }),
        Task::Probe { .. } => Finished::Probed(Err(Saw::Error(reason))),
        Task::Inspect { .. } => Finished::Listening(None),
        Task::Run { .. } => Finished::Ran(RunState::Failed { reason }),
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use orca_dataplane::{AccessLog, Limits, NoModules};
    use orca_wire::message::agent::{AgentRequest, Blob};
    use orca_wire::{Client, Endpoint, Plane};
    use tempfile::TempDir;

    use super::*;
    use crate::docker;
    use crate::testing::control_and_agent;

    /// Hands of a node, and a control node that gives the same bytes whatever module it is asked for.
    struct World {
        directory: TempDir,
        hands: Arc<Hands>,
        asked: Arc<AtomicUsize>,
        _server: Endpoint,
    }

    fn world(given: Bytes) -> World {
        let directory = tempfile::tempdir().unwrap();
        let (server, mut accepted, agent) = control_and_agent();
        let asked = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&asked);
        tokio::spawn(async move {
            let connection = accepted.accept().await.unwrap();
            let give = move |request: AgentRequest, mut stream: orca_wire::Stream| {
                let (given, counted) = (given.clone(), Arc::clone(&counted));
                async move {
                    assert!(matches!(request, AgentRequest::Module { .. }), "{request:?}");
                    counted.fetch_add(1, Ordering::Relaxed);
                    stream.send(&Blob::Here { size: given.len() as u64 }).await.unwrap();
                    stream.send_bytes(&given).await.unwrap();
                    stream.finish().await.unwrap();
                }
            };
            connection.serve(give).await
        });
        let config = orca_dataplane::Config {
            http: vec![(Ipv4Addr::LOCALHOST, 0).into()],
            workers: 1,
            access_log: AccessLog::Off,
            limits: Limits::default(),
            trusted_proxies: Vec::new(),
        };
        let at = |name: &str| directory.path().join(name);
        let (hands, _finished) = Hands::new(Tools {
            docker: Docker::new(docker::Config {
                socket: at("docker.sock"),
                cluster: "c".to_owned(),
                runtime_directory: PathBuf::new(),
                state_directories: Vec::new(),
            }),
            wasm: wasm::Engine::new(at("compiled"), tokio::runtime::Handle::current()).unwrap(),
            replicas: Arc::default(),
            logs: Logs::open(at("logs")).unwrap(),
            dataplane: DataPlane::start(config, Arc::new(NoModules)).unwrap(),
            session: Session::new(Client::new(agent, Plane::Agent, vec![server.local_address().unwrap()])),
            cluster: ClusterId(7),
            node: NodeId(2),
            sealing_key: SealingKey::load_or_create(&at("keys")).unwrap(),
            modules: at("modules"),
        });
        std::fs::create_dir(at("modules")).unwrap();
        World { directory, hands, asked, _server: server }
    }

    impl World {
        fn file(&self, digest: &str) -> PathBuf {
            self.directory.path().join(format!("modules/{digest}{MODULE_SUFFIX}"))
        }

        async fn fetch(&self, replica: u64, digest: &str) -> Finished {
            let limits = orca_cluster::spec::ModuleLimits::default();
            let module = ModuleGoal { path: String::new(), digest: digest.to_owned(), limits };
            self.hands.fetch_module(ReplicaId(replica), &module).await
        }

        fn asked(&self) -> usize {
            self.asked.load(Ordering::Relaxed)
        }
    }

    fn task() -> Bytes {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/task.wasm");
        std::fs::read(path).unwrap().into()
    }

    #[tokio::test]
    async fn a_damaged_module_is_fetched_once_more_for_all_its_replicas_and_replaced() {
        let (good, world) = (task(), world(task()));
        let digest = wasm::module_digest(&good);
        let mut damaged = good.to_vec();
        damaged[100] ^= 1;
        std::fs::write(world.file(&digest), damaged).unwrap();
        let fetched = futures_util::future::join_all((1..=5).map(|replica| world.fetch(replica, &digest))).await;
        assert!(fetched.iter().all(|finished| matches!(finished, Finished::Fetched { .. })), "{fetched:?}");
        assert!(std::fs::read(world.file(&digest)).unwrap() == good, "it is as it was deployed");
        assert_eq!(world.asked(), 1);
    }

    #[tokio::test]
    async fn bytes_that_are_not_the_module_are_not_kept() {
        let world = world(Bytes::from_static(b"something else"));
        let digest = wasm::module_digest(&task());
        let failed = world.fetch(1, &digest).await;
        let Finished::Failed(Cause::ModuleInvalid { reason }) = failed else { panic!("{failed:?}") };
        assert!(reason.contains("not the one that was deployed"), "{reason}");
        assert_eq!((world.asked(), world.file(&digest).exists()), (1, false));
    }
}
