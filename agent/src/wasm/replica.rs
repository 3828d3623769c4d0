//! One replica: an instance for each request, from its admission until what is left of it is cleared away.

use std::fmt;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{HOST, HeaderValue};
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt as _;
use orca_cluster::id::{ReplicaId, ServiceName};
use orca_cluster::spec::ModuleLimits;
use orca_dataplane::{Body, BodyError, Services};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};
use tokio_util::sync::CancellationToken;
use wasmtime::Store;
use wasmtime_wasi_http::WasiHttpView as _;
use wasmtime_wasi_http::p2::bindings::Proxy;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;
use zeroize::Zeroizing;

use super::engine::{Component, Engine, RUNS, Running, SERVES};
use super::failure::{CallError, Circumstances};
use super::guest::{Allotment, Deadline, Guest};
use super::outbound::Policy;
use super::pace::Pace;
use super::spare::{Ready, Spare};
use crate::module_log::{Source, Writer};

/// How long a request waits for one of its replica's instances before it is told that all are busy: as long as the proxy
/// holds one for a service that is restarting. In that time a rush passes, or a busy machine gets to it.
pub(super) const ADMISSION_WAIT_MAX: Duration = Duration::from_secs(2);
/// A deadline inside a running instance names the function it was in. Waits are cut only after that had its chance.
const DEADLINE_GRACE: Duration = Duration::from_millis(30);

/// What a replica is started with. Has no `Debug`: the values of `env` may be secrets. Ours are wiped when the replica
/// ends; an instance's copy lives until its request has ended.
#[expect(missing_debug_implementations, reason = "holds secrets")]
pub struct Start {
    pub replica: ReplicaId,
    pub service: ServiceName,
    pub env: Vec<(String, Zeroizing<String>)>,
    pub limits: ModuleLimits,
    pub log: Writer,
    /// Those it may ask, of its own project.
    pub services: Services,
}

/// One replica of a module. Cheap to clone; ends with [`stop`](Module::stop).
#[derive(Clone)]
pub struct Module(pub(super) Arc<Replica>);

pub(super) struct Replica {
    pub(super) engine: Engine,
    pub(super) component: Component,
    replica: ReplicaId,
    service: ServiceName,
    env: Vec<(String, Zeroizing<String>)>,
    pub(super) limits: ModuleLimits,
    log: Writer,
    outbound: Arc<Policy>,
    pub(super) instances: Arc<Semaphore>,
    stopping: CancellationToken,
    pub(super) pace: Arc<Pace>,
    pub(super) spare: Spare,
}

impl Engine {
    pub fn start(&self, component: &Component, start: Start) -> Module {
        let Start { replica, service, mut env, limits, log, services } = start;
        for (name, value) in [("ORCA_SERVICE", service.service.to_string()), ("ORCA_REPLICA", replica.to_string())] {
            if env.iter().all(|(given, _)| given != name) {
                env.push((name.to_owned(), value.into()));
            }
        }
        let outbound = Policy::new(limits.outbound.clone(), service.project.clone(), services, log.clone());
        let instances = Arc::new(Semaphore::new(limits.concurrency as usize));
        let (engine, component) = (self.clone(), component.clone());
        let stopping = CancellationToken::new();
        Module(Arc::new(Replica {
            engine,
            component,
            replica,
            service,
            env,
            limits,
            log,
            outbound: Arc::new(outbound),
            instances,
            stopping,
            pace: Arc::default(),
            spare: Spare::default(),
        }))
    }
}

impl Module {
    /// A place among the requests that it may serve at a time, if there is one.
    pub fn place(&self) -> Option<Place> {
        Arc::clone(&self.0.instances).try_acquire_owned().ok().map(Place)
    }

    /// Answers a request, for which it waits for a place if none is given. The response begins when the module begins
    /// it; its body streams. Dropping the future ends the instance; dropping the body closes it under the instance,
    /// which has until its deadline to notice.
    pub async fn call(&self, request: Request<Body>, place: Option<Place>) -> Result<Response<Body>, CallError> {
        let result = self.answer(request, place).await;
        if let Err(error) = &result {
            self.0.note(error);
        }
        result
    }

