use std::collections::BTreeSet;
use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{HOST, HeaderValue};
use http::{Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::BodyExt as _;
use orca_cluster::id::{NodeId, ReplicaId, Revision};
use orca_cluster::resource::Memory;
use orca_cluster::route::{Absence, Backend, Tables, Upstream};
use orca_cluster::spec::ModuleLimits;
use orca_cluster::time::Timestamp;
use orca_dataplane::{AccessLog, Body, BodyError, DataPlane, Limits, Modules, NoModules, Services, WhenBusy};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use zeroize::Zeroizing;

use super::engine::TICK;
use super::replica::ADMISSION_WAIT_MAX;
use super::*;
use crate::module_log::{Line, Logs, Query, Source};

const REPLICA: ReplicaId = ReplicaId(7);
/// Longest wait for something that should come at once.
const PATIENCE: Duration = Duration::from_secs(30);

fn committed(path: &str) -> Bytes {
    fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path))
        .expect("a component of this repository")
        .into()
}

fn probe() -> Bytes {
    committed("tests/fixtures/probe.wasm")
}

/// An engine with a directory and a runtime of its own.
struct Bench {
    directory: TempDir,
    runtime: Option<tokio::runtime::Runtime>,
    engine: Engine,
    logs: Logs,
}

impl Bench {
    fn new() -> Bench {
        Bench::ticking(TICK)
    }

    fn ticking(period: Duration) -> Bench {
        let directory = tempfile::tempdir().expect("a directory");
        let runtime = runtime().expect("a runtime");
        let cache = directory.path().join("cache");
        let engine = Engine::ticking(cache, runtime.handle().clone(), period).expect("an engine");
        let logs = Logs::open(directory.path().join("logs")).expect("logs");
        Bench { directory, runtime: Some(runtime), engine, logs }
    }

    async fn load(&self, bytes: Bytes) -> Result<Component, LoadError> {
        self.engine.load(&module_digest(&bytes), async { Ok(bytes) }).await
    }

    /// A replica of a module, with anything but the defaults set by `with`.
    async fn module(&self, bytes: Bytes, with: impl FnOnce(&mut Start)) -> Module {
        let component = self.load(bytes).await.expect("a component");
        let mut start = Start {
            replica: REPLICA,
            service: "shop/web".parse().expect("a name"),
            env: Vec::new(),
            limits: limits(),
            log: self.logs.writer(REPLICA).expect("a log"),
            services: Services::default(),
        };
        with(&mut start);
        self.engine.start(&component, start)
    }

    async fn probe(&self, with: impl FnOnce(&mut Start)) -> Module {
        self.module(probe(), with).await
    }

    fn lines(&self) -> Vec<Line> {
        self.logs.read(REPLICA, Query::default()).expect("a log")
    }

