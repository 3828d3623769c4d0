//! Errors as `application/problem+json` (RFC 9457), and what is taken out of requests before a verb sees them.

use std::net::IpAddr;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::rejection::{BytesRejection, PathRejection, QueryRejection};
use axum::extract::{FromRequest, FromRequestParts, Path, Query, Request, State};
use axum::http::request::Parts;
use axum::http::{Method, StatusCode, header};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use orca_cluster::command::put::faults;
use orca_cluster::spec::Project;
use orca_cluster::spec::toml::{self, Problem as SpecProblem, SourceFile};
use orca_wire::identity::Token;
use orca_wire::message::client::{Reason, Refused};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::Source;
use crate::api::{Core, invalid, unauthenticated};
use crate::auth::{self, Caller, Unauthenticated};
use crate::clock::now;
use crate::front::Front;

const WHAT_THERE_IS: &str = "GET /api/v1/openapi.json lists what there is";

/// An answer that is no success.
#[derive(Debug)]
pub struct Problem {
    status: StatusCode,
    refused: Refused,
    /// What is wrong with a file, or does not fit the cluster, one by one.
    errors: Vec<SpecProblem>,
}

#[derive(Serialize)]
struct Body<'a> {
    title: &'a str,
    status: u16,
    /// The same words as the CLI's exit codes.
    reason: Reason,
    detail: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    hint: Option<&'a str>,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    errors: &'a [SpecProblem],
}

impl Problem {
    fn new(status: StatusCode, refused: Refused) -> Problem {
        Problem { status, refused, errors: Vec::new() }
    }

    pub fn of_file(errors: Vec<SpecProblem>) -> Problem {
        let count = errors.len();
        let message = format!("{count} {} in the file", if count == 1 { "error" } else { "errors" });
        Problem { errors, ..invalid(message, None).into() }
    }

    /// With the places in the file of what does not fit the cluster, if that is what is refused.
    pub fn placed(self, file: &SourceFile, project: &Project) -> Problem {
        Problem { errors: toml::misfits(file, &faults(project, &self.refused.unfit)), ..self }
    }
}

