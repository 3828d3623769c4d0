//! Wasm services: components that answer requests, inside this process, without a socket in between.
//!
//! A component is compiled once and kept on disk as machine code. Each request gets an instance of its own, made
//! from a pool in microseconds and thrown away after; so a module cannot leak from one request into the next, and
//! one that loops, traps or eats memory spoils its own request and no other. Three things hold that up:
//!
//! - **Time.** A ticker raises the engine's epoch every 2 ms. A running instance that notices lets others have a
//!   turn, and ends when its time is up. Waits end at the same deadline. Guest code runs on a runtime of its own
//!   ([`runtime`]). Only of a module that has been quick ([`pace`]) the first turn is taken by whoever calls it, which
//!   is a thread of the proxy; what is not through then moves.
//! - **Memory.** Every byte of linear memory is counted against the service's limit, all memories together.
//! - **Reach.** What an instance can see is what [`guest`] hands it; whom it can call is decided in [`outbound`].
//!
//! Not here: who starts and stops replicas (the driver), and what to do with a failed call (the proxy).

mod cache;
mod failure;
mod guest;
mod outbound;
mod pace;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError, RwLock, Weak};
use std::task::{Context, Poll, Waker};
use std::thread::Thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{HOST, HeaderValue};
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use orca_cluster::id::{ReplicaId, ServiceName};
use orca_cluster::limit::MODULE_BYTES_MAX;
use orca_cluster::spec::ModuleLimits;
use orca_dataplane::{Body, BodyError, ModuleError, ModuleResponse, Modules, Services};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_util::sync::CancellationToken;
use wasmtime::component::{InstancePre, Linker};
use wasmtime::{Config, Enabled, InstanceAllocationStrategy, PoolingAllocationConfig, Store};
use wasmtime_wasi::p2::bindings::CommandPre;
use wasmtime_wasi_http::WasiHttpView as _;
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use zeroize::Zeroizing;

use crate::module_log::{Source, Writer};
use cache::Cache;
pub use failure::CallError;
use failure::Circumstances;
use guest::{Allotment, CORE_INSTANCES_MAX, Deadline, Guest, TABLE_ENTRIES_MAX};
use outbound::Policy;
use pace::Pace;

/// How long a running instance may go on before it lets others have a turn, and how exact a deadline is.
const TICK: Duration = Duration::from_millis(2);
/// Instances on one node at once, of all services: each reserves 4 GiB of addresses (not of memory).
const INSTANCES_MAX: u32 = 1_000;
/// How long a request waits for one of its replica's instances before it is told that all are busy.
const ADMISSION_WAIT_MAX: Duration = Duration::from_millis(250);
/// A deadline inside a running instance names the function it was in. Waits are cut only after that had its chance.
const DEADLINE_GRACE: Duration = Duration::from_millis(30);
/// Memory of an ended instance that is cleared and kept for the next of its kind, instead of given back.
const KEPT_BYTES: usize = 128 << 10;
/// Idle instances' worth of such memory.
const KEPT_INSTANCES_MAX: u32 = 32;

const SERVES: &str = "wasi:http/incoming-handler@0.2";
const RUNS: &str = "wasi:cli/run@0.2";

/// A runtime for modules: a thread for each core, which looks for news between any two turns of the instances.
pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .thread_name("module")
        // Turns are up to a tick long. At tokio's usual 61 turns between two looks at timers and sockets, a few
        // looping instances would keep the others waiting for most of a second.
        .event_interval(1)
        .global_queue_interval(1)
        .enable_all()
        .build()
}

