//! How long a module takes to be there, and what a request costs on top of what the module does itself.
//!
//! `cargo bench -p orca-bench --bench wasm`. Prints rows of the table of `bench/figures.sh`; asserts nothing, as
//! machines differ.

#![expect(clippy::print_stdout, reason = "printing figures is what it does")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::{Request, Response};
use http_body_util::BodyExt as _;
use orca_agent::module_log::Logs;
use orca_agent::wasm::{Component, Engine, Module, Replicas, Start, runtime};
use orca_cluster::id::{NodeId, ReplicaId, Revision, ServiceName};
use orca_cluster::resource::Memory;
use orca_cluster::route::{Absence, Backend, RouteKey, Tables, Upstream};
use orca_cluster::spec::ModuleLimits;
use orca_dataplane::{AccessLog, Body, Config, DataPlane, Limits, Modules, Offered, Services, WhenBusy};

const COLD_STARTS: usize = 50;
const REQUESTS: usize = 2_000;
const AT_ONCE: usize = 16;
/// For a proxy to be through with what it did after its answers.
const REST: Duration = Duration::from_micros(300);
/// The argument that makes this program the client of itself.
const CLIENT: &str = "client-of";

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, module, native] = &arguments[..]
        && role == CLIENT
    {
        return client(module, native);
    }
    let directory = tempfile::tempdir().expect("a directory");
    run_on(1);
    let modules = runtime().expect("a runtime");
    let bytes =
        fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/hello/hello.wasm")).expect("the example");
    let bytes = bytes::Bytes::from(bytes);
    let digest = {
        let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes);
        digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>()
    };
    let logs = Logs::open(directory.path().join("logs")).expect("logs");
    let engine = || Engine::new(directory.path().join("cache"), modules.handle().clone()).expect("an engine");
    let start = |engine: &Engine, component: &Component| {
        engine.start(
            component,
            Start {
                replica: ReplicaId(1),
                service: "hello/web".parse().expect("a name"),
                env: vec![("GREETING".to_owned(), "Hello".to_owned().into())],
                limits: ModuleLimits {
                    memory: Memory(64 << 20),
                    timeout: Duration::from_secs(30),
                    concurrency: AT_ONCE as u32,
                    outbound: Default::default(),
                },
                log: logs.writer(ReplicaId(1)).expect("a log"),
                services: Services::default(),
            },
        )
    };

    // The threads of a proxy run nothing else either.
    let proxy = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let module = proxy.block_on(async {
        let compiling = Instant::now();
        let component = engine().load(&digest, async { Ok(bytes.clone()) }).await.expect("it compiles");
        row(&format!("compile a module of {} KB", bytes.len() / 1000), compiling.elapsed(), "–");
        drop(component);

        let mut cold = Vec::new();
        for _ in 0..COLD_STARTS {
            let engine = engine();
            let begin = Instant::now();
            let component = engine.load(&digest, async { Ok(bytes.clone()) }).await.expect("it is in the cache");
            let loaded = begin.elapsed();
            let module = start(&engine, &component);
            request(&module).await;
            cold.push((begin.elapsed(), loaded));
        }
        cold.sort();
        let (total, loaded) = cold[COLD_STARTS / 2];
        row("cold start of a module from the disk cache, to its first whole answer", total, "< 1 ms");
        row("of it loading", loaded, "–");

        let warm = engine();
        let component = warm.load(&digest, async { Ok(bytes.clone()) }).await.expect("it is in the cache");
        let module = start(&warm, &component);
        let mut times = Vec::new();
        for _ in 0..REQUESTS {
            let begin = Instant::now();
            request(&module).await;
            times.push(begin.elapsed());
        }
        row("a call of a module in this process, one at a time", median(times), "–");

        let begin = Instant::now();
        let mut callers = tokio::task::JoinSet::new();
        for _ in 0..AT_ONCE {
            let module = module.clone();
            callers.spawn(async move {
                for _ in 0..REQUESTS / AT_ONCE {
                    request(&module).await;
                }
            });
        }
        callers.join_all().await;
        row(&format!("the same, {AT_ONCE} at once, each"), begin.elapsed() / REQUESTS as u32, "–");
        module
    });

    // What a client sees: the same request through the same proxy, answered by the module and by a line of Rust.
    let replicas = Replicas::default();
    replicas.insert(module);
    let (_module_plane, of_module) = serve(&proxy, Arc::new(replicas));
    let (_native_plane, of_native) = serve(&proxy, Arc::new(Native));
    // Another process, as clients are: in this one its thread would take part in every change of our memory.
    let client = std::env::current_exe()
        .map(|itself| Command::new(itself).args([CLIENT, &of_module.to_string(), &of_native.to_string()]).status());
    assert!(client.is_ok_and(|status| status.is_ok_and(|status| status.success())), "the client fails");
    modules.shutdown_background();
}