    /// Waits until a line of the log holds `text`.
    async fn logged(&self, text: &str) {
        let start = Instant::now();
        while !self.lines().iter().any(|line| line.text.contains(text)) {
            assert!(start.elapsed() < PATIENCE, "no line holds {text:?}: {:?}", self.lines());
            tokio::task::yield_now().await;
        }
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn limits() -> ModuleLimits {
    ModuleLimits {
        memory: Memory(32 << 20),
        timeout: Duration::from_secs(20),
        concurrency: 16,
        outbound: BTreeSet::new(),
    }
}

fn get(path: &str) -> Request<Body> {
    Request::builder().uri(path).header(HOST, "shop.example").body(Body::empty()).expect("a request")
}

async fn text(response: Response<Body>) -> String {
    let bytes = response.into_body().collect().await.expect("a whole body").to_bytes();
    String::from_utf8(bytes.into()).expect("text")
}

async fn answer(module: &Module, path: &str) -> (StatusCode, String) {
    let response = module.call(get(path), None).await.unwrap_or_else(|error| panic!("{path}: {error}"));
    (response.status(), text(response).await)
}

#[tokio::test]
async fn hello_answers_people_and_programs() {
    let bench = Bench::new();
    let hello = committed("examples/hello/hello.wasm");
    assert!(hello.len() < 100_000, "the example has {} bytes", hello.len());
    let env = vec![("GREETING".to_owned(), Zeroizing::new("Ahoy & <welcome>".to_owned()))];
    let module = bench.module(hello, |start| start.env = env).await;

    let (status, plain) = answer(&module, "/harbour?x=1&y=2").await;
    assert_eq!(status, StatusCode::OK);
    assert_eq!(plain, "Ahoy & <welcome>\n\npath     /harbour?x=1&y=2\nservice  web\nreplica  r7\n");

    let mut request = get("/harbour?x=1&y=2");
    request.headers_mut().insert("accept", HeaderValue::from_static("text/html,application/xml;q=0.9"));
    let response = module.call(request, None).await.unwrap();
    assert_eq!(response.headers()["content-type"], "text/html; charset=utf-8");
    let page = text(response).await;
    assert!(page.contains("<h1>Ahoy &amp; &lt;welcome&gt;</h1>"), "{page}");
    assert!(page.contains("/harbour?x=1&amp;y=2"), "{page}");
}

#[test]
fn the_service_file_of_hello_is_valid_and_fits_on_a_screen() {
    let text = String::from_utf8(committed("examples/hello/service.toml").into()).expect("text");
    assert!(text.lines().count() <= 20);
    let file = orca_cluster::spec::toml::SourceFile { name: "service.toml".to_owned(), text };
    let project = orca_cluster::spec::toml::project(&file, &"hello".parse().expect("a label")).expect("no problems");
    let service = project.services.values().next().expect("one service");
    assert!(service.is_module() && service.replicas == 2);
}

#[tokio::test]
async fn a_body_larger_than_the_memory_limit_streams_through() {
    let bench = Bench::new();
    let module = bench.probe(|start| start.limits.memory = Memory(4 << 20)).await;
    let chunk = Bytes::from(vec![b'o'; 64 << 10]);
    let chunks = 256;
    let frames = futures_util::stream::repeat_with(move || Ok(Frame::data(chunk.clone())));
    let body = http_body_util::StreamBody::new(futures_util::StreamExt::take(frames, chunks));
    let mut request = get("/echo").map(|_| Body::stream(body));
    *request.method_mut() = http::Method::POST;
    request.headers_mut().insert("x-echo", HeaderValue::from_static("back"));
    let response = module.call(request, None).await.unwrap();
    assert_eq!(response.headers()["x-echo"], "back");
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    assert_eq!(bytes.len(), chunks * (64 << 10));
}

#[tokio::test]
async fn a_module_sees_its_own_environment_and_nothing_of_ours() {
    let bench = Bench::new();
    let env = vec![("TOKEN".to_owned(), "s3cret".to_owned().into())];
    let module = bench.probe(|start| start.env = env).await;
    assert_eq!(answer(&module, "/env?TOKEN").await.1, "s3cret");
    assert_eq!(answer(&module, "/env?ORCA_REPLICA").await.1, "r7");
    assert!(std::env::var_os("PATH").is_some(), "or the next line says nothing");
    assert_eq!(answer(&module, "/env?PATH").await.0, StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn what_is_printed_is_in_the_log_line_by_line() {
    let bench = Bench::new();
    let module = bench.probe(|_| {}).await;
    answer(&module, "/log?cast-off").await;
    let lines = bench.lines();
    let seen: Vec<_> = lines.iter().map(|line| (line.source, line.text.as_str())).collect();
    assert_eq!(seen, [(Source::Stdout, "cast-off"), (Source::Stderr, "CAST-OFF")]);
}

#[tokio::test]
async fn a_line_without_an_end_is_a_line_when_its_request_is_over() {
    let bench = Bench::new();
    let module = bench.probe(|_| {}).await;
    answer(&module, "/mutter?half").await;
    bench.logged("half").await;
}

#[tokio::test]
async fn a_flood_of_lines_is_cut_and_the_module_does_not_notice() {
    let bench = Bench::new();
    let module = bench.probe(|_| {}).await;
    let (status, _) = answer(&module, "/flood?20000").await;
    assert_eq!(status, StatusCode::OK);
    drop(module);
    bench.logged("were dropped").await;
}

/// While `path` is being called, everyone else is served: so many of them, at least, before the first of these ends.
async fn others_are_served_during(
    path: &'static str,
    beside: usize,
    with: impl Fn(&mut Start),
) -> Vec<Result<(), CallError>> {
    let bench = Bench::new();
    let culprit = bench.probe(|start| with(start)).await;
    let innocent = bench.probe(|start| start.limits.concurrency = 4).await;
    // Compiled code is paged in once; that is not what is measured.
    answer(&innocent, "/version").await;
    let culprits: Vec<_> = (0..4)
        .map(|_| {
            let culprit = culprit.clone();
            tokio::spawn(async move { culprit.call(get(path), None).await.map(|_| ()) })
        })
        .collect();
    while culprit.0.instances.available_permits() == 16 {
        tokio::task::yield_now().await;
    }
    let start = Instant::now();
    for served in 1..=100 {
        assert_eq!(answer(&innocent, "/version").await, (StatusCode::OK, "1".to_owned()));
        let all_go_on = culprits.iter().all(|culprit| !culprit.is_finished());
        assert!(served > beside || all_go_on, "only {served} were served meanwhile");
    }
    eprintln!("100 requests beside 4 of {path}: {:?}", start.elapsed());
    let mut ends = Vec::new();
    for culprit in culprits {
        ends.push(culprit.await.expect("no panic"));
    }
    // And the same replica goes on serving.
    assert_eq!(answer(&culprit, "/version").await.0, StatusCode::OK);
    ends
}

#[tokio::test]
async fn a_looping_request_ends_at_its_deadline_and_blocks_nobody() {
    let start = Instant::now();
    // As many as a machine under load gets through in these seconds.
    let ends = others_are_served_during("/loop", 10, |start| start.limits.timeout = Duration::from_secs(6)).await;
    assert!(start.elapsed() < PATIENCE);
    for end in ends {
        let error = end.expect_err("it never ends by itself");
        let CallError::TimedOut { place: Some(place), .. } = &error else { panic!("{error:?}") };
        assert!(place.contains("forever"), "{place}");
    }
}

/// Until what is left of its instances is cleared away.
async fn at_rest(module: &Module) {
    while module.0.instances.available_permits() < 16 {
        tokio::task::yield_now().await;
    }
}

/// Makes a module quick. On a busy machine it may not be by the clock, ever.
fn prove(module: &Module) {
    (0..1_000).for_each(|_| module.0.pace.took_turn(Duration::ZERO, true));
}

/// On one thread, as in a worker of the proxy: what it runs itself keeps it from all else.
#[tokio::test(flavor = "current_thread")]
async fn a_quick_module_runs_where_it_is_called() {
    // However long a busy machine lets it wait in the midst of its turn, that does not end.
    let bench = Bench::ticking(Duration::from_secs(3600));
    let module = bench.probe(|start| start.limits.timeout = PATIENCE).await;
    answer(&module, "/version").await;
    at_rest(&module).await;
    prove(&module);
    // Without a look at anything but the call: nothing else is needed to answer it.
    let mut call = Box::pin(module.call(get("/version"), None));
    let mut context = Context::from_waker(Waker::noop());
    assert!(matches!(call.as_mut().poll(&mut context), Poll::Ready(Ok(_))));
    assert_eq!(module.0.instances.available_permits(), 15, "what is left of it waits until the response is on its way");
    prove(&module);
    at_rest(&module).await;

    // It has made the next one as well, whose time begins when its request does.
    let before = Instant::now();
    let ready = module.0.spare.take(PATIENCE).expect("it is there");
    assert!(ready.deadline.at() >= before + PATIENCE);
    assert!(!module.0.spare.is_there(), "and serves once");
    drop(ready);
    module.0.make_spare();
    assert!(module.0.spare.is_there());
    assert_eq!(answer(&module, "/version").await, (StatusCode::OK, "1".to_owned()));
}

#[tokio::test(flavor = "current_thread")]
async fn a_request_that_is_not_quick_moves_and_so_do_those_after_it() {
    let bench = Bench::new();
    let module = bench.probe(|start| start.limits.timeout = Duration::from_secs(6)).await;
    prove(&module);
    let looping = tokio::spawn({
        let module = module.clone();
        async move { module.call(get("/loop"), None).await.map(|_| ()) }
    });
    while module.0.instances.available_permits() == 16 {
        tokio::task::yield_now().await;
    }
    assert!(!module.0.pace.is_quick(), "the turn it took here was its whole");
    for _ in 0..20 {
        assert_eq!(answer(&module, "/version").await, (StatusCode::OK, "1".to_owned()));
    }
    assert!(!looping.is_finished(), "it moved, and went on elsewhere");
    let error = looping.await.expect("no panic").expect_err("it never ends by itself");
    assert!(matches!(error, CallError::TimedOut { place: Some(_), .. }), "{error:?}");

    prove(&module);
    let error = module.call(get("/trap"), None).await.map(|_| ()).expect_err("it traps");
    assert!(!matches!(error, CallError::NoAnswer), "{error:?}");
    prove(&module);
    answer(&module, "/log?line").await;
    assert!(!module.0.pace.is_quick(), "a disk may take its time");
}

#[tokio::test]
async fn a_request_that_eats_memory_hurts_only_itself() {
    let ends = others_are_served_during("/eat", 0, |_| {}).await;
    for end in ends {
        let error = end.expect_err("memory runs out");
        assert!(matches!(error, CallError::OutOfMemory { limit: Memory(33_554_432), .. }), "{error:?}");
    }
}

#[tokio::test]
async fn a_trap_is_an_error_with_its_place_and_in_the_log() {
    let bench = Bench::new();
    let module = bench.probe(|_| {}).await;
    let error = module.call(get("/trap"), None).await.expect_err("it panics");
    assert!(matches!(error, CallError::Trapped { .. }), "{error:?}");
    let message = error.to_string();
    assert!(message.contains("unreachable") && message.contains("misstep"), "{message}");
    assert!(bench.lines().iter().any(|line| line.source == Source::Orca && line.text == message));
    assert_eq!(answer(&module, "/version").await.0, StatusCode::OK);
}

#[tokio::test]
async fn a_wait_ends_at_the_deadline_too() {
    let bench = Bench::new();
    let module = bench.probe(|start| start.limits.timeout = Duration::from_millis(200)).await;
    let error = module.call(get("/sleep?60000"), None).await.expect_err("it sleeps for a minute");
    assert!(matches!(error, CallError::TimedOut { .. }), "{error:?}");
}

#[tokio::test]
async fn a_response_that_is_cut_does_not_look_whole() {
    let bench = Bench::new();
    let module = bench.probe(|start| start.limits.timeout = Duration::from_millis(200)).await;
    let response = module.call(get("/late"), None).await.expect("it begins");
    let error = response.into_body().collect().await.expect_err("and never ends");
    assert!(matches!(error, BodyError::Module(_)), "{error:?}");
    bench.logged("took longer").await;
}

#[tokio::test]
async fn an_end_without_an_answer_is_an_error() {
    let bench = Bench::new();
    let module = bench.probe(|_| {}).await;
    let error = module.call(get("/silent"), None).await.expect_err("it says nothing");
    assert!(matches!(error, CallError::NoAnswer), "{error:?}");
}

#[tokio::test]
async fn past_its_concurrency_a_module_is_busy_and_then_free_again() {
    let bench = Bench::new();
    let module = bench.probe(|start| start.limits.concurrency = 1).await;
    let slow = tokio::spawn({
        let module = module.clone();
        async move { module.call(get("/sleep?4000"), None).await.map(|_| ()) }
    });
    while module.0.instances.available_permits() > 0 {
        tokio::task::yield_now().await;
    }
    let error = module.call(get("/version"), None).await.expect_err("one is one");
    assert!(matches!(error, CallError::Busy { concurrency: 1 }), "{error:?}");
    let replicas = Replicas::default();
    replicas.insert(module.clone());
    let given_back = replicas.call(module.replica(), get("/version"), WhenBusy::GiveBack).err().expect("one is one");
    assert_eq!(given_back.uri().path(), "/version");
    slow.await.expect("no panic").expect("it slept well");
    assert_eq!(answer(&module, "/version").await.0, StatusCode::OK);
}

#[tokio::test]
async fn stopping_ends_what_runs_and_admits_no_more() {
    let bench = Bench::new();
    let module = bench.probe(|_| {}).await;
    let running = tokio::spawn({
        let module = module.clone();
        async move { module.call(get("/loop"), None).await.map(|_| ()) }
    });
    while module.0.instances.available_permits() == 16 {
        tokio::task::yield_now().await;
    }
    module.stop();
    let error = running.await.expect("no panic").expect_err("it loops");
    assert!(matches!(error, CallError::Stopped), "{error:?}");
    assert!(matches!(module.call(get("/version"), None).await, Err(CallError::Stopped)));
}

#[tokio::test]
async fn a_call_that_nobody_waits_for_gives_its_place_back() {
    let bench = Bench::new();
    let module = bench.probe(|start| start.limits.concurrency = 1).await;
    assert!(tokio::time::timeout(Duration::from_millis(100), module.call(get("/loop"), None)).await.is_err());
    let start = Instant::now();
    while module.call(get("/version"), None).await.is_err() {
        assert!(start.elapsed() < PATIENCE);
    }
}

#[tokio::test]
async fn random_bytes_are_given_in_measure() {
    let bench = Bench::new();
    let module = bench.probe(|_| {}).await;
    assert_eq!(answer(&module, "/random?1000").await.1, "1000\n");
    let error = module.call(get("/random?10000000"), None).await.expect_err("too many");
    assert!(matches!(error, CallError::Trapped { .. }), "{error:?}");
}

/// A server that answers every request with the same words: with the last of them only when it is not held.
async fn neighbour_while(held: watch::Receiver<bool>) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut request = [0; 4096];
            let length = stream.read(&mut request).await.expect("a request");
            assert!(request[..length].starts_with(b"GET /stock HTTP/1.1\r\n"));
            let begin = "HTTP/1.1 200 OK\r\ncontent-length: 9\r\nconnection: close\r\n\r\n12 ";
            stream.write_all(begin.as_bytes()).await.expect("somebody listens");
            held.clone().wait_for(|held| !held).await.expect("it is let go");
            stream.write_all(b"ropes\n").await.expect("somebody listens");
        }
    });
    address
}