    async fn answer(&self, request: Request<Body>, place: Option<Place>) -> Result<Response<Body>, CallError> {
        let replica = &self.0;
        if !replica.component.serves() {
            return Err(CallError::NotExported { wanted: SERVES });
        }
        let permit = match place {
            Some(Place(permit)) => permit,
            None => replica.admit(ADMISSION_WAIT_MAX).await?,
        };
        let (begin, begun) = oneshot::channel();
        let end = Arc::new(OnceLock::new());
        let mut serving = Box::pin(Arc::clone(replica).serve(request, begin, Arc::clone(&end), permit));
        let runtime = replica.engine.runtime();
        let first = if replica.pace.is_quick() { take_turn(serving.as_mut(), runtime) } else { Turn::Unfinished };
        let mut instance = EndsWithUs(match first {
            Turn::Unfinished => Some(runtime.spawn(serving).abort_handle()),
            Turn::Panicked => None,
            Turn::Last(remains) => {
                // Our caller sends the response first. This takes as long as many a request.
                let replica = Arc::clone(replica);
                tokio::spawn(async move {
                    drop(remains);
                    replica.make_spare();
                });
                None
            }
        });
        match begun.await {
            Ok(Ok(response)) => {
                instance.0 = None;
                Ok(response.map(|body| Body::stream(Answer { body, end })))
            }
            Ok(Err(code)) => Err(CallError::refused(&code)),
            // The instance is gone. Why is written down before it goes.
            Err(_) => Err(end.get().cloned().unwrap_or(CallError::NoAnswer)),
        }
    }

    /// Runs the module once, as a program. It may wait so long for an instance: unlike a request's, its caller has time.
    pub async fn run(&self, wait_max: Duration) -> Result<(), CallError> {
        let replica = Arc::clone(&self.0);
        let permit = replica.admit(wait_max).await?;
        let running = self.0.engine.runtime().spawn(replica.run(permit));
        let mut instance = EndsWithUs(Some(running.abort_handle()));
        let result = running.await.unwrap_or_else(|error| Err(CallError::Runtime { problem: error.to_string() }));
        instance.0 = None;
        if let Err(error) = &result {
            self.0.note(error);
        }
        result
    }

    /// Ends every instance and admits no more. Draining comes before, and is the proxy's.
    pub fn stop(&self) {
        self.0.instances.close();
        self.0.stopping.cancel();
        self.0.spare.clear();
    }

    pub fn replica(&self) -> ReplicaId {
        self.0.replica
    }
}

/// The right to one instance of a module.
#[derive(Debug)]
pub struct Place(OwnedSemaphorePermit);

/// How an instance's first turn went.
pub(super) enum Turn<T> {
    Unfinished,
    Last(T),
    Panicked,
}

/// Takes an instance's first turn on this thread, as if on the runtime.
pub(super) fn take_turn<T>(instance: Pin<&mut impl Future<Output = T>>, runtime: &tokio::runtime::Handle) -> Turn<T> {
    // What it waits for belongs to the runtime, which asks for it anew as soon as the instance has moved there.
    let _entered = runtime.enter();
    let mut context = Context::from_waker(Waker::noop());
    // A panic ends the instance, as it would there, and not our caller.
    match catch_unwind(AssertUnwindSafe(|| instance.poll(&mut context))) {
        Ok(Poll::Ready(remains)) => Turn::Last(remains),
        Ok(Poll::Pending) => Turn::Unfinished,
        Err(_panic) => Turn::Panicked,
    }
}

/// What is left of an instance that is through. It still takes the place of one.
struct Remains {
    _store: Store<Guest>,
    _running: Running,
    _permit: OwnedSemaphorePermit,
}

/// Ends an instance when nobody waits for it any more.
struct EndsWithUs(Option<tokio::task::AbortHandle>);

impl Drop for EndsWithUs {
    fn drop(&mut self) {
        if let Some(instance) = self.0.take() {
            instance.abort();
        }
    }
}

type Begin =
    oneshot::Sender<Result<Response<HyperOutgoingBody>, wasmtime_wasi_http::p2::bindings::http::types::ErrorCode>>;
