//! The command line and the HTTP API against a real server, as a person and a script see them.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::support::{
    Node, PATIENCE, Ran, Running, Setup, container, container_ids, docker, module, orca_binary, probe, request,
    requires_docker, signal, wait_for, wait_until,
};

/// An answer that there is no server must not take a person's patience.
const UNREACHABLE_MAX: Duration = Duration::from_secs(5);
/// From `orca up` to the first answer, compiling the component included.
const UP_MAX: Duration = Duration::from_secs(40);

#[test]
fn bad_files_are_refused_with_every_mistake_and_nothing_is_sent() {
    let mut node = Node::start();
    node.deploy(&probe("web", "")).succeeded();
    let before = node.json(&["status"])["generation"].clone();
    let bad = "[[service]]\nname = \"web\"\nimage = \"a:1\"\nreplcas = 3\n\n[[service]]\nname = \"Web\"\nimage = \"b\"\nmodule = \"c\"\n";
    let refused = node.deploy(bad).exited(2);
    eprintln!("{refused}");
    let refused =
        refused.says(&["nothing was sent", "replcas", "did you mean `replicas`", "^^^^", "service.toml:5", "`W`"]);
    let json = node.deploy_with(bad, &["--json"]).exited(2);
    let error: Value = serde_json::from_str(json.stderr.trim()).unwrap_or_else(|error| panic!("{error}: {json}"));
    assert_eq!((&error["schema"], &error["type"]), (&1.into(), &"error".into()));
    assert!(error["error"]["problems"].as_array().is_some_and(|problems| problems.len() >= 3), "{error}");
    assert_eq!(node.json(&["status"])["generation"], before);
    // Nor is a server needed to be told.
    node.terminate();
    let alone = node.deploy(bad).exited(2);
    assert_eq!(alone.stderr.lines().count(), refused.stderr.lines().count());
}

#[test]
fn settings_are_planned_and_deployed_with_the_services_beside_them() {
    let node = Node::start();
    let both = node.directory().join("both");
    std::fs::create_dir(&both).unwrap();
    let service = |more: &str| {
        let text = format!("project = \"{}\"\n{}", node.project(), probe("web", more));
        std::fs::write(both.join("service.toml"), text).unwrap();
    };
    std::fs::write(both.join("cluster.toml"), "[policy]\nallow_host = [\"/srv\"]\n").unwrap();
    let path = both.to_str().unwrap();
    let row = "~ cluster.toml";

    service("[service.env]\nA = \"${secrets.NOWHERE}\"\n");
    node.orca(&["deploy", "-f", path]).exited(2).says(&["needs secret NOWHERE"]);
    service("");
    for look in [&["plan", "-f", path][..], &["deploy", "--dry-run", "-f", path]] {
        let planned = node.orca(look).succeeded();
        assert!(planned.stdout.contains(row) && planned.stdout.contains("allow_host /srv added"), "{planned}");
    }
    let index = node.json(&["plan", "-f", path])["index"].to_string();
    node.orca(&["deploy", "-f", path, "--if-index", &index]).succeeded().says(&[row]);
    let again = node.orca(&["deploy", "-f", path]).succeeded();
    assert!(again.stdout.contains("Nothing to change"), "{again}");

    let alone = node.directory().join("cluster.toml");
    std::fs::write(&alone, "[policy]\nallow_host = []\n").unwrap();
    let alone = alone.to_str().unwrap();
    node.orca(&["plan", "--exit-code", "-f", alone]).exited(3);
    let set = node.orca(&["deploy", "-f", alone]).succeeded();
    assert!(set.stdout.contains("Settings of the cluster changed (index "), "{set}");
    let told = node.json_lines(&["deploy", "-f", alone]);
    assert_eq!(told.last().unwrap()["outcome"], "unchanged", "{told:?}");
}

