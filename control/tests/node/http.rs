//! The HTTP API.

use orca_cluster::command::Refusal;
use orca_cluster::state::Role;
use orca_wire::message::client::{Request, Response};
use serde_json::Value;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{Node, PATIENCE, http, http_with, web, written};

#[tokio::test]
async fn the_document_and_the_router_have_the_same_routes() {
    let node = Node::found().await;
    let document = http(&node, None, "GET", "/api/v1/openapi.json", "").await;
    assert_eq!(document.status, 200);
    let document = document.json();
    let mut count = 0;
    for (path, item) in document["paths"].as_object().unwrap() {
        let path = path
            .replace("{project}/{service}", "shop/web")
            .replace("{project}", "shop")
            .replace("{name}", "A")
            .replace("{id}", "abcdefgh")
            .replace("{digest}", &"0".repeat(64));
        assert!(!path.contains('{'), "{path}");
        for (method, operation) in item.as_object().unwrap() {
            count += 1;
            let answered = http(&node, None, &method.to_uppercase(), &path, "").await;
            let open = operation["security"].as_array().is_none_or(Vec::is_empty);
            assert_eq!(answered.status, if open { 200 } else { 401 }, "{method} {path}: {}", answered.body);
            assert!(operation["summary"].as_str().is_some_and(|text| !text.is_empty()), "{method} {path}");
        }
    }
    assert!(count > 30, "{count} routes");
    let nothing = http(&node, None, "GET", "/api/v1/nothing", "").await;
    assert_eq!((nothing.status, nothing.json()["reason"].as_str().unwrap()), (404, "not_found"));
    let other = http(&node, None, "PATCH", "/api/v1/services", "").await;
    assert_eq!((other.status, other.json()["detail"].as_str().unwrap()), (405, "PATCH is not what this path is for"));
    node.stop().await;
}

#[tokio::test]
async fn a_project_is_deployed_operated_and_removed() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    let token = node.token();
    let ask = async |method: &str, path: &str, body: &str| http(&node, Some(&token), method, path, body).await;
    let deployed = ask("PUT", "/api/v1/projects/shop", &web("web:1")).await;
    assert_eq!(deployed.status, 200, "{}", deployed.body);
    assert_eq!(deployed.json()["outcome"]["services"]["shop/web"]["created"]["revision"], 1);
    node.settled("shop/web").await;
    let service = ask("GET", "/api/v1/services/shop/web", "").await.json();
    assert_eq!((&service["state"], &service["ready"]), (&"running".into(), &2.into()));
    assert_eq!(ask("GET", "/api/v1/services", "").await.json().as_array().unwrap().len(), 1);

    let scaled = ask("POST", "/api/v1/services/shop/web/scale", "{\"replicas\":3}").await;
    assert_eq!(scaled.json()["revision"], 2, "{}", scaled.body);
    assert_eq!(ask("POST", "/api/v1/services/shop/web/scale", "{\"count\":3}").await.status, 400);
    node.settled("shop/web").await;
    let back = ask("POST", "/api/v1/services/shop/web/rollback", "{\"to\":1}").await;
    assert_eq!(back.status, 200, "{}", back.body);
    assert_eq!(ask("POST", "/api/v1/services/shop/web/promote", "").await.status, 409);

    let text = ask("GET", "/api/v1/services/shop/web/logs?tail=2", "").await.body;
    assert_eq!(text.lines().count(), 2, "{text}");
    let lines =
        http_with(&node, Some(&token), "GET", "/api/v1/services/shop/web/logs", "", Some("application/json")).await;
    assert!(lines.body.lines().all(|line| serde_json::from_str::<Value>(line).is_ok()));

    let removed = ask("DELETE", "/api/v1/services/shop/web", "").await;
    assert_eq!(removed.status, 200, "{}", removed.body);
    node.until("it is gone", |state| state.services.is_empty()).await;
    assert_eq!(ask("GET", "/api/v1/services/shop/web", "").await.status, 404);
    node.stop().await;
}