#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the Wasm engine does not start on this machine")]
    Engine(#[source] wasmtime::Error),
    #[error("the directory for compiled modules, {directory}, cannot be used")]
    Cache {
        directory: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no thread for the clock of modules")]
    Ticker(#[source] io::Error),
}

#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("the module is not the one that was deployed: its digest is {found}, not {wanted}")]
    Digest { wanted: String, found: String },
    #[error("the module has {bytes} bytes; at most {MODULE_BYTES_MAX} are accepted")]
    TooLarge { bytes: usize },
    #[error(
        "the module is {0}; build it as a component: `cargo build --target wasm32-wasip2`, or `wasm-tools component new`"
    )]
    NotAComponent(&'static str),
    #[error("the module exports neither `{SERVES}` (to answer requests) nor `{RUNS}` (to run on a schedule)")]
    MissingExport,
    #[error("the module imports `{name}`, which Orca does not offer")]
    MissingImport {
        name: String,
        #[source]
        source: wasmtime::Error,
    },
    #[error("the module does not compile")]
    Compile(#[source] wasmtime::Error),
}

/// Compiles modules and runs them. Cheap to clone; there is one in a process.
#[derive(Clone)]
pub struct Engine(Arc<Shared>);

struct Shared {
    engine: wasmtime::Engine,
    linker: Linker<Guest>,
    cache: Cache,
    runtime: tokio::runtime::Handle,
    /// Replicas of one revision share its code.
    loaded: Mutex<HashMap<String, Weak<Code>>>,
    /// One compilation at a time: it uses every core as it is, and two of the same module would both do the work.
    compiling: Semaphore,
    ticker: Thread,
    running: AtomicUsize,
}

/// A component, compiled and linked. Cheap to clone.
#[derive(Clone)]
pub struct Component(Arc<Code>);

struct Code {
    serves: Option<ProxyPre<Guest>>,
    runs: Option<CommandPre<Guest>>,
}

/// What a replica is started with. Has no `Debug`: the values of `env` may be secrets. Ours are wiped when the replica
/// ends; an instance's copy lives as long as its request.
#[expect(missing_debug_implementations, reason = "holds secrets")]
pub struct Start {
    pub replica: ReplicaId,
    pub service: ServiceName,
    pub env: Vec<(String, Zeroizing<String>)>,
    pub limits: ModuleLimits,
    pub log: Writer,
    /// Those it may ask, of its own project.
    pub services: Services,
}

/// One replica of a module. Cheap to clone; ends with [`stop`](Module::stop).
#[derive(Clone)]
pub struct Module(Arc<Replica>);

struct Replica {
    engine: Engine,
    component: Component,
    replica: ReplicaId,
    service: ServiceName,
    env: Vec<(String, Zeroizing<String>)>,
    limits: ModuleLimits,
    log: Writer,
    outbound: Arc<Policy>,
    instances: Arc<Semaphore>,
    stopping: CancellationToken,
    pace: Arc<Pace>,
}

impl Engine {
    /// `cache` is where compiled modules are kept; `runtime` is where they run: see [`runtime`].
    pub fn new(cache: PathBuf, runtime: tokio::runtime::Handle) -> Result<Engine, EngineError> {
        let engine = wasmtime::Engine::new(&config()).map_err(EngineError::Engine)?;
        let mut linker = Linker::new(&engine);
        wasmtime_wasi::p2::add_to_linker_async(&mut linker).map_err(EngineError::Engine)?;
        wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker).map_err(EngineError::Engine)?;
        let directory = cache.clone();
        let cache = Cache::open(cache, &engine).map_err(|source| EngineError::Cache { directory, source })?;
        let (engine_of_ticker, (give, take)) = (engine.weak(), std::sync::mpsc::sync_channel(1));
        let ticker = std::thread::Builder::new()
            .name("module-ticker".to_owned())
            .spawn(move || {
                // Without the engine there is nothing to tick for.
                if let Ok(shared) = take.recv() {
                    tick(&engine_of_ticker, &shared);
                }
            })
            .map_err(EngineError::Ticker)?;
        let shared = Arc::new(Shared {
            engine,
            linker,
            cache,
            runtime,
            loaded: Mutex::default(),
            compiling: Semaphore::new(1),
            ticker: ticker.thread().clone(),
            running: AtomicUsize::new(0),
        });
        give.send(Arc::downgrade(&shared)).expect("the ticker waits for this");
        Ok(Engine(shared))
    }

    /// Lets go of the code of modules that are not among these and were not needed lately.
    pub fn sweep(&self, named: &BTreeSet<String>) -> io::Result<()> {
        self.0.cache.sweep(named)
    }

    /// A component from its bytes: from memory if a replica of it runs, from the cache if it was compiled before.
    /// `digest` is the hex SHA-256 under which it was deployed.
    pub async fn load(&self, digest: &str, bytes: Bytes) -> Result<Component, LoadError> {
        if let Some(code) = self.loaded(digest) {
            return Ok(Component(code));
        }
        let _turn = self.0.compiling.acquire().await.expect("the semaphore is never closed");
        if let Some(code) = self.loaded(digest) {
            return Ok(Component(code));
        }
        let (engine, wanted) = (self.clone(), digest.to_owned());
        let loading = self.0.runtime.spawn_blocking(move || engine.load_blocking(&wanted, &bytes));
        let code = Arc::new(loading.await.expect("loading neither panics nor is cancelled")?);
        let mut loaded = self.0.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.retain(|_, code| code.strong_count() > 0);
        loaded.insert(digest.to_owned(), Arc::downgrade(&code));
        Ok(Component(code))
    }

    pub fn start(&self, component: &Component, start: Start) -> Module {
        let Start { replica, service, mut env, limits, log, services } = start;
        for (name, value) in [("ORCA_SERVICE", service.service.to_string()), ("ORCA_REPLICA", replica.to_string())] {
            if env.iter().all(|(given, _)| given != name) {
                env.push((name.to_owned(), value.into()));
            }
        }
        let outbound = Policy::new(limits.outbound.clone(), service.project.clone(), services, log.clone());
        let instances = Arc::new(Semaphore::new(limits.concurrency as usize));
        let (engine, component) = (self.clone(), component.clone());
        let stopping = CancellationToken::new();
        Module(Arc::new(Replica {
            engine,
            component,
            replica,
            service,
            env,
            limits,
            log,
            outbound: Arc::new(outbound),
            instances,
            stopping,
            pace: Arc::default(),
        }))
    }

    fn loaded(&self, digest: &str) -> Option<Arc<Code>> {
        self.0.loaded.lock().unwrap_or_else(PoisonError::into_inner).get(digest).and_then(Weak::upgrade)
    }

    fn load_blocking(&self, wanted: &str, bytes: &[u8]) -> Result<Code, LoadError> {
        let Shared { engine, linker, .. } = &*self.0;
        if bytes.len() as u64 > MODULE_BYTES_MAX {
            return Err(LoadError::TooLarge { bytes: bytes.len() });
        }
        let found = cache::module_digest(bytes);
        if found != wanted {
            return Err(LoadError::Digest { wanted: wanted.to_owned(), found });
        }
        let component = match self.cached(wanted) {
            Some(component) => component,
            None => self.compile(wanted, bytes)?,
        };
        let linked: InstancePre<Guest> = linker.instantiate_pre(&component).map_err(|source| {
            let name = component
                .component_type()
                .imports(engine)
                .map(|(name, _)| name.to_owned())
                .find(|name| format!("{source:#}").contains(&format!("`{name}`")))
                .unwrap_or_else(|| "an interface".to_owned());
            LoadError::MissingImport { name, source }
        })?;
        let (serves, runs) = (ProxyPre::new(linked.clone()).ok(), CommandPre::new(linked).ok());
        if serves.is_none() && runs.is_none() {
            return Err(LoadError::MissingExport);
        }
        Ok(Code { serves, runs })
    }

    fn cached(&self, digest: &str) -> Option<wasmtime::component::Component> {
        let code = self.0.cache.read(digest).unwrap_or_else(|error| {
            tracing::warn!(module = digest, %error, "could not read a compiled module; compiling it again");
            None
        })?;
        // SAFETY: the bytes become machine code, so they must be what this engine's own wasmtime returned. The cache was
        // opened for this engine, and a `Trusted` of it is just that: see there.
        let component = unsafe { wasmtime::component::Component::deserialize(&self.0.engine, code) };
        component
            .inspect_err(
                |error| tracing::warn!(module = digest, %error, "a compiled module is of no use; compiling it again"),
            )
            .ok()
    }

    fn compile(&self, digest: &str, bytes: &[u8]) -> Result<wasmtime::component::Component, LoadError> {
        if let Some(other) = not_a_component(bytes) {
            return Err(LoadError::NotAComponent(other));
        }
        let Shared { engine, cache, .. } = &*self.0;
        let component = wasmtime::component::Component::from_binary(engine, bytes).map_err(LoadError::Compile)?;
        let kept = component.serialize().map_err(io::Error::other).and_then(|code| cache.write(digest, &code));
        if let Err(error) = kept {
            // It runs from memory. Only the next start takes longer.
            let directory = cache.directory().display();
            tracing::warn!(module = digest, %directory, %error, "could not keep a compiled module");
        }
        Ok(component)
    }

    /// Counts a running instance, so that the ticker sleeps while there is none.
    fn running(&self) -> Running {
        if self.0.running.fetch_add(1, Ordering::AcqRel) == 0 {
            self.0.ticker.unpark();
        }
        Running(self.clone())
    }
}

