//! One request from its head to the end of its response, so that it is counted exactly once, whatever becomes of
//! it: whoever holds the [`Exchange`] when it is dropped has ended it.

use std::net::IpAddr;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::{Buf, Bytes};
use http::{HeaderMap, Request, StatusCode};
use http_body::{Body as _, Frame, SizeHint};
use orca_cluster::id::ReplicaId;

use super::access_log::Line;
use super::connection::Client;
use super::count::{self, Boarded, Ended};
use super::header::X_FORWARDED_FOR;
use super::table::{Backend, Replica, Service};
use super::upstream::Incoming;
use crate::body::{Body, BodyError};
use crate::now;

#[derive(Debug)]
pub struct Exchange {
    pub client: Rc<Client>,
    began: Instant,
    status: Option<StatusCode>,
    /// Where it counts: at the revision of its last attempt, or as unserved. Nothing without a route.
    cell: Option<Arc<count::Cell>>,
    boarded: Option<Boarded>,
    /// The replica of the last attempt.
    replica: Option<ReplicaId>,
    end: End,
    latency: Option<std::time::Duration>,
    bytes: u64,
    line: Option<Box<Line>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// Until something else is known: whoever gives up without a word is the client.
    Left,
    Done,
    Cut,
}

impl Exchange {
    pub fn begin(client: Rc<Client>, request: &Request<hyper::body::Incoming>) -> Exchange {
        client.begin();
        let line = client.worker.log.is_some().then(|| {
            let told = if client.is_trusted { spoken_for(&client, request.headers()) } else { None };
            Box::new(Line {
                at: now().0,
                id: String::new(),
                client: told.unwrap_or(client.peer),
                via: told.map(|_| client.peer),
                method: request.method().to_string(),
                host: None,
                path: request.uri().path().to_owned(),
                status: None,
                bytes: 0,
                micros: 0,
                end: "left",
                service: None,
                revision: None,
                replica: None,
                retries: 0,
            })
        });
        Exchange {
            client,
            began: Instant::now(),
            status: None,
            cell: None,
            boarded: None,
            replica: None,
            end: End::Left,
            latency: None,
            bytes: 0,
            line,
        }
    }

    pub fn named(&mut self, id: &str, host: Option<&str>) {
        if let Some(line) = &mut self.line {
            id.clone_into(&mut line.id);
            line.host = host.map(str::to_owned);
        }
    }

    /// It is for this service, and nobody serves it yet.
    pub fn routed(&mut self, service: &Service) {
        self.cell = Some(Arc::clone(&service.unserved));
        self.boarded = None;
        if let Some(line) = &mut self.line {
            line.service = Some(service.name.clone());
            line.revision = None;
            line.replica = None;
        }
    }

    /// It goes to this replica now. Called between two polls of anything else, so that no table can change between
    /// the choice and its being counted.
    pub fn attempted(&mut self, backend: &Backend) {
        self.cell = Some(Arc::clone(&backend.cell));
        self.boarded = Some(backend.replica.flight.board());
        self.replica = Some(backend.replica.id);
        if let Some(line) = &mut self.line {
            line.revision = Some(backend.revision);
            line.replica = Some(backend.replica.id);
        }
    }

    pub fn retried(&mut self) {
        if let Some(line) = &mut self.line {
            line.retries += 1;
        }
    }

    /// It has its response, and is given to no other replica.
    pub fn answered(&mut self, status: StatusCode) {
        if self.status.replace(status).is_none() {
            self.client.answered();
        }
    }

    /// The response was an agreement to upgrade; from here on the time is the users' own.
    pub fn upgraded(&mut self) {
        self.latency = Some(self.began.elapsed());
        if let Some(boarded) = &mut self.boarded {
            boarded.upgrade();
        }
    }

    /// Whether the replica is one that no new request would be given to.
    pub fn is_draining(&self) -> bool {
        self.replica.is_some_and(|replica| !self.client.worker.routes_to(replica))
    }