#[test]
fn every_way_to_fail_has_its_exit_code() {
    let mut node = Node::start();
    let web = node.name("web");
    node.deploy(&probe("web", "[service.env]\nVERSION = \"1\"\n")).succeeded();
    let changed = node.write(&probe("web", "[service.env]\nVERSION = \"2\"\n"));
    let changed = changed.to_str().unwrap();

    node.orca(&["no-such-command"]).exited(2);
    node.orca(&["scale", &web, "many"]).exited(2);
    node.orca(&["plan", "--exit-code", "-f", changed]).exited(3);
    node.orca(&["plan", "-f", changed]).succeeded();
    assert_eq!(node.text("web", "/version"), "1", "a plan changes nothing");
    for arguments in [
        &["logs", "nothere"][..],
        &["why", "nothere"],
        &["exec", "nothere", "--", "x"],
        &["scale", "nothere", "2"],
        &["rm", "-y", "nothere"],
        &["history", "nothere"],
        &["deploy", "nothere", "-f", changed],
    ] {
        node.orca(arguments).exited(5).says(&["nothere"]);
    }
    node.orca(&["deploy", "-f", changed, "--if-index", "1"]).exited(6).says(&["1"]);
    node.orca(&["promote", &web]).exited(6);
    let index = node.json(&["plan", "-f", changed])["index"].to_string();
    node.orca(&["deploy", "-f", changed, "--if-index", &index]).succeeded();
    node.orca(&["plan", "--exit-code", "-f", changed]).succeeded();

    // Somebody else's token, one that was revoked, one that may only look, one of another project.
    let as_token = |token: &str, arguments: &[&str]| {
        let mut command = node.command();
        command.env("ORCA_TOKEN", token).env("ORCA_ADDRESS", node.control().to_string()).args(arguments);
        Running::start(command, b"").end()
    };
    as_token("orca1.nonsense", &["status"]).exited(4);
    let create = |arguments: &[&str]| {
        let created = node.json(&[&["token", "create"], arguments].concat());
        (created["id"].as_str().unwrap().to_owned(), created["token"].as_str().unwrap().to_owned())
    };
    let (_, viewer) = create(&["eyes", "--role", "viewer"]);
    as_token(&viewer, &["status"]).succeeded();
    as_token(&viewer, &["deploy", "-f", changed]).succeeded();
    let other = node.write(&probe("web", "[service.env]\nVERSION = \"3\"\n"));
    as_token(&viewer, &["deploy", "-f", other.to_str().unwrap()]).exited(4);
    as_token(&viewer, &["scale", &web, "2"]).exited(4);
    as_token(&viewer, &["token", "create", "x", "--role", "admin"]).exited(4);
    let (_, stranger) = create(&["elsewhere", "--role", "deployer", "--project", "elsewhere"]);
    as_token(&stranger, &["scale", &web, "2"]).exited(4);
    let (id, revoked) = create(&["gone", "--role", "admin"]);
    as_token(&revoked, &["status"]).succeeded();
    node.orca(&["token", "revoke", &id]).succeeded();
    as_token(&revoked, &["status"]).exited(4);
    assert_eq!(node.text("web", "/version"), "2");
    assert_eq!(node.status("web")["wanted"], 1);

    node.terminate();
    let down = node.orca(&["status"]).exited(10);
    eprintln!("{down}");
    assert!(down.took < UNREACHABLE_MAX, "{down}");
    down.says(&[&node.control().to_string(), "orca server"]);
    node.orca(&["deploy", "-f", changed]).exited(10);
    node.orca(&["--context", "nowhere", "status"]).exited(5);
    node.orca(&["version"]).succeeded();
}

#[test]
fn whoever_stops_waiting_is_told_that_it_goes_on() {
    requires_docker!();
    let node = Node::start();
    let slow = "[service.env]\nSTART_DELAY_MS = \"3000\"\n";
    node.deploy_with(&container("web", "1", slow), &["--timeout", "500ms"]).exited(9).says(&["goes on"]);
    let deploy = node.start_deploy(&container("web", "1", slow), &[]);
    wait_until("it to attach", PATIENCE, || deploy.stderr().contains("web"));
    signal(deploy.id(), "INT");
    deploy.end().exited(9).says(&["goes on", "orca rollback"]);
    wait_until("it to have gone on", PATIENCE, || node.status("web")["state"] == "running");
    assert_eq!(node.history("web")["revisions"].as_array().unwrap().len(), 1);
    let follow = node.start_orca(&["logs", "-f", &node.name("web")]);
    wait_until("a line", PATIENCE, || follow.stdout().contains("listening"));
    signal(follow.id(), "INT");
    follow.end().exited(130);
}

/// Commands without data of their own to print: they refuse to print it as JSON.
const WITHOUT_JSON: [&str; 3] = ["completions", "exec", "server"];