async fn neighbour() -> SocketAddr {
    neighbour_while(watch::channel(false).1).await
}

/// A proxy that knows one more service of the project, `shop/store`, with a replica at each of these.
async fn proxy(store: &[SocketAddr]) -> DataPlane {
    let addresses = store.iter().copied().map(Some).collect();
    proxy_before(addresses, Arc::new(NoModules)).await
}

/// The same, where a replica without an address is one of these.
async fn proxy_before(store: Vec<Option<SocketAddr>>, modules: Arc<dyn Modules>) -> DataPlane {
    let config = orca_dataplane::Config {
        http: vec!["127.0.0.1:0".parse().expect("an address")],
        workers: 1,
        access_log: AccessLog::Off,
        limits: Limits::default(),
        trusted_proxies: Vec::new(),
    };
    let module = store.contains(&None);
    let backends = store.into_iter().zip(1..).map(|(address, number)| Backend {
        replica: ReplicaId(number),
        revision: Revision(1),
        node: NodeId(1),
        address,
        weight: 1,
    });
    let upstream =
        Upstream { backends: backends.collect(), absence: Absence::Failing, response_timeout: PATIENCE, module };
    let services = [("shop/store".parse().expect("a name"), upstream)].into();
    let plane = DataPlane::start(config, modules).expect("a proxy");
    plane.apply(Arc::new(Tables { services, ..Tables::default() })).await;
    plane
}

