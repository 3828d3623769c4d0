//! What each route does: takes a request apart, asks the verb, and writes its answer down.

use std::io;
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::{Stream, StreamExt};
use http_body_util::BodyExt as _;
use orca_cluster::event::Event;
use orca_cluster::id::{Generation, Label, ReplicaId, Revision, ServiceName};
use orca_cluster::secret::{SecretName, TokenId};
use orca_cluster::spec::toml::{self, SourceFile};
use orca_cluster::spec::{Project, Settings};
use orca_cluster::time::Timestamp;
use orca_wire::message::agent::LogLine;
use orca_wire::message::client::{
    CreateToken, Deploy, EventsQuery, LogsQuery, Progress, Refused, Response as Message, SetSecret,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::document::document;
use super::problem::{Asked, At, Authenticated, Problem, Sent, Whole, json};
use super::route::{JSON, LINES, TEXT};
use crate::api::{self, Core, Items, deploy, doctor, events, invalid, logs, secret, service, status, token};
use crate::auth::{Object as Subject, Verb};
use crate::metrics;

type Answer = Result<Json<Value>, Problem>;

/// A message's content without its name: over HTTP the route says what it is.
fn content(answer: api::Answer) -> Answer {
    let message = match answer? {
        Message::Refused(refused) => return Err(refused.into()),
        message => message,
    };
    let value = serde_json::to_value(&message).map_err(|error| api::failed(format!("no form in JSON: {error}")))?;
    Ok(Json(match value {
        Value::Object(named) => named.into_iter().next().map_or(Value::Null, |(_, content)| content),
        other => other,
    }))
}

/// One JSON document a line, until there are no more or the token is revoked. That it is not all is said as over QUIC.
fn lines<T: Serialize + Send + 'static>(
    core: Arc<Core>,
    token: TokenId,
    items: Result<Items<T>, Refused>,
) -> Result<Response, Problem> {
    let text = |item: Result<T, Refused>| {
        let line = match item {
            Ok(item) => serde_json::to_vec(&item),
            Err(refused) => serde_json::to_vec(&Message::Refused(refused)),
        };
        let mut line = line.expect("a message of ours has a form in JSON");
        line.push(b'\n');
        line
    };
    Ok(([(header::CONTENT_TYPE, LINES)], stream(core, token, items?, text)).into_response())
}

/// The response of what is not all is broken off, so that nobody takes it for whole.
fn stream<T: Send + 'static>(
    core: Arc<Core>,
    token: TokenId,
    items: Items<T>,
    text: impl Fn(Result<T, Refused>) -> Vec<u8> + Send + 'static,
) -> Body {
    let items = futures_util::stream::unfold((items, false), |(mut items, is_broken)| async move {
        if is_broken {
            // What was said last is sent meanwhile. Else it would go down with the connection.
            tokio::task::yield_now().await;
            return Some((Err(io::Error::other("it is not all")), (items, true)));
        }
        let item = items.recv().await?;
        let is_broken = item.is_err();
        Some((Ok(item), (items, is_broken)))
    });
    let revoked = async move { core.revoked(&token).await };
    let body = items.map(move |item| item.map(|item| Bytes::from(text(item)))).take_until(revoked);
    Body::from_stream(boxed(body))
}

fn boxed<T: Send + 'static>(stream: impl Stream<Item = T> + Send + 'static) -> impl Stream<Item = T> + Send {
    Box::pin(stream)
}

pub async fn health(State(core): State<Arc<Core>>) -> Response {
    let leader = core.raft.metrics().leader;
    let fatal = futures_util::FutureExt::now_or_never(core.raft.fatal());
    let (status, text) = match (fatal, leader) {
        (Some(fatal), _) => (StatusCode::SERVICE_UNAVAILABLE, fatal.to_string()),
        (None, None) => (StatusCode::SERVICE_UNAVAILABLE, "no leader is known".to_owned()),
        (None, Some(_)) => (StatusCode::OK, "ok".to_owned()),
    };
    (status, Json(serde_json::json!({ "status": text }))).into_response()
}

pub async fn openapi() -> Json<Value> {
    Json(serde_json::to_value(document()).expect("a document of fixed form can be written"))
}

pub async fn show_metrics(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
) -> Result<Response, Problem> {
    core.authorise(&caller, Verb::See, Subject::Cluster)?;
    let overview = core.overview.borrow().clone();
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics::render(&core, &overview)).into_response())
}

pub async fn whoami(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    content(token::whoami(&core, &caller))
}

pub async fn all_status(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    content(status::status(&core, &caller, None).await)
}

pub async fn services(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    let Json(mut status) = content(status::status(&core, &caller, None).await)?;
    Ok(Json(status["services"].take()))
}

type Name = At<(Label, Label)>;

fn name(At((project, service)): Name) -> ServiceName {
    ServiceName::new(project, service)
}