struct Running(Engine);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.0.running.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        // The ticker may be asleep; it has to wake to see that it is over.
        self.ticker.unpark();
    }
}

fn tick(engine: &wasmtime::EngineWeak, shared: &Weak<Shared>) {
    loop {
        let Some(running) = shared.upgrade().map(|shared| shared.running.load(Ordering::Acquire)) else { return };
        if running == 0 {
            // An unpark between the look and the sleep ends the sleep at once.
            std::thread::park();
        } else {
            std::thread::sleep(TICK);
            let Some(engine) = engine.upgrade() else { return };
            engine.increment_epoch();
        }
    }
}

fn config() -> Config {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(INSTANCES_MAX)
        .total_stacks(INSTANCES_MAX)
        .total_memories(INSTANCES_MAX * 2)
        .total_tables(INSTANCES_MAX * 4)
        .total_core_instances(INSTANCES_MAX * 8)
        .max_core_instances_per_component(CORE_INSTANCES_MAX as u32)
        .max_memories_per_component(CORE_INSTANCES_MAX as u32)
        .max_tables_per_component(CORE_INSTANCES_MAX as u32)
        .table_elements(TABLE_ENTRIES_MAX)
        .linear_memory_keep_resident(KEPT_BYTES)
        .table_keep_resident(16 << 10)
        // Where the kernel can say which pages an instance wrote, only those are cleared.
        .pagemap_scan(Enabled::Auto)
        .max_unused_warm_slots(KEPT_INSTANCES_MAX);
    let mut config = Config::new();
    config
        .wasm_component_model(true)
        .epoch_interruption(true)
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config
}

