//! What holds for every input, also for one that nobody would write.

use orca_cluster::spec::toml::{self, FILE_BYTES_MAX, NESTING_MAX, PROBLEMS_MAX};
use orca_cluster::spec::{Project, Service};
use proptest::prelude::*;

use crate::{file, label, project};

const FIXTURES: [&str; 2] = [include_str!("../fixtures/all.toml"), include_str!("../fixtures/mistakes.toml")];

/// Reads it as everything it could be, and looks at what is said about it.
fn look_at(text: &str) {
    let file = file(text);
    let found = [
        toml::project(&file, &label("p")).err(),
        toml::settings(&file).err(),
        toml::projects(&[(file.clone(), label("p")), (file.clone(), label("q"))]).err(),
    ];
    for problem in found.into_iter().flatten().flatten() {
        assert!(problem.span.start <= problem.span.end && problem.span.end <= text.len(), "{problem:?}");
        assert!(text.get(problem.span.clone()).is_some(), "{problem:?}");
        assert!(problem.line >= 1 && problem.line <= text.matches('\n').count() + 1, "{problem:?}");
        assert!(problem.column >= 1 && !problem.message.is_empty(), "{problem:?}");
        let shown = toml::render(&problem, text, false);
        assert!(shown.contains('^'), "{shown}");
        assert!(shown.chars().all(|c| c == '\n' || !c.is_control()), "{shown:?}");
    }
    if let Ok(project) = toml::project(&file, &label("p")) {
        survives_json(&project);
    }
}

fn survives_json(project: &Project) {
    let json = serde_json::to_string(project).expect("a project is JSON");
    assert_eq!(serde_json::from_str::<Project>(&json).expect("what was written is right"), *project);
    for service in project.services.values() {
        let json = serde_json::to_string(service).expect("a service is JSON");
        assert_eq!(serde_json::from_str::<Service>(&json).expect("what was written is right"), *service);
    }
}

/// Pieces of TOML as people and attackers combine them.
fn piece() -> impl Strategy<Value = String> {
    prop_oneof![
        3 => "[\\[\\]{}.,=\"'#\n a-c0]{1,12}",
        1 => prop::sample::select(vec![
            "[[service]]\n", "[service.env]\n", "[[service.volume]]\n", "name = \"a\"\n", "image = \"b\"\n", "module = ",
            "'''", "\"\"\"", "\\u0000", "\u{1b}[2J", "1979-05-27", "-0x1", "1e999", "nan", "inf", "\u{feff}", "\r\n", "é",
        ]).prop_map(str::to_owned),
        1 => ".*",
    ]
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(pieces in prop::collection::vec(piece(), 0..40)) {
        look_at(&pieces.concat());
    }

    #[test]
    fn no_damage_to_a_file_makes_it_panic(
        which in 0..FIXTURES.len(), at in any::<prop::sample::Index>(), cut in 0..30_usize, put in piece(),
    ) {
        let mut chars: Vec<char> = FIXTURES[which].chars().collect();
        let at = at.index(chars.len());
        let end = (at + cut).min(chars.len());
        chars.splice(at..end, put.chars());
        look_at(&chars.into_iter().collect::<String>());
    }

    #[test]
    fn any_value_of_any_key_is_accepted_or_refused(key in key(), value in value()) {
        look_at(&format!("[[service]]\nname = \"a\"\nimage = \"b\"\nport = 80\n{key} = {value}\n"));
        look_at(&format!("[[service]]\nname = \"a\"\nmodule = \"./b.wasm\"\n{key} = {value}\n"));
    }
}

fn key() -> impl Strategy<Value = &'static str> {
    prop::sample::select(vec![
        "project",
        "name",
        "replicas",
        "domain",
        "domains",
        "routes",
        "expose",
        "health",
        "command",
        "depends_on",
        "internal",
        "sticky",
        "env",
        "env.A",
        "resources",
        "resources.memory",
        "resources.cpu",
        "resources.gpu",
        "liveness",
        "liveness.path",
        "liveness.exec",
        "readiness.interval_secs",
        "readiness.timeout_secs",
        "deploy",
        "deploy.strategy",
        "deploy.max_surge",
        "deploy.canary_weight",
        "deploy.auto_promote",
        "deploy.drain_timeout_secs",
        "placement",
        "placement.labels",
        "placement.node",
        "volume",
        "rate_limit",
        "autoscale",
        "build",
        "template",
        "triggers",
        "registry",
        "secrets_as",
        "response_timeout_secs",
        "privileged",
        "network",
        "module",
    ])
}

