//! A value that is set as a secret reaches its workload and is found nowhere else, in no form.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::support::{
    Node, PATIENCE, Running, Setup, container, container_ids, docker, probe, requires_docker, wait_until,
};

const CANARY: &str = "Canary7fK2dPq9Zr4TbWx1Lm8V";
/// For a stream that never ends: what has come in this time is looked at.
const STREAM_READ: Duration = Duration::from_millis(700);

/// All that the canary could look like: as it is, in hex, as a list of numbers, and in base64 wherever it begins.
fn forms() -> Vec<Vec<u8>> {
    let hex = |upper: bool| {
        let digits = CANARY.bytes().map(|byte| if upper { format!("{byte:02X}") } else { format!("{byte:02x}") });
        digits.collect::<String>().into_bytes()
    };
    let numbers = |between: &str| {
        let numbers: Vec<String> = CANARY.bytes().map(|byte| byte.to_string()).collect();
        numbers.join(between).into_bytes()
    };
    let mut forms = vec![CANARY.into(), hex(false), hex(true), numbers(","), numbers(", "), numbers(" ")];
    for offset in 0..3 {
        // Whole groups of three only: what is beside them is not known.
        let skip = (3 - offset) % 3;
        let whole = &CANARY.as_bytes()[skip..];
        forms.push(base64(&whole[..whole.len() / 3 * 3]));
    }
    forms
}

fn base64(bytes: &[u8]) -> Vec<u8> {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let group = |three: &[u8]| {
        let bits = three.iter().fold(0u32, |bits, byte| bits << 8 | u32::from(*byte));
        [18, 12, 6, 0].map(|shift| ALPHABET[(bits >> shift & 63) as usize])
    };
    bytes.chunks_exact(3).flat_map(group).collect()
}

fn contains_canary(bytes: &[u8]) -> bool {
    forms().iter().any(|form| bytes.windows(form.len()).any(|window| window == form))
}

#[track_caller]
fn assert_clean(what: &str, bytes: impl AsRef<[u8]>) {
    let bytes = bytes.as_ref();
    assert!(!contains_canary(bytes), "{what} has the canary in it: {}", String::from_utf8_lossy(bytes));
}

fn files_below(directory: &Path) -> Vec<PathBuf> {
    let mut files = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            files.extend(files_below(&entry.path()));
        } else if kind.is_file() {
            files.push(entry.path());
        }
    }
    files
}

/// What an endpoint says first; some never end.
fn beginning(node: &Node, path: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(node.control()).unwrap();
    stream.set_read_timeout(Some(STREAM_READ)).unwrap();
    let head = format!("GET {path} HTTP/1.0\r\nhost: x\r\nauthorization: Bearer {}\r\n\r\n", node.token());
    stream.write_all(head.as_bytes()).unwrap();
    let mut bytes = Vec::new();
    let mut block = [0; 4096];
    while let Ok(count @ 1..) = stream.read(&mut block) {
        bytes.extend(&block[..count]);
    }
    bytes
}

#[test]
fn the_forms_are_found() {
    assert!(contains_canary(format!("x{CANARY}y").as_bytes()));
    assert!(contains_canary(format!("{:?}", CANARY.as_bytes()).as_bytes()));
    for front in ["", "a", "ab", "user:"] {
        let mut text = format!("{front}{CANARY}:x").into_bytes();
        text.resize(text.len().div_ceil(3) * 3, b'!');
        assert!(contains_canary(&base64(&text)), "{front}");
    }
    assert!(!contains_canary(CANARY.to_lowercase().as_bytes()));
}

