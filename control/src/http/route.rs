//! The routes, each with what the OpenAPI document says of it.

use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::handler::Handler;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{self, MethodRouter};
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
use tokio::sync::mpsc;
use utoipa::openapi::path::{OperationBuilder, Parameter, ParameterBuilder, ParameterIn};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::security::{HttpAuthScheme, HttpBuilder, SecurityRequirement, SecurityScheme};
use utoipa::openapi::{
    ComponentsBuilder, Content, HttpMethod, InfoBuilder, Object, OpenApi, OpenApiBuilder, PathItem, PathsBuilder,
    Required, ResponseBuilder, Type,
};

use super::problem::{Asked, At, Authenticated, Problem, Sent, Whole, json};
use super::schema;
use crate::api::{self, Core, deploy, doctor, events, invalid, logs, secret, service, status, token};
use crate::auth::{Object as Subject, Verb};
use crate::metrics;

type Answer = Result<Json<Value>, Problem>;

/// One method on one path.
pub struct Route {
    pub method: HttpMethod,
    pub path: &'static str,
    pub handler: MethodRouter<Arc<Core>>,
    summary: &'static str,
    query: &'static [(&'static str, &'static str)],
    body: Option<&'static str>,
    /// The media types of the body, each with the type of what is sent.
    sent: &'static [(&'static str, &'static str)],
    /// The answer's media type, and the type of what is answered; of each line, if it is lines.
    answer: (&'static str, &'static str),
    /// Answered without a token.
    open: bool,
}

const JSON: &str = "application/json";
const LINES: &str = "application/x-ndjson";
const TOML: &str = "application/toml";
const TEXT: &str = "text/plain; charset=utf-8";

impl Route {
    fn new(method: HttpMethod, path: &'static str, summary: &'static str, handler: MethodRouter<Arc<Core>>) -> Route {
        let answer = (JSON, "Changed");
        Route { method, path, handler, summary, query: &[], body: None, sent: &[], answer, open: false }
    }

    fn get<H: Handler<T, Arc<Core>>, T: 'static>(path: &'static str, summary: &'static str, handler: H) -> Route {
        Route::new(HttpMethod::Get, path, summary, routing::get(handler))
    }

    fn post<H: Handler<T, Arc<Core>>, T: 'static>(path: &'static str, summary: &'static str, handler: H) -> Route {
        Route::new(HttpMethod::Post, path, summary, routing::post(handler))
    }

    fn put<H: Handler<T, Arc<Core>>, T: 'static>(path: &'static str, summary: &'static str, handler: H) -> Route {
        Route::new(HttpMethod::Put, path, summary, routing::put(handler))
    }

    fn delete<H: Handler<T, Arc<Core>>, T: 'static>(path: &'static str, summary: &'static str, handler: H) -> Route {
        Route::new(HttpMethod::Delete, path, summary, routing::delete(handler))
    }

    fn query(self, query: &'static [(&'static str, &'static str)]) -> Route {
        Route { query, ..self }
    }

    fn takes(self, description: &'static str, sent: &'static [(&'static str, &'static str)]) -> Route {
        Route { body: Some(description), sent, ..self }
    }

    /// Unless it is told what a change led to.
    fn answers(self, what: &'static str) -> Route {
        Route { answer: (self.answer.0, what), ..self }
    }

    fn in_lines(self) -> Route {
        Route { answer: (LINES, self.answer.1), ..self }
    }

    fn in_text(self) -> Route {
        Route { answer: (TEXT, "string"), ..self }
    }

    fn open(self) -> Route {
        Route { open: true, ..self }
    }
}

