//! Requests that a module sends. A module reaches the services of its project, by name, and the hosts its service
//! lists; everything else is refused before a name is looked up.
//!
//! A host on the list is reached at a public address only, and the address that was checked is the one connected
//! to: a name may not lead back into the host or into its network, whatever its owner lets it resolve to today.
//!
//! Which replica of a service a request goes to is the data plane's choice ([`Services`]), by the same tables and the
//! same rule as for clients. It is in flight there until its response is read, so that a drain waits for it too. Another
//! module is called in this process; one that calls itself, over whatever detour, comes to the end of its
//! `max_concurrent` or of what it may have open.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http::uri::{PathAndQuery, Scheme, Uri};
use http::{Method, Request, Response};
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt as _;
use hyper_util::rt::TokioIo;
use orca_cluster::id::{Label, ServiceName};
use orca_dataplane::{Body, BodyError, ModuleError, ModuleResponse, Passage, Services, WhenBusy};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use wasmtime_wasi_http::p2::bindings::http::types::ErrorCode;
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttpHooks};

use crate::module_log::{Source, Writer};

/// Requests one replica has under way at once; further ones wait for one to end, until their module's time is up.
const CONNECTIONS_MAX: usize = 256;
/// From the first packet to an open connection, unless the module asks for less.
const CONNECT_TIME_MAX: Duration = Duration::from_secs(5);
/// As long as the proxy gives a replica: it is on this network, and there may be another.
const REPLICA_CONNECT_TIME_MAX: Duration = Duration::from_secs(1);
/// Replicas that may refuse before a request does not reach its service; nothing was sent to them.
const REPLICAS_TRIED_MAX: usize = 3;

/// What the requests of one replica share.
pub(super) struct Policy {
    listed: BTreeSet<String>,
    project: Label,
    services: Services,
    log: Writer,
    connections: Arc<Semaphore>,
}

impl Policy {
    pub(super) fn new(listed: BTreeSet<String>, project: Label, services: Services, log: Writer) -> Policy {
        Policy { listed, project, services, log, connections: Arc::new(Semaphore::new(CONNECTIONS_MAX)) }
    }

    async fn send(&self, request: Request<WasiBody>, options: Option<RequestOptions>) -> Result<Sent, Error> {
        let target = Target::of(request.uri())?;
        let options = options.unwrap_or_default();
        let destination = self.destination(&target).await?;
        let slot = Arc::clone(&self.connections).acquire_owned().await.expect("the semaphore is never closed");
        let connect_time = options.connect_timeout.unwrap_or(CONNECT_TIME_MAX).min(CONNECT_TIME_MAX);
        let is_head = request.method() == Method::HEAD;
        let request = outgoing(request);
        let reaching = async {
            match destination {
                Destination::Service(service) => {
                    let (reached, passage) = self.reach(&target, &service, request).await?;
                    Ok::<_, Error>((reached, Some(passage)))
                }
                Destination::Outside(address) => {
                    let stream = connect(address).await.map_err(Error::Connect)?;
                    Ok((Reached::Connected(target.secure(stream).await?, request.into()), None))
                }
            }
        };
        let (reached, passage) = timeout(connect_time, reaching).await.map_err(|_| Error::ConnectionTimeout)??;
        let (response, drive) = match reached {
            Reached::Connected(stream, request) => exchange(stream, *request, &options).await?,
            Reached::Called(answer) => {
                let response = self.answer(&target, answer, &options).await?;
                // As through a connection, where hyper sees to it.
                let response = if is_head { response.map(|_| Body::empty()) } else { response };
                (response, Box::new(async { Ok(()) }) as Drive)
            }
        };
        if let Some(passage) = &passage {
            passage.succeeded();
        }
        let idle = options.between_bytes_timeout;
        let held = Held { _slot: slot, _passage: passage };
        Ok((response.map(|body| ResponseBody { body, idle, clock: None, _held: held }.boxed_unsync()), drive))
    }

    /// Where a request may go, if anywhere.
    async fn destination(&self, target: &Target) -> Result<Destination, Error> {
        let service = Label::new(&target.host).ok().map(|service| ServiceName::new(self.project.clone(), service));
        if let Some(service) = service.filter(|service| self.services.has(service)) {
            return Ok(Destination::Service(service));
        }
        if !is_listed(&self.listed, target) {
            let problem = "it is no service of this project and not listed in `outbound`";
            return Err(self.refuse(target, problem, Error::HttpRequestDenied));
        }
        match public_address(target).await {
            Ok(address) => Ok(Destination::Outside(address)),
            Err(problem) => Err(self.refuse(target, &problem, Error::DestinationIpProhibited)),
        }
    }