#[tokio::test]
async fn services_that_are_picked_are_deployed_and_no_others() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    let token = node.token();
    let project: String =
        ["api", "web", "job"].map(|name| format!("[[service]]\nname = \"{name}\"\nimage = \"a:1\"\n")).concat();
    let put =
        async |query: &str| http(&node, Some(&token), "PUT", &format!("/api/v1/projects/shop{query}"), &project).await;
    let services = |answer: &Value| -> Vec<String> {
        answer["outcome"]["services"].as_object().unwrap().keys().cloned().collect()
    };
    let planned = put("?only=web&dry_run=true").await.json();
    assert_eq!(services(&planned), ["shop/web"], "{planned:#}");
    let deployed = put("?only=api,web").await.json();
    assert_eq!(services(&deployed), ["shop/api", "shop/web"], "{deployed:#}");
    assert!(deployed["outcome"]["unlisted"].is_null(), "{deployed:#}");
    assert_eq!(node.handle.state().borrow().services.len(), 2);
    for (query, status, says) in [
        ("?only=nothere", 404, "has no service nothere"),
        ("?only=", 400, "`only`"),
        ("?only=web&prune=true", 400, "leave out one"),
        ("?onyl=web", 400, "onyl"),
    ] {
        let refused = put(query).await;
        assert!(
            refused.status == status && refused.body.contains(says),
            "{query}: {} {}",
            refused.status,
            refused.body
        );
    }
    let last = "[[service]]\nname = \"job\"\nimage = \"a:1\"\n";
    let last = http(&node, Some(&token), "PUT", "/api/v1/projects/shop", last).await.json();
    assert_eq!(last["outcome"]["unlisted"], serde_json::json!(["shop/api", "shop/web"]), "{last:#}");
    node.stop().await;
}

#[tokio::test]
async fn every_mistake_of_a_file_is_in_the_answer() {
    let node = Node::found().await;
    let token = node.token();
    let file = "[[service]]\nname = \"web\"\nimage = \"web:1\"\nreplcas = 2\nport = \"x\"\n";
    let answered = http(&node, Some(&token), "PUT", "/api/v1/projects/shop", file).await;
    assert_eq!(answered.status, 400);
    let problem = answered.json();
    assert_eq!(problem["errors"].as_array().unwrap().len(), 2, "{problem:#}");
    assert_eq!(problem["errors"][0]["line"], 4);
    let large = "#".repeat(5 << 20);
    assert_eq!(http(&node, Some(&token), "PUT", "/api/v1/projects/shop", &large).await.status, 413);
    let other = format!("project = \"blog\"\n{}", web("web:1"));
    assert_eq!(http(&node, Some(&token), "PUT", "/api/v1/projects/shop", &other).await.status, 400);
    node.stop().await;
}

#[tokio::test]
async fn what_the_cluster_refuses_of_a_file_is_in_the_answer_with_its_place() {
    let node = Node::found().await;
    let shop = format!("{}domain = \"*.a.test\"\n", web("web:1"));
    let deployed = node.admin().await.deploy(&shop).await;
    assert!(matches!(deployed, Response::Deployed { .. }), "{deployed:?}");
    let (asker, token) = node.user(Role::Deployer, Some("blog")).await;
    let ask = async |path: &str, body: &str, media: Option<&str>| {
        http_with(&node, Some(&token), "PUT", path, body, media).await
    };
    let blog = format!("project = \"blog\"\n{}domain = \"www.a.test\"\n", web("web:1"));

    // One thing that does not fit is as good as several.
    let Response::Refused(refused) = asker.deploy(&blog).await else { panic!("it was accepted") };
    assert!(matches!(refused.unfit[..], [Refusal::HostTaken { .. }]), "{refused:?}");
    let places = |problem: &Value| -> Vec<(u64, u64, String)> {
        let errors = problem["errors"].as_array().into_iter().flatten();
        let place = |error: &Value, key: &str| error[key].as_u64().unwrap();
        let text = |error: &Value| error["message"].as_str().unwrap().to_owned();
        errors.map(|error| (place(error, "line"), place(error, "column"), text(error))).collect()
    };
    let taken = "`www.a.test` belongs to `shop/web`, a service of another project, which has `*.a.test`".to_owned();
    for path in ["/api/v1/projects/blog", "/api/v1/projects/blog?dry_run=true"] {
        let answered = ask(path, &blog, None).await;
        let problem = answered.json();
        assert_eq!((answered.status, &problem["detail"]), (400, &refused.message.clone().into()), "{path}");
        assert_eq!(places(&problem), [(7, 10, taken.clone())], "{path}: {problem:#}");
    }
    // A word that is not known may be one that was meant to hold it back.
    for path in ["/api/v1/projects/blog?dry-run=true", "/api/v1/projects/blog?if-generation=1"] {
        let answered = ask(path, &web("web:1"), None).await;
        assert_eq!(answered.status, 400, "{}", answered.body);
        assert!(answered.body.contains("unknown field `"), "{}", answered.body);
    }
    let several =
        ask("/api/v1/projects/blog", &format!("{blog}env = {{ A = \"${{secrets.A}}\" }}\n"), None).await.json();
    let missing = "`web` needs secret A, which is not set".to_owned();
    assert_eq!(places(&several), [(7, 10, taken), (8, 13, missing)], "{several:#}");

    // A specification has no lines.
    let sent = serde_json::to_string(&written(&blog).project).unwrap();
    let problem = ask("/api/v1/projects/blog", &sent, Some("application/json")).await.json();
    assert_eq!((&problem["detail"], places(&problem).len()), (&refused.message.into(), 0), "{problem:#}");
    node.stop().await;
}

