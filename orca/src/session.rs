//! One command's conversation with a cluster: who is asked, and what it means when no answer comes.

use std::io::ErrorKind;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use orca_cluster::id::{Label, ReplicaId, ServiceName};
use orca_cluster::status::Status;
use orca_wire::client::ClientError;
use orca_wire::endpoint::DialError;
use orca_wire::message::client::{Refused, Request, Response};
use orca_wire::stream::{Receiver, StreamError};
use orca_wire::{Client, Endpoint, Plane, Stream};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::net::UdpSocket;
use tokio::time::{sleep, timeout};

use crate::cli::ServiceArg;
use crate::context::{Chosen, Origin};
use crate::exit::{Exit, Failure};

/// For one answer, unless `--timeout` says otherwise.
const ANSWER: Duration = Duration::from_secs(15);
/// For finding a node that answers: one handshake's deadline and a little.
const CONNECT: Duration = Duration::from_secs(4);
/// A server on this machine answers within this; past it, it is looked up whether there is one at all.
const HERE: Duration = Duration::from_millis(200);

#[derive(Debug)]
pub struct Session {
    client: Client,
    addresses: Vec<SocketAddr>,
    origin: Origin,
    deadline: Duration,
}

/// What may come on a stream: what was asked for, or why not.
#[derive(Debug)]
enum Said<T> {
    Refused { refused: Refused },
    Item(T),
}

/// Not derived as untagged: what serde keeps aside to look at twice loses the numbers among the keys of maps.
impl<'de, T: DeserializeOwned> Deserialize<'de> for Said<T> {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Said<T>, D::Error> {
        let mut value = serde_json::Value::deserialize(from)?;
        let said = match value.get_mut("refused").map(serde_json::Value::take) {
            Some(refused) => serde_json::from_value(refused).map(|refused| Said::Refused { refused }),
            None => serde_json::from_value(value).map(Said::Item),
        };
        said.map_err(serde::de::Error::custom)
    }
}

impl Session {
    pub async fn open(chosen: Chosen, answer: Option<Duration>) -> Result<Session, Failure> {
        let Chosen { origin, addresses, access } = chosen;
        let mut resolved = Vec::new();
        for address in &addresses {
            match tokio::net::lookup_host(address).await {
                Ok(found) => resolved.extend(found),
                Err(error) if addresses.len() == 1 => {
                    return Err(Failure::new(Exit::Unreachable, format!("{address} cannot be looked up"))
                        .why(error.to_string())
                        .fix("an address is HOST:PORT; correct it with `orca context add`, or set ORCA_ADDRESS"));
                }
                Err(error) => tracing::warn!(%address, %error, "cannot be looked up"),
            }
        }
        let endpoint = Endpoint::client(access).map_err(|error| Failure::from_error(Exit::General, &error))?;
        let client = Client::new(endpoint, Plane::Client, resolved.clone());
        let session = Session { client, addresses: resolved, origin, deadline: answer.unwrap_or(ANSWER) };
        session.connect().await?;
        Ok(session)
    }

    /// Makes sure of a connection, also after one was lost.
    pub async fn connect(&self) -> Result<(), Failure> {
        let connecting = self.client.connection(CONNECT);
        tokio::pin!(connecting);
        // QUIC takes a port that nobody holds for one from which nothing has come yet, for seconds.
        let connected = tokio::select! {
            connected = &mut connecting => connected,
            () = self.nobody_here() => return Err(self.unreachable("nothing listens there")),
        };
        connected.map(drop).map_err(|error| self.failure(error))
    }

    /// Ends when no address can have a server, all of them being of this machine; else never.
    async fn nobody_here(&self) {
        sleep(HERE).await;
        let mut nobody = !self.addresses.is_empty();
        for address in &self.addresses {
            nobody &= address.ip().is_loopback() && is_free(*address).await;
        }
        if !nobody {
            std::future::pending::<()>().await;
        }
    }

    pub async fn ask(&self, request: &Request) -> Result<Response, Failure> {
        match self.client.request(request, self.deadline).await {
            Ok(Response::Refused(refused)) => Err(refused.into()),
            Ok(response) => Ok(response),
            Err(error) => Err(self.failure(error)),
        }
    }

    /// A request that is answered by a stream.
    pub async fn follow(&self, request: &Request) -> Result<Following, Failure> {
        let mut stream = self.stream(request).await?;
        stream.finish().await.map_err(|error| self.broken(&error))?;
        Ok(Following::new(stream.receiver))
    }

    pub async fn stream(&self, request: &Request) -> Result<Stream, Failure> {
        self.client.open(request, CONNECT).await.map_err(|error| self.failure(error))
    }

    /// The answer at the end of what was sent on a stream.
    pub async fn answer(&self, stream: &mut Stream) -> Result<Response, Failure> {
        match stream.next_within(self.deadline).await {
            Ok(Response::Refused(refused)) => Err(refused.into()),
            Ok(response) => Ok(response),
            Err(error) => Err(self.broken(&error)),
        }
    }

