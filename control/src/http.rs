//! The HTTP API: the verbs of the CLI under `/api/v1`, except `exec`, which needs a stream both ways. One table of
//! routes makes both the router and the OpenAPI document, so that neither can have what the other lacks. Plain HTTP,
//! hence on loopback only; TLS comes with the edge.

mod document;
mod handler;
mod problem;
mod route;
mod schema;

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tracing::{debug, error, warn};

use crate::api::Core;
use crate::front::Front;

pub use document::document;

/// Largest body, but for modules ([`MODULE_BYTES_MAX`](orca_cluster::limit::MODULE_BYTES_MAX)).
const BODY_BYTES_MAX: usize = 4 << 20;

/// For the head of a request; without it, connections that say nothing would be kept for ever.
const HEAD_DEADLINE: Duration = Duration::from_secs(10);

/// Heads are method, path and a token.
const HEAD_BYTES_MAX: usize = 32 << 10;

const CONNECTIONS_MAX: usize = 512;

/// After `accept` failed, because there are no file descriptors left, say.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// The address a request came from.
#[derive(Debug, Clone, Copy)]
struct Source(SocketAddr);

pub fn router(core: Arc<Core>) -> Router {
    let router =
        route::routes().into_iter().fold(Router::new(), |router, route| router.route(route.path, route.handler));
    let router = router.fallback(problem::no_route).method_not_allowed_fallback(problem::no_method);
    let router = router.layer(DefaultBodyLimit::max(BODY_BYTES_MAX));
    router.layer(axum::middleware::from_fn(problem::only_local)).with_state(core)
}

/// What answers while no control plane is up: each request with the reason.
pub fn router_without_control(front: Front) -> Router {
    let router = Router::new().fallback(problem::no_control);
    router.layer(axum::middleware::from_fn(problem::only_local)).with_state(front)
}

impl Front {
    /// Answers HTTP for a control plane that is not there, until it is dropped. QUIC is answered at the handshake.
    pub async fn answer_without_control(&self) -> Infallible {
        // Nobody ever ends it in good order.
        let (_never, ending) = watch::channel(None);
        serve(router_without_control(self.clone()), self.http(), ending).await;
        std::future::pending().await
    }
}

/// Serves until the control plane ends, and then until what was asked is answered.
pub async fn serve(router: Router, listener: &TcpListener, mut ending: watch::Receiver<Option<String>>) {
    let service = TowerToHyperService::new(router);
    let told = ending.clone();
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(ended) = connections.join_next() => {
                if let Err(failed) = ended && failed.is_panic() {
                    error!(%failed, "serving an HTTP connection panicked");
                }
                continue;
            }
            _ = ending.wait_for(Option::is_some) => break,
        };
        let (socket, source) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                warn!(%error, "an HTTP connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        if connections.len() >= CONNECTIONS_MAX {
            warn!(%source, "too many HTTP connections");
            continue;
        }
        let (service, mut told) = (service.clone(), told.clone());
        let told = async move { drop(told.wait_for(Option::is_some).await) };
        connections.spawn(async move {
            let answer = service_fn(move |mut request: hyper::Request<Incoming>| {
                request.extensions_mut().insert(Source(source));
                let answer = service.call(request);
                async move { answer.await.map_err(|never: Infallible| never) }
            });
            let mut serving = std::pin::pin!(
                http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_DEADLINE)
                    .max_buf_size(HEAD_BYTES_MAX)
                    .serve_connection(TokioIo::new(socket), answer)
            );
            let served = tokio::select! {
                served = &mut serving => served,
                () = told => {
                    serving.as_mut().graceful_shutdown();
                    serving.await
                }
            };
            if let Err(error) = served {
                debug!(%source, %error, "an HTTP connection ended early");
            }
        });
    }
    while connections.join_next().await.is_some() {}
}