pub fn routes() -> Vec<Route> {
    const DEPLOY: &[(&str, &str)] = &[
        ("prune", "also remove services of the project that are not in it"),
        ("replace", "take the place of a rollout that runs"),
        ("if_generation", "refuse if the state has moved on from this generation"),
        ("dry_run", "only say what it would do"),
    ];
    const PROJECT: &[(&str, &str)] = &[("project", "only this project; absent means global, or all")];
    vec![
        Route::get("/api/v1/health", "Whether the store works and a leader is known.", health).answers("Health").open(),
        Route::get("/api/v1/openapi.json", "This document.", openapi).answers("any").open(),
        Route::get("/metrics", "Prometheus metrics.", show_metrics).in_text(),
        Route::get("/api/v1/whoami", "Whose token this is and what it may do.", whoami).answers("Whoami"),
        Route::get("/api/v1/status", "Everything there is, as of now.", all_status).answers("Status"),
        Route::get("/api/v1/services", "All services.", services).answers("[ServiceStatus]"),
        Route::get("/api/v1/services/{project}/{service}", "One service.", one_service).answers("ServiceStatus"),
        Route::delete("/api/v1/services/{project}/{service}", "Remove a service.", remove)
            .query(&[("volumes", "its volumes too, with all that is in them")]),
        Route::get("/api/v1/services/{project}/{service}/why", "What is wrong with it, and the fix.", why)
            .answers("Why"),
        Route::get("/api/v1/services/{project}/{service}/history", "Its revisions and rollouts.", history)
            .answers("History"),
        Route::get("/api/v1/services/{project}/{service}/progress", "Its status whenever that changes.", progress)
            .answers("Progress")
            .in_lines(),
        Route::get("/api/v1/services/{project}/{service}/logs", "Its replicas' lines, interleaved by time.", read_logs)
            .query(&[
                ("replica", "only this replica, even if it is gone"),
                ("since", "not before this time, in milliseconds since 1970"),
                ("tail", "only the last so many lines"),
                ("follow", "go on with what is being written"),
                ("grep", "only lines that contain this"),
            ])
            .answers("LogLine")
            .in_lines(),
        Route::post("/api/v1/services/{project}/{service}/scale", "Change the number of replicas.", scale)
            .takes("`{\"replicas\": 3}`", &[(JSON, "Scaling")]),
        Route::post("/api/v1/services/{project}/{service}/stop", "Stop it; its specification stays.", stop),
        Route::post("/api/v1/services/{project}/{service}/start", "Start it again.", start),
        Route::post("/api/v1/services/{project}/{service}/restart", "New replicas of the same.", restart),
        Route::post(
            "/api/v1/services/{project}/{service}/redeploy",
            "New replicas of whatever the image's name means now.",
            redeploy,
        ),
        Route::post("/api/v1/services/{project}/{service}/promote", "Let the canary take over.", promote),
        Route::post(
            "/api/v1/services/{project}/{service}/rollback",
            "Back to the revision before, or to one.",
            rollback,
        )
        .takes("nothing, or `{\"to\": 3}`", &[(JSON, "Rollback")]),
        Route::put("/api/v1/projects/{project}", "Deploy a project.", deploy_project)
            .query(DEPLOY)
            .takes("a service.toml, or a project", &[(TOML, "string"), (JSON, "Project")])
            .answers("Deployed"),
        Route::post("/api/v1/modules/missing", "Which of these modules are not here.", missing_modules)
            .takes("`{\"digests\": [\"<hex SHA-256>\"]}`", &[(JSON, "Digests")])
            .answers("Digests"),
        Route::put("/api/v1/modules/{digest}", "Upload a module.", put_module)
            .takes("its bytes; the digest is their hex SHA-256", &[("application/wasm", "any")]),
        Route::put("/api/v1/settings", "Replace the cluster's settings.", set_settings)
            .takes("a cluster.toml, or settings", &[(TOML, "string"), (JSON, "Settings")]),
        Route::get("/api/v1/nodes", "The nodes.", nodes).answers("Nodes"),
        Route::get("/api/v1/events", "What happened, oldest first.", read_events)
            .query(&[
                ("project", "only about services of this project"),
                ("service", "only about this one, as project/service"),
                ("since", "not before this time, in milliseconds since 1970"),
                ("last", "only the last so many"),
                ("follow", "go on with what happens"),
            ])
            .answers("Event")
            .in_lines(),
        Route::get("/api/v1/secrets", "Names and versions of secrets; never values.", secrets)
            .query(PROJECT)
            .answers("Secrets"),
        Route::put("/api/v1/secrets/{name}", "Set a secret that every project may use.", set_global_secret)
            .takes("the value, as it is", &[(TEXT, "string")]),
        Route::delete("/api/v1/secrets/{name}", "Remove a global secret.", remove_global_secret),
        Route::put("/api/v1/projects/{project}/secrets/{name}", "Set a secret of a project.", set_secret)
            .takes("the value, as it is", &[(TEXT, "string")]),
        Route::delete("/api/v1/projects/{project}/secrets/{name}", "Remove a secret.", remove_secret),
        Route::post("/api/v1/data-keys", "Seal a scope's secrets anew under a new data key.", rotate).query(PROJECT),
        Route::get("/api/v1/tokens", "The tokens, without their secrets.", tokens).answers("Tokens"),
        Route::post("/api/v1/tokens", "Make a token; its text is in the answer and nowhere else.", create_token)
            .takes(
                "`{\"name\": \"ci\", \"role\": \"deployer\", \"project\": \"shop\", \"expires\": null}`",
                &[(JSON, "NewToken")],
            )
            .answers("Token"),
        Route::delete("/api/v1/tokens/{id}", "Revoke a token, at once.", revoke_token),
        Route::get("/api/v1/doctor", "What the server can tell of its own health.", examine).answers("Findings"),
    ]
}

