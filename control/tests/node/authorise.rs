//! Who gets in, and what they may do, over both ways in. The whole table is beside `authorise`; here it is that
//! everything asks it.

use orca_cluster::event::Kind;
use orca_cluster::id::ServiceName;
use orca_cluster::spec::Settings;
use orca_cluster::state::Role;
use orca_wire::Access;
use orca_wire::identity::Token;
use orca_wire::message::client::{CreateToken, Deploy, Exec, Reason, Request, Response, SetSecret};

use crate::support::{Asker, Node, http, web, written};

fn service() -> ServiceName {
    "shop/web".parse().unwrap()
}

/// Each with the least role that may, and its HTTP form.
fn requests() -> Vec<(Role, Request, (&'static str, &'static str, &'static str))> {
    let secret = || SetSecret { name: "shop/A".parse().unwrap(), value: "a".to_owned() };
    let token = || CreateToken { name: "x".to_owned(), role: Role::Viewer, project: None, expires: None };
    vec![
        (Role::Viewer, Request::Whoami, ("GET", "/api/v1/whoami", "")),
        (Role::Viewer, Request::Status { service: None }, ("GET", "/api/v1/status", "")),
        (Role::Viewer, Request::Why { service: service() }, ("GET", "/api/v1/services/shop/web/why", "")),
        (Role::Viewer, Request::History { service: service() }, ("GET", "/api/v1/services/shop/web/history", "")),
        (Role::Viewer, Request::Nodes, ("GET", "/api/v1/nodes", "")),
        (Role::Viewer, Request::Doctor, ("GET", "/api/v1/doctor", "")),
        (
            Role::Viewer,
            Request::Plan(written(&web("web:1"))),
            ("PUT", "/api/v1/projects/shop?dry_run=true", "[[service]]\nname = \"web\"\nimage = \"web:1\"\n"),
        ),
        (
            Role::Deployer,
            Request::Deploy(written(&web("web:1"))),
            (
                "PUT",
                "/api/v1/projects/shop",
                "[[service]]\nname = \"web\"\nimage = \"web:1\"\nport = 80\nreplicas = 2\n",
            ),
        ),
        (Role::Deployer, Request::Stop { service: service() }, ("POST", "/api/v1/services/shop/web/stop", "")),
        (Role::Deployer, Request::Start { service: service() }, ("POST", "/api/v1/services/shop/web/start", "")),
        (
            Role::Deployer,
            Request::Scale { service: service(), replicas: 2 },
            ("POST", "/api/v1/services/shop/web/scale", "{\"replicas\":2}"),
        ),
        (
            Role::Deployer,
            Request::MissingModules { digests: vec![] },
            ("POST", "/api/v1/modules/missing", "{\"digests\":[]}"),
        ),
        (
            Role::Deployer,
            Request::SetSecrets { secrets: vec![secret()] },
            ("PUT", "/api/v1/projects/shop/secrets/A", "a"),
        ),
        (Role::Deployer, Request::ListSecrets { project: None }, ("GET", "/api/v1/secrets", "")),
        (Role::Deployer, Request::RotateSecrets { project: None }, ("POST", "/api/v1/data-keys", "")),
        (Role::Viewer, Request::PlanSettings(Settings::default()), ("PUT", "/api/v1/settings?dry_run=true", "")),
        (Role::Admin, Request::SetSettings(Settings::default()), ("PUT", "/api/v1/settings", "")),
        (
            Role::Admin,
            Request::CreateToken(token()),
            ("POST", "/api/v1/tokens", "{\"name\":\"x\",\"role\":\"viewer\",\"project\":null,\"expires\":null}"),
        ),
        (Role::Admin, Request::ListTokens, ("GET", "/api/v1/tokens", "")),
    ]
}

#[tokio::test]
async fn every_request_asks_whether_it_may() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    node.admin().await.deploy(&web("web:1")).await;
    node.settled("shop/web").await;
    for role in [Role::Viewer, Role::Deployer, Role::Admin] {
        let (asker, token) = node.user(role, None).await;
        for (least, request, (method, path, body)) in requests() {
            let may = role >= least;
            let answer = asker.ask(request.clone()).await;
            match &answer {
                Response::Refused(refused) => {
                    assert!(!may && refused.reason == Reason::Unauthorised, "{role:?} {request:?}: {refused:?}");
                }
                _ => assert!(may, "{role:?} {request:?}: {answer:?}"),
            }
            let answered = http(&node, Some(&token), method, path, body).await;
            let expected = if may { 200 } else { 403 };
            assert_eq!(answered.status, expected, "{role:?} {method} {path}: {}", answered.body);
        }
    }
    let state = node.handle.state().borrow().clone();
    let refused: Vec<_> = state.events.iter().filter(|event| event.kind == Kind::Refused).collect();
    assert!(!refused.is_empty() && refused.len() <= 10, "announced, and not too often: {refused:?}");
    assert!(refused.iter().all(|event| event.source.is_some()));
    node.stop().await;
}