#[tokio::test]
async fn a_browser_that_was_led_here_learns_nothing() {
    let node = Node::found().await;
    let status = async |headers: &str| {
        let mut socket = TcpStream::connect(node.handle.http_address()).await.unwrap();
        let request = format!("GET /api/v1/health HTTP/1.1\r\n{headers}connection: close\r\n\r\n");
        socket.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, socket.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer.split(' ').nth(1).unwrap().to_owned()
    };
    assert_eq!(status("host: 127.0.0.1:6880\r\n").await, "200");
    for headers in ["host: rebound.example:6880\r\n", "host: localhost\r\norigin: http://page.example\r\n", ""] {
        assert_eq!(status(headers).await, "421", "{headers}");
    }
    node.stop().await;
}

#[tokio::test]
async fn health_and_metrics_tell_what_is() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    assert_eq!(http(&node, None, "GET", "/api/v1/health", "").await.status, 200);
    node.admin().await.deploy(&web("web:1")).await;
    node.settled("shop/web").await;
    let (asker, token) = node.user(Role::Viewer, None).await;
    // Both look at the overview, and this one waits for it.
    asker.ask(Request::Status { service: None }).await;
    let metrics = http(&node, Some(&token), "GET", "/metrics", "").await.body;
    for line in [
        "orca_replicas_wanted{project=\"shop\",service=\"web\"} 2",
        "orca_replicas_ready{project=\"shop\",service=\"web\"} 2",
        "orca_requests_total{project=\"shop\",service=\"web\",status=\"2xx\"} 0",
        "orca_request_duration_seconds_bucket{project=\"shop\",service=\"web\",le=\"+Inf\"} 0",
        "orca_agents_connected 1",
        "orca_raft_is_leader 1",
    ] {
        assert!(metrics.lines().any(|found| found == line), "{line} is not in\n{metrics}");
    }
    node.stop().await;
}

/// What about a value is not as its schema says, and where.
fn misfit(document: &Value, schema: &Value, value: &Value, at: &str) -> Option<String> {
    if let Some(reference) = schema["$ref"].as_str() {
        let named = document.pointer(reference.strip_prefix('#').unwrap());
        return misfit(document, named.unwrap_or_else(|| panic!("{reference} is not there")), value, at);
    }
    if let Some(alternatives) = schema["oneOf"].as_array() {
        let faults: Vec<_> = alternatives.iter().map(|one| misfit(document, one, value, at)).collect();
        let fits = faults.iter().any(Option::is_none);
        return (!fits).then(|| faults.into_iter().flatten().collect::<Vec<_>>().join(" or "));
    }
    let wanted = |what: &str| Some(format!("{at} is {value}, not {what}"));
    match schema["type"].as_str() {
        None => None,
        Some("object") => {
            let Some(fields) = value.as_object() else { return wanted("an object") };
            if let Some(any) = schema.get("additionalProperties") {
                return fields.iter().find_map(|(name, value)| misfit(document, any, value, &format!("{at}.{name}")));
            }
            let known = schema["properties"].as_object().unwrap();
            let mut required = schema["required"].as_array().into_iter().flatten();
            if let Some(absent) = required.find(|name| !fields.contains_key(name.as_str().unwrap())) {
                return Some(format!("{at} has no {absent}"));
            }
            fields.iter().find_map(|(name, value)| match known.get(name) {
                Some(schema) => misfit(document, schema, value, &format!("{at}.{name}")),
                None => Some(format!("{at} has a {name}, which is not in the document")),
            })
        }
        Some("array") => {
            let Some(items) = value.as_array() else { return wanted("a list") };
            items.iter().find_map(|item| misfit(document, &schema["items"], item, &format!("{at}[]")))
        }
        Some("string") => match schema["enum"].as_array() {
            Some(words) if !words.contains(value) => wanted(&schema["enum"].to_string()),
            _ if !value.is_string() => wanted("a text"),
            _ => None,
        },
        Some("integer") if !value.is_i64() && !value.is_u64() => wanted("a whole number"),
        Some("boolean") if !value.is_boolean() => wanted("a truth value"),
        Some("null") if !value.is_null() => wanted("null"),
        Some("integer" | "boolean" | "null") => None,
        Some(other) => panic!("{at}: a schema of type {other}"),
    }
}

