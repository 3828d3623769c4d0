//! A request's way to a replica and the response's way back. Both bodies are streamed; nothing of them is kept. A
//! request is sent again only where that cannot do anything twice: when nothing of it was sent, or when its method
//! is idempotent, it has no body and not a byte of a response came. While a service has no replica that takes
//! connections, as when its only one restarts, its requests are held for a moment instead of refused.

use std::future::{Future, poll_fn};
use std::io;
use std::net::IpAddr;
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;
use std::time::Duration;

use http::header::{self, HeaderValue};
use http::{HeaderMap, Method, Request, Response, StatusCode, Uri, Version};
use http_body::Body as _;
use hyper::body::Incoming;
use hyper::upgrade::OnUpgrade;
use tokio::time::Instant;

use super::connection::{Client, Pulse};
use super::count::Held;
use super::exchange::{Content, Counted, Exchange};
use super::header::{X_FORWARDED_FOR, X_FORWARDED_HOST, X_FORWARDED_PROTO, X_REQUEST_ID, strip, strip_request};
use super::page::{Asked, Refusal, page};
use super::response::Invalid;
use super::route::host_name;
use super::table::{Backend, Replica, Service, Target};
use super::upgrade;
use super::upload::Upload;
use super::upstream::{self, Answer, Link};
use super::worker::Worker;
use crate::body::{Body, BodyError};
use crate::{ModuleError, WhenBusy};

/// Between two rounds of trying a service's replicas: at first short beside the start of a process, then longer, since
/// many may be waiting. Whichever gets through first wakes the others.
const HOLD_PAUSE_MIN: Duration = Duration::from_millis(10);
const HOLD_PAUSE_MAX: Duration = Duration::from_millis(160);
/// Replicas that may refuse before a round counts as failed: with more, the next round tries others.
const CONNECTS_PER_ROUND: usize = 3;

/// Fields that a request may get on its way.
const FIELDS_ADDED_MAX: usize = 6;

/// Answers one request of a client.
pub async fn serve(client: Rc<Client>, request: Request<Incoming>) -> Response<Counted> {
    let mut exchange = Exchange::begin(Rc::clone(&client), &request);
    let asked = Asked { accept: request.headers().get(header::ACCEPT).cloned(), method: request.method().clone() };
    let id = request_id(client.worker.random());
    let mut way = Way { client: &client, exchange: &mut exchange, service: None, id: &id };
    match way.go(request).await {
        Ok(Passed::Response(response)) => {
            exchange.answered(response.status());
            response.map(|content| Counted::new(content, exchange))
        }
        Ok(Passed::Upgrade { headers, replica, ours }) => {
            let mut response = Response::new(Counted::uncounted());
            *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
            *response.headers_mut() = headers;
            exchange.answered(response.status());
            exchange.upgraded();
            client.pulse.upgraded();
            let protocol = response.headers().get(header::UPGRADE);
            let is_websocket = protocol.is_some_and(|name| name.as_bytes().eq_ignore_ascii_case(b"websocket"));
            tokio::task::spawn_local(upgrade::run(ours, replica, is_websocket, exchange));
            response
        }
        Err(refusal) => {
            let service = way.service.take();
            let name = service.as_ref().map(|service| &service.name);
            tracing::debug!(?refusal, service = name.map(tracing::field::display), "a request was not served");
            let page = page(&refusal, name, &id, &asked);
            exchange.answered(page.status());
            page.map(|body| Counted::new(Content::Ours(body), exchange))
        }
    }
}

/// What came back.
enum Passed {
    Response(Response<Content>),
    /// The replica agreed to change protocols.
    Upgrade {
        headers: HeaderMap,
        replica: upgrade::End,
        ours: OnUpgrade,
    },
}

/// One request under way.
struct Way<'a> {
    client: &'a Rc<Client>,
    exchange: &'a mut Exchange,
    service: Option<Rc<Service>>,
    id: &'a HeaderValue,
}

/// The request as it goes to a replica, for as long as it is ours.
struct Outgoing {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Body,
    /// The same as it goes over a wire, from the first attempt to send it on.
    upload: Option<Upload>,
    /// Sending it twice is as good as once, and it is all here.
    is_repeatable: bool,
}