#[test]
fn every_command_speaks_json() {
    let node = Node::start();
    let web = node.name("web");
    let project = node.project();
    let first = node.write(&probe("web", "[service.env]\nVERSION = \"1\"\n"));
    let second = node.write(&probe("web", "[service.env]\nVERSION = \"2\"\n"));
    let canary = "[service.deploy]\nstrategy = \"canary\"\n[service.env]\nVERSION = \"3\"\n";
    let canary = node.write(&probe("web", canary));
    let [first, second, canary] = [&first, &second, &canary].map(|file| file.to_str().unwrap());
    let env = node.directory().join("secrets.env");
    std::fs::write(&env, "A=1\nB=2\n").unwrap();
    let mut covered = BTreeSet::new();
    let mut run = |arguments: &[&str], input: &str| -> Vec<Value> {
        covered.insert(arguments[0].to_owned());
        let ran = node.orca_with_input(&[arguments, &["--json"]].concat(), input).succeeded();
        let lines = ran.json_lines();
        assert!(!lines.is_empty(), "it says something: {ran}");
        for line in &lines {
            assert_eq!(line["schema"], 1, "{ran}");
            assert!(line["type"].as_str().is_some_and(|kind| !kind.is_empty()), "{ran}");
        }
        assert!(ran.stderr.is_empty(), "nothing beside the JSON: {ran}");
        lines
    };
    let result = |lines: &[Value]| lines.last().unwrap().clone();

    let planned = result(&run(&["plan", "-f", first], ""));
    assert_eq!((&planned["type"], &planned["changes"]), (&"plan".into(), &true.into()));
    for (arguments, outcome) in [
        (&["deploy", "-f", first][..], "done"),
        (&["deploy", "-f", first], "unchanged"),
        (&["deploy", "-f", second], "done"),
        (&["rollback", &web], "done"),
        (&["scale", &web, "2"], "done"),
        (&["restart", &web], "done"),
        (&["deploy", "-f", canary], "done"),
        (&["promote", &web], "done"),
        (&["deploy", "-f", first], "done"),
        (&["redeploy", &web, "--detach"], "started"),
    ] {
        let last = result(&run(arguments, ""));
        assert_eq!(
            (&last["type"], &last["outcome"], &last["exit_code"]),
            (&"result".into(), &outcome.into(), &0.into()),
            "{arguments:?}: {last}"
        );
    }
    wait_until("the redeploy", PATIENCE, || node.status("web")["state"] == "running");
    for arguments in [&["stop", &web][..], &["start", &web]] {
        assert_eq!(result(&run(arguments, ""))["type"], "result");
    }
    node.text("web", "/log?hello");
    for (arguments, kind) in [
        (&["status"][..], "status"),
        (&["status", &web], "status"),
        (&["ps"], "replicas"),
        (&["nodes"], "nodes"),
        (&["why", &web], "why"),
        (&["history", &web], "history"),
        (&["events"], "result"),
        (&["logs", &web], "result"),
        (&["top", "--once"], "status"),
        (&["doctor"], "doctor"),
        (&["version"], "version"),
        (&["context", "list"], "contexts"),
        (&["context", "use", "n1"], "context"),
        (&["secrets", "import", env.to_str().unwrap(), "-p", project], "change"),
        (&["secrets", "list", "-p", project], "secrets"),
        (&["secrets", "rotate", "-p", project], "change"),
        (&["secrets", "rm", "-y", "B", "-p", project], "change"),
        (&["token", "list"], "tokens"),
        (&["init"], "templates"),
        (&["init", "wasm"], "file"),
    ] {
        assert_eq!(result(&run(arguments, ""))["type"], kind, "{arguments:?}");
    }
    assert_eq!(result(&run(&["secrets", "set", "C", "-p", project], "value"))["type"], "change");
    let token = result(&run(&["token", "create", "ci", "--role", "deployer"], ""));
    assert_eq!(token["type"], "token");
    assert_eq!(result(&run(&["token", "revoke", token["id"].as_str().unwrap()], ""))["type"], "change");
    let (data, control) = (node.data_dir(), node.control().to_string());
    let up = ["up", second, "--data-dir", data.to_str().unwrap(), "--listen", &control];
    for outcome in ["done", "unchanged"] {
        let lines = run(&up, "");
        let last = result(&lines);
        assert_eq!((&last["outcome"], &last["exit_code"]), (&outcome.into(), &0.into()), "{last}");
        let url = format!("http://web.test:{}/", node.proxy().port());
        assert_eq!(last["urls"], serde_json::json!({ &web: [url] }), "{last}");
        assert_eq!(lines.iter().filter(|line| line["type"] == "result").count(), 1, "{lines:?}");
        assert_eq!(lines[0]["type"], "plan", "{lines:?}");
    }
    assert_eq!(result(&run(&["rm", "-y", &web], ""))["outcome"], "done");

    let help = node.orca(&["--help"]).succeeded().stdout;
    let commands = help.split("Commands:\n").nth(1).unwrap().split("\n\n").next().unwrap();
    let commands = commands.lines().map(|line| line.split_whitespace().next().unwrap());
    let missing: Vec<&str> = commands.filter(|name| !covered.contains(*name) && !WITHOUT_JSON.contains(name)).collect();
    assert!(missing.is_empty(), "this test does not know {missing:?}");
    for arguments in [&["completions", "bash"][..], &["exec", &web, "--", "x"], &["server"]] {
        node.orca(&[&["--json"], arguments].concat()).exited(2).says(&["this command prints no data"]);
        let help = node.orca(&[arguments[0], "--help"]).succeeded().stdout;
        assert!(help.contains("--timeout") && !help.contains("--json"), "{help}");
    }
    assert!(node.orca(&["completions", "bash"]).succeeded().stdout.contains("orca"));
}

