//! A server of a test, and the command line that talks to it.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, SystemTime};

use serde_json::Value;
use tempfile::TempDir;

use super::load::Target;
use super::ran::{Ran, Running};
use super::wait::{wait_for, wait_until};

/// A server says it is healthy, or says why not, within this.
const START_MAX: Duration = Duration::from_secs(30);
/// One that is told to stop lets requests end first, for ten seconds at most.
const STOP_MAX: Duration = Duration::from_secs(20);
const ANSWER_MAX: Duration = Duration::from_secs(20);
/// Lines of a server's log shown when a test fails.
const LOG_LINES_SHOWN: usize = 150;
const PORT_PROXY: u16 = 8080;
const PORT_CONTROL: u16 = 6880;

/// What a node is to be like; the default is what most tests want.
#[derive(Debug, Clone, Default)]
pub struct Setup {
    /// More environment for the server, `ORCA_LOG` for one.
    pub env: Vec<(String, String)>,
    /// More arguments for `orca server`.
    pub arguments: Vec<String>,
    /// Instead of a directory beside the node's other files.
    pub data_dir: Option<PathBuf>,
}

/// A server with a data directory, addresses, a project and contexts of its own.
#[derive(Debug)]
pub struct Node {
    setup: Setup,
    directory: TempDir,
    address: IpAddr,
    ports: (u16, u16),
    project: String,
    process: Option<Child>,
    /// The administrator's, told by the first start.
    token: Option<String>,
}

/// The program under test, as `cargo xtask test` built it.
pub fn orca_binary() -> PathBuf {
    let named = std::env::var_os("ORCA_TEST_BINARY").map(PathBuf::from);
    // `target/debug/deps/it-…` is this program.
    let beside = || Some(std::env::current_exe().ok()?.parent()?.parent()?.join("orca"));
    let path = named.or_else(beside).filter(|path| path.is_file());
    path.expect("there is no `orca` to test: run `cargo xtask test`, or `cargo build --package orca` first")
}

impl Node {
    /// A founded cluster of one node, which answers.
    #[track_caller]
    pub fn start() -> Node {
        Node::with(Setup::default())
    }

    #[track_caller]
    pub fn with(setup: Setup) -> Node {
        let mut node = Node::prepare(setup);
        node.boot();
        node
    }

    /// Everything but the process.
    pub fn prepare(setup: Setup) -> Node {
        static NODES: AtomicU16 = AtomicU16::new(0);
        let number = NODES.fetch_add(1, Ordering::Relaxed);
        // Each process of the tests has a loopback address, each node in it two ports: no two tests can meet, and
        // connections that clients make are elsewhere. A process id has 22 bits at most.
        let address = Ipv4Addr::from_bits(0x7f80_0000 | std::process::id()).into();
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        // Ids of processes come again; what a killed test left behind must not be met.
        let project = format!("it-{:x}-{:x}-{number}", std::process::id(), now & 0xffff);
        let directory = tempfile::Builder::new().prefix("node-").tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let ports = (PORT_PROXY + number, PORT_CONTROL + number);
        Node { setup, directory, address, ports, project, process: None, token: None }
    }

    /// The project of a service file that names none.
    pub fn project(&self) -> &str {
        &self.project
    }

