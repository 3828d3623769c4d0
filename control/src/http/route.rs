//! The routes, each with what the OpenAPI document says of it.

use std::sync::Arc;

use axum::handler::Handler;
use axum::routing::{self, MethodRouter};
use utoipa::openapi::HttpMethod;

use super::handler;
use crate::api::Core;

/// One method on one path.
pub struct Route {
    pub method: HttpMethod,
    pub path: &'static str,
    pub handler: MethodRouter<Arc<Core>>,
    pub summary: &'static str,
    pub query: &'static [(&'static str, &'static str)],
    pub body: Option<&'static str>,
    /// The media types of the body, each with the type of what is sent.
    pub sent: &'static [(&'static str, &'static str)],
    /// The answer's media type, and the type of what is answered; of each line, if it is lines.
    pub answer: (&'static str, &'static str),
    /// Answered without a token.
    pub open: bool,
}

pub const JSON: &str = "application/json";
pub const LINES: &str = "application/x-ndjson";
const TOML: &str = "application/toml";
pub const TEXT: &str = "text/plain; charset=utf-8";

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
        ("only", "only these of its services: `api,web`"),
        ("prune", "also remove services of the project that are not in it"),
        ("replace", "take the place of a rollout that runs"),
        ("if_generation", "refuse if the state has moved on from this generation"),
        ("dry_run", "only say what it would do"),
    ];
    const PROJECT: &[(&str, &str)] = &[("project", "only this project; absent means global, or all")];
    vec![
        Route::get("/api/v1/health", "Whether the store works and a leader is known.", handler::health)
            .answers("Health")
            .open(),
        Route::get("/api/v1/openapi.json", "This document.", handler::openapi).answers("any").open(),
        Route::get("/metrics", "Prometheus metrics.", handler::show_metrics).in_text(),
        Route::get("/api/v1/whoami", "Whose token this is and what it may do.", handler::whoami).answers("Whoami"),
        Route::get("/api/v1/status", "Everything there is, as of now.", handler::all_status).answers("Status"),
        Route::get("/api/v1/services", "All services.", handler::services).answers("[ServiceStatus]"),
        Route::get("/api/v1/services/{project}/{service}", "One service.", handler::one_service)
            .answers("ServiceStatus"),
        Route::delete("/api/v1/services/{project}/{service}", "Remove a service.", handler::remove)
            .query(&[("volumes", "its volumes too, with all that is in them")]),
        Route::get("/api/v1/services/{project}/{service}/why", "What is wrong with it, and the fix.", handler::why)
            .answers("Why"),
        Route::get("/api/v1/services/{project}/{service}/history", "Its revisions and rollouts.", handler::history)
            .answers("History"),
        Route::get(
            "/api/v1/services/{project}/{service}/progress",
            "Its status whenever that changes.",
            handler::progress,
        )
        .answers("Progress")
        .in_lines(),
        Route::get(
            "/api/v1/services/{project}/{service}/logs",
            "Its replicas' lines, interleaved by time.",
            handler::read_logs,
        )
        .query(&[
            ("replica", "only this replica, even if it is gone"),
            ("since", "not before this time, in milliseconds since 1970"),
            ("tail", "only the last so many lines"),
            ("follow", "go on with what is being written"),
            ("grep", "only lines that contain this"),
        ])
        .answers("LogLine")
        .in_lines(),
        Route::post("/api/v1/services/{project}/{service}/scale", "Change the number of replicas.", handler::scale)
            .takes("`{\"replicas\": 3}`", &[(JSON, "Scaling")]),
        Route::post("/api/v1/services/{project}/{service}/stop", "Stop it; its specification stays.", handler::stop),
        Route::post("/api/v1/services/{project}/{service}/start", "Start it again.", handler::start),
        Route::post("/api/v1/services/{project}/{service}/restart", "New replicas of the same.", handler::restart),
        Route::post(
            "/api/v1/services/{project}/{service}/redeploy",
            "New replicas of whatever the image's name means now.",
            handler::redeploy,
        ),
        Route::post("/api/v1/services/{project}/{service}/promote", "Let the canary take over.", handler::promote),
        Route::post(
            "/api/v1/services/{project}/{service}/rollback",
            "Back to the revision before, or to one.",
            handler::rollback,
        )
        .takes("nothing, or `{\"to\": 3}`", &[(JSON, "Rollback")]),
        Route::put("/api/v1/projects/{project}", "Deploy a project.", handler::deploy_project)
            .query(DEPLOY)
            .takes("a service.toml, or a project", &[(TOML, "string"), (JSON, "Project")])
            .answers("Deployed"),
        Route::post("/api/v1/modules/missing", "Which of these modules are not here.", handler::missing_modules)
            .takes("`{\"digests\": [\"<hex SHA-256>\"]}`", &[(JSON, "Digests")])
            .answers("Digests"),
        Route::put("/api/v1/modules/{digest}", "Upload a module.", handler::put_module)
            .takes("its bytes; the digest is their hex SHA-256", &[("application/wasm", "any")]),
        Route::put("/api/v1/settings", "Replace the cluster's settings.", handler::set_settings)
            .takes("a cluster.toml, or settings", &[(TOML, "string"), (JSON, "Settings")])
            .query(&[("dry_run", "only say what it would do")]),
        Route::get("/api/v1/nodes", "The nodes.", handler::nodes).answers("Nodes"),
        Route::get("/api/v1/events", "What happened, oldest first.", handler::read_events)
            .query(&[
                ("project", "only about services of this project"),
                ("service", "only about this one, as project/service"),
                ("since", "not before this time, in milliseconds since 1970"),
                ("last", "only the last so many"),
                ("follow", "go on with what happens"),
            ])
            .answers("Event")
            .in_lines(),
        Route::get("/api/v1/secrets", "Names and versions of secrets; never values.", handler::secrets)
            .query(PROJECT)
            .answers("Secrets"),
        Route::put("/api/v1/secrets/{name}", "Set a secret that every project may use.", handler::set_global_secret)
            .takes("the value, as it is", &[(TEXT, "string")]),
        Route::delete("/api/v1/secrets/{name}", "Remove a global secret.", handler::remove_global_secret),
        Route::put("/api/v1/projects/{project}/secrets/{name}", "Set a secret of a project.", handler::set_secret)
            .takes("the value, as it is", &[(TEXT, "string")]),
        Route::delete("/api/v1/projects/{project}/secrets/{name}", "Remove a secret.", handler::remove_secret),
        Route::post("/api/v1/data-keys", "Seal a scope's secrets anew under a new data key.", handler::rotate)
            .query(PROJECT),
        Route::get("/api/v1/tokens", "The tokens, without their secrets.", handler::tokens).answers("Tokens"),
        Route::post(
            "/api/v1/tokens",
            "Make a token; its text is in the answer and nowhere else.",
            handler::create_token,
        )
        .takes(
            "`{\"name\": \"ci\", \"role\": \"deployer\", \"project\": \"shop\", \"expires\": null}`",
            &[(JSON, "NewToken")],
        )
        .answers("Token"),
        Route::delete("/api/v1/tokens/{id}", "Revoke a token, at once.", handler::revoke_token),
        Route::get("/api/v1/doctor", "What the server can tell of its own health.", handler::examine)
            .answers("Findings"),
    ]
}