#[test]
fn logs_are_read_filtered_and_followed() {
    requires_docker!();
    let node = Node::start();
    let web = node.name("web");
    node.deploy(&format!("{}{}", probe("web", "replicas = 2\n"), container("box", "1", ""))).succeeded();
    node.text("web", "/log?early-one");
    let read = |arguments: &[&str]| node.orca(&[&["logs", &web], arguments].concat()).succeeded().stdout;
    wait_until("the line in the log", PATIENCE, || read(&[]).contains("early-one") && read(&[]).contains("EARLY-ONE"));
    // A second boundary between the two, so that a date says which is meant.
    let early = node.json_lines(&["logs", &web]).iter().filter_map(|line| line["at"].as_u64()).max().unwrap();
    let (since, _) = wait_for("a second to pass", PATIENCE, || {
        let date = Command::new("date").args(["-u", "+%s %Y-%m-%dT%H:%M:%SZ"]).output().unwrap().stdout;
        let text = String::from_utf8(date).unwrap();
        let (seconds, date) = text.trim().split_once(' ').unwrap();
        (seconds.parse::<u64>().unwrap() * 1000 > early).then(|| date.to_owned())
    });
    node.text("web", "/log?late-one");
    wait_until("the later line", PATIENCE, || read(&[]).contains("late-one"));
    let late = read(&["--since", &since]);
    assert!(late.contains("late-one") && !late.contains("early-one"), "since {since}: {late}");
    assert!(read(&["--since", "10m"]).contains("early-one"));
    let found = read(&["--grep", "EARLY"]);
    assert!(found.contains("EARLY-ONE") && !found.contains("early-one") && !found.contains("late"), "{found}");
    assert_eq!(read(&["--tail", "1"]).lines().count(), 1);
    let lines = node.json_lines(&["logs", &web]);
    let said =
        |text: &str| lines.iter().find(|line| line["text"] == text).unwrap_or_else(|| panic!("no {text}")).clone();
    assert_eq!((&said("early-one")["stream"], &said("EARLY-ONE")["stream"]), (&"stdout".into(), &"stderr".into()));
    let one = format!("r{}", said("early-one")["replica"].as_u64().unwrap());
    assert!(read(&["--replica", &one]).contains("early-one"));
    assert!(node.orca(&["logs", &format!("{web}/{one}")]).succeeded().stdout.contains("early-one"));

    let mut follow = node.start_orca(&["logs", "-f", "--grep", "live", &web]);
    wait_until("a followed line", PATIENCE, || {
        node.text("web", "/log?live-line");
        follow.stdout().contains("live-line")
    });
    assert!(follow.is_running());
    let replicas: BTreeSet<String> = wait_for("lines of both replicas", PATIENCE, || {
        node.text("web", "/log?live-line");
        let text = follow.stdout();
        let replicas = text.lines().filter_map(|line| line.split_whitespace().next()).map(str::to_owned);
        let replicas: BTreeSet<String> = replicas.collect();
        (replicas.len() == 2).then_some(replicas)
    })
    .0;
    eprintln!("both of {replicas:?} interleaved");
    follow.kill();
    assert!(!follow.end().stdout.contains("late-one"));

    let container = node.orca(&["logs", "-t", &node.name("box")]).succeeded().stdout;
    assert!(container.contains("version 1 listening on http://"), "{container}");
    node.orca(&["restart", &node.name("box")]).succeeded();
    let mut gone = node.start_orca(&["logs", "-f", &node.name("box")]);
    wait_until("the log of the new container", PATIENCE, || gone.stdout().contains("listening"));
    gone.kill();
}

/// A command with a terminal of its own of 91 by 33.
fn in_terminal(node: &Node, arguments: &str) -> Ran {
    let command = node.command();
    let mut script = Command::new("script");
    script.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned()))));
    script.current_dir(node.directory()).env("TERM", "xterm").args(["--quiet", "--return", "--command"]);
    script.arg(format!("stty cols 91 rows 33; {} {arguments}", orca_binary().display())).arg("/dev/null");
    Running::start(script, b"").end()
}