    /// Where the test may write what it likes.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn data_dir(&self) -> PathBuf {
        self.setup.data_dir.clone().unwrap_or_else(|| self.directory().join("data"))
    }

    /// The key of the vault: beside the data, never in it.
    pub fn unseal_key(&self) -> PathBuf {
        let mut name = self.data_dir().file_name().unwrap().to_owned();
        name.push(".unseal-key");
        self.data_dir().with_file_name(name)
    }

    /// Where the first start puts the administrator's token when nobody sees what it prints.
    pub fn token_file(&self) -> PathBuf {
        self.data_dir().join("admin").join("token")
    }

    pub fn contexts(&self) -> PathBuf {
        self.directory().join("contexts.toml")
    }

    pub fn proxy(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.0)
    }

    /// The API, over UDP and TCP.
    pub fn control(&self) -> SocketAddr {
        SocketAddr::new(self.address, self.ports.1)
    }

    pub fn token(&self) -> &str {
        self.token.as_deref().expect("the first start told it")
    }

    pub fn pid(&self) -> u32 {
        self.process.as_ref().expect("the server runs").id()
    }

    /// What the load generator is aimed at: `web` is reached as `web.test`, the domain [`container`] and [`probe`]
    /// give it.
    pub fn target(&self, service: &str) -> Target {
        Target { address: self.proxy(), host: format!("{service}.test"), path: "/version".to_owned() }
    }

    /// Everything the servers of this node have logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.log_file()).unwrap_or_default()
    }

    fn log_file(&self) -> PathBuf {
        self.directory().join("server.log")
    }

    /// Starts the server and waits until it answers.
    #[track_caller]
    pub fn boot(&mut self) -> Duration {
        self.spawn();
        let what = format!("health of the server at {}", self.control());
        let took = wait_until(&what, START_MAX, || {
            if let Some(status) = self.process.as_mut().unwrap().try_wait().unwrap() {
                panic!("the server ended with {status}: {}", tail(&self.log()));
            }
            self.is_healthy()
        });
        if self.token.is_none() {
            let told = || fs::read_to_string(self.token_file()).ok().map(|text| text.trim().to_owned());
            self.token = Some(wait_for("the administrator's token", START_MAX, told).0);
        }
        took
    }

    /// Starts the server and waits for nothing.
    pub fn spawn(&mut self) {
        assert!(self.process.is_none(), "the server runs already");
        self.start_server(&[]);
    }

    fn start_server(&mut self, more: &[&str]) {
        let log = File::options().create(true).append(true).open(self.log_file()).unwrap();
        let mut command = self.server_command();
        command.args(more);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        self.process = Some(command.spawn().unwrap());
    }

    /// `orca server` as this node runs it.
    pub fn server_command(&self) -> Command {
        let mut command = self.command();
        command.arg("server").arg("--data-dir").arg(self.data_dir()).args(["--name", "n1"]);
        command.args(["--http", &self.proxy().to_string(), "--listen", &self.control().to_string()]);
        command.args(&self.setup.arguments);
        command
    }

    /// Runs a second server as this node is set up, which is expected to end by itself.
    #[track_caller]
    pub fn server_fails(&self) -> Ran {
        Running::start(self.server_command(), b"").end()
    }

    pub fn is_healthy(&self) -> bool {
        matches!(request(self.control(), "GET", "/api/v1/health", &[], b""), Ok(answer) if answer.status == 200)
    }

    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(|process| process.try_wait().unwrap().is_none())
    }

    /// SIGKILL, if it runs still, and wait for the end.
    pub fn kill9(&mut self) {
        let mut process = self.process.take().expect("the server runs");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// SIGTERM, and wait for the end.
    #[track_caller]
    pub fn terminate(&mut self) -> Duration {
        let mut process = self.process.take().expect("the server runs");
        signal(process.id(), "TERM");
        wait_for("the server's end after SIGTERM", STOP_MAX, || process.try_wait().unwrap()).1
    }

    /// A successor takes over from the server that runs; gives how long that one took to end.
    #[track_caller]
    pub fn hand_over(&mut self) -> Duration {
        let mut old = self.process.take().expect("the server runs");
        self.start_server(&["--take-over"]);
        let took = wait_for("the end of the predecessor", STOP_MAX, || old.try_wait().unwrap()).1;
        wait_until("health of the successor", START_MAX, || self.is_healthy());
        assert!(self.is_running(), "the successor ended: {}", tail(&self.log()));
        took
    }

    /// A successor takes over and serves; gives the predecessor, which ends when its requests have.
    #[track_caller]
    pub fn succeed(&mut self) -> Child {
        let old = self.process.take().expect("the server runs");
        let taken_over = |node: &Node| node.log().matches("taken over from").count();
        let before = taken_over(self);
        self.start_server(&["--take-over"]);
        wait_until("a successor that serves", START_MAX, || taken_over(self) > before);
        wait_until("health of the successor", START_MAX, || self.is_healthy());
        old
    }

    /// `orca` with this node's contexts, and of the environment of the tests no more than a shell needs.
    pub fn command(&self) -> Command {
        let mut command = Command::new(orca_binary());
        command.current_dir(self.directory()).env_clear();
        for name in ["PATH", "DOCKER_HOST", "LLVM_PROFILE_FILE"] {
            if let Some(value) = std::env::var_os(name) {
                command.env(name, value);
            }
        }
        command
            .env("HOME", self.directory())
            .env("ORCA_CONTEXT", self.contexts())
            .env("TERM", "dumb")
            .env("LC_ALL", "C.UTF-8");
        command.envs(self.setup.env.iter().map(|(name, value)| (name, value)));
        command
    }

    /// Runs `orca …` to its end.
    #[track_caller]
    pub fn orca(&self, arguments: &[&str]) -> Ran {
        self.start_orca(arguments).end()
    }

    #[track_caller]
    pub fn orca_with_input(&self, arguments: &[&str], input: &str) -> Ran {
        self.start_orca_with_input(arguments, input).end()
    }

    /// Starts `orca …`.
    pub fn start_orca(&self, arguments: &[&str]) -> Running {
        self.start_orca_with_input(arguments, "")
    }

    pub fn start_orca_with_input(&self, arguments: &[&str], input: &str) -> Running {
        let mut command = self.command();
        command.args(arguments);
        Running::start(command, input.as_bytes())
    }

    /// The one result of `orca … --json`, which must succeed.
    #[track_caller]
    pub fn json(&self, arguments: &[&str]) -> Value {
        self.orca(&[arguments, &["--json"]].concat()).succeeded().json()
    }

    /// All that `orca … --json` prints; it must succeed.
    #[track_caller]
    pub fn json_lines(&self, arguments: &[&str]) -> Vec<Value> {
        self.orca(&[arguments, &["--json"]].concat()).succeeded().json_lines()
    }

    /// Writes a service file. The project's, unless it names another.
    pub fn write(&self, toml: &str) -> PathBuf {
        static FILES: AtomicU16 = AtomicU16::new(0);
        let text = if toml.trim_start().starts_with("project") {
            toml.to_owned()
        } else {
            format!("project = \"{}\"\n{toml}", self.project)
        };
        let directory = self.directory().join(format!("files-{}", FILES.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir_all(&directory).unwrap();
        let file = directory.join("service.toml");
        fs::write(&file, text).unwrap();
        file
    }

    /// Deploys these services and waits until they have settled.
    #[track_caller]
    pub fn deploy(&self, toml: &str) -> Ran {
        self.deploy_with(toml, &[])
    }

    #[track_caller]
    pub fn deploy_with(&self, toml: &str, arguments: &[&str]) -> Ran {
        self.start_deploy(toml, arguments).end()
    }

    pub fn start_deploy(&self, toml: &str, arguments: &[&str]) -> Running {
        let file = self.write(toml);
        self.start_orca(&[&["deploy", "-y", "-f", file.to_str().unwrap()], arguments].concat())
    }

    /// `service` alone is looked up by every command; with the project it is sure to be meant.
    pub fn name(&self, service: &str) -> String {
        format!("{}/{service}", self.project)
    }

    #[track_caller]
    pub fn set_secret(&self, name: &str, value: &str) {
        self.orca_with_input(&["secrets", "set", name, "--project", &self.project], value).succeeded();
    }

    /// What `orca status --json` says of a service; null if it is not there.
    #[track_caller]
    pub fn status(&self, service: &str) -> Value {
        let status = self.json(&["status"]);
        let name = self.name(service);
        let services = status["services"].as_array().unwrap_or_else(|| panic!("no services in {status}"));
        services.iter().find(|service| service["name"] == *name).cloned().unwrap_or(Value::Null)
    }

    /// What `orca history --json` says of a service.
    #[track_caller]
    pub fn history(&self, service: &str) -> Value {
        self.json(&["history", &self.name(service)])
    }

    /// The receipt of the service's last rollout.
    #[track_caller]
    pub fn last_receipt(&self, service: &str) -> Value {
        let history = self.history(service);
        let receipts = history["receipts"].as_array().unwrap_or_else(|| panic!("no receipts in {history}"));
        receipts.last().unwrap_or_else(|| panic!("no receipt in {history}")).clone()
    }

    /// GET through the proxy.
    pub fn get(&self, service: &str, path: &str) -> io::Result<Answer> {
        request(self.proxy(), "GET", path, &[("host", &format!("{service}.test"))], b"")
    }

    /// The text that a service answers there with 200.
    #[track_caller]
    pub fn text(&self, service: &str, path: &str) -> String {
        let answer = self.get(service, path).unwrap_or_else(|error| panic!("GET {path} of {service}: {error}"));
        assert_eq!(answer.status, 200, "GET {path} of {service}: {}", answer.body);
        answer.body
    }

    /// The HTTP API, with the administrator's token.
    #[track_caller]
    pub fn api(&self, method: &str, path: &str, body: &str) -> Answer {
        self.api_as(self.token(), method, path, body)
    }

    #[track_caller]
    pub fn api_as(&self, token: &str, method: &str, path: &str, body: &str) -> Answer {
        let bearer = format!("Bearer {token}");
        let kind = if body.trim_start().starts_with('{') { "application/json" } else { "application/toml" };
        let fields = [("authorization", bearer.as_str()), ("content-type", kind)];
        let answer = request(self.control(), method, path, &fields, body.as_bytes());
        answer.unwrap_or_else(|error| panic!("{method} {path}: {error}"))
    }

    /// A service's value of a metric, added up over all else that it is broken down by.
    #[track_caller]
    pub fn metric(&self, name: &str, service: &str) -> u64 {
        let page = self.api("GET", "/metrics", "");
        assert_eq!(page.status, 200, "{}", page.body);
        let label = format!("project=\"{}\",service=\"{service}\"", self.project);
        let of_it = page.body.lines().filter(|line| line.starts_with(name) && line.contains(&label));
        let values = of_it.map(|line| line.rsplit_once(' ').unwrap().1.parse::<u64>().unwrap());
        values.sum()
    }
}

impl Drop for Node {
    /// Also when the test failed: an engine has room for few networks.
    fn drop(&mut self) {
        if let Some(mut process) = self.process.take() {
            // One that has ended by itself needs neither.
            drop(process.kill());
            drop(process.wait());
        }
        if std::thread::panicking() {
            let log = tail(&self.log());
            // Nobody to tell when standard error is gone.
            drop(writeln!(io::stderr(), "--- the log of {} ({})\n{log}", self.project, self.control()));
        }
        if !orca_tests::docker::is_skipped() {
            clean(&self.project);
        }
    }
}

/// Removes whatever in the engine bears this name.
fn clean(project: &str) {
    let name = format!("name=orca-{project}");
    let quiet = |arguments: &[&str]| {
        let output = Command::new("docker").args(arguments).stderr(Stdio::null()).output();
        output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default()
    };
    for (list, remove) in [
        (&["ps", "--all", "--quiet"][..], &["rm", "--force", "--volumes"][..]),
        (&["network", "ls", "--quiet"], &["network", "rm"]),
        (&["volume", "ls", "--quiet"], &["volume", "rm", "--force"]),
    ] {
        let found = quiet(&[list, &["--filter", &name]].concat());
        let found: Vec<&str> = found.lines().collect();
        if !found.is_empty() {
            quiet(&[remove, &found].concat());
        }
    }
}

pub fn signal(pid: u32, name: &str) {
    let status = Command::new("kill").args(["-s", name, &pid.to_string()]).status().unwrap();
    assert!(status.success(), "cannot send {name} to {pid}");
}

fn tail(log: &str) -> String {
    let lines: Vec<&str> = log.lines().collect();
    lines[lines.len().saturating_sub(LOG_LINES_SHOWN)..].join("\n")
}

/// The answer to one request.
#[derive(Debug, Clone)]
pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|error| panic!("{error}: {}", self.body))
    }
}

