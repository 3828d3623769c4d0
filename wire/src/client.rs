//! Any of several control nodes will do: finds one that answers, stays with it, and finds another when it is gone.

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout_at};
use tracing::debug;

use crate::Plane;
use crate::cause::chain;
use crate::connection::Connection;
use crate::endpoint::{DialError, Endpoint, Wanted};
use crate::stream::{Stream, StreamError};

/// How long one address is tried alone before the next is tried beside it (RFC 8305 recommends 250 ms).
const HEAD_START: Duration = Duration::from_millis(250);

/// Between rounds in which no address answered: doubles from the first to the last.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("no address of the cluster is known")]
    NoAddress,
    /// What the most telling of the addresses said; the others are in the log.
    #[error("no node could be reached")]
    Dial(#[source] DialError),
    #[error("no node answered within {} s", .0.as_secs())]
    Deadline(Duration),
    #[error("the request failed")]
    Request(#[from] StreamError),
}

#[derive(Debug)]
pub struct Client {
    endpoint: Endpoint,
    plane: Plane,
    /// In the order in which to try them.
    addresses: Vec<SocketAddr>,
    current: Mutex<Option<Connection>>,
    /// One search at a time: the others wait for its result.
    searching: tokio::sync::Mutex<()>,
}

impl Client {
    pub fn new(endpoint: Endpoint, plane: Plane, addresses: Vec<SocketAddr>) -> Client {
        Client { endpoint, plane, addresses, current: Mutex::new(None), searching: tokio::sync::Mutex::new(()) }
    }

    /// The connection in use, or a new one to whichever address answers first.
    pub async fn connection(&self, deadline: Duration) -> Result<Connection, ClientError> {
        if let Some(connection) = self.open_connection() {
            return Ok(connection);
        }
        let until = Instant::now() + deadline;
        let search = async {
            let _alone = self.searching.lock().await;
            match self.open_connection() {
                Some(found_meanwhile) => Ok(found_meanwhile),
                None => self.search(until).await,
            }
        };
        timeout_at(until, search).await.unwrap_or(Err(ClientError::Deadline(deadline)))
    }

    /// One request, one answer; never sent twice, since the first may have been carried out.
    pub async fn request<Request, Response>(
        &self,
        request: &Request,
        deadline: Duration,
    ) -> Result<Response, ClientError>
    where
        Request: Serialize,
        Response: DeserializeOwned,
    {
        let until = Instant::now() + deadline;
        let connection = self.connection(deadline).await?;
        Ok(connection.request(request, until.saturating_duration_since(Instant::now())).await?)
    }

    /// One request, and then whatever the two agree on. The deadline is for finding a node, not for what follows.
    pub async fn open<Request: Serialize>(&self, request: &Request, deadline: Duration) -> Result<Stream, ClientError> {
        Ok(self.connection(deadline).await?.open(request).await?)
    }

    fn open_connection(&self) -> Option<Connection> {
        lock(&self.current).as_ref().filter(|connection| !connection.is_closed()).cloned()
    }

    /// Rounds until one answers. What will not change by asking again ends the search at once.
    async fn search(&self, until: Instant) -> Result<Connection, ClientError> {
        let mut pause = PAUSE_MIN;
        loop {
            let error = match self.round().await {
                Ok(connection) => {
                    *lock(&self.current) = Some(connection.clone());
                    return Ok(connection);
                }
                Err(error) => error,
            };
            let lasting = match &error {
                ClientError::Dial(error) => telling(error) == Telling::Lasting,
                ClientError::NoAddress | ClientError::Deadline(_) | ClientError::Request(_) => true,
            };
            if lasting || Instant::now() + pause >= until {
                return Err(error);
            }
            sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// All addresses, each a little later than the one before it. The first connection wins.
    async fn round(&self) -> Result<Connection, ClientError> {
        let start = Instant::now();
        let mut dials = JoinSet::new();
        for (place, &address) in self.addresses.iter().enumerate() {
            let (endpoint, plane) = (self.endpoint.clone(), self.plane);
            let begin = start + HEAD_START * u32::try_from(place).unwrap_or(u32::MAX);
            dials.spawn(async move {
                sleep_until(begin).await;
                endpoint.dial(address, plane, Wanted::Control).await
            });
        }
        let mut most: Option<DialError> = None;
        while let Some(dialed) = dials.join_next().await {
            match dialed {
                Ok(Ok(connection)) => return Ok(connection),
                Ok(Err(error)) => {
                    debug!(error = chain(&error), "dial failed");
                    if most.as_ref().is_none_or(|before| telling(before) < telling(&error)) {
                        most = Some(error);
                    }
                }
                Err(failed) => std::panic::resume_unwind(failed.into_panic()),
            }
        }
        Err(most.map_or(ClientError::NoAddress, ClientError::Dial))
    }
}

/// How much the failure of a dial says about the next one.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Telling {
    /// The node may be down, or the network.
    Nothing,
    /// Somebody is there, and may soon be somebody else, or less busy.
    Passing,
    /// Asking again gets the same answer.
    Lasting,
}

fn telling(error: &DialError) -> Telling {
    match error {
        DialError::Silent { .. } | DialError::Unreachable { .. } => Telling::Nothing,
        DialError::Busy { .. } | DialError::Stranger { .. } => Telling::Passing,
        // Not for ever, but until something is done about it: whoever asks had better be told why.
        DialError::Unavailable { .. } => Telling::Lasting,
        DialError::Refused { .. } | DialError::Incompatible { .. } => Telling::Lasting,
        DialError::Token(_) | DialError::Local { .. } => Telling::Lasting,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // What is inside is replaced as a whole, so a panic elsewhere has left it whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
