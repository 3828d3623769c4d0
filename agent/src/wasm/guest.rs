//! What one instance may see and use: everything the host hands to a module, in one place.
//!
//! An instance has its environment, two clocks, randomness, two streams into its log and the requests it was
//! allowed. It has no files, sockets, arguments or standard input: the interfaces are there, as the libraries of
//! many languages import them whether they are used or not, and answer that there is nothing.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use orca_cluster::resource::Memory;
use tokio::io::AsyncWrite;
use wasmtime::component::ResourceTable;
use wasmtime::{ResourceLimiter, Store, StoreContextMut, UpdateDeadline};
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::{WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

use super::failure::OutOfTime;
use super::outbound::{Outbound, Policy};
use super::pace::Pace;
use crate::module_log::{LINE_BYTES_MAX, Source, Writer};

/// Entries of all of an instance's tables together: its functions that are called through pointers. Large
/// interpreters have some ten thousand.
pub(super) const TABLE_ENTRIES_MAX: usize = 20_000;
/// Modules inside one component: it and the shims of its tool chain; the pieces of an interpreter.
pub(super) const CORE_INSTANCES_MAX: usize = 64;
/// Things of the host (streams, requests, bodies, timers) one instance holds at once. A leak stops here.
const RESOURCES_MAX: usize = 4_096;
/// Bytes an instance hands to the host in one call; streams take less.
const HOSTCALL_BYTES_MAX: usize = 4 << 20;
/// Random bytes in one call.
const RANDOM_BYTES_MAX: u64 = 64 << 10;
/// Size in memory of one set of header fields: what the proxy accepts and as much again for its bookkeeping.
const FIELDS_BYTES_MAX: usize = 64 << 10;
/// Bytes of output that are taken in one write.
const OUTPUT_BYTES_MAX: usize = 64 << 10;

/// The host's side of one instance.
pub(super) struct Guest {
    wasi: WasiCtx,
    http: WasiHttpCtx,
    resources: ResourceTable,
    outbound: Outbound,
    usage: Usage,
    deadline: Deadline,
}

/// What an instance is made with.
pub(super) struct Allotment<'a> {
    pub(super) env: &'a [(String, zeroize::Zeroizing<String>)],
    pub(super) memory: Memory,
    pub(super) log: &'a Writer,
    pub(super) outbound: &'a Arc<Policy>,
    pub(super) pace: &'a Arc<Pace>,
    pub(super) deadline: Deadline,
}

impl Guest {
    pub(super) fn store(engine: &wasmtime::Engine, allotment: Allotment<'_>) -> Store<Guest> {
        let Allotment { env, memory, log, outbound, pace, deadline } = allotment;
        let mut wasi = WasiCtx::builder();
        for (name, value) in env {
            wasi.env(name, value.as_str());
        }
        wasi.stdout(Lines::new(Source::Stdout, log, pace))
            .stderr(Lines::new(Source::Stderr, log, pace))
            .allow_tcp(false)
            .allow_udp(false)
            .allow_ip_name_lookup(false)
            .max_random_size(RANDOM_BYTES_MAX);
        let mut http = WasiHttpCtx::new();
        http.set_field_size_limit(FIELDS_BYTES_MAX);
        let mut resources = ResourceTable::new();
        resources.set_max_capacity(RESOURCES_MAX);
        let guest = Guest {
            wasi: wasi.build(),
            http,
            resources,
            outbound: Outbound(Arc::clone(outbound)),
            usage: Usage::new(memory),
            deadline,
        };
        let mut store = Store::new(engine, guest);
        store.limiter(|guest| &mut guest.usage);
        store.set_hostcall_fuel(HOSTCALL_BYTES_MAX);
        Guest::begin(&mut store);
        store.epoch_deadline_callback(|store: StoreContextMut<'_, Guest>| match store.data().deadline.has_passed() {
            true => Err(OutOfTime.into()),
            false => Ok(UpdateDeadline::Yield(1)),
        });
        store
    }

    /// It runs from now on.
    pub(super) fn begin(store: &mut Store<Guest>) {
        // Each tick a running instance looks at the clock and lets the others have a turn; not at the first, which may come
        // at once, and most have just begun and are nearly through.
        store.set_epoch_deadline(2);
    }

    pub(super) fn memory_denied(&self) -> bool {
        self.usage.memory_denied
    }
}

impl WasiView for Guest {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.resources }
    }
}

impl WasiHttpView for Guest {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView { hooks: &mut self.outbound, table: &mut self.resources, ctx: &mut self.http }
    }
}

/// When an instance has to be done. It moves once, when the response begins.
#[derive(Debug, Clone)]
pub(super) struct Deadline {
    start: Instant,
    /// Nanoseconds after `start`.
    at: Arc<AtomicU64>,
    moved: Arc<AtomicBool>,
}