/// Requests that are in flight at the first replica.
fn in_flight(proxy: &DataPlane) -> u32 {
    proxy.traffic(Timestamp(0)).in_flight.get(&ReplicaId(1)).map_or(0, |flight| flight.requests)
}

async fn until_in_flight(proxy: &DataPlane, count: u32) {
    let start = Instant::now();
    while in_flight(proxy) != count {
        assert!(start.elapsed() < PATIENCE, "{} are in flight, not {count}", in_flight(proxy));
        tokio::task::yield_now().await;
    }
}

const STOCK: &str = "/fetch?http://store/stock";

#[tokio::test]
async fn a_module_reaches_the_services_of_its_project_by_name() {
    let bench = Bench::new();
    let proxy = proxy(&[neighbour().await]).await;
    let module = bench.probe(|start| start.services = proxy.services()).await;
    assert_eq!(answer(&module, STOCK).await, (StatusCode::OK, "12 ropes\n".to_owned()));
}

#[tokio::test]
async fn a_module_asks_another_replica_where_one_takes_no_connection() {
    let bench = Bench::new();
    let gone = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr()).expect("a port");
    let both = proxy(&[gone, neighbour().await]).await;
    let module = bench.probe(|start| start.services = both.services()).await;
    for _ in 0..20 {
        assert_eq!(answer(&module, STOCK).await, (StatusCode::OK, "12 ropes\n".to_owned()));
    }

    for (store, error) in [(&[gone][..], "ConnectionRefused"), (&[], "DestinationUnavailable")] {
        let proxy = proxy(store).await;
        let module = bench.probe(|start| start.services = proxy.services()).await;
        let (status, said) = answer(&module, STOCK).await;
        assert_eq!((status, said.contains(error)), (StatusCode::BAD_GATEWAY, true), "{said}");
    }
    bench.logged("request to http://store:80 refused: the service has no replica that is ready").await;
}