#[test]
fn a_command_runs_in_a_replica_as_if_it_ran_here() {
    requires_docker!();
    let node = Node::start();
    node.deploy(&format!("{}{}", container("web", "1", "[service.env]\nA = \"b c\"\n"), probe("wasm", ""))).succeeded();
    let web = node.name("web");
    let exec = |command: &[&str], input: &str| {
        let all = [&["exec", &web, "--", "/orca-test-app"], command].concat();
        node.orca_with_input(&all, input)
    };
    assert_eq!(exec(&["echo", "a", "b"], "").succeeded().stdout, "a b\n");
    assert_eq!(exec(&["env", "A"], "").succeeded().stdout, "b c\n");
    assert_eq!(exec(&["cat"], "through and back\n").succeeded().stdout, "through and back\n");
    let complained = exec(&["complain", "oh"], "").succeeded();
    assert_eq!((complained.stdout.as_str(), complained.stderr.as_str()), ("", "oh\n"));
    for code in [1, 7, 42, 255] {
        exec(&["exit", &code.to_string()], "").exited(code);
    }
    assert_eq!(exec(&["size"], "").succeeded().stdout, "no terminal\n");
    let absent = node.orca(&["exec", &web, "--", "/no/such/program"]);
    eprintln!("{absent}");
    assert_eq!((absent.code, absent.stdout.as_str()), (127, ""), "as a shell says it: {absent}");
    assert!(absent.stderr.contains("/no/such/program"), "{absent}");
    let unfit = node.orca(&["exec", &web, "--", "/etc"]);
    assert_eq!((unfit.code, unfit.stdout.as_str()), (126, ""), "{unfit}");
    let module = node.orca(&["exec", &node.name("wasm"), "--", "sh"]);
    eprintln!("{module}");
    assert_ne!(module.code, 0);
    module.says(&["module"]);

    let shown = in_terminal(&node, &format!("exec {web} -- /orca-test-app exit 5"));
    assert_eq!(shown.code, 5, "{shown}");
    let size = in_terminal(&node, &format!("exec {web} -- /orca-test-app size"));
    assert!(size.stdout.contains("91x33"), "{size}");
    let without = in_terminal(&node, &format!("exec -T {web} -- /orca-test-app size"));
    assert!(without.stdout.contains("no terminal"), "{without}");
    let events = node.json_lines(&["events", &web]);
    assert!(
        events.iter().any(|event| event["kind"] == "executed" && event["actor"].to_string().contains("admin")),
        "{events:?}"
    );
}

#[test]
fn a_command_whose_person_has_gone_ends() {
    requires_docker!();
    let node = Node::start();
    node.deploy(&container("web", "1", "")).succeeded();
    let web = node.name("web");
    let ids = container_ids(&node, "web");
    let goes_on = || docker(&["top", &ids[0]]).contains("sleep 600000");
    // It neither reads nor prints, so that nothing tells it by itself.
    let mut person = node.start_orca(&["exec", &web, "--", "/orca-test-app", "sleep", "600000"]);
    wait_until("the command to run", PATIENCE, goes_on);
    person.kill();
    person.end();
    wait_until("the command's end", PATIENCE, || !goes_on());
}

#[test]
fn every_change_is_told_with_who_did_it() {
    let node = Node::start();
    let mut follow = node.start_orca(&["events", "-f", "--json"]);
    node.deploy(&probe("web", "")).succeeded();
    node.orca(&["scale", &node.name("web"), "2"]).succeeded();
    node.set_secret("A", "1");
    let created = node.json(&["token", "create", "robot", "--role", "deployer"]);
    let robot = created["token"].as_str().unwrap();
    let path = format!("/api/v1/services/{}/web/scale", node.project());
    assert_eq!(node.api_as(robot, "POST", &path, "{\"replicas\": 3}").status, 200);
    node.orca(&["rm", "-y", &node.name("web")]).succeeded();
    let wanted = ["deployed", "scaled", "secret_set", "token_created", "rollout_done", "service_removed"];
    let kinds = |lines: &[Value]| {
        lines.iter().filter_map(|line| line["kind"].as_str().map(str::to_owned)).collect::<BTreeSet<_>>()
    };
    let parse = |text: &str| text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect::<Vec<Value>>();
    wait_until("all followed", PATIENCE, || {
        let seen = kinds(&parse(&follow.stdout()));
        wanted.iter().all(|kind| seen.contains(*kind))
    });
    follow.kill();
    let all = node.json_lines(&["events", "-n", "1000"]);
    let by = |actor: &str, kind: &str| {
        all.iter().any(|event| event["kind"] == kind && event["actor"].to_string().contains(actor))
    };
    assert!(by("admin", "scaled") && by("robot", "scaled") && by("orca", "rollout_done"), "{all:?}");
    assert!(all.iter().filter(|event| event["kind"] == "scaled").all(|event| event["source"].is_string()), "{all:?}");
    let only = node.json_lines(&["events", "-p", "nowhere"]);
    assert_eq!(only.iter().filter(|line| line["type"] == "event").count(), 0);
    assert_eq!(node.json_lines(&["events", "-n", "2"]).iter().filter(|line| line["type"] == "event").count(), 2);
}