    pub async fn status(&self, service: Option<ServiceName>) -> Result<Status, Failure> {
        match self.ask(&Request::Status { service }).await? {
            Response::Status(status) => Ok(*status),
            other => Err(unexpected(&other)),
        }
    }

    /// The service that is meant, and the replica if one was named.
    pub async fn resolve(&self, arg: &ServiceArg) -> Result<(ServiceName, Option<ReplicaId>), Failure> {
        if let ServiceArg::Full(name) = arg {
            return Ok((name.clone(), None));
        }
        if let ServiceArg::Replica { project: Some(project), service, replica } = arg {
            return Ok((ServiceName::new(project.clone(), service.clone()), Some(*replica)));
        }
        let status = self.status(None).await?;
        pick(arg, status.services.iter().map(|service| &service.name), "`orca status` lists what there is")
    }

    pub fn failure(&self, error: ClientError) -> Failure {
        match error {
            ClientError::NoAddress => self.unreachable("the context names no address"),
            ClientError::Deadline(_) => self.unreachable("no answer in time"),
            ClientError::Dial(error) => self.not_dialed(&error),
            ClientError::Request(error) => self.broken(&error),
        }
    }

    fn not_dialed(&self, error: &DialError) -> Failure {
        match error {
            DialError::Silent { .. } => self.unreachable("no answer in time"),
            DialError::Unreachable { source, .. } => self.unreachable(source),
            DialError::Unavailable { reason, .. } => {
                Failure::new(Exit::Unreachable, format!("no control plane is up at {}", self.where_to()))
                    .why(reason.clone())
                    .fix("what runs there goes on; it opens by itself as soon as it can: then try again")
            }
            DialError::Busy { .. } => self.unreachable("it has too many connections; try again in a moment"),
            DialError::Stranger { stranger, .. } => {
                let mut failure = Failure::new(
                    Exit::Unreachable,
                    format!("what answers at {} is not to be trusted", self.where_to()),
                )
                .why(stranger.to_string());
                failure.stranger = true;
                failure.fix(match &self.origin {
                    Origin::Context(name) => {
                        format!(
                            "check the address of context `{name}`, or add it anew: orca context add {name} --replace"
                        )
                    }
                    Origin::Variable(_) => "check that $ORCA_ADDRESS and $ORCA_TOKEN are of one cluster".to_owned(),
                    Origin::Data(_) => "another server listens there; choose another address with --listen".to_owned(),
                })
            }
            DialError::Refused { reason, .. } => {
                Failure::new(Exit::Unauthorised, format!("the cluster of {} refused", self.origin))
                    .why(reason.clone())
                    .fix("ask an administrator for a token: orca token create NAME --role ROLE")
            }
            DialError::Incompatible { source, .. } => {
                Failure::new(Exit::General, "this orca and the server's do not fit").why(source.to_string())
            }
            DialError::Token(_) | DialError::Local { .. } => Failure::from_error(Exit::General, error),
        }
    }

    fn unreachable(&self, why: impl ToString) -> Failure {
        let here = self.addresses.iter().all(|address| address.ip().is_loopback());
        let fix = if here {
            "start it: orca server (or `orca up DIR`); another cluster: orca context use NAME"
        } else {
            "check that a server runs there and that UDP and TCP to that port are open"
        };
        Failure::new(Exit::Unreachable, format!("no server can be reached at {}", self.where_to()))
            .why(why.to_string())
            .fix(fix)
            .more("orca doctor")
    }

    fn where_to(&self) -> String {
        let addresses: Vec<String> = self.addresses.iter().map(ToString::to_string).collect();
        format!("{} ({})", addresses.join(", "), self.origin)
    }

    pub fn broken(&self, error: &StreamError) -> Failure {
        match error {
            StreamError::Deadline(deadline) => {
                Failure::new(Exit::TimedOut, format!("no answer within {} s; it may still be done", deadline.as_secs()))
                    .fix("look with `orca status` before trying again, or give it more --timeout")
            }
            StreamError::Lost(_) => {
                Failure::from_error(Exit::Unreachable, error).fix("try again; what was asked may have been done")
            }
            StreamError::Refused(reason) => {
                Failure::new(Exit::Unreachable, "the server closed the connection").why(reason.clone())
            }
            StreamError::Stalled(_)
            | StreamError::Cancelled
            | StreamError::Panicked
            | StreamError::NotUnderstood
            | StreamError::Ended
            | StreamError::Malformed(_)
            | StreamError::Unexpected { .. }
            | StreamError::Crowded
            | StreamError::Encode(_) => Failure::from_error(Exit::General, error),
        }
    }
}

/// The messages of a stream, one after the other.
#[derive(Debug)]
pub struct Following {
    receiver: Receiver,
}

/// How a stream went wrong.
#[derive(Debug)]
pub enum Broken {
    Refused(Failure),
    /// The connection is gone; asking again may help.
    Lost(StreamError),
}

impl Following {
    pub fn new(receiver: Receiver) -> Following {
        Following { receiver }
    }

