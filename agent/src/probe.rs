//! One look at one replica: is it well? What a failure leads to is decided elsewhere; here it is only said what was
//! seen, so that a person can be told.

use std::net::SocketAddr;
use std::pin::pin;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Method, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt as _, Empty, Full};
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use orca_cluster::replica::Saw;
use orca_cluster::spec::Check;
use tokio::net::TcpStream;

use crate::docker::Ended;

const USER_AGENT: &str = concat!("orca-probe/", env!("CARGO_PKG_VERSION"));
const GRPC_PATH: &str = "/grpc.health.v1.Health/Check";
/// A message of no bytes, not compressed: the request for the health of the whole server.
const GRPC_REQUEST: &[u8] = &[0, 0, 0, 0, 0];
/// `HealthCheckResponse.ServingStatus`: SERVING.
const GRPC_SERVING: u64 = 1;
/// Longest answer to a gRPC check that is read; the one expected has seven bytes.
const GRPC_ANSWER_MAX: usize = 4096;

/// Carries a check out, within `timeout`. `address` is the replica's own; `exec` runs a command in its container, within
/// the same time.
pub async fn probe(
    check: &Check,
    address: Option<SocketAddr>,
    timeout: Duration,
    exec: impl AsyncFnOnce(&[String], Duration) -> Result<Ended, Saw>,
) -> Result<(), Saw> {
    let reach =
        || address.ok_or_else(|| Saw::Error("it has no address: set `port` to the one it listens on".to_owned()));
    match check {
        Check::Http(path) => within(timeout, http(reach()?, path)).await,
        Check::Tcp => within(timeout, async { connect(reach()?).await.map(drop) }).await,
        Check::Grpc => within(timeout, grpc(reach()?)).await,
        Check::Exec(argv) => match exec(argv, timeout).await? {
            Ended { code: 0, .. } => Ok(()),
            Ended { code, output } => Err(Saw::Exit { code, output }),
        },
    }
}

async fn within(timeout: Duration, check: impl Future<Output = Result<(), Saw>>) -> Result<(), Saw> {
    tokio::time::timeout(timeout, check).await.unwrap_or(Err(Saw::TimedOut))
}

async fn connect(address: SocketAddr) -> Result<TcpStream, Saw> {
    TcpStream::connect(address).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::ConnectionRefused => Saw::Refused,
        _ => Saw::Error(error.to_string()),
    })
}

/// Redirects pass, and are not followed: they may lead anywhere.
async fn http(address: SocketAddr, path: &str) -> Result<(), Saw> {
    let request = Request::builder()
        .method(Method::GET)
        .uri(path)
        .header(header::HOST, address.to_string())
        .header(header::USER_AGENT, USER_AGENT)
        .header(header::CONNECTION, "close")
        .body(Empty::<Bytes>::new())
        .map_err(|error| Saw::Error(format!("`{path}` cannot be asked for: {error}")))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(connect(address).await?)).await.map_err(saw)?;
    // Dropping the answer ends the connection; the body is nobody's concern.
    let answer = async { sender.send_request(request).await.map_err(saw) };
    match driven(connection, answer).await?.status().as_u16() {
        200..400 => Ok(()),
        status => Err(Saw::Status(status)),
    }
}

async fn grpc(address: SocketAddr) -> Result<(), Saw> {
    let uri = Uri::builder().scheme("http").authority(address.to_string()).path_and_query(GRPC_PATH).build();
    let request = Request::builder()
        .method(Method::POST)
        .uri(uri.expect("a socket address is an authority"))
        .header(header::CONTENT_TYPE, "application/grpc")
        .header(header::TE, "trailers")
        .header(header::USER_AGENT, USER_AGENT)
        .body(Full::new(Bytes::from_static(GRPC_REQUEST)))
        .expect("the parts of the request are valid");
    let stream = TokioIo::new(connect(address).await?);
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.map_err(saw)?;
    // Whatever else listens there answers in its own way.
    let foreign = |error: hyper::Error| match error.is_incomplete_message() || error.is_canceled() {
        true => saw(error),
        false => Saw::Error("it does not speak HTTP/2, which gRPC needs".to_owned()),
    };
    let answer = async {
        let response = sender.send_request(request).await.map_err(foreign)?;
        if response.status() != StatusCode::OK {
            return Err(Saw::Status(response.status().as_u16()));
        }
        let mut status = grpc_status(response.headers());
        let (mut body, mut message) = (response.into_body(), BytesMut::new());
        while let Some(frame) = body.frame().await {
            let frame = frame.map_err(saw)?;
            match frame.into_data() {
                Ok(data) if message.len() + data.len() <= GRPC_ANSWER_MAX => message.extend_from_slice(&data),
                Ok(_) => return Err(Saw::Error("the answer is too long".to_owned())),
                Err(frame) => status = frame.trailers_ref().map_or(status, grpc_status),
            }
        }
        match status {
            Some(0) => grpc_answer(&message),
            Some(12) => Err(Saw::Error("gRPC status 12: it has no grpc.health.v1.Health service".to_owned())),
            Some(code) => Err(Saw::Error(format!("gRPC status {code}"))),
            None => Err(Saw::Error("the answer has no gRPC status".to_owned())),
        }
    };
    driven(connection, answer).await
}