#[tokio::test]
async fn what_a_module_asks_of_a_replica_is_in_flight_there_until_it_is_answered() {
    let bench = Bench::new();
    let (hold, held) = watch::channel(true);
    let proxy = proxy(&[neighbour_while(held).await]).await;
    let module = bench.probe(|start| start.services = proxy.services()).await;
    let asking = tokio::spawn(async move { answer(&module, STOCK).await });
    until_in_flight(&proxy, 1).await;
    proxy.apply(Arc::default()).await;
    assert_eq!(in_flight(&proxy), 1, "a drain has to wait for it");
    hold.send(false).expect("the neighbour listens");
    assert_eq!(asking.await.expect("no panic"), (StatusCode::OK, "12 ropes\n".to_owned()));
    until_in_flight(&proxy, 0).await;
}

/// `shop/store` as a module of this many replicas, each with one place, and one more module that asks it.
async fn store_of_modules(bench: &Bench, count: u64) -> (DataPlane, Vec<Module>, Module) {
    let replicas = Arc::new(Replicas::default());
    let proxy = proxy_before((0..count).map(|_| None).collect(), Arc::clone(&replicas) as Arc<dyn Modules>).await;
    let mut store = Vec::new();
    for number in 1..=count {
        let module = bench.probe(|start| {
            (start.replica, start.services) = (ReplicaId(number), proxy.services());
            start.limits.concurrency = 1;
        });
        store.push(module.await);
    }
    store.iter().for_each(|module| replicas.insert(module.clone()));
    let asking = bench.probe(|start| start.services = proxy.services()).await;
    (proxy, store, asking)
}