    /// Connects to a replica of a service, or calls it if it is a module; another where one takes no request.
    async fn reach(
        &self,
        target: &Target,
        service: &ServiceName,
        mut request: Request<Body>,
    ) -> Result<(Reached, Passage), Error> {
        let mut refused = Vec::new();
        // All modules were busy: it waits for a place at one of them.
        let mut waits = false;
        loop {
            let Some(passage) = self.services.choose(service, &refused) else {
                let problem = "the service has no replica that is ready";
                return Err(self.refuse(target, problem, Error::DestinationUnavailable));
            };
            // Chosen again: there is no other.
            let is_again = refused.contains(&passage.replica());
            match passage.address() {
                Some(address) => {
                    let connected = timeout(REPLICA_CONNECT_TIME_MAX, connect(address)).await;
                    let error = match connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                        Ok(stream) => {
                            return Ok((Reached::Connected(target.secure(stream).await?, request.into()), passage));
                        }
                        Err(error) => error,
                    };
                    passage.refused(&error);
                    if is_again || refused.len() + 1 >= REPLICAS_TRIED_MAX {
                        return Err(Error::Connect(error));
                    }
                    refused.push(passage.replica());
                }
                None if target.tls => {
                    let problem = "the service is a module, which is asked by http://";
                    return Err(self.refuse(target, problem, Error::TlsProtocolError));
                }
                None => {
                    let when_busy = if waits { WhenBusy::Wait } else { WhenBusy::GiveBack };
                    match passage.call(request, when_busy) {
                        Ok(answer) => return Ok((Reached::Called(answer), passage)),
                        Err(_) if waits => {
                            let problem = "the module is not loaded on this node";
                            return Err(self.refuse(target, problem, Error::DestinationUnavailable));
                        }
                        Err(given_back) => request = *given_back,
                    }
                    if is_again {
                        waits = true;
                        refused.clear();
                    } else {
                        refused.push(passage.replica());
                    }
                }
            }
        }
    }

    /// What another module answers, when it begins to.
    async fn answer(
        &self,
        target: &Target,
        answer: ModuleResponse,
        options: &RequestOptions,
    ) -> Result<Response<Body>, Error> {
        let response = in_time(options, answer).await?.map_err(|error| {
            self.log.line(Source::Orca, &format!("request to {target} failed: {error}"));
            match error {
                ModuleError::Busy => Error::ConnectionLimitReached,
                ModuleError::Unavailable => Error::DestinationUnavailable,
                ModuleError::TimedOut => Error::HttpResponseTimeout,
                ModuleError::Trapped | ModuleError::TooMuchMemory => Error::ConnectionTerminated,
            }
        })?;
        if response.status().is_informational() { Err(Error::HttpProtocolError) } else { Ok(response) }
    }

    fn refuse(&self, target: &Target, problem: &str, error: Error) -> Error {
        self.log.line(Source::Orca, &format!("request to {target} refused: {problem}"));
        error
    }
}

enum Destination {
    Service(ServiceName),
    /// A public address of a listed host.
    Outside(SocketAddr),
}

/// Who a request is for, as its module says.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    tls: bool,
    /// Lower case; an IPv6 address without brackets.
    host: String,
    port: u16,
}

impl Target {
    fn of(uri: &Uri) -> Result<Target, Error> {
        let tls = uri.scheme() == Some(&Scheme::HTTPS);
        let host = uri.host().ok_or(Error::HttpRequestUriInvalid)?;
        let host = host.trim_start_matches('[').trim_end_matches(']').trim_end_matches('.').to_ascii_lowercase();
        let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        Ok(Target { tls, host, port })
    }

    async fn secure(&self, stream: TcpStream) -> Result<Box<dyn Stream>, Error> {
        if !self.tls {
            return Ok(Box::new(stream));
        }
        let name = ServerName::try_from(self.host.clone()).map_err(|_| Error::HttpRequestUriInvalid)?;
        let stream = TlsConnector::from(tls_config()).connect(name, stream).await.map_err(Error::Tls)?;
        Ok(Box::new(stream))
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Target { tls, host, port } = self;
        write!(f, "{}://{host}:{port}", if *tls { "https" } else { "http" })
    }
}

