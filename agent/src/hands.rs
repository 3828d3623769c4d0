//! Carries out the reconciler's actions: a `match`, and a task for each. Every action ends in exactly one result,
//! also when it fails, so that nothing stays under way for ever.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use orca_cluster::goal::{ModuleGoal, ReplicaGoal, Workload};
use orca_cluster::id::{ClusterId, NodeId, ReplicaId, ServiceName};
use orca_cluster::node::{Action, ActionId, Finished, Secrets, Task};
use orca_cluster::replica::{Cause, Saw};
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
use crate::wasm;

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
        let (components, fetching) = (Mutex::default(), tokio::sync::Mutex::default());
        (Arc::new(Hands { tools, components, fetching, finished }), results)
    }

    pub fn start(self: &Arc<Hands>, action: Action) {
        let Action { id, task } = action;
        let (hands, worker) = (Arc::clone(self), Arc::clone(self));
        let after_panic = after_panic(&task);
        tokio::spawn(async move {
            let finished = match tokio::spawn(async move { worker.carry_out(task).await }).await {
                Ok(finished) => finished,
                Err(failed) => {
                    error!(%failed, "an action panicked");
                    after_panic
                }
            };
            // Else the driver has ended, and with it everyone who would want to know.
            let _ = hands.finished.send((id, finished));
        });
    }

    async fn carry_out(&self, task: Task) -> Finished {
        match task {
            Task::Fetch { replica, goal, secrets } => match &goal.workload {
                Workload::Container(_) => {
                    let open = |name: &SecretName| self.open(&secrets, name);
                    self.tools.docker.fetch(&goal, &open, |_| {}).await
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
        let bytes = match self.module_bytes(digest).await {
            Ok(bytes) => bytes,
            Err(cause) => return Finished::Failed(cause),
        };
        match self.tools.wasm.load(digest, bytes).await {
            Ok(component) => {
                self.components.lock().unwrap_or_else(PoisonError::into_inner).insert(replica, component);
                let digest = Some(format!("sha256:{digest}"));
                Finished::Fetched { image: module.digest.clone(), digest, pulled: None }
            }
            Err(error) => Finished::Failed(Cause::ModuleInvalid { reason: chain(&error) }),
        }
    }

    async fn module_bytes(&self, digest: &str) -> Result<Bytes, Cause> {
        // A digest is hex, so it cannot lead out of the directory; one that is not has no module.
        let missing = || Cause::ModuleMissing { digest: digest.to_owned() };
        if digest.is_empty() || !digest.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(missing());
        }
        let path = self.tools.modules.join(format!("{digest}{MODULE_SUFFIX}"));
        if let Ok(bytes) = tokio::fs::read(&path).await {
            return Ok(bytes.into());
        }
        // What is here waits for no transfer. Behind the lock it may have come meanwhile.
        let _alone = self.fetching.lock().await;
        if let Ok(bytes) = tokio::fs::read(&path).await {
            return Ok(bytes.into());
        }
        let bytes = self.tools.session.module(digest).await.map_err(|error| {
            warn!(digest, error = chain(&error), "a module could not be fetched");
            missing()
        })?;
        let bytes = bytes.ok_or_else(missing)?;
        let (kept, at) = (bytes.clone(), path.clone());
        let written = tokio::task::spawn_blocking(move || orca_wire::identity::file::replace(&at, &kept)).await;
        if let Ok(Err(error)) = written {
            // It runs all the same; after a restart it is fetched again.
            warn!(path = %path.display(), error = chain(&error), "a module's bytes could not be kept");
        }
        Ok(bytes)
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
            return Finished::Ran(Err("it is not running".to_owned()));
        };
        info!(%replica, cron, due = due.to_minute(), "a scheduled run begins");
        Finished::Ran(module.run(until.since(now())).await.map_err(|error| chain(&error)))
    }
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
        Task::Run { .. } => Finished::Ran(Err(reason)),
    }
}