/// Why an attempt gave no response.
enum Failed {
    /// Nothing was sent: the replica takes no connection.
    Refused(io::Error),
    /// The same of a module that is busy, or not loaded.
    GivenBack,
    /// Nothing was sent: a kept connection had been closed.
    Stale,
    /// It was sent, and the connection broke without a byte of a response.
    Broken {
        reused: bool,
        error: io::Error,
    },
    /// A response came that cannot be passed on.
    Invalid(Invalid),
    Late,
    /// The client broke off.
    Client(BodyError),
    Module(ModuleError),
}

impl Way<'_> {
    async fn go(&mut self, mut request: Request<Incoming>) -> Result<Passed, Refusal> {
        let worker = &self.client.worker;
        if request.method() == Method::CONNECT {
            return Err(Refusal::Method);
        }
        let ours = request.headers().contains_key(header::UPGRADE).then(|| hyper::upgrade::on(&mut request));
        let (parts, body) = request.into_parts();
        let authority = authority(&parts.uri, parts.version, &parts.headers)?;
        let host = match &authority {
            None => None,
            Some(value) => {
                let text = value.to_str().map_err(|_| Refusal::Host)?;
                Some(host_name(text).ok_or(Refusal::Host)?)
            }
        };
        self.exchange.named(self.id.to_str().unwrap_or_default(), host.as_deref());
        let path = match parts.uri.path() {
            "*" => "/",
            path => path,
        };
        let table = worker.table();
        let service = Rc::clone(table.routes.find(host.as_deref(), path).ok_or(Refusal::NoRoute)?);
        drop(table);
        self.exchange.routed(&service);

        let mut headers = parts.headers;
        let hop = strip_request(&mut headers);
        // Room for all of them at once: it would grow twice.
        headers.reserve(FIELDS_ADDED_MAX);
        let told = if self.client.is_trusted { Told::by(&headers) } else { Told::default() };
        headers.insert(X_FORWARDED_FOR, told.before(&self.client.forwarded_for));
        headers.insert(X_FORWARDED_PROTO, told.proto.unwrap_or(HeaderValue::from_static("http")));
        headers.insert(X_REQUEST_ID, self.id.clone());
        match authority {
            Some(authority) => {
                headers.insert(X_FORWARDED_HOST, told.host.unwrap_or_else(|| authority.clone()));
                headers.insert(header::HOST, authority);
            }
            // A client of HTTP/1.0 may not know the name; the request we make of it needs one.
            None => {
                headers.remove(X_FORWARDED_HOST);
                headers.insert(header::HOST, HeaderValue::from_static(""));
            }
        }
        if hop.trailers {
            headers.insert(header::TE, HeaderValue::from_static("trailers"));
            headers.insert(header::CONNECTION, HeaderValue::from_static("te"));
        }
        let is_empty = body.is_end_stream();
        let mut wanted = None;
        if let (Some(protocol), Some(ours), true) = (hop.upgrade, ours, is_empty && parts.version == Version::HTTP_11) {
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            headers.insert(header::UPGRADE, protocol);
            wanted = Some(ours);
        }
        let mut outgoing = Outgoing {
            is_repeatable: is_empty && parts.method.is_idempotent(),
            method: parts.method,
            uri: origin_form(parts.uri),
            headers,
            body: Body::from(body),
            upload: None,
        };
        self.deliver(service, &mut outgoing, wanted).await
    }

    /// Tries replicas until one answers or there is no sense in it any more.
    async fn deliver(
        &mut self,
        mut service: Rc<Service>,
        outgoing: &mut Outgoing,
        mut wanted: Option<OnUpgrade>,
    ) -> Result<Passed, Refusal> {
        let worker = Rc::clone(&self.client.worker);
        let mut hold = Hold::new(&worker);
        let mut retries = 0;
        // Who has refused it in this round, or broken off.
        let mut avoid = Vec::new();
        // All modules were busy: it waits for a place at one of them, drawn by weight as if none had been.
        let mut waits = false;
        loop {
            self.service = Some(Rc::clone(&service));
            let when_busy = if waits || service.backends.len() == 1 { WhenBusy::Wait } else { WhenBusy::GiveBack };
            let chosen = service.choose(worker.now(), worker.random_pair(), &avoid);
            let is_last = chosen.is_none_or(|backend| avoid.len() + 1 >= service.tries_max(backend.target));
            let failed = match chosen {
                None if !service.absence.may_end_soon() => return Err(Refusal::Absent(service.absence)),
                None => None,
                Some(backend) => match self.attempt(&service, backend, when_busy, outgoing, &mut wanted).await {
                    Ok(passed) => return Ok(passed),
                    Err(failed) => Some((backend.replica.id, failed)),
                },
            };
            let is_held = match failed {
                None => true,
                Some((_, Failed::Stale)) => false,
                Some((replica, Failed::Refused(error))) => {
                    tracing::debug!(%replica, %error, "a replica took no connection");
                    avoid.push(replica);
                    is_last
                }
                Some((_, Failed::GivenBack)) if is_last && when_busy == WhenBusy::GiveBack => {
                    waits = true;
                    avoid.clear();
                    false
                }
                Some((replica, Failed::GivenBack)) => {
                    avoid.push(replica);
                    is_last
                }
                Some((replica, Failed::Broken { reused, error })) => {
                    tracing::debug!(%replica, reused, %error, "a replica broke off before it answered");
                    if !outgoing.is_repeatable || retries >= worker.limits.retries_max {
                        return Err(Refusal::Broken);
                    }
                    retries += 1;
                    self.exchange.retried();
                    if !reused {
                        avoid.push(replica);
                    }
                    false
                }
                Some((replica, Failed::Invalid(why))) => {
                    tracing::warn!(service = %service.name, %replica, %why, "a replica gave a response that cannot be passed on");
                    return Err(Refusal::Broken);
                }
                Some((replica, Failed::Late)) => {
                    tracing::debug!(%replica, "a replica did not answer in time");
                    return Err(Refusal::Late(service.response_timeout));
                }
                Some((_, Failed::Client(error))) => {
                    tracing::debug!(%error, "a client broke off inside its request");
                    return Err(Refusal::Incomplete);
                }
                // As when a connection is refused: it has just been stopped.
                Some((replica, Failed::Module(ModuleError::Unavailable))) if outgoing.is_repeatable => {
                    avoid.push(replica);
                    is_last
                }
                Some((_, Failed::Module(error))) => return Err(Refusal::Module(error)),
            };
            if is_held {
                let is_absent = service.backends.is_empty();
                self.exchange.routed(&service);
                if !hold.pause(is_absent).await {
                    return Err(if is_absent { Refusal::Absent(service.absence) } else { Refusal::Refusing });
                }
                avoid.clear();
                waits = false;
            }
            // Time has passed: only what the table says now may be chosen.
            service = worker.table().services.get(&service.name).cloned().ok_or(Refusal::NoRoute)?;
        }
    }

    async fn attempt(
        &mut self,
        service: &Service,
        backend: &Backend,
        when_busy: WhenBusy,
        outgoing: &mut Outgoing,
        wanted: &mut Option<OnUpgrade>,
    ) -> Result<Passed, Failed> {
        self.exchange.attempted(backend);
        let pulse = &self.client.pulse;
        let address = match backend.target {
            Target::Address(address) => address,
            Target::Module => return self.call(service, backend, outgoing, when_busy).await,
        };
        let replica = &backend.replica;
        let worker = &self.client.worker;
        let kept = replica.pool.borrow_mut().take();
        let link = match kept {
            Some(link) => link,
            None => Link::connect(address, worker.limits.connect_time_max).await.map_err(|error| {
                if !is_our_shortage(&error) {
                    replica.failed(worker.now());
                }
                Failed::Refused(error)
            })?,
        };
        let reused = link.reused;
        let is_head = outgoing.method == Method::HEAD;
        let exchanged = link.exchange(outgoing.upload(), is_head, &self.client.bypass);
        pulse.wait(service.response_timeout);
        let answered = in_time(pulse, exchanged).await;
        pulse.wait_is_over();
        match answered {
            None => Err(Failed::Late),
            Some(Ok(answer)) => {
                if replica.succeeded() {
                    worker.reachable.notify_waiters();
                }
                pass_on(answer, wanted, replica)
            }
            Some(Err(upstream::Failed::Invalid(why))) => Err(Failed::Invalid(why)),
            Some(Err(upstream::Failed::Client(error))) => Err(Failed::Client(error)),
            Some(Err(upstream::Failed::Unsent(error) | upstream::Failed::Broken(error))) => {
                // What else is kept for this replica was probably closed with it.
                replica.pool.borrow_mut().clear();
                if !reused {
                    replica.failed(worker.now());
                }
                match outgoing.upload {
                    Some(Upload { has_begun: false, .. }) if reused => Err(Failed::Stale),
                    Some(Upload { has_begun: false, .. }) => Err(Failed::Refused(error)),
                    _ => Err(Failed::Broken { reused, error }),
                }
            }
        }
    }

    /// A module runs in this process; its time-outs are its own, and ours, which is longer, only backs them up.
    async fn call(
        &mut self,
        service: &Service,
        backend: &Backend,
        outgoing: &mut Outgoing,
        when_busy: WhenBusy,
    ) -> Result<Passed, Failed> {
        let pulse = &self.client.pulse;
        let is_head = outgoing.method == Method::HEAD;
        let request = outgoing.request().ok_or(Failed::Module(ModuleError::Unavailable))?;
        let called = self.client.worker.modules.call(backend.replica.id, request, when_busy).map_err(|request| {
            outgoing.take_back(*request);
            Failed::GivenBack
        })?;
        pulse.wait(service.response_timeout);
        let answered = in_time(pulse, called).await;
        pulse.wait_is_over();
        let mut response = answered.unwrap_or(Err(ModuleError::TimedOut)).map_err(Failed::Module)?;
        if response.status().is_informational() {
            return Err(Failed::Invalid(Invalid::Switch));
        }
        strip(response.headers_mut());
        *response.version_mut() = Version::HTTP_11;
        if is_head {
            *response.body_mut() = Body::empty();
        }
        Ok(Passed::Response(response.map(Content::Ours)))
    }
}