fn value() -> impl Strategy<Value = String> {
    prop_oneof![
        any::<i64>().prop_map(|number| number.to_string()),
        (0..1000_u32).prop_map(|number| number.to_string()),
        any::<f32>().prop_map(|number| format!("{number:?}").to_lowercase()),
        any::<bool>().prop_map(|flag| flag.to_string()),
        "\"[a-z0-9/.:*$\\{\\} -]{0,20}\"",
        prop::collection::vec("\"[a-z0-9/.:*@ -]{0,12}\"", 0..4).prop_map(|items| format!("[{}]", items.join(", "))),
        prop::sample::select(vec![
            "{}",
            "[]",
            "[[]]",
            "{ path = \"/a\" }",
            "{ name = \"a\", path = \"/b\" }",
            "[{ host = \"/a\", path = \"/b\" }]",
            "{ tcp = true }",
            "\"canary\"",
            "\"files\"",
            "\"host\"",
            "[\"cron:* * * * *\"]",
            "[\"http:/a\", \"queue:x\"]",
            "1979-05-27T07:32:00Z",
            "{ strategy = \"blue-green\" }",
            "0xffffffffffffffffffffffffffffffffffffffff",
        ])
        .prop_map(str::to_owned),
    ]
}

#[test]
fn a_file_that_is_too_long_is_not_looked_at() {
    let problems = project(&"#".repeat(FILE_BYTES_MAX + 1)).expect_err("it is too long");
    assert_eq!(problems.len(), 1);
    assert!(problems[0].message.contains("bytes"), "{problems:?}");
}

/// The tree is freed recursively: this is what would overflow the stack of a thread, here a small one.
#[test]
fn no_nesting_overflows_the_stack() {
    let bombs = [
        "a=".to_owned() + &"[".repeat(100_000),
        "a=".to_owned() + &"{a=".repeat(100_000),
        "a=".to_owned() + &"{a.b.c.d.e.f.g=".repeat(50_000),
        "a.".repeat(200_000) + "a=1",
        "[".to_owned() + &"a.".repeat(200_000) + "a]",
        "a=".to_owned() + &"{a.a.a.a.a.a.a.a=]\n".repeat(20_000),
        "a=".to_owned() + &"[{a.a.a.a.a.a.a.a=}".repeat(20_000),
        "[[a]]\n".repeat(20_000),
        "a=[]]".repeat(50_000),
        "\"".repeat(100_000),
        "=\n".repeat(100_000),
    ];
    let small_stack = std::thread::Builder::new().stack_size(512 << 10);
    let thread = small_stack.spawn(move || {
        for bomb in bombs {
            let problems = project(&bomb).expect_err("it is no project");
            assert!(problems.len() <= PROBLEMS_MAX);
        }
        let deepest = format!("[[service]]\nname = {}1{}", "[".repeat(NESTING_MAX), "]".repeat(NESTING_MAX));
        assert_eq!(project(&deepest).expect_err("it is no name").len(), 2);
    });
    thread.expect("a thread can be started").join().expect("it ends by returning");
}