#[test]
fn a_secret_is_where_it_must_be_and_nowhere_else() {
    requires_docker!();
    let setup = Setup { env: vec![("ORCA_LOG".to_owned(), "trace".to_owned())], ..Setup::default() };
    let mut node = Node::with(setup);
    let set = |arguments: &[&str]| node.orca_with_input(&[arguments, &["--project", node.project()]].concat(), CANARY);
    let said = set(&["secrets", "set", "KEY", "-vvv"]).succeeded();
    assert_clean("`secrets set -vvv`", said.to_string());
    let import = format!("PASSWORD={CANARY}\n");
    let said = node.orca_with_input(&["secrets", "import", "-", "--project", node.project()], &import).succeeded();
    assert_clean("`secrets import`", said.to_string());
    assert_clean("`secrets set --json`", set(&["secrets", "set", "KEY", "--json"]).succeeded().to_string());
    let put = node.api("PUT", &format!("/api/v1/projects/{}/secrets/OTHER", node.project()), CANARY);
    assert_eq!(put.status, 200, "{put:?}");
    assert_clean("its answer", put.body);

    let refers = "[service.env]\nKEY = \"${secrets.KEY}\"\nURL = \"x://u:${secrets.KEY}@db\"\n";
    let registry = "[service.registry]\nusername = \"u\"\npassword = \"${secrets.PASSWORD}\"\n";
    let services = [
        container("env", "1", refers),
        container("files", "1", &format!("secrets_as = \"files\"\n{refers}")),
        probe("wasm", refers),
    ];
    node.deploy(&services.concat()).succeeded();

    // It reached them.
    let url = format!("x://u:{CANARY}@db");
    assert_eq!(node.text("env", "/env?KEY"), CANARY);
    assert_eq!(node.text("env", "/env?URL"), url);
    assert_eq!(node.text("wasm", "/env?KEY"), CANARY);
    assert_eq!(node.text("wasm", "/env?URL"), url);
    assert_eq!(node.text("files", "/file?/run/secrets/KEY"), CANARY);
    assert_eq!(node.text("files", "/file?/run/secrets/URL"), url);
    assert_eq!(node.get("files", "/env?KEY").unwrap().status, 404, "a file instead of a variable");
    let inspect = |service| docker(&["inspect", &container_ids(&node, service)[0]]);
    assert!(contains_canary(inspect("env").as_bytes()), "Docker shows variables: the search finds what there is");
    assert_clean("`docker inspect` of a container that is given files", inspect("files"));

    // A failure has much to say: a pull with credentials that ends at a port where nobody listens.
    let pulls = format!(
        "[[service]]\nname = \"pulls\"\nimage = \"127.0.0.1:9/none:1\"\n{refers}{registry}[service.deploy]\nready_timeout_secs = 2\n"
    );
    let failed = node.deploy(&pulls).exited(8);
    assert_clean("a failed deploy", failed.to_string());
    for arguments in [
        &["status", "--json"][..],
        &["events", "--json", "-n", "1000"],
        &["history", "--json", &node.name("env")],
        &["why", "--json", &node.name("pulls")],
        &["ps", "--json"],
        &["top", "--once", "--json"],
        &["nodes", "--json"],
        &["secrets", "list", "--json", "--project", node.project()],
        &["logs", "--json", &node.name("env")],
        &["logs", "--json", &node.name("wasm")],
        &["doctor", "--json"],
        &["secrets", "rotate", "--project", node.project()],
    ] {
        assert_clean(&format!("{arguments:?}"), node.orca(arguments).to_string());
    }
    let plan = node.write(&services.concat().replace("${secrets.KEY}", "${secrets.OTHER}"));
    assert_clean("a plan", node.orca(&["plan", "--json", "-f", plan.to_str().unwrap()]).succeeded().to_string());

    // Every answer of the API, by its own list.
    let document = node.api("GET", "/api/v1/openapi.json", "").json();
    let mut asked = 0;
    for (path, methods) in document["paths"].as_object().unwrap() {
        if methods.get("get").is_none() {
            continue;
        }
        for service in ["env", "files", "wasm", "pulls"] {
            let path = path.replace("{project}", node.project()).replace("{service}", service);
            assert!(!path.contains('{'), "this test does not know what to put into {path}");
            let answer = beginning(&node, &path);
            assert!(answer.starts_with(b"HTTP/1.") && !answer.is_empty(), "{path}");
            assert_clean(&path, answer);
            asked += 1;
            if !path.contains("/services/") {
                break;
            }
        }
    }
    assert!(asked > 20, "{asked} answers");

    // Nor is it there for those who come after: in files and logs, also of a server that starts with all of it.
    node.kill9();
    node.boot();
    wait_until("the workloads after a restart", PATIENCE, || {
        node.get("wasm", "/env?KEY").is_ok_and(|answer| answer.body == CANARY)
            && node.get("env", "/env?KEY").is_ok_and(|answer| answer.body == CANARY)
    });
    node.terminate();
    let log = node.log();
    assert!(log.contains("TRACE"), "the log is at its most talkative");
    let files = files_below(node.directory());
    assert!(files.len() > 5 && files.iter().any(|file| file.starts_with(node.data_dir())), "{files:?}");
    for file in files {
        let bytes = fs::read(&file).unwrap();
        assert!(!contains_canary(&bytes), "{} has the canary in it", file.display());
    }
}