#[tokio::test]
async fn a_module_reaches_another_module_by_name() {
    let bench = Bench::new();
    let (proxy, store, asking) = store_of_modules(&bench, 2).await;
    let version = (StatusCode::OK, "1".to_owned());
    let busy = store[0].place().expect("nobody asks yet");
    for _ in 0..20 {
        assert_eq!(answer(&asking, "/fetch?http://store/version").await, version, "the other is not busy");
    }
    drop(busy);
    // Each of the two asks its service for the next, and the last finds nobody who is not busy.
    assert_eq!(answer(&asking, "/fetch?http://store/fetch?http://store/version").await, version);
    let (status, _) = answer(&asking, "/fetch?http://store/fetch?http://store/fetch?http://store/version").await;
    assert_eq!(status, StatusCode::BAD_GATEWAY);
    bench.logged("request to http://store:80 failed: the module serves as many requests as it may").await;

    for (url, error, said) in [
        ("http://store/trap", "ConnectionTerminated", "request to http://store:80 failed: the module trapped"),
        ("https://store/version", "TlsProtocolError", "request to https://store:443 refused: the service is a module"),
    ] {
        let (status, body) = answer(&asking, &format!("/fetch?{url}")).await;
        assert_eq!((status, body.contains(error)), (StatusCode::BAD_GATEWAY, true), "{body}");
        bench.logged(said).await;
    }
    drop(proxy);
}