/// Moves a connection's bytes while something waits for an answer on it.
async fn driven<T>(connection: impl Future, answer: impl Future<Output = Result<T, Saw>>) -> Result<T, Saw> {
    let mut answer = pin!(answer);
    tokio::select! {
        biased;
        answer = &mut answer => answer,
        // How it ended, the answer says too: it is there already, or an error.
        _ended = connection => answer.await,
    }
}

fn grpc_status(headers: &http::HeaderMap) -> Option<u32> {
    headers.get("grpc-status")?.to_str().ok()?.parse().ok()
}

/// One message: a byte that says whether it is compressed, its length, and `HealthCheckResponse`, whose field 1 is the
/// status.
fn grpc_answer(bytes: &[u8]) -> Result<(), Saw> {
    let message = match bytes.split_at_checked(5) {
        Some(([0, length @ ..], message)) if *length == (message.len() as u32).to_be_bytes() => message,
        _ => return Err(Saw::Error("the answer is no gRPC message".to_owned())),
    };
    match grpc_serving_status(message) {
        Some(GRPC_SERVING) => Ok(()),
        Some(0) => Err(Saw::Error("its health is UNKNOWN".to_owned())),
        Some(2) => Err(Saw::Error("its health is NOT_SERVING".to_owned())),
        Some(3) => Err(Saw::Error("its health is SERVICE_UNKNOWN".to_owned())),
        Some(other) => Err(Saw::Error(format!("its health is {other}"))),
        None => Err(Saw::Error("the answer is no HealthCheckResponse".to_owned())),
    }
}

/// Field 1, a number, of a protobuf message; 0 if absent, as protobuf has it. The last one counts.
fn grpc_serving_status(mut message: &[u8]) -> Option<u64> {
    const NUMBER: u64 = 0;
    const BYTES: u64 = 2;
    let mut status = 0;
    while !message.is_empty() {
        let key = varint(&mut message)?;
        match key & 7 {
            NUMBER => {
                let value = varint(&mut message)?;
                if key >> 3 == 1 {
                    status = value;
                }
            }
            BYTES => {
                let length = usize::try_from(varint(&mut message)?).ok()?;
                message = message.get(length..)?;
            }
            1 => message = message.get(8..)?,
            5 => message = message.get(4..)?,
            _ => return None,
        }
    }
    Some(status)
}

/// Seven bits in each byte, lowest first; the top bit says that more follow.
fn varint(bytes: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes.split_first()?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Some(value);
        }
    }
    None
}