impl Service {
    /// Replicas of this kind that a round tries: asking a module for a place costs nothing.
    fn tries_max(&self, target: Target) -> usize {
        match target {
            Target::Address(_) => CONNECTS_PER_ROUND.min(self.backends.len()),
            Target::Module => self.backends.len(),
        }
    }
}

/// Whether a connection failed for want of something that is ours: descriptors, ports, memory.
pub fn is_our_shortage(error: &io::Error) -> bool {
    use rustix::io::Errno;
    let shortages = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM, Errno::ADDRNOTAVAIL];
    Errno::from_io_error(error).is_some_and(|errno| shortages.contains(&errno))
}

/// Makes a replica's response ours.
fn pass_on(answer: Answer, wanted: &mut Option<OnUpgrade>, replica: &Rc<Replica>) -> Result<Passed, Failed> {
    match answer {
        Answer::Switched(mut headers, stream, early) => {
            let ours = wanted.take().ok_or(Failed::Invalid(Invalid::Switch))?;
            let protocol = headers.remove(header::UPGRADE);
            strip(&mut headers);
            headers.insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
            if let Some(protocol) = protocol {
                headers.insert(header::UPGRADE, protocol);
            }
            Ok(Passed::Upgrade { headers, replica: upgrade::End { stream, early }, ours })
        }
        Answer::Response(status, mut headers, body) => {
            strip(&mut headers);
            let mut response = Response::new(Content::Relayed(body, Rc::clone(replica)));
            *response.status_mut() = status;
            *response.headers_mut() = headers;
            Ok(Passed::Response(response))
        }
    }
}