#[tokio::test]
async fn what_a_module_asks_of_a_module_is_in_flight_there_and_ends_with_whoever_asked() {
    let bench = Bench::new();
    let (proxy, store, asking) = store_of_modules(&bench, 1).await;
    let waiting =
        tokio::spawn(async move { asking.call(get("/fetch?http://store/sleep?600000"), None).await.map(drop) });
    until_in_flight(&proxy, 1).await;
    while store[0].0.instances.available_permits() > 0 {
        tokio::task::yield_now().await;
    }
    waiting.abort();
    until_in_flight(&proxy, 0).await;
    drop(store[0].0.instances.acquire().await.expect("it is not closed"));
}

#[tokio::test]
async fn a_module_reaches_nobody_else() {
    let bench = Bench::new();
    let address = neighbour().await;
    let module = bench.probe(|start| {
        start.limits.outbound.insert(format!("localhost:{}", address.port()));
    });
    let module = module.await;
    let (status, said) = answer(&module, &format!("/fetch?http://{address}/stock")).await;
    assert_eq!((status, said.contains("HttpRequestDenied")), (StatusCode::BAD_GATEWAY, true), "{said}");
    bench.logged("refused: it is no service of this project and not listed").await;

    // Listed, and still this host: a list is no way around the border.
    let (status, said) = answer(&module, &format!("/fetch?http://localhost:{}/stock", address.port())).await;
    assert_eq!((status, said.contains("DestinationIpProhibited")), (StatusCode::BAD_GATEWAY, true), "{said}");
    bench.logged("refused: its name leads to no public address").await;
}

#[tokio::test]
async fn a_task_runs_with_its_environment_and_its_exit_is_known() {
    let bench = Bench::new();
    let env = vec![("TASK_NAME".to_owned(), "nightly".to_owned().into())];
    let task = bench.module(committed("tests/fixtures/task.wasm"), |start| start.env = env).await;
    task.run(Duration::ZERO).await.unwrap();
    let lines = bench.lines();
    assert_eq!(lines.iter().map(|line| line.text.as_str()).collect::<Vec<_>>(), ["task ran", "TASK_NAME=nightly"]);
    assert!(matches!(task.call(get("/"), None).await, Err(CallError::NotExported { .. })));

    let env = vec![("TASK_FAILS".to_owned(), "1".to_owned().into())];
    let task = bench.module(committed("tests/fixtures/task.wasm"), |start| start.env = env).await;
    assert!(matches!(task.run(Duration::ZERO).await, Err(CallError::Exited { code: 1 })));
}

#[tokio::test]
async fn a_task_waits_for_its_replica_longer_than_a_request_does() {
    let bench = Bench::new();
    let task = bench.module(committed("tests/fixtures/task.wasm"), |start| start.limits.concurrency = 1).await;
    let other = Arc::clone(&task.0.instances).try_acquire_owned().expect("nothing runs yet");
    let busy = task.run(Duration::ZERO).await;
    assert!(matches!(busy, Err(CallError::Busy { concurrency: 1 })), "{busy:?}");
    let mut waiting = tokio::spawn({
        let task = task.clone();
        async move { task.run(PATIENCE).await }
    });
    let early = tokio::time::timeout(ADMISSION_WAIT_MAX + Duration::from_millis(250), &mut waiting).await;
    assert!(early.is_err(), "it did not wait: {early:?}");
    drop(other);
    waiting.await.expect("no panic").expect("it is free again");
}

#[tokio::test]
async fn what_is_no_component_is_called_by_its_name() {
    let bench = Bench::new();
    let core = Bytes::from_static(b"\0asm\x01\0\0\0");
    for (bytes, said) in [
        (core, "a core module"),
        (Bytes::new(), "an empty file"),
        (Bytes::from_static(b"\x7fELF\x02"), "a program for Linux"),
        (Bytes::from_static(b"(component)"), "as text"),
        (Bytes::from_static(b"<!doctype html>"), "not WebAssembly"),
    ] {
        let error = bench.load(bytes).await.expect_err("no component").to_string();
        assert!(error.contains(said), "{error}");
    }
    let mut cut = probe().to_vec();
    cut.truncate(1_000);
    assert!(matches!(bench.load(cut.into()).await, Err(LoadError::Compile(_))));
    let other = bench.engine.load(&module_digest(b"other"), async { Ok(probe()) }).await;
    assert!(matches!(other, Err(LoadError::Digest { .. })));
    let empty = Bytes::from_static(b"\0asm\x0d\0\x01\0");
    assert!(matches!(bench.load(empty).await, Err(LoadError::MissingExport)));
}