#[test]
fn the_http_api_does_what_the_command_line_does() {
    let node = Node::start();
    let plain = |method, path, fields: &[(&str, &str)]| request(node.control(), method, path, fields, b"").unwrap();
    assert_eq!(plain("GET", "/api/v1/health", &[]).status, 200);
    assert_eq!(plain("GET", "/api/v1/openapi.json", &[]).status, 200);
    for path in ["/api/v1/status", "/metrics", "/api/v1/secrets", "/api/v1/tokens"] {
        let answer = plain("GET", path, &[]);
        assert_eq!(answer.status, 401, "{path}: {answer:?}");
        assert!(answer.head.to_lowercase().contains("application/problem+json"), "{answer:?}");
    }
    assert_eq!(plain("GET", "/api/v1/status", &[("authorization", "Bearer orca1.a.b.c")]).status, 401);

    // A module goes up first; then the project is put as the file a person would write.
    let module_path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/probe.wasm");
    let file = format!("project = \"{}\"\n{}", node.project(), module("web", &module_path, ""));
    let project = format!("/api/v1/projects/{}", node.project());
    let refused = node.api("PUT", &project, &file);
    assert!((400..500).contains(&refused.status), "a module is not a path on the server: {refused:?}");
    node.deploy(&probe("web", "")).succeeded();
    let service = format!("/api/v1/services/{}/web", node.project());
    assert_eq!(node.api("GET", &service, "").json()["state"], "running");
    assert_eq!(node.api("POST", &format!("{service}/scale"), "{\"replicas\": 2}").status, 200);
    wait_until("two replicas", PATIENCE, || node.api("GET", &service, "").json()["ready"] == 2);
    assert_eq!(node.api("POST", &format!("{service}/scale"), "{\"replicas\": 2, \"x\": 1}").status, 400);
    assert_eq!(node.api("GET", "/api/v1/services/no/where", "").status, 404);
    assert_eq!(node.api("POST", &format!("{service}/promote"), "").status, 409);
    let bad = node.api("PUT", &project, "[[service]]\nname = \"web\"\nimge = \"a\"\n");
    assert_eq!(bad.status, 400, "{bad:?}");
    assert!(bad.json()["errors"].as_array().is_some_and(|errors| !errors.is_empty()), "{bad:?}");

    let viewer = node.json(&["token", "create", "eyes", "--role", "viewer"])["token"].as_str().unwrap().to_owned();
    assert_eq!(node.api_as(&viewer, "GET", &service, "").status, 200);
    assert_eq!(node.api_as(&viewer, "POST", &format!("{service}/stop"), "").status, 403);
    assert_eq!(node.api_as(&viewer, "GET", "/metrics", "").status, 200);
    assert_eq!(node.api("DELETE", &service, "").status, 200);
    wait_until("it to go", PATIENCE, || node.api("GET", &service, "").status == 404);
}

#[test]
fn a_server_on_the_network_keeps_plain_http_at_home_and_tells_its_labels() {
    let node = Node::prepare(Setup::default());
    let data = node.data_dir();
    let (data, proxy) = (data.to_str().unwrap(), node.proxy().to_string());
    let mut server = node.start_orca(&[
        "server",
        "--data-dir",
        data,
        "--http",
        &proxy,
        "--listen",
        "0.0.0.0:0",
        "--label",
        "zone=eu-1",
    ]);
    let (http, _) = wait_for("the address of the API", PATIENCE, || {
        assert!(server.is_running(), "it ended: {}", server.stderr());
        let log = server.stderr();
        let started =
            log.lines().find(|line| line.contains("control node started") && line.contains("quic=0.0.0.0:"))?;
        started.split_whitespace().find_map(|word| word.strip_prefix("http="))?.parse::<SocketAddr>().ok()
    });
    assert_eq!(http.ip(), IpAddr::from([127, 0, 0, 1]));
    // 503 until its leader is elected.
    wait_until("its health", PATIENCE, || request(http, "GET", "/api/v1/health", &[], b"").unwrap().status == 200);
    wait_until("the access it gives", PATIENCE, || node.token_file().exists());

    let here = "[service.placement]\nlabels = { zone = \"eu-1\" }\n";
    node.deploy(&probe("here", here)).succeeded();
    let nodes = node.orca(&["nodes"]).succeeded();
    assert!(nodes.stdout.contains("zone=eu-1"), "{nodes}");
    let elsewhere = probe("elsewhere", &here.replace("eu-1", "us-1"));
    let waits = node.deploy_with(&format!("{}{elsewhere}", probe("here", here)), &["--detach"]).succeeded();
    eprintln!("{waits}");
    let name = node.name("elsewhere");
    let told = ["no node has the label zone = `us-1`", "`orca server --label zone=us-1`"];
    wait_until("its cause", PATIENCE, || {
        let why = node.orca(&["why", &name]);
        told.iter().all(|told| why.stdout.contains(told))
    });
    let refused = node.orca(&["server", "--data-dir", data, "--label", "zone"]).exited(2);
    refused.says(&["`zone` is no label", "KEY=VALUE"]);
    signal(server.id(), "TERM");
    server.end().succeeded();
}