/// As much of each thing as fits into a file; whatever takes the square of that would not end.
#[test]
fn no_amount_of_anything_takes_for_ever() {
    let many = |text: &str| text.repeat((FILE_BYTES_MAX - 200) / text.len());
    let numbered = |of: fn(usize) -> String| {
        let mut text = String::new();
        let mut at = 0;
        while text.len() < FILE_BYTES_MAX - 200 {
            text += &of(at);
            at += 1;
        }
        text
    };
    let web = "[[service]]\nname = \"web\"\nimage = \"nginx\"\nport = 80\n";
    let texts = [
        many("="),
        many("=\n"),
        many("[[service]]\n"),
        many("\n") + "x = 1",
        format!("{web}domains = [{}]\n", numbered(|at| format!("\"a{at}\",")).trim_end_matches(',')),
        format!("{web}routes = [{}]\n", numbered(|at| format!("\"/{at}\",")).trim_end_matches(',')),
        numbered(|at| {
            let list = |of: &str| (0..200).map(|n| format!("\"{of}{n}\"")).collect::<Vec<_>>().join(", ");
            let (domains, routes) = (list("d"), list("/"));
            format!("[[service]]\nname = \"a{at}\"\nimage = \"a\"\ndomains = [{domains}]\nroutes = [{routes}]\n")
        }),
        format!("{web}depends_on = [{}]\n", numbered(|at| format!("\"a{at}\",")).trim_end_matches(',')),
        format!("{web}{}", numbered(|at| format!("a{at} = 1\n"))),
        format!("{web}{}", numbered(|at| format!("[[service.volume]]\nname = \"a{at}\"\npath = \"/a{at}\"\n"))),
        format!("{web}env = {{ {} }}\n", numbered(|at| format!("a{at} = 1, "))),
        numbered(|at| format!("[[service]]\nname = \"a{at}\"\nimage = \"a\"\ndepends_on = [\"a{}\"]\n", at + 1)),
    ];
    for text in texts {
        let problems = project(&text).expect_err("there is too much of it");
        assert!(problems.len() <= PROBLEMS_MAX);
        for problem in problems.iter().take(3) {
            assert!(toml::render(problem, &text, false).len() < 2_000);
        }
    }
}

#[test]
fn json_that_no_file_could_mean_is_refused() {
    let right = project(FIXTURES[0]).expect("it is right");
    let json = serde_json::to_value(&right).expect("a project is JSON");
    let refusals = [
        ("/services/api/source/image", "lower case", serde_json::json!("UPPER/x")),
        ("/services/api/replicas", "replicas", serde_json::json!(1_000_000)),
        ("/services/api/port", "needs `port`", serde_json::json!(null)),
        ("/services/api/routes/0/path", "no route", serde_json::json!("/a/../b")),
        ("/services/api/routes/0/host", "no route", serde_json::json!({ "exact": "UPPER" })),
        ("/services/api/deploy/strategy", "per cent", serde_json::json!({ "canary": { "weight": 100 } })),
        ("/services/api/name", "calls itself", serde_json::json!("web")),
        ("/services/api/depends_on", "no service", serde_json::json!(["nobody"])),
        ("/services/api/depends_on", "after itself", serde_json::json!(["api"])),
        ("/services/db/depends_on", "wait for each other", serde_json::json!(["api"])),
        ("/services/db/replicas", "volume `data`", serde_json::json!(2)),
        ("/services/db/volumes/1/source/host", "absolute", serde_json::json!("etc")),
        ("/services/db/volumes/1/source/host", "`..`", serde_json::json!("/srv/../etc")),
        ("/services/hello/source/module/digest", "64", serde_json::json!("abc")),
        ("/services/hello/schedules/0/cron", "five fields", serde_json::json!("@daily")),
        ("/services/hello/limits/outbound", "lower case", serde_json::json!(["UPPER"])),
        ("/services/hello/port", "cannot have `port`", serde_json::json!(80)),
        ("/services/exporter/env", "variable", serde_json::json!({ "A=B": "x" })),
    ];
    for (pointer, expected, value) in refusals {
        let mut json = json.clone();
        *json.pointer_mut(pointer).expect(pointer) = value;
        let error = serde_json::from_value::<Project>(json).expect_err(pointer).to_string();
        assert!(error.contains(expected), "{pointer}: {error}");
    }
}

#[test]
fn what_one_problem_says_can_be_sent() {
    let text = FIXTURES[1];
    for problem in project(text).expect_err("it is full of mistakes") {
        let json = serde_json::to_string(&problem).expect("a problem is JSON");
        assert_eq!(serde_json::from_str::<toml::Problem>(&json).expect("it was just written"), problem);
    }
}