/// Why an instance ended, if not well.
type End = Arc<OnceLock<CallError>>;

impl Replica {
    async fn admit(&self, wait_max: Duration) -> Result<OwnedSemaphorePermit, CallError> {
        match tokio::time::timeout(wait_max, Arc::clone(&self.instances).acquire_owned()).await {
            Ok(Ok(permit)) => Ok(permit),
            Ok(Err(_closed)) => Err(CallError::Stopped),
            Err(_elapsed) => Err(CallError::Busy { concurrency: self.limits.concurrency }),
        }
    }

    async fn serve(
        self: Arc<Self>,
        request: Request<Body>,
        begin: Begin,
        end: End,
        permit: OwnedSemaphorePermit,
    ) -> Remains {
        let running = self.engine.running();
        let (mut store, instance, deadline) = match self.spare.take(self.limits.timeout) {
            Some(Ready { store, instance, deadline, .. }) => (store, Some(instance), deadline),
            None => {
                let deadline = Deadline::after(self.limits.timeout);
                (self.store(deadline.clone()), None, deadline)
            }
        };
        // Dropped after the end is set: who waits for the beginning and learns that there is none looks there.
        let mut begin = Some(begin);
        let result = {
            let guest = self.handle(&mut store, instance, request, &mut begin, deadline.clone());
            self.within(guest, &deadline).await
        };
        if let Err(error) = result {
            let error = self.read(error, &store);
            // Whoever waits for the beginning or the rest of the response looks here once the store is gone.
            if end.set(error.clone()).is_ok() && deadline.has_moved() {
                self.note(&error);
            }
        }
        Remains { _store: store, _running: running, _permit: permit }
    }

    async fn handle(
        &self,
        store: &mut Store<Guest>,
        instance: Option<Proxy>,
        request: Request<Body>,
        begin: &mut Option<Begin>,
        deadline: Deadline,
    ) -> wasmtime::Result<()> {
        let pre = self.component.handler().expect("looked at before");
        let (scheme, request) = self.incoming(request);
        let timeout = self.limits.timeout;
        let mut http = store.data_mut().http();
        let request = http.new_incoming_request(scheme, request)?;
        let given = Arc::new(Mutex::new(None));
        let response = http.new_response_outparam_from_callback({
            let given = Arc::clone(&given);
            move |response| {
                deadline.extend(timeout);
                *given.lock().unwrap_or_else(PoisonError::into_inner) = Some(response);
            }
        })?;
        let guest = async {
            let instance = match instance {
                Some(instance) => instance,
                None => pre.instantiate_async(&mut *store).await?,
            };
            instance.wasi_http_incoming_handler().call_handle(store, request, response).await
        };
        // The response is passed on when the guest's turn is over, a tick later at most. Most are through by then, and
        // whoever waits wakes up once for all of it instead of for the head, for the body and for its end.
        let mut guest = std::pin::pin!(guest);
        let mut first_turn = Some(Instant::now());
        poll_fn(|context| {
            let polled = guest.as_mut().poll(context);
            if let Some(began) = first_turn.take() {
                self.pace.took_turn(began.elapsed(), polled.is_ready());
            }
            let response = given.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(response) = response
                && let Some(begin) = begin.take()
            {
                // Nobody waits any more: then the instance is about to be ended.
                let _ = begin.send(response);
            }
            polled
        })
        .await
    }