/// What a file is that is no component, as its owner would call it.
fn not_a_component(bytes: &[u8]) -> Option<&'static str> {
    const MODULE: &[u8] = b"\0asm\x01\0\0\0";
    const COMPONENT: &[u8] = b"\0asm\x0d\0\x01\0";
    let text = bytes.trim_ascii_start();
    match bytes {
        _ if bytes.starts_with(COMPONENT) => None,
        _ if bytes.starts_with(MODULE) => Some("a core module, not a component"),
        _ if bytes.starts_with(b"\0asm") => Some("a component in a format that is not the standard one"),
        [] => Some("an empty file"),
        _ if bytes.starts_with(b"\x7fELF") => Some("a program for Linux, not WebAssembly"),
        _ if bytes.starts_with(b"\x1f\x8b") || bytes.starts_with(b"PK") => Some("an archive; unpack it first"),
        _ if text.starts_with(b"(component") || text.starts_with(b"(module") => Some("WebAssembly as text, not binary"),
        _ => Some("not WebAssembly"),
    }
}

impl Component {
    /// Whether it can answer requests.
    pub fn serves(&self) -> bool {
        self.0.serves.is_some()
    }

    /// Whether it can run on a schedule.
    pub fn runs(&self) -> bool {
        self.0.runs.is_some()
    }
}

impl Module {
    /// Answers a request. The response begins when the module begins it; its body streams. Dropping the future
    /// ends the instance; dropping the body closes it under the instance, which has until its deadline to notice.
    pub async fn call(&self, request: Request<Body>) -> Result<Response<Body>, CallError> {
        let result = self.answer(request).await;
        if let Err(error) = &result {
            self.0.note(error);
        }
        result
    }