#[test]
fn up_is_all_a_newcomer_needs() {
    let node = Node::prepare(Setup::default());
    let hello = Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/hello");
    let (data, proxy, control) = (node.data_dir(), node.proxy().to_string(), node.control().to_string());
    let (hello, data) = (hello.to_str().unwrap(), data.to_str().unwrap());
    let mut up = node.start_orca(&["up", hello, "--data-dir", data, "--http", &proxy, "--listen", &control]);
    let took = wait_until("the example to answer", UP_MAX, || {
        assert!(up.is_running(), "it ended: {}", up.stderr());
        let answer = TcpStream::connect(node.proxy()).ok().and_then(|_| node.get("any", "/").ok());
        answer.is_some_and(|answer| answer.status == 200)
    });
    eprintln!("answered {took:.2?} after its start");
    let url = format!("  web                  http://localhost:{}/\n", node.proxy().port());
    wait_until("the URL", PATIENCE, || up.stdout().contains(&url));
    wait_until("the status", PATIENCE, || up.stdout().contains("hello/web"));
    assert!(node.get("any", "/").unwrap().body.contains("Hello from Orca"));
    // A second one on the same data deploys to the first, and prints the same URL.
    let same = ["--no-follow", "--data-dir", data, "--http", &proxy, "--listen", &control];
    let again = node.orca(&[&["up", hello], &same[..]].concat()).succeeded();
    let again = again.says(&["a server runs on this machine already"]);
    assert!(again.stdout.ends_with(&url) && !again.stderr.contains("http://"), "{again}");
    // What is refused has changed nothing: no secret was made for it.
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/probe.wasm");
    let taker = format!(
        "project = \"taker\"\n[[service]]\nname = \"web\"\nmodule = \"{}\"\nroutes = [\"/*\"]\n\
         env = {{ A = \"${{secrets.A}}\" }}\n",
        fixture.display()
    );
    let taker = node.write(&taker);
    let refused = node.orca(&[&["up", taker.to_str().unwrap(), "--generate-secrets"], &same[..]].concat()).exited(2);
    refused.says(&["`/*` is already routed to `hello/web`", "service.toml:5", "^^^^", "needs secret A", "2 problems"]);
    assert_eq!(node.json(&["secrets", "list"])["secrets"], Value::Array(Vec::new()));
    signal(up.id(), "INT");
    let ended = up.end().succeeded();
    eprintln!("{ended}");
}

#[test]
fn up_that_is_interrupted_before_all_serves_does_not_say_that_it_goes_on() {
    let node = Node::prepare(Setup::default());
    let (data, proxy, control) = (node.data_dir(), node.proxy().to_string(), node.control().to_string());
    let never = "readiness = { path = \"/trap\", interval_secs = 1 }\n";
    let (file, data) = (node.write(&probe("web", never)), data.to_str().unwrap());
    let server = ["--data-dir", data, "--http", &proxy, "--listen", &control];
    let up = node.start_orca(&[&["up", file.to_str().unwrap(), "--json"], &server[..]].concat());
    wait_until("the deploy", UP_MAX, || up.stdout().contains("\"progress\""));
    signal(up.id(), "INT");
    let ended = up.end().exited(130);
    let last = ended.json_lines().pop().unwrap();
    assert_eq!((&last["type"], &last["outcome"]), (&"result".into(), &"interrupted".into()), "{ended}");
    assert!(!ended.stderr.contains("goes on with it"), "{ended}");
}

#[test]
fn up_says_at_once_that_containers_need_docker() {
    let nowhere = ("DOCKER_HOST".to_owned(), "unix:///nonexistent/docker.sock".to_owned());
    let node = Node::prepare(Setup { env: vec![nowhere], ..Setup::default() });
    let (data, proxy, control) = (node.data_dir(), node.proxy().to_string(), node.control().to_string());
    let file = node.write(&format!("{}{}", container("web", "1", ""), probe("wasm", "")));
    let (file, data) = (file.to_str().unwrap(), data.to_str().unwrap());
    let refused = node.orca(&["up", file, "--data-dir", data, "--http", &proxy, "--listen", &control]).exited(1);
    eprintln!("{refused}");
    assert!(refused.took < UP_MAX, "{refused}");
    let container = format!("{} is a container", node.name("web"));
    refused.says(&["no Docker engine answers", &container, "/nonexistent/docker.sock", "apt-get install docker.io"]);
}

#[test]
fn the_doctor_asks_for_the_engine_that_a_server_would_use() {
    let nowhere = ("DOCKER_HOST".to_owned(), "unix:///nonexistent/docker.sock".to_owned());
    let node = Node::prepare(Setup { env: vec![nowhere], ..Setup::default() });
    let found = node.orca(&["doctor"]).exited(1);
    assert!(found.stdout.contains("/nonexistent/docker.sock"), "{found}");
}