    async fn run(self: Arc<Self>, _permit: OwnedSemaphorePermit) -> Result<(), CallError> {
        let Some(pre) = self.component.program() else { return Err(CallError::NotExported { wanted: RUNS }) };
        let _running = self.engine.running();
        let deadline = Deadline::after(self.limits.timeout);
        let mut store = self.store(deadline.clone());
        let result = {
            let guest = async {
                let instance = pre.instantiate_async(&mut store).await?;
                instance.wasi_cli_run().call_run(&mut store).await
            };
            self.within(guest, &deadline).await
        };
        match result {
            Ok(Ok(())) => Ok(()),
            Ok(Err(())) => Err(CallError::Exited { code: 1 }),
            Err(error) => match self.read(error, &store) {
                // How a program in C or Rust ends when all is well.
                CallError::Exited { code: 0 } => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Waits for an instance until its deadline, wherever that has moved, or until the replica stops.
    async fn within<T>(
        &self,
        guest: impl Future<Output = wasmtime::Result<T>>,
        deadline: &Deadline,
    ) -> Result<T, Ending> {
        let mut guest = std::pin::pin!(guest);
        let mut stopping = std::pin::pin!(self.stopping.cancelled());
        let until = || (deadline.at() + DEADLINE_GRACE).into();
        let mut clock = std::pin::pin!(tokio::time::sleep_until(until()));
        loop {
            tokio::select! {
                // The guest first: one that is through in its first turn costs no timer.
                biased;
                result = &mut guest => return result.map_err(Ending::Error),
                () = &mut stopping => return Err(Ending::Stopped),
                () = &mut clock => {
                    if until() <= clock.deadline() {
                        return Err(Ending::Deadline);
                    }
                    clock.as_mut().reset(until());
                }
            }
        }
    }

    fn read(&self, ending: Ending, store: &Store<Guest>) -> CallError {
        let ModuleLimits { memory, timeout, .. } = self.limits;
        match ending {
            Ending::Stopped => CallError::Stopped,
            Ending::Deadline => CallError::TimedOut { limit: timeout, place: None },
            Ending::Error(error) => {
                let memory_denied = store.data().memory_denied();
                CallError::of(&error, &Circumstances { timeout, memory, memory_denied })
            }
        }
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.is_cancelled()
    }

    pub(super) fn store(&self, deadline: Deadline) -> Store<Guest> {
        let Replica { env, limits, log, outbound, pace, .. } = self;
        Guest::store(self.engine.wasmtime(), Allotment { env, memory: limits.memory, log, outbound, pace, deadline })
    }

    /// The request as the module is to see it.
    fn incoming(&self, mut request: Request<Body>) -> (Scheme, Request<GuestBody>) {
        let headers = request.headers_mut();
        // The proxy ended TLS, and says so.
        let tls = headers.get("x-forwarded-proto").is_some_and(|proto| proto == "https");
        let host = headers.get(HOST);
        if host.is_none_or(|host| host.to_str().is_err()) && request.uri().authority().is_none() {
            // HTTP/1.0 may leave it out; WASI needs one.
            let name = HeaderValue::from_str(self.service.service.as_str()).expect("a label is a header value");
            request.headers_mut().insert(HOST, name);
        }
        let scheme = if tls { Scheme::Https } else { Scheme::Http };
        (scheme, request.map(|body| body.map_err(broken as fn(BodyError) -> wasmtime_wasi_http::Error)))
    }

    /// A failed call, in the replica's own log. What is not the module's doing is not in it: one line for each
    /// request too many would push out what the module itself has to say.
    fn note(&self, error: &CallError) {
        match error {
            CallError::Busy { .. } | CallError::NodeBusy | CallError::Stopped => {}
            _ => {
                self.pace.lingered();
                self.log.line(Source::Orca, &error.to_string());
            }
        }
    }
}

type GuestBody = http_body_util::combinators::MapErr<Body, fn(BodyError) -> wasmtime_wasi_http::Error>;

fn broken(_: BodyError) -> wasmtime_wasi_http::Error {
    wasmtime_wasi_http::Error::ConnectionTerminated
}

enum Ending {
    Error(wasmtime::Error),
    Deadline,
    Stopped,
}

/// A response's body. When the instance ended badly what there is of it is not the whole, and that has to be seen:
/// a cut body must not look like a short one.
struct Answer {
    body: HyperOutgoingBody,
    end: End,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(context).map(|frame| match frame {
            Some(Ok(frame)) => Some(Ok(frame)),
            Some(Err(error)) => Some(Err(BodyError::Module(Box::new(error)))),
            None => self.end.get().map(|error| Err(BodyError::Module(Box::new(error.clone())))),
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl fmt::Debug for Module {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0.service, self.0.replica)
    }
}
