//! The HTTP API.

use orca_cluster::state::Role;
use orca_wire::message::client::Request;

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::support::{Node, PATIENCE, http, http_with, web};

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
    assert!(lines.body.lines().all(|line| serde_json::from_str::<serde_json::Value>(line).is_ok()));

    let removed = ask("DELETE", "/api/v1/services/shop/web", "").await;
    assert_eq!(removed.status, 200, "{}", removed.body);
    node.until("it is gone", |state| state.services.is_empty()).await;
    assert_eq!(ask("GET", "/api/v1/services/shop/web", "").await.status, 404);
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