/// The OpenAPI document of [`routes`].
pub fn document() -> OpenApi {
    let info = InfoBuilder::new()
        .title("Orca")
        .version(env!("CARGO_PKG_VERSION"))
        .description(Some("The cluster's HTTP API: the same verbs as the command line. Errors are problem+json."));
    let paths = routes().into_iter().fold(PathsBuilder::new(), |paths, route| {
        let path = route.path;
        paths.path(path, PathItem::new(route.method.clone(), operation(route)))
    });
    let bearer = SecurityScheme::Http(HttpBuilder::new().scheme(HttpAuthScheme::Bearer).build());
    let components = ComponentsBuilder::new().security_scheme("token", bearer);
    let components = schema::named().fold(components, |all, (name, schema)| all.schema(name, schema));
    OpenApiBuilder::new().info(info.build()).paths(paths).components(Some(components.build())).build()
}

fn operation(route: Route) -> utoipa::openapi::path::Operation {
    let in_path = route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'));
    let in_path = in_path.map(|name| parameter(name, ParameterIn::Path, None));
    let in_query = route.query.iter().map(|(name, description)| parameter(name, ParameterIn::Query, Some(description)));
    let content = |of| Content::new(Some(schema::of_type(of)));
    let body = route.body.map(|description| {
        let body = RequestBodyBuilder::new().description(Some(description));
        route.sent.iter().fold(body, |body, (media, what)| body.content(*media, content(what))).build()
    });
    let done = ResponseBuilder::new().description("done").content(route.answer.0, content(route.answer.1));
    let problem = ResponseBuilder::new().description("refused");
    let problem = problem.content("application/problem+json", content("Problem"));
    let security = if route.open { vec![] } else { vec![SecurityRequirement::new("token", [] as [&str; 0])] };
    OperationBuilder::new()
        .summary(Some(route.summary))
        .parameters(Some(in_path.chain(in_query).collect::<Vec<_>>()))
        .request_body(body)
        .response("200", done.build())
        .response("default", problem.build())
        .securities(Some(security))
        .build()
}

fn parameter(name: &str, place: ParameterIn, description: Option<&str>) -> Parameter {
    let required = if matches!(place, ParameterIn::Path) { Required::True } else { Required::False };
    ParameterBuilder::new()
        .name(name)
        .parameter_in(place)
        .required(required)
        .description(description)
        .schema(Some(Object::with_type(Type::String)))
        .build()
}

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

/// One JSON document a line, until there are no more or the token is revoked.
fn lines<T: Serialize + Send + 'static>(
    core: Arc<Core>,
    token: TokenId,
    items: Result<mpsc::Receiver<T>, Refused>,
) -> Result<Response, Problem> {
    let text = |item: T| {
        let mut line = serde_json::to_vec(&item).expect("a message of ours has a form in JSON");
        line.push(b'\n');
        line
    };
    Ok(([(header::CONTENT_TYPE, LINES)], stream(core, token, items?, text)).into_response())
}