impl Outgoing {
    /// The request to send, from its beginning.
    fn upload(&mut self) -> &mut Option<Upload> {
        match &mut self.upload {
            Some(upload) => upload.rewind(),
            None => {
                let body = std::mem::take(&mut self.body);
                self.upload = Some(Upload::new(&self.method, &self.uri, &self.headers, body));
            }
        }
        &mut self.upload
    }

    /// The request to call a module with: a copy of it if it can be sent again, else itself. Nothing if part of its
    /// body went another way.
    fn request(&mut self) -> Option<Request<Body>> {
        if let Some(upload) = self.upload.take() {
            self.body = upload.into_body()?;
        }
        let (uri, headers) = if self.is_repeatable {
            (self.uri.clone(), self.headers.clone())
        } else {
            (std::mem::take(&mut self.uri), std::mem::take(&mut self.headers))
        };
        let mut request = Request::new(std::mem::take(&mut self.body));
        *request.method_mut() = self.method.clone();
        *request.uri_mut() = uri;
        *request.headers_mut() = headers;
        Some(request)
    }

    /// The request of before, to be sent elsewhere.
    fn take_back(&mut self, request: Request<Body>) {
        let (head, body) = request.into_parts();
        (self.uri, self.headers, self.body) = (head.uri, head.headers, body);
    }
}