impl Deadline {
    pub(super) fn after(span: Duration) -> Deadline {
        let deadline = Deadline { start: Instant::now(), at: Arc::default(), moved: Arc::default() };
        deadline.begin(span);
        deadline
    }

    /// Sets it to `span` from now: the request begins.
    pub(super) fn begin(&self, span: Duration) {
        self.set(span);
    }

    /// Sets it to `span` from now: the response begins.
    pub(super) fn extend(&self, span: Duration) {
        self.set(span);
        self.moved.store(true, Ordering::Relaxed);
    }

    fn set(&self, span: Duration) {
        let at = self.start.elapsed().saturating_add(span).as_nanos();
        self.at.store(u64::try_from(at).unwrap_or(u64::MAX), Ordering::Relaxed);
    }

    pub(super) fn at(&self) -> Instant {
        self.start + Duration::from_nanos(self.at.load(Ordering::Relaxed))
    }

    /// Whether the response has begun.
    pub(super) fn has_moved(&self) -> bool {
        self.moved.load(Ordering::Relaxed)
    }

    fn has_passed(&self) -> bool {
        self.at() <= Instant::now()
    }
}

/// Counts what an instance takes, over all its memories and tables.
struct Usage {
    memory_bytes_max: usize,
    memory_bytes: usize,
    table_entries: usize,
    /// What was allowed last; taken back if the host then could not give it.
    pending: usize,
    memory_denied: bool,
}

impl Usage {
    fn new(memory: Memory) -> Usage {
        let memory_bytes_max = usize::try_from(memory.0).unwrap_or(usize::MAX);
        Usage { memory_bytes_max, memory_bytes: 0, table_entries: 0, pending: 0, memory_denied: false }
    }
}

impl ResourceLimiter for Usage {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        let more = desired.saturating_sub(current);
        let total = self.memory_bytes.saturating_add(more);
        // What the module itself gave as its most is no limit of ours, and no news for its log.
        let fits = total <= self.memory_bytes_max;
        if fits {
            self.memory_bytes = total;
            self.pending = more;
        } else if maximum.is_none_or(|maximum| desired <= maximum) {
            self.memory_denied = true;
        }
        Ok(fits)
    }

    fn memory_grow_failed(&mut self, _: wasmtime::Error) -> wasmtime::Result<()> {
        self.memory_bytes -= std::mem::take(&mut self.pending);
        Ok(())
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let total = self.table_entries.saturating_add(desired.saturating_sub(current));
        let fits = total <= TABLE_ENTRIES_MAX;
        if fits {
            self.table_entries = total;
        }
        Ok(fits)
    }

    fn instances(&self) -> usize {
        CORE_INSTANCES_MAX
    }

    fn tables(&self) -> usize {
        CORE_INSTANCES_MAX
    }

    fn memories(&self) -> usize {
        CORE_INSTANCES_MAX
    }
}

/// Standard output or error: bytes in, lines into the log. All handles of one instance share the line that is
/// being written; what is left of it is a line when the instance ends.
#[derive(Clone)]
struct Lines(Arc<Mutex<Partial>>);

struct Partial {
    source: Source,
    log: Writer,
    pace: Arc<Pace>,
    line: Vec<u8>,
}

impl Lines {
    fn new(source: Source, log: &Writer, pace: &Arc<Pace>) -> Lines {
        let (log, pace) = (log.clone(), Arc::clone(pace));
        Lines(Arc::new(Mutex::new(Partial { source, log, pace, line: Vec::new() })))
    }

    fn lock(&self) -> MutexGuard<'_, Partial> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Partial {
    fn push(&mut self, mut bytes: &[u8]) {
        self.pace.lingered();
        while let Some(newline) = bytes.iter().position(|byte| *byte == b'\n') {
            let (end, rest) = bytes.split_at(newline);
            if self.line.is_empty() {
                self.log.bytes(self.source, end);
            } else {
                self.line.extend_from_slice(end);
                self.log.bytes(self.source, &self.line);
                self.line.clear();
            }
            bytes = &rest[1..];
        }
        self.line.extend_from_slice(bytes);
        if self.line.len() > LINE_BYTES_MAX {
            self.log.bytes(self.source, &self.line);
            self.line.clear();
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.line.is_empty() {
            self.log.bytes(self.source, &self.line);
        }
    }
}

impl IsTerminal for Lines {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Lines {
    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }

    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        unreachable!("only WASI 0.3 asks for this form, and it is not linked")
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Lines {
    async fn ready(&mut self) {}
}

#[wasmtime_wasi::async_trait]
impl OutputStream for Lines {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.lock().push(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(OUTPUT_BYTES_MAX)
    }
}
