//! Compiles modules, keeps what it compiled, and sets the pace and the bounds of all instances.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::Thread;
use std::time::Duration;

use bytes::Bytes;
use orca_cluster::limit::MODULE_BYTES_MAX;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wasmtime::component::{InstancePre, Linker};
use wasmtime::{Config, Enabled, InstanceAllocationStrategy, PoolingAllocationConfig};
use wasmtime_wasi::p2::bindings::CommandPre;
use wasmtime_wasi_http::p2::bindings::ProxyPre;

use super::cache::{self, Cache};
use super::guest::{CORE_INSTANCES_MAX, Guest, TABLE_ENTRIES_MAX};

/// How long a running instance may go on before it lets others have a turn, and how exact a deadline is.
pub(super) const TICK: Duration = Duration::from_millis(2);
/// Instances on one node at once, of all services: each reserves 4 GiB of addresses (not of memory).
const INSTANCES_MAX: u32 = 1_000;
/// Those of them that may wait for a request.
const SPARES_MAX: usize = 250;
/// Memory of an ended instance that is cleared and kept for the next of its kind, instead of given back.
const KEPT_BYTES: usize = 128 << 10;
/// Idle instances' worth of such memory.
const KEPT_INSTANCES_MAX: u32 = 32;

pub(super) const SERVES: &str = "wasi:http/incoming-handler@0.2";
pub(super) const RUNS: &str = "wasi:cli/run@0.2";

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
    #[error("the module's bytes cannot be read")]
    Read(#[source] io::Error),
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
pub struct Engine(pub(super) Arc<Shared>);

pub(super) struct Shared {
    engine: wasmtime::Engine,
    linker: Linker<Guest>,
    pub(super) cache: Cache,
    runtime: tokio::runtime::Handle,
    /// Replicas of one revision share its code.
    loaded: Mutex<HashMap<String, Weak<Code>>>,
    /// One compilation at a time: it uses every core as it is, and two of the same module would both do the work.
    pub(super) compiling: Semaphore,
    ticker: Thread,
    running: AtomicUsize,
    spares: Arc<Semaphore>,
}

/// A component, compiled and linked. Cheap to clone.
#[derive(Clone)]
pub struct Component(Arc<Code>);

struct Code {
    serves: Option<ProxyPre<Guest>>,
    runs: Option<CommandPre<Guest>>,
}

impl Engine {
    /// `cache` is where compiled modules are kept; `runtime` is where they run: see [`runtime`].
    pub fn new(cache: PathBuf, runtime: tokio::runtime::Handle) -> Result<Engine, EngineError> {
        Engine::ticking(cache, runtime, TICK)
    }

    /// Lets instances have a turn of this length.
    pub(super) fn ticking(
        cache: PathBuf,
        runtime: tokio::runtime::Handle,
        period: Duration,
    ) -> Result<Engine, EngineError> {
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
                    tick(&engine_of_ticker, &shared, period);
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
            spares: Arc::new(Semaphore::new(SPARES_MAX)),
        });
        give.send(Arc::downgrade(&shared)).expect("the ticker waits for this");
        Ok(Engine(shared))
    }

    /// Lets go of the code of modules that are not among these and were not needed lately.
    pub fn sweep(&self, named: &BTreeSet<String>) -> io::Result<()> {
        self.0.cache.sweep(named)
    }

    /// A component from its bytes: from memory if a replica of it runs, from the cache if it was compiled before.
    /// `digest` is the hex SHA-256 under which it was deployed. The bytes are asked for when it is their turn, if they are
    /// needed at all: the thirty replicas of a service that wait do not hold them thirty times.
    pub async fn load(
        &self,
        digest: &str,
        bytes: impl Future<Output = io::Result<Bytes>>,
    ) -> Result<Component, LoadError> {
        if let Some(code) = self.loaded(digest) {
            return Ok(Component(code));
        }
        let _turn = self.0.compiling.acquire().await.expect("the semaphore is never closed");
        if let Some(code) = self.loaded(digest) {
            return Ok(Component(code));
        }
        let bytes = bytes.await.map_err(LoadError::Read)?;
        let (engine, wanted) = (self.clone(), digest.to_owned());
        let loading = self.0.runtime.spawn_blocking(move || engine.load_blocking(&wanted, &bytes));
        let code = Arc::new(loading.await.expect("loading neither panics nor is cancelled")?);
        let mut loaded = self.0.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        loaded.retain(|_, code| code.strong_count() > 0);
        loaded.insert(digest.to_owned(), Arc::downgrade(&code));
        Ok(Component(code))
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

    pub(super) fn cached(&self, digest: &str) -> Option<wasmtime::component::Component> {
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

    /// Where instances run.
    pub(super) fn runtime(&self) -> &tokio::runtime::Handle {
        &self.0.runtime
    }

    pub(super) fn wasmtime(&self) -> &wasmtime::Engine {
        &self.0.engine
    }

    /// For an instance that waits for a request, if there may be one more.
    pub(super) fn place_for_spare(&self) -> Option<OwnedSemaphorePermit> {
        Arc::clone(&self.0.spares).try_acquire_owned().ok()
    }

    /// Counts a running instance, so that the ticker sleeps while there is none.
    pub(super) fn running(&self) -> Running {
        if self.0.running.fetch_add(1, Ordering::AcqRel) == 0 {
            self.0.ticker.unpark();
        }
        Running(self.clone())
    }
}

pub(super) struct Running(Engine);

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

fn tick(engine: &wasmtime::EngineWeak, shared: &Weak<Shared>, period: Duration) {
    loop {
        let Some(running) = shared.upgrade().map(|shared| shared.running.load(Ordering::Acquire)) else { return };
        if running == 0 {
            // An unpark between the look and the sleep ends the sleep at once.
            std::thread::park();
        } else {
            std::thread::sleep(period);
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

    pub(super) fn handler(&self) -> Option<&ProxyPre<Guest>> {
        self.0.serves.as_ref()
    }

    pub(super) fn program(&self) -> Option<&CommandPre<Guest>> {
        self.0.runs.as_ref()
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
