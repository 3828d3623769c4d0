//! From a deploy to a settled service.

use orca_cluster::command::put::ServiceOutcome;
use orca_cluster::event::Event;
use orca_cluster::id::{Revision, ServiceName};
use orca_cluster::status::ServiceState;
use orca_wire::message::agent::{ExecOutput, LogLine};
use orca_wire::message::client::{EventsQuery, Exec, LogsQuery, Progress, Reason, Request, Response};
use tokio::time::timeout;

use crate::support::{Answered, Node, PATIENCE, http_cut_or_whole, web, written};

fn name() -> ServiceName {
    "shop/web".parse().unwrap()
}

fn outcome(response: Response) -> ServiceOutcome {
    match response {
        Response::Deployed { outcome, .. } => outcome.services.get(&name()).unwrap().clone(),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_deploy_reaches_the_node_settles_and_is_nothing_the_second_time() {
    let node = Node::found().await;
    let mut agent = node.agent().await;
    let admin = node.admin().await;
    let first = outcome(admin.deploy(&web("web:1")).await);
    assert_eq!(first, ServiceOutcome::Created { revision: Revision(1), replicas: 2 });
    let goal = agent.until("two replicas", |goal| goal.replicas.len() == 2).await;
    assert!(goal.replicas.values().all(|replica| replica.service == name()));
    node.settled("shop/web").await;

    let second = outcome(admin.deploy(&web("web:1")).await);
    assert_eq!(second, ServiceOutcome::Unchanged { revision: Revision(1), rolling_out: false, proven: true });

    let third = outcome(admin.deploy(&web("web:2")).await);
    assert!(matches!(third, ServiceOutcome::Changed { replaces: true, .. }), "{third:?}");
    let state = node.settled("shop/web").await;
    assert_eq!(state.services[&name()].settled, Some(Revision(2)));
    agent
        .until("only new replicas", |goal| {
            goal.replicas.len() == 2 && goal.replicas.values().all(|replica| replica.revision == Revision(2))
        })
        .await;
    let Response::History { revisions, receipts, .. } = admin.ask(Request::History { service: name() }).await else {
        panic!("no history");
    };
    assert_eq!((revisions.len(), receipts.len()), (2, 2));
    assert_eq!(revisions[1].by, "admin");
    node.stop().await;
}

#[tokio::test]
async fn a_plan_says_the_same_and_does_nothing() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    let admin = node.admin().await;
    let Response::Planned { outcome, generation } = admin.ask(Request::Plan(written(&web("web:1")))).await else {
        panic!("no plan");
    };
    assert_eq!(outcome.services[&name()], ServiceOutcome::Created { revision: Revision(1), replicas: 2 });
    assert!(node.handle.state().borrow().services.is_empty());
    let mut deploy = written(&web("web:1"));
    deploy.if_generation = Some(orca_cluster::id::Generation(generation.0 - 1));
    let Response::Refused(refused) = admin.ask(Request::Deploy(deploy)).await else { panic!("done") };
    assert_eq!(refused.reason, Reason::Conflict);
    node.stop().await;
}

#[tokio::test]
async fn of_two_deploys_at_once_one_is_a_conflict() {
    let node = Node::found().await;
    let admin = node.admin().await;
    // Without an agent neither rollout can end, so that the second finds the first.
    let (web_1, web_2) = (web("web:1"), web("web:2"));
    let (one, two) = tokio::join!(admin.deploy(&web_1), admin.deploy(&web_2));
    let conflicts = [&one, &two].map(|response| match response {
        Response::Refused(refused) => {
            assert_eq!(refused.reason, Reason::Conflict, "{refused:?}");
            1
        }
        Response::Deployed { .. } => 0,
        other => panic!("{other:?}"),
    });
    assert_eq!(conflicts.iter().sum::<i32>(), 1);
    node.stop().await;
}

#[tokio::test]
async fn a_watch_tells_each_change_until_the_service_runs() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    let admin = node.admin().await;
    admin.deploy(&web("web:1")).await;
    let mut stream = admin.open(Request::Watch { services: vec![name()] }).await;
    let mut events: Vec<Event> = Vec::new();
    loop {
        let progress: Progress = timeout(PATIENCE, stream.next()).await.unwrap().unwrap().unwrap();
        events.extend(progress.events);
        if progress.services[0].state == ServiceState::Running {
            break;
        }
    }
    let indexes: Vec<_> = events.iter().map(|event| event.index).collect();
    assert!(indexes.is_sorted() && indexes.len() > 3, "{events:?}");
    node.stop().await;
}