pub async fn one_service(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    let Json(mut status) = content(status::status(&core, &caller, Some(name(at))).await)?;
    Ok(Json(status["services"][0].take()))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Removal {
    #[serde(default)]
    volumes: bool,
}

pub async fn remove(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    at: Name,
    Asked(Removal { volumes }): Asked<Removal>,
) -> Answer {
    content(service::remove(&core, &caller, name(at), volumes).await)
}

pub async fn why(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(status::why(&core, &caller, name(at)).await)
}

pub async fn history(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(status::history(&core, &caller, name(at)).await)
}

pub async fn progress(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    at: Name,
) -> Result<Response, Problem> {
    let service = name(at);
    // Over QUIC one may wait for a service to come; here its absence is an answer.
    status::status(&core, &caller, Some(service.clone())).await?;
    lines::<Progress>(core.clone(), caller.token.clone(), status::watch(&core, &caller, vec![service]).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logs {
    replica: Option<ReplicaId>,
    since: Option<Timestamp>,
    tail: Option<u32>,
    #[serde(default)]
    follow: bool,
    grep: Option<String>,
}

/// Text for people, JSON lines for whoever asks for JSON.
pub async fn read_logs(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    at: Name,
    Asked(Logs { replica, since, tail, follow, grep }): Asked<Logs>,
    headers: HeaderMap,
) -> Result<Response, Problem> {
    let query = LogsQuery { service: name(at), replica, since, tail, follow, grep };
    let read = logs::logs(&core, &caller, query).await;
    let accept = headers.get(header::ACCEPT).and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    if accept.contains("json") {
        return lines::<LogLine>(core, caller.token, read);
    }
    let text = |read: Result<LogLine, Refused>| match read {
        Ok(line) => format!("{} {}\n", line.replica, line.text).into_bytes(),
        Err(refused) => format!("orca: {refused}\n").into_bytes(),
    };
    let token = caller.token.clone();
    Ok(([(header::CONTENT_TYPE, TEXT)], stream(core, token, read?, text)).into_response())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Scaling {
    replicas: u32,
}

pub async fn scale(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    at: Name,
    Sent(Scaling { replicas }): Sent<Scaling>,
) -> Answer {
    content(service::scale(&core, &caller, name(at), replicas).await)
}

pub async fn stop(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(service::stop(&core, &caller, name(at)).await)
}

pub async fn start(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(service::start(&core, &caller, name(at)).await)
}

pub async fn restart(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(service::restart(&core, &caller, name(at)).await)
}

pub async fn redeploy(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(service::redeploy(&core, &caller, name(at)).await)
}

pub async fn promote(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(service::promote(&core, &caller, name(at)).await)
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Back {
    to: Option<Revision>,
}

pub async fn rollback(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    at: Name,
    Whole(body): Whole,
) -> Answer {
    let Back { to } = if body.is_empty() { Back::default() } else { json(&body)? };
    content(service::rollback(&core, &caller, name(at), to).await)
}

/// A word that is not understood might have been what was to keep it small: `dry_run`, `only`.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Deploying {
    only: Option<String>,
    #[serde(default)]
    prune: bool,
    #[serde(default)]
    replace: bool,
    if_generation: Option<Generation>,
    #[serde(default)]
    dry_run: bool,
}

pub async fn deploy_project(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At(label): At<Label>,
    Asked(Deploying { only, prune, replace, if_generation, dry_run }): Asked<Deploying>,
    headers: HeaderMap,
    Whole(body): Whole,
) -> Answer {
    let (project, written): (Project, Option<SourceFile>) = match is_json(&headers) {
        true => (json(&body)?, None),
        false => {
            let file = file("service.toml", &body)?;
            (toml::project(&file, &label).map_err(Problem::of_file)?, Some(file))
        }
    };
    if project.name != label {
        let message = format!("the body is project {}, and the path says {label}", project.name);
        return Err(invalid(message, Some("let both say the same")).into());
    }
    let only = only.map_or(Ok(Vec::new()), |names| picked(&names))?;
    let deploy = Deploy { project: project.clone(), only, prune, replace, if_generation, settings: None };
    let answer = content(match dry_run {
        true => deploy::plan(&core, &caller, deploy).await,
        false => deploy::deploy(&core, &caller, deploy).await,
    });
    match written {
        Some(file) => answer.map_err(|problem| problem.placed(&file, &project)),
        None => answer,
    }
}

/// `api,web`. None at all is a mistake: it would be taken for all of them.
fn picked(names: &str) -> Result<Vec<Label>, Problem> {
    let label = |name: &str| {
        let wrong = |error| invalid(format!("`only`: {error}"), Some("name services of the project: ?only=api,web"));
        Label::new(name).map_err(|error| wrong(error).into())
    };
    names.split(',').map(label).collect()
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Setting {
    #[serde(default)]
    dry_run: bool,
}

pub async fn set_settings(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Asked(Setting { dry_run }): Asked<Setting>,
    headers: HeaderMap,
    Whole(body): Whole,
) -> Answer {
    let settings: Settings = match is_json(&headers) {
        true => json(&body)?,
        false => toml::settings(&file("cluster.toml", &body)?).map_err(Problem::of_file)?,
    };
    content(match dry_run {
        true => service::plan_settings(&core, &caller, settings).await,
        false => service::set_settings(&core, &caller, settings).await,
    })
}

fn is_json(headers: &HeaderMap) -> bool {
    let media = headers.get(header::CONTENT_TYPE).and_then(|media| media.to_str().ok()).unwrap_or_default();
    media.starts_with(JSON)
}

fn file(name: &str, body: &[u8]) -> Result<SourceFile, Problem> {
    match str::from_utf8(body) {
        Ok(text) => Ok(SourceFile { name: name.to_owned(), text: text.to_owned() }),
        Err(error) => Err(invalid(format!("the body is not text: {error}"), None).into()),
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Digests {
    digests: Vec<String>,
}

pub async fn missing_modules(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Sent(Digests { digests }): Sent<Digests>,
) -> Answer {
    content(deploy::missing_modules(&core, &caller, digests))
}

/// Not taken in whole, so the limit on bodies does not hold; the upload has its own.
pub async fn put_module(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At(digest): At<String>,
    headers: HeaderMap,
    mut body: Body,
) -> Answer {
    let size = headers.get(header::CONTENT_LENGTH).and_then(|size| size.to_str().ok()?.parse().ok());
    let size = size.ok_or_else(|| invalid("a module is sent with its Content-Length".to_owned(), None))?;
    let mut upload = deploy::receive_module(&core, &caller, &digest, size).await?;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| invalid(format!("the module could not be received: {error}"), None))?;
        if let Some(bytes) = frame.data_ref() {
            upload.push(bytes).await.map_err(api::blob)?;
        }
    }
    content(deploy::keep_module(&core, upload).await)
}

pub async fn nodes(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    content(status::nodes(&core, &caller).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Events {
    project: Option<Label>,
    service: Option<ServiceName>,
    since: Option<Timestamp>,
    last: Option<u32>,
    #[serde(default)]
    follow: bool,
}

pub async fn read_events(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Asked(Events { project, service, since, last, follow }): Asked<Events>,
) -> Result<Response, Problem> {
    let query = EventsQuery { service, project, since, last, follow };
    lines::<Event>(core.clone(), caller.token.clone(), events::events(&core, &caller, query).await)
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InProject {
    project: Option<Label>,
}

pub async fn secrets(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Asked(InProject { project }): Asked<InProject>,
) -> Answer {
    content(secret::list(&core, &caller, project).await)
}

pub async fn set_global_secret(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At(name): At<String>,
    Whole(value): Whole,
) -> Answer {
    content(secret::set(&core, &caller, vec![value_of(None, &name, &value)?]).await)
}

pub async fn set_secret(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At((project, name)): At<(Label, String)>,
    Whole(value): Whole,
) -> Answer {
    content(secret::set(&core, &caller, vec![value_of(Some(project), &name, &value)?]).await)
}

fn value_of(project: Option<Label>, name: &str, value: &[u8]) -> Result<SetSecret, Problem> {
    match str::from_utf8(value) {
        Ok(value) => Ok(SetSecret { name: secret_name(project, name)?, value: value.to_owned() }),
        Err(_) => Err(invalid(format!("the value of {name} is not text"), Some("encode it, in base64 say")).into()),
    }
}

fn secret_name(project: Option<Label>, name: &str) -> Result<SecretName, Problem> {
    SecretName::new(project, name).map_err(|error| invalid(error.to_string(), None).into())
}

pub async fn remove_global_secret(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At(name): At<String>,
) -> Answer {
    content(secret::remove(&core, &caller, secret_name(None, &name)?).await)
}

pub async fn remove_secret(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At((project, name)): At<(Label, String)>,
) -> Answer {
    content(secret::remove(&core, &caller, secret_name(Some(project), &name)?).await)
}

pub async fn rotate(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Asked(InProject { project }): Asked<InProject>,
) -> Answer {
    content(secret::rotate(&core, &caller, project).await)
}

pub async fn tokens(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    content(token::list(&core, &caller).await)
}

pub async fn create_token(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Sent(create): Sent<CreateToken>,
) -> Answer {
    content(token::create(&core, &caller, create).await)
}

pub async fn revoke_token(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At(id): At<TokenId>,
) -> Answer {
    content(token::revoke(&core, &caller, id).await)
}

pub async fn examine(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    content(doctor::doctor(&core, &caller).await)
}
