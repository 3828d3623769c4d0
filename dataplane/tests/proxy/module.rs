//! Replicas that run in this process.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use http_body_util::BodyExt;
use orca_cluster::id::{ReplicaId, Revision};
use orca_cluster::route::{Backend, Upstream};
use orca_dataplane::{AccessLog, Body, Config, DataPlane, ModuleError, Modules, Offered, WhenBusy};

use crate::world::*;

/// Echoes what it is sent, or fails as the path says.
struct Echo;

impl Modules for Echo {
    fn call(&self, replica: ReplicaId, request: http::Request<Body>, _: WhenBusy) -> Offered {
        Ok(Box::pin(async move {
            match request.uri().path() {
                "/trap" => Err(ModuleError::Trapped),
                "/late" => Err(ModuleError::TimedOut),
                "/busy" => Err(ModuleError::Busy),
                "/memory" => Err(ModuleError::TooMuchMemory),
                "/never" => std::future::pending().await,
                "/gone" => Err(ModuleError::Unavailable),
                _ => {
                    let body = request.into_body().collect().await.map_err(|_| ModuleError::Trapped)?.to_bytes();
                    let response = http::Response::builder().header("x-replica", replica.0);
                    Ok(response.body(Body::whole(body)).unwrap())
                }
            }
        }))
    }
}

/// The same, once it is loaded.
#[derive(Default)]
struct Loading(AtomicBool);

impl Modules for Loading {
    fn call(&self, replica: ReplicaId, request: http::Request<Body>, when_busy: WhenBusy) -> Offered {
        if self.0.load(Ordering::SeqCst) { Echo.call(replica, request, when_busy) } else { Err(Box::new(request)) }
    }
}

/// The same, but these replicas are busy.
#[derive(Default)]
struct Crowded(Mutex<BTreeSet<u64>>);

impl Modules for Crowded {
    fn call(&self, replica: ReplicaId, request: http::Request<Body>, when_busy: WhenBusy) -> Offered {
        match (self.0.lock().unwrap().contains(&replica.0), when_busy) {
            (false, _) => Echo.call(replica, request, when_busy),
            (true, WhenBusy::GiveBack) => Err(Box::new(request)),
            (true, WhenBusy::Wait) => Ok(Box::pin(async { Err(ModuleError::Busy) })),
        }
    }
}

/// A proxy before one replica of these.
async fn before(modules: Arc<dyn Modules>) -> DataPlane {
    let config = Config {
        http: vec!["127.0.0.1:0".parse().unwrap()],
        workers: 1,
        access_log: AccessLog::Off,
        limits: limits(),
        trusted_proxies: Vec::new(),
    };
    let plane = DataPlane::start(config, modules).unwrap();
    plane.apply(Arc::new(tables_with(module()))).await;
    plane
}

fn module() -> Upstream {
    let mut upstream = upstream(&[(5, "0.0.0.0:0".parse().unwrap())]);
    upstream.module = true;
    upstream.backends[0].address = None;
    upstream
}

#[tokio::test]
async fn a_request_of_any_kind_waits_whole_for_a_module_that_is_being_loaded() {
    let modules = Arc::new(Loading::default());
    let plane = before(modules.clone()).await;
    let mut posting = Client::connect(&plane).await;
    posting.send("POST /a HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbo").await;
    let mut getting = Client::connect(&plane).await;
    getting.send("GET / HTTP/1.1\r\nHost: a\r\n\r\n").await;
    until("both wait", || plane.held() == 2).await;
    modules.0.store(true, Ordering::SeqCst);
    posting.send("dy").await;
    let reply = posting.reply().await.unwrap();
    assert_eq!((reply.status, reply.text(), reply.header("x-replica")), (200, "body", Some("5")));
    assert_eq!(getting.reply().await.unwrap().status, 200);
}

#[tokio::test]
async fn a_request_of_any_kind_goes_whole_to_a_replica_that_is_not_busy() {
    let modules = Arc::new(Crowded::default());
    let plane = before(modules.clone()).await;
    let mut upstream = module();
    upstream.backends.extend([6, 7, 8, 9].map(|id| Backend { replica: ReplicaId(id), ..upstream.backends[0].clone() }));
    plane.apply(Arc::new(tables_with(upstream))).await;
    modules.0.lock().unwrap().extend([5, 7, 8, 9]);
    let mut client = Client::connect(&plane).await;
    for _ in 0..50 {
        client.send("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 4\r\n\r\nbody").await;
        let reply = client.reply().await.unwrap();
        assert_eq!((reply.status, reply.text(), reply.header("x-replica")), (200, "body", Some("6")));
    }
    modules.0.lock().unwrap().insert(6);
    let reply = client.get("/").await;
    assert_eq!(reply.status, 503);
    assert!(reply.text().contains("is busy with other requests"), "{}", reply.text());
}

#[tokio::test]
async fn a_request_from_inside_the_process_is_given_to_a_module_and_in_flight_there() {
    let modules = Arc::new(Crowded::default());
    let plane = before(modules.clone()).await;
    let passage = plane.services().choose(&service(), &[]).unwrap();
    assert_eq!((passage.replica(), passage.address()), (ReplicaId(5), None));
    assert_eq!(traffic(&plane).in_flight[&ReplicaId(5)].requests, 1);
    let request = || http::Request::post("/").body(Body::whole("body")).unwrap();
    modules.0.lock().unwrap().insert(5);
    let given_back = passage.call(request(), WhenBusy::GiveBack).err().unwrap();
    modules.0.lock().unwrap().clear();
    let response = passage.call(*given_back, WhenBusy::GiveBack).ok().unwrap().await.unwrap();
    assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "body");
    // Whoever still has the way when nothing runs any more learns that.
    plane.shutdown(Duration::ZERO).await;
    drop(modules);
    until("the modules are gone", || passage.call(request(), WhenBusy::Wait).is_err()).await;
}

#[tokio::test]
async fn a_module_that_does_not_end_its_request_itself_is_not_waited_for_without_end() {
    let plane = before(Arc::new(Echo)).await;
    let mut upstream = module();
    upstream.response_timeout = Duration::from_millis(200);
    plane.apply(Arc::new(tables_with(upstream))).await;
    let reply = Client::connect(&plane).await.get("/never").await;
    assert_eq!(reply.status, 504);
    assert!(reply.text().contains("did not finish in time (`timeout_secs` of its module)"), "{}", reply.text());
}

#[tokio::test]
async fn a_module_is_called_in_process_and_its_failures_have_pages() {
    let plane = before(Arc::new(Echo)).await;
    let mut client = Client::connect(&plane).await;
    client.send("POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n").await;
    let reply = client.reply().await.unwrap();
    assert_eq!((reply.text(), reply.header("x-replica"), reply.header("content-length")), ("hi", Some("5"), Some("2")));
    for (path, status) in [("/trap", 500), ("/late", 504), ("/busy", 503), ("/memory", 500), ("/gone", 503)] {
        let reply = client.get(path).await;
        assert_eq!(reply.status, status, "{path}");
        assert!(reply.text().contains("shop/web"));
    }
    let traffic = &traffic(&plane).services[&service()];
    let counters = &traffic.revisions[&Revision(5)];
    assert_eq!((counters.requests, counters.statuses), (5, [0, 1, 0, 0, 4]));
    // One that has just been stopped is like one that takes no connection: held for a while, and served by no revision.
    assert_eq!((traffic.unserved.requests, traffic.unserved.statuses), (1, [0, 0, 0, 0, 1]));
}