/// An error of a connection in as many words as say what happened.
fn saw(error: hyper::Error) -> Saw {
    if error.is_incomplete_message() || error.is_canceled() {
        return Saw::Error("it closed the connection without an answer".to_owned());
    }
    let mut text = error.to_string();
    if let Some(source) = std::error::Error::source(&error) {
        text = format!("{text}: {source}");
    }
    Saw::Error(text)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;
    use std::net::Ipv4Addr;

    use http::{HeaderMap, HeaderValue, Response};
    use http_body_util::StreamBody;
    use hyper::body::Frame;
    use hyper::service::service_fn;
    use proptest::prelude::*;
    use tokio::io::AsyncWriteExt as _;
    use tokio::net::TcpListener;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    async fn listen() -> (TcpListener, SocketAddr) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        (listener, address)
    }

    async fn check(check: Check, address: SocketAddr, timeout: Duration) -> Result<(), Saw> {
        probe(&check, Some(address), timeout, async |_, _| panic!("nothing to run")).await
    }

    /// Answers one connection with these bytes and closes it.
    async fn answering(bytes: &'static [u8]) -> SocketAddr {
        let (listener, address) = listen().await;
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.readable().await.unwrap();
            let mut head = [0; 1024];
            assert!(stream.try_read(&mut head).unwrap() > 0);
            stream.write_all(bytes).await.unwrap();
        });
        address
    }

    #[tokio::test]
    async fn http_passes_from_200_to_399() {
        let get = || Check::Http("/healthz".to_owned());
        for (answer, expect) in [
            (&b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"[..], Ok(())),
            (b"HTTP/1.1 302 Found\r\nlocation: /login\r\ncontent-length: 0\r\n\r\n", Ok(())),
            (b"HTTP/1.1 404 Not Found\r\n\r\n", Err(Saw::Status(404))),
            (b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n", Err(Saw::Status(503))),
            (b"", Err(Saw::Error("it closed the connection without an answer".to_owned()))),
        ] {
            let address = answering(answer).await;
            assert_eq!(check(get(), address, SECOND).await, expect);
        }
        let address = answering(b"SSH-2.0-OpenSSH\r\n").await;
        assert!(matches!(check(get(), address, SECOND).await, Err(Saw::Error(_))));
    }

    #[tokio::test]
    async fn who_does_not_listen_or_does_not_answer_is_told_apart() {
        let (listener, silent) = listen().await;
        let (closed, refused) = listen().await;
        drop(closed);
        let short = Duration::from_millis(50);
        for kind in [Check::Http("/".to_owned()), Check::Grpc] {
            assert_eq!(check(kind.clone(), silent, short).await, Err(Saw::TimedOut));
            assert_eq!(check(kind, refused, SECOND).await, Err(Saw::Refused));
        }
        assert_eq!(check(Check::Tcp, silent, SECOND).await, Ok(()));
        assert_eq!(check(Check::Tcp, refused, SECOND).await, Err(Saw::Refused));
        drop(listener);
        let nowhere = probe(&Check::Tcp, None, SECOND, async |_, _| panic!("nothing to run")).await;
        assert!(matches!(nowhere, Err(Saw::Error(text)) if text.contains("`port`")));
    }

    #[tokio::test]
    async fn a_command_passes_with_0() {
        let argv = ["true".to_owned()];
        let run = async |code| {
            let exec = async |given: &[String], _| {
                assert_eq!(given, argv);
                Ok(Ended { code, output: "why".to_owned() })
            };
            probe(&Check::Exec(argv.to_vec()), None, SECOND, exec).await
        };
        assert_eq!(run(0).await, Ok(()));
        assert_eq!(run(3).await, Err(Saw::Exit { code: 3, output: "why".to_owned() }));
    }

    /// A gRPC server that always answers with this message and status.
    async fn grpc_server(message: &'static [u8], status: &'static str) -> SocketAddr {
        let (listener, address) = listen().await;
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let service = service_fn(move |request: Request<hyper::body::Incoming>| async move {
                assert_eq!(request.uri().path(), GRPC_PATH);
                assert_eq!(request.into_body().collect().await.unwrap().to_bytes(), GRPC_REQUEST);
                let mut data = vec![0];
                data.extend((message.len() as u32).to_be_bytes());
                data.extend(message);
                let trailers =
                    HeaderMap::from_iter([("grpc-status".parse().unwrap(), HeaderValue::from_static(status))]);
                let frames = [Frame::data(Bytes::from(data)), Frame::trailers(trailers)].map(Ok::<_, Infallible>);
                let body = StreamBody::new(futures_util::stream::iter(frames));
                Ok::<_, Infallible>(Response::builder().header("content-type", "application/grpc").body(body).unwrap())
            });
            let server = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
            // The probe hangs up when it has its answer.
            let _ = server.serve_connection(TokioIo::new(stream), service).await;
        });
        address
    }

    #[tokio::test]
    async fn grpc_passes_when_serving() {
        for (message, status, expect) in [
            (&[8, 1][..], "0", Ok(())),
            (&[8, 2], "0", Err("its health is NOT_SERVING")),
            (&[], "0", Err("its health is UNKNOWN")),
            (&[255], "0", Err("the answer is no HealthCheckResponse")),
            (&[], "12", Err("gRPC status 12: it has no grpc.health.v1.Health service")),
        ] {
            let address = grpc_server(message, status).await;
            let expect = expect.map_err(|text: &str| Saw::Error(text.to_owned()));
            assert_eq!(check(Check::Grpc, address, SECOND).await, expect);
        }
    }

    proptest! {
        #[test]
        fn no_answer_panics(bytes in prop::collection::vec(any::<u8>(), 0..40)) {
            let _ = grpc_answer(&bytes);
            let _ = grpc_serving_status(&bytes);
        }

        #[test]
        fn the_status_is_found_among_other_fields(status: u64, text in prop::collection::vec(any::<u8>(), 0..100)) {
            let mut message = vec![0x12, text.len() as u8];
            message.extend(text);
            message.push(8);
            let mut rest = status;
            while rest >= 0x80 {
                message.push(rest as u8 | 0x80);
                rest >>= 7;
            }
            message.push(rest as u8);
            prop_assert_eq!(grpc_serving_status(&message), Some(status));
        }
    }
}