async fn connect(address: SocketAddr) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    // Requests are written whole; a delay would only be a delay.
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Whether a list such as `api.example.com`, `*.example.com:8443` names the target. An entry without a port means
/// the usual one of the scheme.
fn is_listed(list: &BTreeSet<String>, target: &Target) -> bool {
    let usual = if target.tls { 443 } else { 80 };
    list.iter().any(|entry| {
        let (host, port) = match entry.rsplit_once(':') {
            Some((host, port)) if !host.contains(':') => (host, port.parse().unwrap_or(usual)),
            _ => (entry.as_str(), usual),
        };
        let host_fits = match host.strip_prefix("*.") {
            // One label or more in front of the dot, as routes have it.
            Some(suffix) => target.host.strip_suffix(suffix).is_some_and(|rest| rest.len() > 1 && rest.ends_with('.')),
            None => host == target.host,
        };
        host_fits && port == target.port
    })
}

async fn public_address(target: &Target) -> Result<SocketAddr, String> {
    let mut addresses = tokio::net::lookup_host((target.host.as_str(), target.port))
        .await
        .map_err(|error| format!("its name does not resolve ({error})"))?;
    addresses.find(|address| is_public(address.ip())).ok_or_else(|| "its name leads to no public address".to_owned())
}

/// Whether an address is somebody else's, out on the internet: not this host, its network, or a cloud's metadata
/// service (which is link-local). From the registries of special-purpose addresses, RFC 6890.
fn is_public(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            let special = a == 0
                || v4.is_private()
                || v4.is_loopback()
                || v4.is_link_local()
                || v4.is_documentation()
                || (a == 100 && b & 0xc0 == 64)
                || (a == 192 && b == 0 && c == 0)
                || (a == 198 && b & 0xfe == 18)
                || a >= 224;
            !special
        }
        IpAddr::V6(v6) => match v6.segments() {
            // NAT64 and 6to4 carry an IPv4 address to check instead.
            [0x64, 0xff9b, 0, 0, 0, 0, high, low] => is_public(embedded(high, low)),
            [0x2002, high, low, ..] => is_public(embedded(high, low)),
            [0x2001, 0xdb8, ..] => false,
            // Only 2000::/3 is given out.
            [first, ..] => v6 != Ipv6Addr::UNSPECIFIED && first & 0xe000 == 0x2000,
        },
    }
}

fn embedded(high: u16, low: u16) -> IpAddr {
    let ([a, b], [c, d]) = (high.to_be_bytes(), low.to_be_bytes());
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

/// The host's own certificate authorities, read once, when the first module needs them.
fn tls_config() -> Arc<ClientConfig> {
    static CONFIG: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let mut roots = RootCertStore::empty();
        // What cannot be read is not trusted; without any, each handshake fails and says so.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("the provider has the cipher suites of TLS 1.2 and 1.3")
            .with_root_certificates(roots)
            .with_no_client_auth();
        Arc::new(config)
    });
    Arc::clone(config)
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Stream for S {}

/// What moves the connection along while the response is read; it ends when the connection does.
type Drive = Box<dyn Future<Output = Result<(), Error>> + Send>;
type Sent = (Response<WasiBody>, Drive);

/// A request whose receiver is found.
enum Reached {
    Connected(Box<dyn Stream>, Box<Request<Body>>),
    /// It is asked when this is polled.
    Called(ModuleResponse),
}

/// What a request holds until its response is read: one of its replica's connections, and its place in flight at the
/// service that it goes to.
struct Held {
    _slot: OwnedSemaphorePermit,
    _passage: Option<Passage>,
}

/// The request as it is sent: it asks for a path, not for a whole address as one would of a proxy.
fn outgoing(mut request: Request<WasiBody>) -> Request<Body> {
    let path = request.uri().path_and_query().cloned().unwrap_or(PathAndQuery::from_static("/"));
    *request.uri_mut() = Uri::from(path);
    request.map(|body| {
        if body.is_end_stream() {
            return Body::empty();
        }
        Body::stream(body.map_err(|error| BodyError::Module(Box::new(error))))
    })
}

/// A connection per request.
async fn exchange(
    stream: Box<dyn Stream>,
    request: Request<Body>,
    options: &RequestOptions,
) -> Result<(Response<Body>, Drive), Error> {
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let mut connection = Box::pin(connection);
    let answer = async {
        // `connection` has to be polled for the answer to come.
        let mut answer = std::pin::pin!(sender.send_request(request));
        let mut ended = false;
        std::future::poll_fn(|context| {
            if let Poll::Ready(answer) = answer.as_mut().poll(context) {
                return Poll::Ready(answer.map_err(Error::from));
            }
            if !ended {
                let result = ready!(connection.as_mut().poll(context));
                ended = true;
                result?;
            }
            answer.as_mut().poll(context).map_err(Error::from)
        })
        .await
    };
    let response = in_time(options, answer).await??;
    Ok((response.map(Body::from), Box::new(async move { connection.await.map_err(Error::from) })))
}