fn stream<T: Send + 'static>(
    core: Arc<Core>,
    token: TokenId,
    items: mpsc::Receiver<T>,
    text: impl Fn(T) -> Vec<u8> + Send + 'static,
) -> Body {
    let items = futures_util::stream::unfold(items, |mut items| async move { Some((items.recv().await?, items)) });
    let revoked = async move { core.revoked(&token).await };
    let body = items.map(move |item| Ok::<_, std::convert::Infallible>(Bytes::from(text(item)))).take_until(revoked);
    Body::from_stream(boxed(body))
}

fn boxed<T: Send + 'static>(stream: impl Stream<Item = T> + Send + 'static) -> impl Stream<Item = T> + Send {
    Box::pin(stream)
}

async fn health(State(core): State<Arc<Core>>) -> Response {
    let leader = core.raft.metrics().leader;
    let fatal = futures_util::FutureExt::now_or_never(core.raft.fatal());
    let (status, text) = match (fatal, leader) {
        (Some(fatal), _) => (StatusCode::SERVICE_UNAVAILABLE, fatal.to_string()),
        (None, None) => (StatusCode::SERVICE_UNAVAILABLE, "no leader is known".to_owned()),
        (None, Some(_)) => (StatusCode::OK, "ok".to_owned()),
    };
    (status, Json(serde_json::json!({ "status": text }))).into_response()
}

async fn openapi() -> Json<Value> {
    Json(serde_json::to_value(document()).expect("a document of fixed form can be written"))
}

async fn show_metrics(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
) -> Result<Response, Problem> {
    core.authorise(&caller, Verb::See, Subject::Cluster)?;
    let overview = core.overview.borrow().clone();
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], metrics::render(&core, &overview)).into_response())
}

async fn whoami(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    content(token::whoami(&core, &caller))
}

async fn all_status(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    content(status::status(&core, &caller, None).await)
}

async fn services(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    let Json(mut status) = content(status::status(&core, &caller, None).await)?;
    Ok(Json(status["services"].take()))
}

type Name = At<(Label, Label)>;

fn name(At((project, service)): Name) -> ServiceName {
    ServiceName::new(project, service)
}

async fn one_service(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    let Json(mut status) = content(status::status(&core, &caller, Some(name(at))).await)?;
    Ok(Json(status["services"][0].take()))
}

#[derive(Deserialize)]
struct Removal {
    #[serde(default)]
    volumes: bool,
}

async fn remove(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    at: Name,
    Asked(Removal { volumes }): Asked<Removal>,
) -> Answer {
    content(service::remove(&core, &caller, name(at), volumes).await)
}

async fn why(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(status::why(&core, &caller, name(at)).await)
}

async fn history(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(status::history(&core, &caller, name(at)).await)
}