/// The compiled file of the probe, and when it was last written.
fn compiled(bench: &Bench) -> (PathBuf, u64) {
    use std::os::unix::fs::MetadataExt as _;
    let path = bench.engine.0.cache.path(&module_digest(&probe()));
    let inode = fs::metadata(&path).expect("a compiled module").ino();
    (path, inode)
}

/// A second process, as far as the cache can tell.
fn again(bench: &Bench) -> Engine {
    let runtime = bench.runtime.as_ref().expect("it runs").handle().clone();
    Engine::new(bench.directory.path().join("cache"), runtime).expect("an engine")
}

#[tokio::test]
async fn replicas_that_wait_for_one_compilation_read_their_module_once() {
    let bench = Bench::new();
    let reads = std::cell::Cell::new(0);
    let digest = module_digest(&probe());
    let read = || async {
        reads.set(reads.get() + 1);
        Ok(probe())
    };
    let other = bench.engine.0.compiling.acquire().await.expect("it is never closed");
    let mut loading = Box::pin(futures_util::future::join_all((0..30).map(|_| bench.engine.load(&digest, read()))));
    assert!(futures_util::poll!(&mut loading).is_pending());
    assert_eq!(reads.get(), 0, "it is not their turn");
    drop(other);
    assert!(loading.await.iter().all(Result::is_ok));
    assert_eq!(reads.get(), 1);
}

#[tokio::test]
async fn a_module_is_compiled_once_and_read_from_disk_after() {
    let bench = Bench::new();
    bench.load(probe()).await.unwrap();
    let (path, inode) = compiled(&bench);

    let engine = again(&bench);
    let start = Instant::now();
    let component = engine.load(&module_digest(&probe()), async { Ok(probe()) }).await.unwrap();
    eprintln!("loaded from disk in {:?}", start.elapsed());
    assert!(component.serves() && !component.runs());
    assert_eq!(compiled(&bench), (path.clone(), inode), "it was not written again");
    assert!(engine.cached(&module_digest(&probe())).is_some());
}

#[tokio::test]
async fn a_compiled_module_that_is_not_ours_to_the_byte_is_compiled_again() {
    use std::os::unix::fs::PermissionsExt as _;
    let bench = Bench::new();
    bench.load(probe()).await.unwrap();
    let (path, _) = compiled(&bench);
    let whole = fs::read(&path).unwrap();
    let other_name = module_digest(b"other");

    let mut flipped = whole.clone();
    let middle = flipped.len() / 2;
    flipped[middle] ^= 1;
    for damaged in [flipped, whole[..whole.len() - 1].to_vec(), b"orca".to_vec(), Vec::new()] {
        fs::write(&path, damaged).unwrap();
        let engine = again(&bench);
        assert!(engine.cached(&module_digest(&probe())).is_none());
        engine.load(&module_digest(&probe()), async { Ok(probe()) }).await.unwrap();
        assert_eq!(fs::read(&path).unwrap(), whole, "it was written anew");
    }
    // Whole, but of another module.
    fs::copy(&path, bench.engine.0.cache.path(&other_name)).unwrap();
    assert!(bench.engine.cached(&other_name).is_none());
    // Whole, but anybody could have written it.
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
    assert!(bench.engine.cached(&module_digest(&probe())).is_none());
}

#[tokio::test]
async fn nothing_holds_an_engine_but_its_owner() {
    let bench = Bench::new();
    let module = bench.probe(|_| {}).await;
    answer(&module, "/version").await;
    drop(module);
    let shared = Arc::downgrade(&bench.engine.0);
    drop(bench);
    let start = Instant::now();
    while shared.strong_count() > 0 {
        assert!(start.elapsed() < PATIENCE, "somebody holds the engine");
        tokio::task::yield_now().await;
    }
}