    pub fn moved(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    pub fn done(mut self) {
        self.end = End::Done;
    }

    /// We or the replica ended it before its end.
    pub fn cut(mut self) {
        self.end = End::Cut;
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        if self.end == End::Left && (self.client.is_ended_by_us.get() || self.client.worker.is_cut()) {
            self.end = End::Cut;
        }
        let latency = self.latency.unwrap_or_else(|| self.began.elapsed());
        if let Some(cell) = &self.cell {
            cell.count(Ended { status: self.status, cut: self.end == End::Cut, latency });
        }
        if self.status.is_none() {
            self.client.answered();
        }
        self.client.end();
        if let (Some(mut line), Some(log)) = (self.line.take(), &self.client.worker.log) {
            line.status = self.status.map(|status| status.as_u16());
            line.bytes = self.bytes;
            line.micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
            line.end = match self.end {
                End::Left => "left",
                End::Done => "done",
                End::Cut => "cut",
            };
            log.write(line);
        }
    }
}

/// For whom a trusted proxy speaks: the last address it was told that is not a trusted proxy's itself, since whatever is
/// before that one anybody may have written. If all of them are, the first.
fn spoken_for(client: &Client, headers: &HeaderMap) -> Option<IpAddr> {
    let mut farthest = None;
    let fields = headers.get_all(X_FORWARDED_FOR).iter().rev();
    for text in fields.flat_map(|field| field.as_bytes().rsplit(|byte| *byte == b',')) {
        let Some(address) = str::from_utf8(text).ok().and_then(|text| text.trim().parse::<IpAddr>().ok()) else {
            break;
        };
        let address = address.to_canonical();
        farthest = Some(address);
        if !client.worker.trusts(address) {
            break;
        }
    }
    farthest
}

/// A response's body on its way to the client. Its end ends the exchange, and gives the replica's connection back.
#[derive(Debug)]
pub struct Counted {
    content: Content,
    exchange: Option<Exchange>,
}

#[derive(Debug)]
pub enum Content {
    /// A page, or what a module says.
    Ours(Body),
    Relayed(Box<Incoming>, Rc<Replica>),
}

impl Counted {
    pub fn new(content: Content, exchange: Exchange) -> Counted {
        if let Content::Relayed(body, _) = &content {
            exchange.client.rest.replace(body.rest());
        }
        Counted { content, exchange: Some(exchange) }
    }

    /// For a response whose exchange goes on elsewhere.
    pub fn uncounted() -> Counted {
        Counted { content: Content::Ours(Body::empty()), exchange: None }
    }

    fn done(&mut self) {
        let Some(exchange) = self.exchange.take() else { return };
        exchange.client.rest.take();
        if let Content::Relayed(body, replica) = std::mem::replace(&mut self.content, Content::Ours(Body::empty()))
            && let Some(link) = body.into_link()
        {
            replica.pool.borrow_mut().put(link, exchange.client.worker.now());
        }
        exchange.done();
    }
}

impl http_body::Body for Counted {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let polled = match &mut self.content {
            Content::Ours(body) => Pin::new(body).poll_frame(context),
            Content::Relayed(body, _) => Pin::new(&mut **body).poll_frame(context),
        };
        match &polled {
            Poll::Pending => {}
            Poll::Ready(None) => self.done(),
            Poll::Ready(Some(Ok(frame))) => {
                if let (Some(data), Some(exchange)) = (frame.data_ref(), &mut self.exchange) {
                    exchange.moved(data.remaining() as u64);
                }
                if self.is_end_stream() {
                    self.done();
                }
            }
            Poll::Ready(Some(Err(error))) => {
                if let Some(exchange) = self.exchange.take() {
                    tracing::debug!(%error, "a response broke off");
                    exchange.cut();
                }
            }
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        match &self.content {
            Content::Ours(body) => body.is_end_stream(),
            Content::Relayed(body, _) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Ours(body) => body.size_hint(),
            Content::Relayed(body, _) => body.size_hint(),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        if let Some(exchange) = &self.exchange {
            exchange.client.rest.take();
        }
        // The library does not poll a body that says it has ended.
        if self.is_end_stream() {
            self.done();
        }
    }
}