/// An answer within the time that the module gives it; its own is the limit if it gives none.
async fn in_time<F: Future>(options: &RequestOptions, answer: F) -> Result<F::Output, Error> {
    match options.first_byte_timeout {
        Some(limit) => timeout(limit, answer).await.map_err(|_| Error::ConnectionReadTimeout),
        None => Ok(answer.await),
    }
}

/// A response's body, held to the pace the module asked for.
struct ResponseBody {
    body: Body,
    idle: Option<Duration>,
    clock: Option<Pin<Box<tokio::time::Sleep>>>,
    _held: Held,
}

impl http_body::Body for ResponseBody {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            self.clock = None;
            return Poll::Ready(frame.map(|frame| {
                frame.map_err(|error| match error {
                    BodyError::Broken(error) => Error::from(error),
                    BodyError::Replica(_) | BodyError::Module(_) => Error::HttpResponseIncomplete,
                })
            }));
        }
        let Some(idle) = self.idle else { return Poll::Pending };
        let clock = self.clock.get_or_insert_with(|| Box::pin(tokio::time::sleep(idle)));
        clock.as_mut().poll(context).map(|()| Some(Err(Error::ConnectionReadTimeout)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The outbound side of one instance.
pub(super) struct Outbound(pub(super) Arc<Policy>);

impl WasiHttpHooks for Outbound {
    fn send_request(
        &mut self,
        request: Request<WasiBody>,
        options: Option<RequestOptions>,
        _problem: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = Result<Sent, Error>> + Send> {
        let policy = Arc::clone(&self.0);
        Box::new(async move { policy.send(request, options).await })
    }

    // The three below say the same as the defaults, without a warning in the node's log for each request of a
    // module to somebody who is away.

    fn p2_error_from_hyper(&mut self, error: &hyper::Error) -> ErrorCode {
        if error.is_timeout() { ErrorCode::HttpResponseTimeout } else { ErrorCode::HttpProtocolError }
    }

    fn p2_error_from_connect(&mut self, _: &io::Error) -> ErrorCode {
        ErrorCode::ConnectionRefused
    }

    fn p2_error_from_tls(&mut self, _: &io::Error) -> ErrorCode {
        ErrorCode::TlsProtocolError
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listed_host_is_that_host_at_that_port() {
        let list = BTreeSet::from(["api.example.com", "*.example.org:8443"].map(str::to_owned));
        for (url, listed) in [
            ("https://api.example.com/x", true),
            ("http://API.example.com./x", true),
            ("https://api.example.com:8443/", false),
            ("https://evil-api.example.com/", false),
            ("https://example.com/", false),
            ("https://a.example.org:8443/", true),
            ("https://a.b.example.org:8443/", true),
            ("https://a.example.org/", false),
            ("https://example.org:8443/", false),
            ("https://.example.org:8443/", false),
            ("https://evilexample.org:8443/", false),
            ("https://api.example.com@10.0.0.1/", false),
        ] {
            let target = Target::of(&url.parse().unwrap()).unwrap();
            assert_eq!(is_listed(&list, &target), listed, "{url} is {target:?}");
        }
    }

    #[test]
    fn an_address_of_this_host_or_its_network_is_not_public() {
        for address in [
            "127.0.0.1",
            "0.0.0.0",
            "10.1.2.3",
            "172.17.0.1",
            "192.168.1.1",
            "169.254.169.254",
            "100.64.0.1",
            "224.0.0.1",
            "255.255.255.255",
            "192.0.0.1",
            "198.18.0.1",
            "::",
            "::1",
            "fe80::1",
            "fd00::1",
            "ff02::1",
            "::ffff:127.0.0.1",
            "64:ff9b::a9fe:a9fe",
            "2002:7f00:1::1",
            "2001:db8::1",
        ] {
            assert!(!is_public(address.parse().unwrap()), "{address}");
        }
        for address in ["1.1.1.1", "93.184.216.34", "2606:4700::1111", "64:ff9b::101:101"] {
            assert!(is_public(address.parse().unwrap()), "{address}");
        }
    }
}