/// Asks both proxies in turn, so that whatever else the machine does falls on both, and lets one come to rest before
/// it asks the other: what an answer leaves to be done is its own. It is not in the time of a single request, as its
/// client does not wait for it; of a row after row it is.
fn client(module: &str, native: &str) {
    run_on(0);
    let (mut of_module, mut of_native) = (Client::new(module), Client::new(native));
    for (rows, at_once, how) in [(1, 1, "one at a time"), (10, AT_ONCE, "sixteen in a row")] {
        let (mut module_times, mut native_times) = (Vec::new(), Vec::new());
        let time = |client: &mut Client| {
            let rested = Instant::now() + REST;
            while Instant::now() < rested {
                std::hint::spin_loop();
            }
            (0..rows).map(|_| client.time_requests(at_once)).sum::<Duration>() / (rows * at_once) as u32
        };
        for _ in 0..REQUESTS {
            native_times.push(time(&mut of_native));
            module_times.push(time(&mut of_module));
        }
        let (module_time, native_time) = (median(module_times), median(native_times));
        row(&format!("a request through the proxy to a native handler, {how}"), native_time, "–");
        row(&format!("a request through the proxy to a module, {how}"), module_time, "–");
        let overhead = module_time.saturating_sub(native_time);
        row(&format!("a module's overhead for a request, {how}"), overhead, "< 50 µs");
    }
}

/// This thread, and those it makes from now on, run on this core only. Left to itself the kernel puts the one of two
/// proxies that takes longer on another core than the client, and what is measured is how long it takes to wake that.
fn run_on(core: usize) {
    let mut cores = rustix::thread::CpuSet::new();
    cores.set(core);
    rustix::thread::sched_setaffinity(None, &cores).expect("there are two cores");
}

fn row(what: &str, time: Duration, goal: &str) {
    println!("| {what} | {time:.1?} | {goal} |");
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

async fn request(module: &Module) {
    let request = Request::builder().uri("/").header("host", "bench").body(Body::empty()).expect("a request");
    let response = module.call(request, module.place()).await.expect("an answer");
    response.into_body().collect().await.expect("a whole answer");
}

/// What a module is compared with.
struct Native;

impl Modules for Native {
    fn call(&self, _: ReplicaId, _: Request<Body>, _: WhenBusy) -> Offered {
        Ok(Box::pin(async { Ok(Response::new(Body::whole("Hello, /\n"))) }))
    }
}

/// A proxy that leads everything to one replica of these.
fn serve(runtime: &tokio::runtime::Runtime, modules: Arc<dyn Modules>) -> (DataPlane, SocketAddr) {
    let config = Config {
        http: vec!["127.0.0.1:0".parse().expect("an address")],
        workers: 1,
        access_log: AccessLog::Off,
        limits: Limits::default(),
        trusted_proxies: Vec::new(),
    };
    let plane = DataPlane::start(config, modules).expect("a proxy");
    let name: ServiceName = "hello/web".parse().expect("a name");
    let backend = Backend { replica: ReplicaId(1), revision: Revision(1), node: NodeId(1), address: None, weight: 1 };
    let upstream = Upstream {
        backends: vec![backend],
        absence: Absence::Starting,
        response_timeout: Duration::from_secs(30),
        module: true,
    };
    let tables = Tables {
        routes: BTreeMap::from([(RouteKey::try_from("*/".to_owned()).expect("a route"), name.clone())]),
        services: BTreeMap::from([(name, upstream)]),
        ..Tables::default()
    };
    runtime.block_on(plane.apply(Arc::new(tables)));
    let address = plane.addresses()[0];
    (plane, address)
}

/// A connection that is kept. It asks for answers without ever sleeping: to wake it would take the proxy's core
/// longer than the answer, and oftener where it had to wait for one, which is no work of the module's.
struct Client {
    stream: TcpStream,
}

impl Client {
    fn new(address: &str) -> Client {
        let stream = TcpStream::connect(address).expect("the proxy listens");
        stream.set_nodelay(true).expect("a socket");
        stream.set_nonblocking(true).expect("a socket");
        Client { stream }
    }

    /// From sending so many at once to having all answers.
    fn time_requests(&mut self, count: usize) -> Duration {
        let requests = b"GET / HTTP/1.1\r\nHost: bench\r\n\r\n".repeat(count);
        let begin = Instant::now();
        self.stream.write_all(&requests).expect("the proxy reads, and a few requests fit into what waits for it");
        let mut answers = [0; 16 << 10];
        let mut filled = 0;
        loop {
            match self.stream.read(&mut answers[filled..]) {
                Ok(0) => panic!("the proxy closed the connection"),
                Ok(read) => filled += read,
                Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                Err(error) => panic!("the proxy does not answer: {error}"),
            }
            let answers = &answers[..filled];
            let begun: Vec<usize> = memchr::memmem::find_iter(answers, b"HTTP/1.1 200 ").collect();
            let last = begun.last().map_or(&[][..], |at| &answers[*at..]);
            // All answer with a line, in chunks or not.
            if begun.len() == count && (last.ends_with(b"\n0\r\n\r\n") || is_whole_with_length(last)) {
                return begin.elapsed();
            }
        }
    }
}

fn is_whole_with_length(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer);
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
    length == Some(body.len())
}