    /// Can be given up at any point and taken up again.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Broken> {
        match self.receiver.next::<Said<T>>().await {
            Ok(Some(Said::Item(item))) => Ok(Some(item)),
            Ok(Some(Said::Refused { refused })) => Err(Broken::Refused(refused.into())),
            Ok(None) => Ok(None),
            Err(error) => Err(Broken::Lost(error)),
        }
    }
}

impl Broken {
    pub fn into_failure(self, session: &Session) -> Failure {
        match self {
            Broken::Refused(failure) => failure,
            Broken::Lost(error) => session.broken(&error),
        }
    }
}

/// The one service of these that a name means. `elsewhere` says what to do if there is none.
pub fn pick<'a>(
    arg: &ServiceArg,
    known: impl Iterator<Item = &'a ServiceName>,
    elsewhere: &str,
) -> Result<(ServiceName, Option<ReplicaId>), Failure> {
    let (wanted, replica): (&Label, Option<ReplicaId>) = match arg {
        ServiceArg::Full(name) => return Ok((name.clone(), None)),
        ServiceArg::Bare(service) => (service, None),
        ServiceArg::Replica { project: Some(project), service, replica } => {
            return Ok((ServiceName::new(project.clone(), service.clone()), Some(*replica)));
        }
        ServiceArg::Replica { project: None, service, replica } => (service, Some(*replica)),
    };
    let known: Vec<&ServiceName> = known.collect();
    if let Some(replica) = replica
        && let Some(exact) = known.iter().find(|name| name.to_string() == format!("{wanted}/{replica}"))
    {
        // A service may be called like a replica.
        return Ok(((*exact).clone(), None));
    }
    let found: Vec<&&ServiceName> = known.iter().filter(|name| name.service == *wanted).collect();
    match found.as_slice() {
        [one] => Ok(((**one).clone(), replica)),
        [] => {
            let failure = Failure::new(Exit::NotFound, format!("there is no service `{wanted}`"));
            let names: Vec<&str> = known.iter().map(|name| name.service.as_str()).collect();
            let hint = orca_cluster::spec::toml::suggestion(wanted.as_str(), names);
            Err(failure.fix(hint.unwrap_or_else(|| elsewhere.to_owned())))
        }
        several => {
            let names: Vec<String> = several.iter().map(ToString::to_string).collect();
            Err(Failure::input(format!("`{wanted}` is in several projects"))
                .fix(format!("write one of {}", names.join(", "))))
        }
    }
}

/// The server answered something else than what was asked: it is of another version, or it is a bug.
pub fn unexpected(response: &Response) -> Failure {
    // Not what it says: there may be a token in it.
    tracing::debug!(kind = ?std::mem::discriminant(response), "unexpected");
    Failure::general("the server gave an answer that does not belong to the question")
        .fix("compare `orca version` with the server's, and report it if they are the same")
}

/// Whether nobody holds a UDP port of this machine. Its kernel says so to a socket that is connected to it (RFC 1122,
/// 4.1.3.3); whoever holds it gets a byte that is no packet.
async fn is_free(address: SocketAddr) -> bool {
    let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let asked = async {
        let socket = UdpSocket::bind((any, 0)).await?;
        socket.connect(address).await?;
        socket.send(&[0]).await?;
        socket.recv(&mut [0]).await
    };
    matches!(timeout(HERE, asked).await, Ok(Err(error)) if error.kind() == ErrorKind::ConnectionRefused)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_is_free_if_the_kernel_says_so_and_not_if_its_holder_is_slow() {
        for here in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()] {
            // A machine may have no IPv6; the rest is as good a test.
            let holder = match UdpSocket::bind((here, 0)).await {
                Err(error) if here.is_ipv6() => return eprintln!("without {here}: {error}"),
                holder => holder.unwrap(),
            };
            let address = holder.local_addr().unwrap();
            assert!(!is_free(address).await, "{address}");
            drop(holder);
            assert!(is_free(address).await, "{address}");
        }
    }

    fn check(arg: &str, known: &[&str], expect: &str) {
        let known: Vec<ServiceName> = known.iter().map(|name| name.parse().unwrap()).collect();
        let got = match pick(&arg.parse().unwrap(), known.iter(), "look elsewhere") {
            Ok((name, Some(replica))) => format!("{name} {replica}"),
            Ok((name, None)) => name.to_string(),
            Err(failure) => format!("{}: {} ({})", failure.exit.code(), failure.message, failure.fix.join("; ")),
        };
        assert_eq!(got, expect);
    }

    #[test]
    fn a_bare_name_is_looked_up_in_all_projects() {
        check("api", &["shop/api", "shop/db"], "shop/api");
        check("api/r3", &["shop/api"], "shop/api r3");
        check("shop/r3", &["shop/r3"], "shop/r3");
        check("blog/api", &[], "blog/api");
        check("api", &["blog/api", "shop/api"], "2: `api` is in several projects (write one of blog/api, shop/api)");
        check("apj", &["shop/api"], "5: there is no service `apj` (did you mean `api`?)");
        check("x", &[], "5: there is no service `x` (look elsewhere)");
    }
}
