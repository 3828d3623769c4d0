//! How long a module takes to be there, and what a request costs on top of what the module does itself.
//!
//! `cargo bench -p orca-bench --bench wasm`. Prints; asserts nothing, as machines differ.

#![expect(clippy::print_stdout, reason = "printing figures is what it does")]

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::Request;
use http_body_util::BodyExt as _;
use orca_agent::module_log::Logs;
use orca_agent::wasm::{Component, Engine, Module, Start, runtime};
use orca_cluster::id::ReplicaId;
use orca_cluster::resource::Memory;
use orca_cluster::spec::ModuleLimits;
use orca_dataplane::Body;

const COLD_STARTS: usize = 50;
const REQUESTS: usize = 2_000;
const AT_ONCE: usize = 16;

fn main() {
    let directory = tempfile::tempdir().expect("a directory");
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
                resolve: Arc::new(|_, _| None),
            },
        )
    };

    // The threads of a proxy run nothing else either.
    let proxy = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    proxy.block_on(async {
        let compiling = Instant::now();
        let component = engine().load(&digest, bytes.clone()).await.expect("it compiles");
        println!("compile, {} KB: {:?}", bytes.len() / 1000, compiling.elapsed());
        drop(component);

        let mut cold = Vec::new();
        for _ in 0..COLD_STARTS {
            let engine = engine();
            let begin = Instant::now();
            let component = engine.load(&digest, bytes.clone()).await.expect("it is in the cache");
            let loaded = begin.elapsed();
            let module = start(&engine, &component);
            request(&module).await;
            cold.push((begin.elapsed(), loaded));
        }
        cold.sort();
        let (total, loaded) = cold[COLD_STARTS / 2];
        println!("cold start from the disk cache to the first whole answer: {total:?} (of it loading: {loaded:?})");

        let warm = engine();
        let component = warm.load(&digest, bytes.clone()).await.expect("it is in the cache");
        let module = start(&warm, &component);
        let mut times = Vec::new();
        for _ in 0..REQUESTS {
            let begin = Instant::now();
            request(&module).await;
            times.push(begin.elapsed());
        }
        times.sort();
        println!("a request: p50 {:?}, p99 {:?}", times[REQUESTS / 2], times[REQUESTS * 99 / 100]);

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
        println!("{AT_ONCE} at once: {:?} each", begin.elapsed() / REQUESTS as u32);
    });
    modules.shutdown_background();
}

async fn request(module: &Module) {
    let request = Request::builder().uri("/").header("host", "bench").body(Body::empty()).expect("a request");
    let response = module.call(request).await.expect("an answer");
    response.into_body().collect().await.expect("a whole answer");
}