    async fn answer(&self, request: Request<Body>) -> Result<Response<Body>, CallError> {
        let replica = &self.0;
        if !replica.component.serves() {
            return Err(CallError::NotExported { wanted: SERVES });
        }
        let permit = replica.admit().await?;
        let (begin, begun) = oneshot::channel();
        let end = Arc::new(OnceLock::new());
        let mut serving = Box::pin(Arc::clone(replica).serve(request, begin, Arc::clone(&end), permit));
        let runtime = &replica.engine.0.runtime;
        let first = if replica.pace.is_quick() { take_turn(serving.as_mut(), runtime) } else { Turn::Unfinished };
        let mut instance = EndsWithUs(match first {
            Turn::Unfinished => Some(runtime.spawn(serving).abort_handle()),
            Turn::Panicked => None,
            Turn::Last(remains) => {
                // Clearing up takes as long as many a request: our caller sends the response first.
                tokio::spawn(async move { drop(remains) });
                None
            }
        });
        match begun.await {
            Ok(Ok(response)) => {
                instance.0 = None;
                Ok(response.map(|body| Body::stream(Answer { body, end })))
            }
            Ok(Err(code)) => Err(CallError::refused(&code)),
            // The instance is gone. Why is written down before it goes.
            Err(_) => Err(end.get().cloned().unwrap_or(CallError::NoAnswer)),
        }
    }

    /// Runs the module once, as a program.
    pub async fn run(&self) -> Result<(), CallError> {
        let replica = Arc::clone(&self.0);
        let permit = replica.admit().await?;
        let running = self.0.engine.0.runtime.spawn(replica.run(permit));
        let mut instance = EndsWithUs(Some(running.abort_handle()));
        let result = running.await.unwrap_or_else(|error| Err(CallError::Runtime { problem: error.to_string() }));
        instance.0 = None;
        if let Err(error) = &result {
            self.0.note(error);
        }
        result
    }

    /// Ends every instance and admits no more. Draining comes before, and is the proxy's.
    pub fn stop(&self) {
        self.0.instances.close();
        self.0.stopping.cancel();
    }

    pub fn replica(&self) -> ReplicaId {
        self.0.replica
    }
}

/// How an instance's first turn went.
enum Turn<T> {
    Unfinished,
    Last(T),
    Panicked,
}

/// Takes an instance's first turn on this thread, as if on the runtime.
fn take_turn<T>(instance: Pin<&mut impl Future<Output = T>>, runtime: &tokio::runtime::Handle) -> Turn<T> {
    // What it waits for belongs to the runtime, which asks for it anew as soon as the instance has moved there.
    let _entered = runtime.enter();
    let mut context = Context::from_waker(Waker::noop());
    // A panic ends the instance, as it would there, and not our caller.
    match catch_unwind(AssertUnwindSafe(|| instance.poll(&mut context))) {
        Ok(Poll::Ready(remains)) => Turn::Last(remains),
        Ok(Poll::Pending) => Turn::Unfinished,
        Err(_panic) => Turn::Panicked,
    }
}

/// What is left of an instance that is through. It still takes the place of one.
struct Remains {
    _store: Store<Guest>,
    _running: Running,
    _permit: OwnedSemaphorePermit,
}

/// Ends an instance when nobody waits for it any more.
struct EndsWithUs(Option<tokio::task::AbortHandle>);

impl Drop for EndsWithUs {
    fn drop(&mut self) {
        if let Some(instance) = self.0.take() {
            instance.abort();
        }
    }
}

type Begin =
    oneshot::Sender<Result<Response<HyperOutgoingBody>, wasmtime_wasi_http::p2::bindings::http::types::ErrorCode>>;
/// Why an instance ended, if not well.
type End = Arc<OnceLock<CallError>>;

