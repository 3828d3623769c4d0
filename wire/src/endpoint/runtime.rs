//! Tells when the task that drives an endpoint has ended. QUIC reads packets from strangers; a panic there would leave
//! an endpoint that accepts nothing and says nothing.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use quinn::{AsyncTimer, AsyncUdpSocket, Runtime, TokioRuntime};
use tokio::sync::watch;
use tracing::error;

/// One for each endpoint.
#[derive(Debug)]
pub(super) struct Watched {
    begun: AtomicBool,
    ended: watch::Sender<bool>,
}

impl Watched {
    pub fn new() -> (Arc<Watched>, watch::Receiver<bool>) {
        let (ended, watch) = watch::channel(false);
        (Arc::new(Watched { begun: AtomicBool::new(false), ended }), watch)
    }
}

impl Runtime for Watched {
    fn new_timer(&self, at: Instant) -> Pin<Box<dyn AsyncTimer>> {
        TokioRuntime.new_timer(at)
    }

    fn spawn(&self, future: Pin<Box<dyn Future<Output = ()> + Send>>) {
        let task = tokio::spawn(future);
        // The first task is the endpoint's; the others are its connections', whose end their owners notice.
        if !self.begun.swap(true, Ordering::Relaxed) {
            let ended = self.ended.clone();
            tokio::spawn(async move {
                if let Err(failed) = task.await {
                    error!(%failed, "the QUIC endpoint failed");
                }
                ended.send_replace(true);
            });
        }
    }

    fn wrap_udp_socket(&self, socket: std::net::UdpSocket) -> io::Result<Arc<dyn AsyncUdpSocket>> {
        TokioRuntime.wrap_udp_socket(socket)
    }

    fn now(&self) -> Instant {
        TokioRuntime.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_end_of_the_first_task_is_told_and_of_no_other() {
        let (runtime, mut ended) = Watched::new();
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        runtime.spawn(Box::pin(async move { panic!("{:?}", stopped.await) }));
        let (done, other) = tokio::sync::oneshot::channel::<()>();
        runtime.spawn(Box::pin(async move { drop(done) }));
        other.await.unwrap_err();
        assert!(!*ended.borrow());
        drop(stop);
        ended.wait_for(|ended| *ended).await.unwrap();
    }
}
