//! Replicas that run in this process.

use std::sync::Arc;

use http_body_util::BodyExt;
use orca_cluster::id::{ReplicaId, Revision};
use orca_dataplane::{AccessLog, Body, Config, DataPlane, ModuleError, ModuleResponse, Modules};

use crate::world::*;

/// Echoes what it is sent, or fails as the path says.
struct Echo;

impl Modules for Echo {
    fn call(&self, replica: ReplicaId, request: http::Request<Body>) -> ModuleResponse {
        Box::pin(async move {
            match request.uri().path() {
                "/trap" => Err(ModuleError::Trapped),
                "/late" => Err(ModuleError::TimedOut),
                "/busy" => Err(ModuleError::Busy),
                "/memory" => Err(ModuleError::TooMuchMemory),
                "/gone" => Err(ModuleError::Unavailable),
                _ => {
                    let body = request.into_body().collect().await.map_err(|_| ModuleError::Trapped)?.to_bytes();
                    let response = http::Response::builder().header("x-replica", replica.0);
                    Ok(response.body(Body::whole(body)).unwrap())
                }
            }
        })
    }
}

#[tokio::test]
async fn a_module_is_called_in_process_and_its_failures_have_pages() {
    let config =
        Config { http: vec!["127.0.0.1:0".parse().unwrap()], workers: 1, access_log: AccessLog::Off, limits: limits() };
    let plane = DataPlane::start(config, Arc::new(Echo)).unwrap();
    let mut upstream = upstream(&[(5, "0.0.0.0:0".parse().unwrap())]);
    upstream.module = true;
    upstream.backends[0].address = None;
    plane.apply(Arc::new(tables_with(upstream))).await;
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
    // One that is not loaded is like one that takes no connection: held for a while, and served by no revision.
    assert_eq!((traffic.unserved.requests, traffic.unserved.statuses), (1, [0, 0, 0, 0, 1]));
}