impl From<Refused> for Problem {
    fn from(refused: Refused) -> Problem {
        let status = match refused.reason {
            Reason::Invalid => StatusCode::BAD_REQUEST,
            Reason::Unauthorised => StatusCode::FORBIDDEN,
            Reason::NotFound => StatusCode::NOT_FOUND,
            Reason::Conflict => StatusCode::CONFLICT,
            Reason::NoQuorum => StatusCode::SERVICE_UNAVAILABLE,
            Reason::TimedOut => StatusCode::GATEWAY_TIMEOUT,
            Reason::Failed => StatusCode::INTERNAL_SERVER_ERROR,
        };
        Problem::new(status, refused)
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let body = Body {
            title: self.status.canonical_reason().unwrap_or_default(),
            status: self.status.as_u16(),
            reason: self.refused.reason,
            detail: &self.refused.message,
            hint: self.refused.hint.as_deref(),
            errors: &self.errors,
        };
        let body = serde_json::to_vec(&body).expect("a problem of fixed form can be written");
        let mut response = (self.status, [(header::CONTENT_TYPE, "application/problem+json")], body).into_response();
        if self.status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, header::HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// Refuses what was not addressed to this machine by itself. Somebody's browser may be led here by a name of anyone's
/// (DNS rebinding), or by a page of anyone's; neither has a token, and neither should learn even what is open.
pub async fn only_local(request: Request, next: Next) -> Result<Response, Problem> {
    let named = request.uri().host().or_else(|| request.headers().get(header::HOST)?.to_str().ok());
    if named.is_some_and(is_local) && !request.headers().contains_key(header::ORIGIN) {
        return Ok(next.run(request).await);
    }
    let hint = "use 127.0.0.1 or localhost, through an SSH tunnel from elsewhere, and no browser";
    let message = "the HTTP API is for programs of this machine".to_owned();
    Err(Problem::new(StatusCode::MISDIRECTED_REQUEST, invalid(message, Some(hint))))
}

/// Whether a `Host` names the loopback interface, with a port or without.
fn is_local(host: &str) -> bool {
    let bracketed = host.strip_prefix('[').and_then(|rest| rest.split_once(']')).map(|(address, _)| address);
    let name = bracketed.unwrap_or_else(|| host.split_once(':').map_or(host, |(name, _)| name));
    name.eq_ignore_ascii_case("localhost") || name.parse().is_ok_and(|address: IpAddr| address.is_loopback())
}

pub async fn no_control(State(front): State<Front>) -> Problem {
    let why = front.said().unwrap_or_else(|| "the control plane is being opened; try again".to_owned());
    Problem::new(StatusCode::SERVICE_UNAVAILABLE, crate::api::failed(why))
}

pub async fn no_route() -> Problem {
    crate::api::not_found("there is nothing at this path".to_owned(), Some(WHAT_THERE_IS)).into()
}

/// Axum says in `Allow` which methods there are.
pub async fn no_method(method: Method) -> Problem {
    let message = format!("{method} is not what this path is for");
    Problem::new(StatusCode::METHOD_NOT_ALLOWED, invalid(message, Some(WHAT_THERE_IS)))
}

/// Who asks, by bearer token. Looked up anew for each request.
pub struct Authenticated(pub Caller);

impl FromRequestParts<Arc<Core>> for Authenticated {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, core: &Arc<Core>) -> Result<Authenticated, Problem> {
        let Some(&Source(source)) = parts.extensions.get::<Source>() else {
            return Err(crate::api::failed("the request came from nowhere; this is a defect in orca".to_owned()).into());
        };
        let now = now();
        let shown = parts.headers.get(header::AUTHORIZATION);
        let found = bearer(shown)
            .and_then(|token| auth::identify_by_secret(&core.raft.state(), &token.id, &token.secret, source, now));
        found.map(Authenticated).map_err(|nobody| {
            if core.refusals.is_shut_out(source.ip(), now) {
                let message = auth::SHUT_OUT.to_owned();
                let refused = Refused { reason: Reason::Unauthorised, message, hint: None, unfit: Vec::new() };
                return Problem::new(StatusCode::TOO_MANY_REQUESTS, refused);
            }
            // A request without any token is no try.
            if shown.is_some() {
                core.refusals.unauthenticated(source, now);
            }
            Problem::new(StatusCode::UNAUTHORIZED, unauthenticated(nobody))
        })
    }
}

fn bearer(shown: Option<&header::HeaderValue>) -> Result<Token, Unauthenticated> {
    let text = shown.and_then(|value| value.to_str().ok()).ok_or(Unauthenticated)?;
    let (scheme, token) = text.split_once(' ').ok_or(Unauthenticated)?;
    if !scheme.eq_ignore_ascii_case("bearer") {
        return Err(Unauthenticated);
    }
    token.parse().map_err(|_| Unauthenticated)
}

/// What the path names.
pub struct At<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for At<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<At<T>, Problem> {
        let path = Path::from_request_parts(parts, state).await;
        path.map(|Path(value)| At(value)).map_err(|rejection: PathRejection| {
            invalid(format!("the path is not understood: {}", rejection.body_text()), None).into()
        })
    }
}

/// What the query asks for.
pub struct Asked<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned + Send> FromRequestParts<S> for Asked<T> {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Asked<T>, Problem> {
        let query = Query::from_request_parts(parts, state).await;
        query.map(|Query(value)| Asked(value)).map_err(|rejection: QueryRejection| {
            invalid(format!("the query is not understood: {}", rejection.body_text()), None).into()
        })
    }
}

/// The body, whole.
pub struct Whole(pub Bytes);

impl<S: Send + Sync> FromRequest<S> for Whole {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Whole, Problem> {
        Bytes::from_request(request, state).await.map(Whole).map_err(|rejection: BytesRejection| {
            let refused = invalid(format!("the body cannot be read: {}", rejection.body_text()), None);
            Problem::new(rejection.status(), refused)
        })
    }
}

/// The body, as JSON; what it says it is does not matter.
pub struct Sent<T>(pub T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Sent<T> {
    type Rejection = Problem;

    async fn from_request(request: Request, state: &S) -> Result<Sent<T>, Problem> {
        let Whole(bytes) = Whole::from_request(request, state).await?;
        json(&bytes).map(Sent)
    }
}

pub fn json<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, Problem> {
    serde_json::from_slice(bytes)
        .map_err(|error| invalid(format!("the body is not what is expected: {error}"), None).into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_this_machine_are_local() {
        for local in
            ["127.0.0.1", "127.0.0.1:6880", "127.9.9.9:1", "localhost", "LocalHost:6880", "[::1]", "[::1]:6880"]
        {
            assert!(is_local(local), "{local}");
        }
        for other in ["", ":6880", "evil.example", "127.0.0.1.evil.example:6880", "localhost.evil", "10.0.0.1", "[::2]"]
        {
            assert!(!is_local(other), "{other}");
        }
    }
}