async fn progress(
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
struct Logs {
    replica: Option<ReplicaId>,
    since: Option<Timestamp>,
    tail: Option<u32>,
    #[serde(default)]
    follow: bool,
    grep: Option<String>,
}

/// Text for people, JSON lines for whoever asks for JSON.
async fn read_logs(
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
    let text = |line: LogLine| format!("{} {}\n", line.replica, line.text).into_bytes();
    let token = caller.token.clone();
    Ok(([(header::CONTENT_TYPE, TEXT)], stream(core, token, read?, text)).into_response())
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Scaling {
    replicas: u32,
}

async fn scale(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    at: Name,
    Sent(Scaling { replicas }): Sent<Scaling>,
) -> Answer {
    content(service::scale(&core, &caller, name(at), replicas).await)
}

async fn stop(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(service::stop(&core, &caller, name(at)).await)
}

async fn start(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(service::start(&core, &caller, name(at)).await)
}

async fn restart(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(service::restart(&core, &caller, name(at)).await)
}

async fn redeploy(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(service::redeploy(&core, &caller, name(at)).await)
}

async fn promote(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated, at: Name) -> Answer {
    content(service::promote(&core, &caller, name(at)).await)
}

#[derive(Deserialize, Default)]
#[serde(deny_unknown_fields)]
struct Back {
    to: Option<Revision>,
}

async fn rollback(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    at: Name,
    Whole(body): Whole,
) -> Answer {
    let Back { to } = if body.is_empty() { Back::default() } else { json(&body)? };
    content(service::rollback(&core, &caller, name(at), to).await)
}

#[derive(Deserialize)]
struct Deploying {
    #[serde(default)]
    prune: bool,
    #[serde(default)]
    replace: bool,
    if_generation: Option<Generation>,
    #[serde(default)]
    dry_run: bool,
}

async fn deploy_project(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At(label): At<Label>,
    Asked(Deploying { prune, replace, if_generation, dry_run }): Asked<Deploying>,
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
    let deploy = Deploy { project: project.clone(), only: Vec::new(), prune, replace, if_generation };
    let answer = content(match dry_run {
        true => deploy::plan(&core, &caller, deploy).await,
        false => deploy::deploy(&core, &caller, deploy).await,
    });
    match written {
        Some(file) => answer.map_err(|problem| problem.placed(&file, &project)),
        None => answer,
    }
}

async fn set_settings(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    headers: HeaderMap,
    Whole(body): Whole,
) -> Answer {
    let settings: Settings = match is_json(&headers) {
        true => json(&body)?,
        false => toml::settings(&file("cluster.toml", &body)?).map_err(Problem::of_file)?,
    };
    content(service::set_settings(&core, &caller, settings).await)
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
struct Digests {
    digests: Vec<String>,
}

async fn missing_modules(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Sent(Digests { digests }): Sent<Digests>,
) -> Answer {
    content(deploy::missing_modules(&core, &caller, digests))
}

/// Not taken in whole, so the limit on bodies does not hold; the upload has its own.
async fn put_module(
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

async fn nodes(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    content(status::nodes(&core, &caller).await)
}

#[derive(Deserialize)]
struct Events {
    project: Option<Label>,
    service: Option<ServiceName>,
    since: Option<Timestamp>,
    last: Option<u32>,
    #[serde(default)]
    follow: bool,
}

async fn read_events(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Asked(Events { project, service, since, last, follow }): Asked<Events>,
) -> Result<Response, Problem> {
    let query = EventsQuery { service, project, since, last, follow };
    lines::<Event>(core.clone(), caller.token.clone(), events::events(&core, &caller, query).await)
}

#[derive(Deserialize)]
struct InProject {
    project: Option<Label>,
}

async fn secrets(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Asked(InProject { project }): Asked<InProject>,
) -> Answer {
    content(secret::list(&core, &caller, project).await)
}

async fn set_global_secret(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At(name): At<String>,
    Whole(value): Whole,
) -> Answer {
    content(secret::set(&core, &caller, vec![value_of(None, &name, &value)?]).await)
}

async fn set_secret(
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

async fn remove_global_secret(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At(name): At<String>,
) -> Answer {
    content(secret::remove(&core, &caller, secret_name(None, &name)?).await)
}

async fn remove_secret(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At((project, name)): At<(Label, String)>,
) -> Answer {
    content(secret::remove(&core, &caller, secret_name(Some(project), &name)?).await)
}

async fn rotate(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Asked(InProject { project }): Asked<InProject>,
) -> Answer {
    content(secret::rotate(&core, &caller, project).await)
}

async fn tokens(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    content(token::list(&core, &caller).await)
}

async fn create_token(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    Sent(create): Sent<CreateToken>,
) -> Answer {
    content(token::create(&core, &caller, create).await)
}

async fn revoke_token(
    State(core): State<Arc<Core>>,
    Authenticated(caller): Authenticated,
    At(id): At<TokenId>,
) -> Answer {
    content(token::revoke(&core, &caller, id).await)
}

async fn examine(State(core): State<Arc<Core>>, Authenticated(caller): Authenticated) -> Answer {
    content(doctor::doctor(&core, &caller).await)
}