#[test]
fn a_secret_that_is_not_set_is_named_before_anything_is_sent() {
    let node = Node::start();
    let needs = probe("web", "[service.env]\nA = \"${secrets.ABSENT}\"\n");
    let refused = node.deploy(&needs);
    eprintln!("{refused}");
    assert_ne!(refused.code, 0);
    refused.says(&["ABSENT", &format!("orca secrets set ABSENT --project {}", node.project())]);
    assert!(node.status("web").is_null());
    node.set_secret("ABSENT", "1");
    node.deploy(&needs).succeeded();
    assert_eq!(node.text("web", "/env?A"), "1");
}

#[test]
fn nobody_is_asked_whether_to_remove_a_secret_that_stays() {
    let node = Node::start();
    node.set_secret("KEY", "value");
    node.set_secret("SPARE", "value");
    node.deploy(&probe("web", "[service.env]\nKEY = \"${secrets.KEY}\"\n")).succeeded();
    let remove =
        |name: &str, more: &[&str]| node.orca(&[&["secrets", "rm", name, "--project", node.project()], more].concat());
    for more in [&[][..], &["-y"]] {
        remove("KEY", more).exited(6).says(&["is used by", &node.name("web")]);
        remove("NEVER", more).exited(5).says(&["there is no secret", "orca secrets list"]);
    }
    remove("SPARE", &[]).exited(2).says(&["Remove secret", "-y"]);
    remove("SPARE", &["-y"]).succeeded();
}

#[test]
fn a_new_value_restarts_nothing_until_it_is_asked_for() {
    let node = Node::start();
    node.set_secret("KEY", "old");
    let service = probe("web", "[service.env]\nKEY = \"${secrets.KEY}\"\n");
    node.deploy(&service).succeeded();
    let replica = node.status("web")["replicas"][0]["id"].clone();
    node.set_secret("KEY", "new");
    node.orca(&["secrets", "rotate", "--project", node.project()]).succeeded();
    let again = node.deploy(&service).succeeded();
    assert!(again.stdout.starts_with("Nothing to change"), "{again}");
    assert_eq!(node.status("web")["replicas"][0]["id"], replica);
    assert_eq!(node.text("web", "/env?KEY"), "old");
    node.orca(&["restart", &node.name("web")]).succeeded();
    assert_eq!(node.text("web", "/env?KEY"), "new");
}

#[test]
fn a_rotation_without_a_project_is_of_all_that_the_caller_may_change() {
    let node = Node::start();
    node.set_secret("KEY", "own");
    node.orca_with_input(&["secrets", "set", "KEY"], "everybody's").succeeded();
    let rotated = || {
        let events = node.json_lines(&["events", "-n", "1000"]).into_iter();
        let texts = events.filter(|event| event["kind"] == "secrets_rotated").map(|event| event["text"].to_string());
        texts.map(|text| text.split_whitespace().nth(3).unwrap().to_owned()).collect::<Vec<_>>()
    };
    let all = node.orca(&["secrets", "rotate"]).succeeded();
    assert!(all.stdout.contains(&format!("global ones, those of {}", node.project())), "{all}");
    assert_eq!(rotated(), ["@global", node.project()]);

    let create = ["token", "create", "ci", "--role", "deployer", "--project", node.project()];
    let token = node.json(&create)["token"].as_str().unwrap().to_owned();
    let mut command = node.command();
    command.env("ORCA_TOKEN", token).env("ORCA_ADDRESS", node.control().to_string()).args(["secrets", "rotate"]);
    Running::start(command, b"").end().succeeded();
    assert_eq!(rotated(), ["@global", node.project(), node.project()]);
}

#[test]
fn a_starter_file_says_to_set_its_secret_for_its_own_project() {
    let node = Node::prepare(Setup::default());
    for project in ["blog", "shop"] {
        let file = format!("{project}/service.toml");
        let set = format!("orca secrets set POSTGRES_PASSWORD --project {project}");
        node.orca(&["init", "postgres", "--file", &file]).succeeded().says(&[&set]);
    }
}