#[test]
fn a_deploy_that_failed_fails_again_and_says_first_what_the_rest_follows_from() {
    let node = Node::start();
    let late = "[service.deploy]\nready_timeout_secs = 2\n";
    let services = format!(
        "{}{}",
        probe("api", &format!("depends_on = [\"db\"]\n{late}")),
        probe("db", &format!("readiness = {{ path = \"/trap\", interval_secs = 1 }}\n{late}")),
    );
    let (api, db) = (node.name("api"), node.name("db"));
    let failed = node.deploy(&services).exited(8);
    eprintln!("{failed}");
    let failed = failed.says(&[&format!("{db}: failed: "), &format!("{api}: failed: "), "exit code 8"]);
    let at = |name: &str| failed.stderr.find(&format!("error: {name} ")).unwrap_or_else(|| panic!("{name}: {failed}"));
    assert!(at(&db) < at(&api), "{failed}");
    // Nothing has changed, and nothing serves.
    let again = node.deploy(&services).exited(8);
    eprintln!("{again}");
    again.says(&[&format!("error: {db} "), &format!("error: {api} ")]);
    let result = node.deploy_with(&services, &["--json"]).exited(8).json_lines().pop().unwrap();
    assert_eq!(result["exit_code"], 8, "{result}");
    assert!(result["services"].as_array().unwrap().iter().all(|one| one["error"].is_object()), "{result}");

    // Stopped, it is as asked; and that it does not run is said.
    node.orca(&["stop", &db]).succeeded();
    let stopped = node.deploy(&probe("db", "")).succeeded();
    assert!(stopped.stdout.contains("It is stopped"), "{stopped}");
}

#[test]
fn a_replica_that_nobody_has_is_not_found() {
    let node = Node::start();
    node.deploy(&probe("web", "")).succeeded();
    for arguments in [&["logs"][..], &["logs", "-f"]] {
        let unknown = format!("{}/r999", node.name("web"));
        node.orca(&[arguments, &[unknown.as_str()]].concat()).exited(5).says(&["r999", "orca history"]);
    }
}

#[test]
fn a_context_that_does_not_work_takes_no_place() {
    fn add(node: &Node, name: &str, token: &str, more: &[&str]) -> Ran {
        let address = node.control().to_string();
        node.orca_with_input(&[&["context", "add", name, "--address", &address], more].concat(), token)
    }
    let mut node = Node::start();
    let other = Node::start();
    let create = |name: &str| node.json(&["token", "create", name, "--role", "viewer"]);
    let (good, revoked) = (create("good"), create("revoked"));
    node.orca(&["token", "revoke", revoked["id"].as_str().unwrap()]).succeeded();
    let [good, revoked] = [&good, &revoked].map(|created| created["token"].as_str().unwrap());

    add(&node, "prod", good, &[]).succeeded();
    add(&node, "prod", good, &[]).exited(6).says(&["--replace"]);
    add(&node, "prod", revoked, &["--replace"]).exited(4).says(&["`prod` was not added"]);
    add(&node, "strange", other.token(), &[]).exited(10).says(&["not to be trusted", "`strange` was not added"]);
    node.orca(&["status"]).succeeded();
    let listed = |node: &Node| {
        let contexts = node.json(&["context", "list"])["contexts"].as_array().unwrap().clone();
        let shown = |one: &Value| format!("{} {}", one["name"].as_str().unwrap(), one["current"]);
        contexts.iter().map(shown).collect::<Vec<_>>().join(", ")
    };
    assert_eq!(listed(&node), "n1 false, prod true");
    // A server that is down may come back.
    node.terminate();
    add(&node, "later", good, &[]).succeeded().says(&["`later` is added, but", "orca context use later"]);
    assert_eq!(listed(&node), "later false, n1 false, prod true");
}

#[test]
fn what_is_not_in_the_files_and_stays_is_named() {
    let node = Node::start();
    let (web, old) = (node.name("web"), node.name("old"));
    node.deploy(&format!("{}{}", probe("web", ""), probe("old", ""))).succeeded();
    let file = node.write(&probe("web", ""));
    let file = file.to_str().unwrap();
    let notice = format!("not in the files, left as it is: {old} (`orca deploy --prune` removes it)");
    node.orca(&["plan", "-f", file]).succeeded().says(&[&notice]);
    node.orca(&["deploy", "-f", file]).succeeded().says(&[&notice]);
    node.deploy(&probe("web", "[service.env]\nVERSION = \"2\"\n")).succeeded().says(&[&notice]);
    let unlisted = serde_json::json!([old]);
    assert_eq!(node.json(&["plan", "-f", file])["unlisted"], unlisted);
    assert_eq!(node.json_lines(&["deploy", "-f", file])[0]["unlisted"], unlisted);
    // What is picked from the files says nothing of the rest, and what is removed does not stay.
    let picked = node.orca(&["plan", "-f", file, &web]).succeeded();
    assert!(!picked.stderr.contains("not in the files"), "{picked}");
    let pruned = node.orca(&["plan", "-f", file, "--prune"]).succeeded();
    assert!(!pruned.stderr.contains("left as") && pruned.stdout.contains(&format!("- {old}")), "{pruned}");
}