#[tokio::test]
async fn a_token_of_one_project_sees_and_touches_nothing_else() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    let admin = node.admin().await;
    admin.deploy(&web("web:1")).await;
    admin.deploy("project = \"blog\"\n[[service]]\nname = \"web\"\nimage = \"blog:1\"\n").await;
    let (asker, token) = node.user(Role::Admin, Some("blog")).await;
    let Response::Status(status) = asker.ask(Request::Status { service: None }).await else { panic!("no status") };
    let names: Vec<_> = status.services.iter().map(|service| service.name.to_string()).collect();
    assert_eq!(names, ["blog/web"]);
    for request in [
        Request::Why { service: service() },
        Request::Stop { service: service() },
        Request::Deploy(written(&web("web:2"))),
        Request::SetSecrets { secrets: vec![SetSecret { name: "A".parse().unwrap(), value: "a".to_owned() }] },
        Request::ListSecrets { project: Some("shop".parse().unwrap()) },
        Request::CreateToken(CreateToken { name: "x".to_owned(), role: Role::Admin, project: None, expires: None }),
        Request::SetSettings(Settings::default()),
    ] {
        let answer = asker.ask(request.clone()).await;
        let refused = matches!(&answer, Response::Refused(refused) if refused.reason == Reason::Unauthorised);
        assert!(refused, "{request:?}: {answer:?}");
    }
    let events = http(&node, Some(&token), "GET", "/api/v1/events", "").await;
    assert!(events.body.contains("blog/web") && !events.body.contains("shop"), "{}", events.body);
    let Response::Tokens { tokens } = asker.ask(Request::ListTokens).await else { panic!("no tokens") };
    assert_eq!(tokens.len(), 1);
    node.stop().await;
}