/// A request that waits until its service can be reached.
struct Hold<'a> {
    worker: &'a Worker,
    place: Option<(Held, Instant)>,
    pause: Duration,
}

impl<'a> Hold<'a> {
    fn new(worker: &'a Worker) -> Hold<'a> {
        Hold { worker, place: None, pause: HOLD_PAUSE_MIN }
    }

    /// Waits for a new table, or, unless only that can help, a little while. Says whether to try again.
    async fn pause(&mut self, only_a_table_helps: bool) -> bool {
        let limits = &self.worker.limits;
        if self.place.is_none() {
            let Some(held) = self.worker.book.hold(limits.held_max) else { return false };
            self.place = Some((held, Instant::now() + limits.hold_time_max));
        }
        let until = self.place.as_ref().map_or_else(Instant::now, |(_, until)| *until);
        let now = Instant::now();
        if now >= until {
            return false;
        }
        let pause = if only_a_table_helps { until } else { until.min(now + self.pause) };
        self.pause = (self.pause * 2).min(HOLD_PAUSE_MAX);
        tokio::select! {
            () = self.worker.reachable.notified() => true,
            () = tokio::time::sleep_until(pause) => !only_a_table_helps,
        }
    }
}

/// The output of a future, or nothing if the replica is late. The worker's tick sees to it that this is polled then.
async fn in_time<F: Future>(pulse: &Pulse, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    poll_fn(|context| match future.as_mut().poll(context) {
        Poll::Ready(output) => Poll::Ready(Some(output)),
        Poll::Pending if pulse.is_late() => Poll::Ready(None),
        Poll::Pending => Poll::Pending,
    })
    .await
}

/// Whom a request is addressed to. What the request line says goes before what `Host` says.
fn authority(uri: &Uri, version: Version, headers: &HeaderMap) -> Result<Option<HeaderValue>, Refusal> {
    let mut hosts = headers.get_all(header::HOST).iter();
    let host = hosts.next();
    if hosts.next().is_some() || (host.is_none() && version == Version::HTTP_11) {
        return Err(Refusal::Host);
    }
    match uri.authority() {
        Some(authority) => HeaderValue::from_str(authority.as_str()).map(Some).map_err(|_| Refusal::Host),
        None => Ok(host.cloned()),
    }
}

/// `http://host/path` without what only a proxy needs to know.
fn origin_form(uri: Uri) -> Uri {
    if uri.authority().is_none() {
        return uri;
    }
    uri.into_parts().path_and_query.map_or_else(|| Uri::from_static("/"), Uri::from)
}

/// What a trusted proxy says of the client it speaks for.
#[derive(Default)]
struct Told {
    /// All that it has passed through, nearest last.
    path: Vec<u8>,
    proto: Option<HeaderValue>,
    host: Option<HeaderValue>,
}

impl Told {
    fn by(headers: &HeaderMap) -> Told {
        let paths: Vec<&[u8]> = headers.get_all(X_FORWARDED_FOR).iter().map(HeaderValue::as_bytes).collect();
        let proto = headers.get(X_FORWARDED_PROTO).filter(|proto| matches!(proto.as_bytes(), b"http" | b"https"));
        Told { path: paths.join(&b", "[..]), proto: proto.cloned(), host: headers.get(X_FORWARDED_HOST).cloned() }
    }

    /// The same with whoever told it at the end.
    fn before(&self, peer: &HeaderValue) -> HeaderValue {
        if self.path.is_empty() {
            return peer.clone();
        }
        let path = [self.path.as_slice(), peer.as_bytes()].join(&b", "[..]);
        HeaderValue::from_bytes(&path).expect("two values of fields and a comma are one")
    }
}

pub fn address_value(address: IpAddr) -> HeaderValue {
    HeaderValue::from_str(&address.to_string()).expect("an address has only visible ASCII")
}

fn request_id(random: u64) -> HeaderValue {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = [0; 16];
    for (index, byte) in random.to_be_bytes().into_iter().enumerate() {
        text[2 * index] = DIGITS[usize::from(byte >> 4)];
        text[2 * index + 1] = DIGITS[usize::from(byte & 15)];
    }
    HeaderValue::from_bytes(&text).expect("hexadecimal digits are visible ASCII")
}