#[tokio::test]
async fn what_is_not_there_is_said_not_to_be() {
    let node = Node::found().await;
    let admin = node.admin().await;
    for request in [
        Request::Stop { service: name() },
        Request::Why { service: name() },
        Request::History { service: name() },
        Request::Status { service: Some(name()) },
        Request::RemoveSecret { name: "NONE".parse().unwrap() },
        Request::RevokeToken { id: "abcdefgh".parse().unwrap() },
    ] {
        let Response::Refused(refused) = admin.ask(request.clone()).await else { panic!("{request:?} was done") };
        assert_eq!(refused.reason, Reason::NotFound, "{request:?}");
        assert!(refused.hint.is_some(), "{request:?}");
    }
    let missing = "[[service]]\nname = \"web\"\nimage = \"web:1\"\n[service.env]\nA = \"${secrets.A}\"\n";
    let Response::Refused(refused) = admin.deploy(missing).await else { panic!("deployed") };
    assert_eq!(refused.reason, Reason::Invalid);
    assert!(refused.message.contains("orca secrets set A --project shop"), "{}", refused.message);
    node.stop().await;
}

#[tokio::test]
async fn a_module_is_deployed_when_its_bytes_are_here_and_given_to_the_node() {
    use orca_wire::message::agent::{AgentRequest, Blob};
    let node = Node::found().await;
    let mut agent = node.agent().await;
    let admin = node.admin().await;
    let bytes = b"\0asm not really".repeat(10_000);
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &bytes);
    let digest: String = digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    let mut deploy = written("[[service]]\nname = \"web\"\nmodule = \"./web.wasm\"\n");
    for service in deploy.project.services.values_mut() {
        let orca_cluster::spec::Source::Module(module) = &mut service.source else { panic!("no module") };
        module.digest = Some(digest.clone());
    }
    let Response::Refused(refused) = admin.ask(Request::Deploy(deploy.clone())).await else { panic!("deployed") };
    assert!(refused.message.contains("./web.wasm"), "{}", refused.message);

    let upload = async |size: u64, bytes: &[u8]| {
        let mut stream = admin.open(Request::PutModule { digest: digest.clone(), size }).await;
        stream.send_bytes(bytes).await.unwrap();
        stream.finish().await.unwrap();
        stream.next_within::<Response>(PATIENCE).await.unwrap()
    };
    let size = bytes.len() as u64;
    let short = upload(size, &bytes[1..]).await;
    assert!(matches!(&short, Response::Refused(refused) if refused.reason == Reason::Invalid), "{short:?}");
    let mut other = bytes.clone();
    other[9] ^= 1;
    let wrong = upload(size, &other).await;
    assert!(matches!(&wrong, Response::Refused(refused) if refused.message.contains("digest")), "{wrong:?}");
    let Response::MissingModules { digests } =
        admin.ask(Request::MissingModules { digests: vec![digest.clone()] }).await
    else {
        panic!("no answer");
    };
    assert_eq!(digests.join(","), digest);
    assert!(matches!(upload(size, &bytes).await, Response::Done { .. }));

    assert!(matches!(admin.ask(Request::Deploy(deploy)).await, Response::Deployed { .. }));
    agent.until("the module", |goal| goal.replicas.len() == 1).await;
    let identity = orca_wire::identity::Identity::load(
        &orca_control::Layout::new(&node.data()).node(),
        None,
        crate::support::now(),
    );
    let endpoint = orca_wire::Endpoint::client(orca_wire::Access::Certificate(identity.unwrap())).unwrap();
    let connection =
        endpoint.dial(node.handle.quic_address(), orca_wire::Plane::Agent, orca_wire::Wanted::Anyone).await.unwrap();
    let mut stream = connection.open(&AgentRequest::Module { digest }).await.unwrap();
    assert!(matches!(stream.next_within::<Blob>(PATIENCE).await.unwrap(), Blob::Here { size: here } if here == size));
    let mut got = Vec::new();
    while let Some(part) = stream.next_bytes().await.unwrap() {
        got.extend_from_slice(&part);
    }
    assert_eq!(got, bytes);
    node.stop().await;
}

#[tokio::test]
async fn logs_of_all_replicas_are_interleaved_by_time() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    let admin = node.admin().await;
    admin.deploy(&web("web:1")).await;
    node.settled("shop/web").await;
    let read = async |tail: Option<u32>, grep: Option<&str>| {
        let grep = grep.map(str::to_owned);
        let query = LogsQuery { service: name(), replica: None, since: None, tail, follow: false, grep };
        let mut stream = admin.open(Request::Logs(query)).await;
        let mut lines = Vec::new();
        while let Some(line) = stream.next::<LogLine>().await.unwrap() {
            lines.push(line);
        }
        lines
    };
    let all = read(None, None).await;
    assert_eq!(all.len(), 6);
    assert!(all.is_sorted_by_key(|line| line.at), "{all:?}");
    let last = read(Some(3), None).await;
    assert_eq!(last, all[3..]);
    let found = read(Some(1), Some("line 1")).await;
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].text, "line 1");

    let query = LogsQuery { service: name(), replica: None, since: None, tail: None, follow: true, grep: None };
    let mut stream = admin.open(Request::Logs(query)).await;
    for _ in 0..6 {
        timeout(PATIENCE, stream.next::<LogLine>()).await.unwrap().unwrap().unwrap();
    }
    node.stop().await;
}