impl Replica {
    async fn admit(&self) -> Result<OwnedSemaphorePermit, CallError> {
        let instances = Arc::clone(&self.instances);
        if let Ok(permit) = Arc::clone(&instances).try_acquire_owned() {
            return Ok(permit);
        }
        match tokio::time::timeout(ADMISSION_WAIT_MAX, instances.acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_closed)) => Err(CallError::Stopped),
            Err(_elapsed) => Err(CallError::Busy { concurrency: self.limits.concurrency }),
        }
    }

    async fn serve(
        self: Arc<Self>,
        request: Request<Body>,
        begin: Begin,
        end: End,
        permit: OwnedSemaphorePermit,
    ) -> Remains {
        let running = self.engine.running();
        let deadline = Deadline::after(self.limits.timeout);
        let mut store = self.store(deadline.clone());
        // Dropped after the end is set: who waits for the beginning and learns that there is none looks there.
        let mut begin = Some(begin);
        let result = {
            let guest = self.handle(&mut store, request, &mut begin, deadline.clone());
            self.within(guest, &deadline).await
        };
        if let Err(error) = result {
            let error = self.read(error, &store);
            // Whoever waits for the beginning or the rest of the response looks here once the store is gone.
            if end.set(error.clone()).is_ok() && deadline.has_moved() {
                self.note(&error);
            }
        }
        Remains { _store: store, _running: running, _permit: permit }
    }

    async fn handle(
        &self,
        store: &mut Store<Guest>,
        request: Request<Body>,
        begin: &mut Option<Begin>,
        deadline: Deadline,
    ) -> wasmtime::Result<()> {
        let pre = self.component.0.serves.as_ref().expect("looked at before");
        let (scheme, request) = self.incoming(request);
        let timeout = self.limits.timeout;
        let mut http = store.data_mut().http();
        let request = http.new_incoming_request(scheme, request)?;
        let given = Arc::new(Mutex::new(None));
        let response = http.new_response_outparam_from_callback({
            let given = Arc::clone(&given);
            move |response| {
                deadline.extend(timeout);
                *given.lock().unwrap_or_else(PoisonError::into_inner) = Some(response);
            }
        })?;
        let guest = async {
            let instance = pre.instantiate_async(&mut *store).await?;
            instance.wasi_http_incoming_handler().call_handle(store, request, response).await
        };
        // The response is passed on when the guest's turn is over, a tick later at most. Most are through by then, and
        // whoever waits wakes up once for all of it instead of for the head, for the body and for its end.
        let mut guest = std::pin::pin!(guest);
        let mut first_turn = Some(Instant::now());
        poll_fn(|context| {
            let polled = guest.as_mut().poll(context);
            if let Some(began) = first_turn.take() {
                self.pace.took_turn(began.elapsed(), polled.is_ready());
            }
            let response = given.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(response) = response
                && let Some(begin) = begin.take()
            {
                // Nobody waits any more: then the instance is about to be ended.
                let _ = begin.send(response);
            }
            polled
        })
        .await
    }

    async fn run(self: Arc<Self>, _permit: OwnedSemaphorePermit) -> Result<(), CallError> {
        let Some(pre) = &self.component.0.runs else { return Err(CallError::NotExported { wanted: RUNS }) };
        let _running = self.engine.running();
        let deadline = Deadline::after(self.limits.timeout);
        let mut store = self.store(deadline.clone());
        let result = {
            let guest = async {
                let instance = pre.instantiate_async(&mut store).await?;
                instance.wasi_cli_run().call_run(&mut store).await
            };
            self.within(guest, &deadline).await
        };
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(())) => Err(CallError::Exited { code: 1 }),
            Err(error) => match self.read(error, &store) {
                // How a program in C or Rust ends when all is well.
                CallError::Exited { code: 0 } => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Waits for an instance until its deadline, wherever that has moved, or until the replica stops.
    async fn within<T>(
        &self,
        guest: impl Future<Output = wasmtime::Result<T>>,
        deadline: &Deadline,
    ) -> Result<T, Ending> {
        let mut guest = std::pin::pin!(guest);
        let mut stopping = std::pin::pin!(self.stopping.cancelled());
        let until = || (deadline.at() + DEADLINE_GRACE).into();
        let mut clock = std::pin::pin!(tokio::time::sleep_until(until()));
        loop {
            tokio::select! {
                // The guest first: one that is through in its first turn costs no timer.
                biased;
                result = &mut guest => return result.map_err(Ending::Error),
                () = &mut stopping => return Err(Ending::Stopped),
                () = &mut clock => {
                    if until() <= clock.deadline() {
                        return Err(Ending::Deadline);
                    }
                    clock.as_mut().reset(until());
                }
            }
        }
    }

    fn read(&self, ending: Ending, store: &Store<Guest>) -> CallError {
        let ModuleLimits { memory, timeout, .. } = self.limits;
        match ending {
            Ending::Stopped => CallError::Stopped,
            Ending::Deadline => CallError::TimedOut { limit: timeout, place: None },
            Ending::Error(error) => {
                let memory_denied = store.data().memory_denied();
                CallError::of(&error, &Circumstances { timeout, memory, memory_denied })
            }
        }
    }

    fn store(&self, deadline: Deadline) -> Store<Guest> {
        let Replica { env, limits, log, outbound, pace, .. } = self;
        Guest::store(&self.engine.0.engine, Allotment { env, memory: limits.memory, log, outbound, pace, deadline })
    }

    /// The request as the module is to see it.
    fn incoming(&self, mut request: Request<Body>) -> (Scheme, Request<GuestBody>) {
        let headers = request.headers_mut();
        // The proxy ended TLS, and says so.
        let tls = headers.get("x-forwarded-proto").is_some_and(|proto| proto == "https");
        let host = headers.get(HOST);
        if host.is_none_or(|host| host.to_str().is_err()) && request.uri().authority().is_none() {
            // HTTP/1.0 may leave it out; WASI needs one.
            let name = HeaderValue::from_str(self.service.service.as_str()).expect("a label is a header value");
            request.headers_mut().insert(HOST, name);
        }
        let scheme = if tls { Scheme::Https } else { Scheme::Http };
        (scheme, request.map(|body| body.map_err(broken as fn(BodyError) -> wasmtime_wasi_http::Error)))
    }

    /// A failed call, in the replica's own log. What is not the module's doing is not in it: one line for each
    /// request too many would push out what the module itself has to say.
    fn note(&self, error: &CallError) {
        match error {
            CallError::Busy { .. } | CallError::NodeBusy | CallError::Stopped => {}
            _ => {
                self.pace.lingered();
                self.log.line(Source::Orca, &error.to_string());
            }
        }
    }
}