/// One request on a connection of its own, over HTTP/1.0 so that the answer ends with the connection.
pub fn request(to: SocketAddr, method: &str, path: &str, fields: &[(&str, &str)], body: &[u8]) -> io::Result<Answer> {
    let mut stream = TcpStream::connect(to)?;
    stream.set_read_timeout(Some(ANSWER_MAX))?;
    let mut head = format!("{method} {path} HTTP/1.0\r\nconnection: close\r\ncontent-length: {}\r\n", body.len());
    if !fields.iter().any(|(name, _)| *name == "host") {
        head.push_str(&format!("host: {to}\r\n"));
    }
    fields.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
    stream.write_all(&[head.as_bytes(), b"\r\n", body].concat())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    let cut = || io::Error::new(io::ErrorKind::UnexpectedEof, "the answer has no head");
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").ok_or_else(cut)?;
    let head = String::from_utf8_lossy(&bytes[..end]).into_owned();
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(cut)?;
    Ok(Answer { status, head, body: String::from_utf8_lossy(&bytes[end + 4..]).into_owned() })
}

/// A service in a container of `orca-test/app:VERSION`, reached as `NAME.test`. `more` is TOML of the service: its
/// first lines are keys, tables come after.
pub fn container(name: &str, version: &str, more: &str) -> String {
    format!(
        "[[service]]\nname = \"{name}\"\nimage = \"orca-test/app:{version}\"\nport = 8080\ndomain = \"{name}.test\"\n\
         routes = [\"/*\"]\nhealth = \"/healthz\"\n{more}\n"
    )
}

/// A service of a Wasm component, by the path of its file.
pub fn module(name: &str, path: &Path, more: &str) -> String {
    let path = path.display();
    format!(
        "[[service]]\nname = \"{name}\"\nmodule = \"{path}\"\ndomain = \"{name}.test\"\nroutes = [\"/*\"]\n{more}\n"
    )
}

/// The same of the component that does what it is told: `tests/fixtures/probe`. It answers `/version` with its
/// variable `VERSION`.
pub fn probe(name: &str, more: &str) -> String {
    module(name, &Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/probe.wasm"), more)
}