#[tokio::test]
async fn a_log_that_breaks_off_is_no_log_that_ends() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    let admin = node.admin().await;
    admin.deploy(&web("web:1").replace("\"web\"", "\"cut\"")).await;
    let state = node.settled("shop/cut").await;
    let service: ServiceName = "shop/cut".parse().unwrap();
    let (whole, broken): (Vec<_>, Vec<_>) =
        state.placements_of(&service).map(|(id, _)| id).partition(|id| id.0 % 2 == 0);
    for tail in [None, Some(100)] {
        let query = LogsQuery { service: service.clone(), replica: None, since: None, tail, follow: false, grep: None };
        let mut stream = admin.open(Request::Logs(query)).await;
        let mut said: Vec<serde_json::Value> = Vec::new();
        while let Some(one) = stream.next().await.unwrap() {
            said.push(one);
        }
        let refused = said.pop().unwrap()["refused"].take();
        let message = refused["message"].as_str().unwrap_or_else(|| panic!("{refused}"));
        assert_eq!(refused["reason"], "failed");
        assert!(message.starts_with(&format!("the log of {} on n", broken[0])), "{message}");
        let of_whole = said.iter().filter(|line| line["replica"] == whole[0].0).count();
        assert_eq!(of_whole, 3, "{said:?}");
    }

    let token = node.token();
    for media in [None, Some("application/json")] {
        let path = "/api/v1/services/shop/cut/logs";
        let (Answered { body, .. }, is_whole) = http_cut_or_whole(&node, Some(&token), "GET", path, "", media).await;
        let last = body.lines().last().unwrap_or_default();
        assert!(last.contains(&format!("the log of {} on n", broken[0])), "{body}");
        assert_eq!(last.starts_with("{\"refused\""), media.is_some(), "{body}");
        assert!(!is_whole, "a program takes it for whole: {body}");
    }
    node.stop().await;
}

#[tokio::test]
async fn what_keeps_a_log_from_being_read_is_told_also_to_who_follows_it() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    let admin = node.admin().await;
    admin.deploy(&web("web:1").replace("\"web\"", "\"torn\"")).await;
    node.settled("shop/torn").await;
    let service: ServiceName = "shop/torn".parse().unwrap();
    let query = |follow| {
        let grep = Some("line 2".to_owned());
        Request::Logs(LogsQuery { service: service.clone(), replica: None, since: None, tail: None, follow, grep })
    };
    let mut stream = admin.open(query(false)).await;
    let mut said: Vec<serde_json::Value> = Vec::new();
    while let Some(one) = stream.next().await.unwrap() {
        said.push(one);
    }
    assert_eq!(said.len(), 3, "{said:?}");
    let message = said[2]["refused"]["message"].as_str().unwrap_or_else(|| panic!("{said:?}"));
    assert!(message.ends_with("could not be read to its end: too many open files"), "{message}");

    let mut stream = admin.open(query(true)).await;
    let told = async {
        loop {
            let line = stream.next::<LogLine>().await.unwrap().unwrap();
            if line.text.starts_with("orca: the log of") {
                return line.text;
            }
        }
    };
    let told = timeout(PATIENCE, told).await.expect("nothing is said of why there are no lines");
    assert!(told.ends_with("too many open files; it is tried again"), "{told}");
    node.stop().await;
}

#[tokio::test]
async fn a_command_in_a_replica_is_bridged_and_leaves_an_event() {
    let node = Node::found().await;
    let _agent = node.agent().await;
    let admin = node.admin().await;
    admin.deploy(&web("web:1")).await;
    node.settled("shop/web").await;
    let command = vec!["echo".to_owned(), "hello".to_owned()];
    let exec = Exec { service: name(), replica: None, command, terminal: None, stdin: false };
    let mut stream = admin.open(Request::Exec(exec)).await;
    let printed: ExecOutput = stream.next_within(PATIENCE).await.unwrap();
    assert!(matches!(&printed, ExecOutput::Stdout(bytes) if bytes.0 == b"echo hello"), "{printed:?}");
    let end: ExecOutput = stream.next_within(PATIENCE).await.unwrap();
    assert!(matches!(end, ExecOutput::Exit { code: 3 }), "{end:?}");
    let query = EventsQuery { service: Some(name()), project: None, since: None, last: Some(1), follow: false };
    let mut events = admin.open(Request::Events(query)).await;
    let event: Event = events.next_within(PATIENCE).await.unwrap();
    assert!(event.text.ends_with(": echo") && !event.text.contains("hello") && event.source.is_some(), "{event:?}");
    node.stop().await;
}