type GuestBody = http_body_util::combinators::MapErr<Body, fn(BodyError) -> wasmtime_wasi_http::Error>;

fn broken(_: BodyError) -> wasmtime_wasi_http::Error {
    wasmtime_wasi_http::Error::ConnectionTerminated
}

enum Ending {
    Error(wasmtime::Error),
    Deadline,
    Stopped,
}

/// A response's body. When the instance ended badly what there is of it is not the whole, and that has to be seen:
/// a cut body must not look like a short one.
struct Answer {
    body: HyperOutgoingBody,
    end: End,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(context).map(|frame| match frame {
            Some(Ok(frame)) => Some(Ok(frame)),
            Some(Err(error)) => Some(Err(BodyError::Module(Box::new(error)))),
            None => self.end.get().map(|error| Err(BodyError::Module(Box::new(error.clone())))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The modules that run on this node, for the proxy.
#[derive(Default)]
pub struct Replicas(RwLock<HashMap<ReplicaId, Module>>);

impl Replicas {
    pub fn insert(&self, module: Module) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(module.replica(), module);
    }

    pub fn remove(&self, replica: ReplicaId) -> Option<Module> {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(&replica)
    }

    pub fn get(&self, replica: ReplicaId) -> Option<Module> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(&replica).cloned()
    }
}

impl Modules for Replicas {
    fn call(&self, replica: ReplicaId, request: Request<Body>) -> Result<ModuleResponse, Box<Request<Body>>> {
        let Some(module) = self.get(replica) else { return Err(Box::new(request)) };
        Ok(Box::pin(async move { module.call(request).await.map_err(|error| ModuleError::from(&error)) }))
    }
}

impl fmt::Debug for Replicas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.read().unwrap_or_else(PoisonError::into_inner).keys()).finish()
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.service, self.0.replica)
    }
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").field("cache", &self.0.cache).finish_non_exhaustive()
    }
}

impl fmt::Debug for Component {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Component").field("serves", &self.serves()).field("runs", &self.runs()).finish()
    }
}

fn hex(bytes: &[u8]) -> String {
    use fmt::Write as _;
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut text, byte| {
        write!(text, "{byte:02x}").expect("a string takes all");
        text
    })
}

#[cfg(test)]
mod tests;