#[tokio::test]
async fn nobody_reaches_into_the_host_but_an_admin_where_it_is_allowed() {
    let host =
        "[[service]]\nname = \"web\"\nimage = \"web:1\"\n[[service.volume]]\nhost = \"/srv/data\"\npath = \"/data\"\n";
    let node = Node::found().await;
    let admin = node.admin().await;
    let (deployer, _) = node.user(Role::Deployer, None).await;
    let refused = |answer: Response| match answer {
        Response::Refused(refused) => {
            assert_eq!(refused.reason, Reason::Unauthorised, "{refused:?}");
            refused
        }
        other => panic!("{other:?}"),
    };
    refused(deployer.deploy(host).await);
    let hint = refused(admin.deploy(host).await).hint.unwrap();
    assert!(hint.contains("/srv/data") && hint.contains("allow_host"), "{hint}");
    for (allowed, may) in [("/srv/dat", false), ("/srv", true)] {
        let settings = Settings { allow_host: [allowed.to_owned().into()].into(), ..Settings::default() };
        admin.ask(Request::SetSettings(settings)).await;
        refused(deployer.deploy(host).await);
        let answer = admin.deploy(host).await;
        assert_eq!(matches!(answer, Response::Deployed { .. }), may, "{allowed}: {answer:?}");
    }
    // With the settings as they are beside its files, a deployer deploys as without them; changes are not its to make.
    let beside = |allowed: &str| {
        let settings = Settings { allow_host: [allowed.to_owned().into()].into(), ..Settings::default() };
        Deploy { settings: Some(settings), ..written(&web("web:1").replace("\"web\"", "\"plain\"")) }
    };
    let answer = deployer.ask(Request::Deploy(beside("/srv"))).await;
    assert!(matches!(answer, Response::Deployed { .. }), "{answer:?}");
    for request in [Request::Plan(beside("/")), Request::Plan(beside("/home")), Request::Deploy(beside("/home"))] {
        let told = refused(deployer.ask(request).await);
        assert!(told.message.starts_with("cluster.toml is not what is set (allow_host /"), "{told:?}");
    }
    // What the files allow counts for what is in them, when it is planned and when it is deployed.
    let home = |settings| Deploy { settings, ..written(&host.replace("/srv", "/home").replace("\"web\"", "\"home\"")) };
    refused(admin.ask(Request::Plan(home(None))).await);
    let planned = admin.ask(Request::Plan(home(beside("/home").settings))).await;
    assert!(matches!(&planned, Response::Planned { outcome, .. } if outcome.settings.len() == 2), "{planned:?}");
    let answer = admin.ask(Request::Deploy(home(beside("/home").settings))).await;
    assert!(matches!(answer, Response::Deployed { .. }), "{answer:?}");
    // What is there already, and does not change, may be among what a deployer deploys.
    let answer = deployer.deploy(host).await;
    assert!(matches!(answer, Response::Deployed { .. }), "{answer:?}");
    // But nobody else gets inside it, or chooses anew what its image's name means.
    let command = vec!["sh".to_owned()];
    let exec = Exec { service: service(), replica: None, command, terminal: None, stdin: false };
    for request in [Request::Exec(exec), Request::Redeploy { service: service() }] {
        refused(deployer.ask(request.clone()).await);
        let answer = admin.ask(request).await;
        let allowed = matches!(&answer, Response::Refused(refused) if refused.reason == Reason::Conflict);
        assert!(allowed, "nothing runs there yet: {answer:?}");
    }
    node.stop().await;
}

#[tokio::test]
async fn a_revoked_token_ends_at_once_everywhere() {
    let node = Node::found().await;
    let (asker, token) = node.user(Role::Viewer, None).await;
    assert!(matches!(asker.ask(Request::Whoami).await, Response::Whoami { .. }));
    assert_eq!(http(&node, Some(&token), "GET", "/api/v1/whoami", "").await.status, 200);
    let revoked = node.admin().await.ask(Request::RevokeToken { id: token.id.clone() }).await;
    assert!(matches!(revoked, Response::Done { .. }), "{revoked:?}");
    let end = tokio::time::timeout(crate::support::PATIENCE, asker.connection.closed()).await.unwrap().to_string();
    assert!(end.contains("revoked"), "{end}");
    assert_eq!(http(&node, Some(&token), "GET", "/api/v1/whoami", "").await.status, 401);
    assert!(Asker::dial(&node, Access::Token(token)).await.is_err());
    let last = node.admin().await.ask(Request::RevokeToken { id: node.token().id }).await;
    assert!(matches!(&last, Response::Refused(refused) if refused.reason == Reason::Conflict), "{last:?}");
    node.stop().await;
}

#[tokio::test]
async fn a_wrong_token_learns_nothing_and_is_soon_not_listened_to() {
    let node = Node::found().await;
    let good = node.token();
    let mut wrong = Token::create(good.authority);
    let unknown = Asker::dial(&node, Access::Token(wrong.clone())).await.err().unwrap();
    wrong.id = good.id.clone();
    let known = Asker::dial(&node, Access::Token(wrong.clone())).await.err().unwrap();
    assert_eq!(unknown, known, "whether the token exists is not told");
    let mut last = 0;
    for _ in 0..20 {
        last = http(&node, Some(&wrong), "GET", "/api/v1/status", "").await.status;
    }
    assert_eq!(last, 429);
    assert_eq!(
        http(&node, Some(&good), "GET", "/api/v1/status", "").await.status,
        200,
        "a good token is, from anywhere"
    );
    // A certificate cannot be guessed, so that its holder is not shut out with those at the same address.
    assert!(matches!(node.admin().await.ask(Request::Whoami).await, Response::Whoami { .. }));
    let state = node.until("it was announced", |state| state.events.iter().any(|event| event.kind == Kind::Refused));
    let state = state.await;
    assert_eq!(state.events.iter().filter(|event| event.kind == Kind::Refused).count(), 1);
    node.stop().await;
}
