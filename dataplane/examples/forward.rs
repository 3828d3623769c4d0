//! The proxy alone, before one server: `cargo run --release --example forward -- 127.0.0.1:8080 127.0.0.1:9000`.
//! For measuring it beside others, and for looking at it with `perf` and `strace`.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use orca_cluster::id::{Label, NodeId, ReplicaId, Revision, ServiceName};
use orca_cluster::route::{Absence, Backend, RouteKey, Tables, Upstream};
use orca_dataplane::{AccessLog, Config, DataPlane, Limits, NoModules};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: forward LISTEN SERVER [WORKERS]";
    let listen: SocketAddr = arguments.next().ok_or(usage)?.parse()?;
    let server: SocketAddr = arguments.next().ok_or(usage)?.parse()?;
    let workers = arguments.next().map_or(Ok(1), |text| text.parse())?;

    let limits = Limits { connections_per_source_max: u32::MAX, ..Limits::default() };
    let config =
        Config { http: vec![listen], workers, access_log: AccessLog::Off, limits, trusted_proxies: Vec::new() };
    let plane = DataPlane::start(config, Arc::new(NoModules))?;
    let name = ServiceName::new(Label::new("example")?, Label::new("server")?);
    let backend =
        Backend { replica: ReplicaId(1), revision: Revision(1), node: NodeId(1), address: Some(server), weight: 1 };
    let upstream = Upstream {
        backends: vec![backend],
        absence: Absence::Starting,
        response_timeout: Duration::from_secs(60),
        module: false,
    };
    let tables = Tables {
        routes: BTreeMap::from([(RouteKey::try_from("*/".to_owned())?, name.clone())]),
        services: BTreeMap::from([(name, upstream)]),
        ..Tables::default()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        plane.apply(Arc::new(tables)).await;
        tokio::signal::ctrl_c().await?;
        plane.shutdown(Duration::from_secs(10)).await;
        Ok(())
    })
}