#[tokio::test]
async fn every_answer_is_as_the_document_says() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    let token = node.token();
    let document = http(&node, None, "GET", "/api/v1/openapi.json", "").await.json();
    let fits = async |method: &str, path: &str, template: &str, body: &str| {
        let is_file = template.ends_with("/projects/{project}");
        let media = (!is_file).then_some("application/json");
        let answered = http_with(&node, Some(&token), method, path, body, media).await;
        let operation = &document["paths"][template][method.to_lowercase()];
        if let Some(sent) = operation.pointer("/requestBody/content/application~1json/schema")
            && let Ok(body) = serde_json::from_str(body)
        {
            assert_eq!(misfit(&document, sent, &body, "what is sent"), None, "{method} {path}");
        }
        let status = if answered.status == 200 { "200" } else { "default" };
        let content = operation["responses"][status]["content"].as_object().unwrap_or_else(|| panic!("{template}"));
        let (media, content) = content.iter().next().unwrap();
        let values: Vec<Value> = match media.as_str() {
            "application/x-ndjson" => answered.body.lines().map(|line| serde_json::from_str(line).unwrap()).collect(),
            "text/plain; charset=utf-8" => vec![Value::String(answered.body.clone())],
            _ => vec![answered.json()],
        };
        for value in values {
            assert_eq!(misfit(&document, &content["schema"], &value, "it"), None, "{method} {path}: {value:#}");
        }
        answered.status
    };
    let service = "/api/v1/services/{project}/{service}";
    let project = "/api/v1/projects/{project}";
    let secret = "/api/v1/projects/{project}/secrets/{name}";
    let broken = "[[service]]\nname = \"web\"\nprot = 1\n";
    for (status, method, path, template, body) in [
        (200, "PUT", "/api/v1/projects/shop", project, web("web:1").as_str()),
        (200, "PUT", "/api/v1/projects/shop", project, &web("web:1")),
        (200, "PUT", "/api/v1/projects/shop/secrets/KEY", secret, "value"),
        (200, "POST", "/api/v1/data-keys?project=shop", "/api/v1/data-keys", ""),
        (400, "PUT", "/api/v1/projects/shop", project, broken),
        (404, "GET", "/api/v1/services/shop/other", service, ""),
        (200, "POST", "/api/v1/tokens", "/api/v1/tokens", "{\"name\":\"ci\",\"role\":\"viewer\"}"),
        (
            200,
            "POST",
            "/api/v1/modules/missing",
            "/api/v1/modules/missing",
            &format!("{{\"digests\":[\"{}\"]}}", "0".repeat(64)),
        ),
    ] {
        assert_eq!(fits(method, path, template, body).await, status, "{method} {path}");
    }
    node.settled("shop/web").await;
    for (method, path, template, body) in [
        ("POST", "/api/v1/services/shop/web/scale", "/api/v1/services/{project}/{service}/scale", "{\"replicas\":3}"),
        ("PUT", "/api/v1/projects/shop", project, &web("web:2")),
    ] {
        assert_eq!(fits(method, path, template, body).await, 200, "{method} {path}");
        node.settled("shop/web").await;
    }
    let mut count = 0;
    for (template, item) in document["paths"].as_object().unwrap() {
        // That one has no end.
        if item.get("get").is_none() || template.ends_with("/progress") || template.ends_with("openapi.json") {
            continue;
        }
        let path = template.replace("{project}/{service}", "shop/web");
        assert_eq!(fits("GET", &path, template, "").await, 200, "{path}");
        count += 1;
    }
    assert!(count >= 12, "{count} routes");
    for (path, template) in [("/api/v1/services/shop/web", service), ("/api/v1/projects/shop/secrets/KEY", secret)] {
        assert_eq!(fits("DELETE", path, template, "").await, 200, "{path}");
    }
    node.stop().await;
}

#[tokio::test]
async fn the_document_says_of_every_body_what_is_in_it() {
    let node = Node::found().await;
    let document = http(&node, None, "GET", "/api/v1/openapi.json", "").await.json();
    for (path, item) in document["paths"].as_object().unwrap() {
        for (method, operation) in item.as_object().unwrap() {
            let bodies = operation["requestBody"]["content"].as_object().into_iter().flatten();
            let answers = operation["responses"].as_object().unwrap().values();
            let answers = answers.flat_map(|answer| answer["content"].as_object().into_iter().flatten());
            for (media, content) in bodies.chain(answers) {
                assert!(content["schema"].is_object(), "{method} {path}: {media}");
            }
        }
    }
    node.stop().await;
}
