//! What a person notices of Orca, measured from outside: memory, size, and how long things take. Drives a real
//! `orca server` of its own through the real command line, looks at it with plain sockets, and prints a table.
//!
//! `figures ORCA [RUNS]`; `bench/figures.sh` builds what it needs.

#![expect(clippy::print_stdout, reason = "printing figures is what it does")]

use std::error::Error;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

const RUNS: usize = 5;
/// Longest that anything here may take; past it there is nothing to measure.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two looks at whether a service answers: the resolution of what is measured so.
const LOOK_EVERY: Duration = Duration::from_micros(500);
/// A server is idle when it has had nothing to do for so long.
const SETTLED_AFTER: Duration = Duration::from_secs(5);
/// Requests, one after another, of which the median time is taken.
const REQUESTS: usize = 4_000;
/// Answers to `/` with a line; built by `cargo xtask images`.
const IMAGE: &str = "orca-test/app:1";

fn main() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let orca = fs::canonicalize(arguments.next().ok_or("usage: figures ORCA [RUNS]")?)?;
    let runs = arguments.next().map_or(Ok(RUNS), |text| text.parse())?;
    let has_docker =
        Command::new("docker").args(["image", "inspect", IMAGE]).output().is_ok_and(|o| o.status.success());
    let module = fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples/hello/hello.wasm"))?;

    let mut table = Table::default();
    table.row("stripped binary", megabytes(fs::metadata(&orca)?.len()), "≤ 35 MB");
    let node = Node::start(orca)?;
    std::thread::sleep(SETTLED_AFTER);
    let memory = Memory::of(node.process.id())?;
    table.row("idle server, resident", megabytes(memory.resident), "≤ 40 MB");
    table.row("idle server, proportional", megabytes(memory.proportional), "–");
    table.row("of it, private and written to", megabytes(memory.anonymous), "–");

    let mut fresh = Vec::new();
    let mut known = Vec::new();
    for run in 0..runs {
        // Another digest each time, so that it is compiled each time.
        let file = node.write(&format!("{run}.wasm"), &distinct(&module, run))?;
        fresh.push(node.time_deploy(&format!("fresh{run}"), &of_module(&file))?);
        known.push(node.time_deploy(&format!("known{run}"), &of_module(&file))?);
    }
    table.times("deploy a module never seen, to its first 200", fresh, "–");
    table.times("deploy a module compiled before, to its first 200", known, "≤ 150 ms");
    if has_docker {
        let mut containers = Vec::new();
        for run in 0..runs {
            containers.push(node.time_deploy(&format!("box{run}"), &of_container())?);
        }
        table.times("deploy a container whose image is here, to its first 200", containers, "≤ 1.5 s");
    }
    let mut nothing = Vec::new();
    for _ in 0..runs {
        let begin = Instant::now();
        node.deploy("known0")?;
        nothing.push(begin.elapsed());
    }
    table.times("deploy that changes nothing", nothing, "< 200 ms");

    table.times("a request to the module, one at a time", node.time_requests("known0")?, "–");
    if has_docker {
        table.times("a request to the container, one at a time", node.time_requests("box0")?, "–");
        let mut failovers = Vec::new();
        for run in 0..runs {
            failovers.push(node.time_failover(&format!("box{run}"))?);
        }
        table.times("a killed container's service answers again", failovers, "≤ 1 s + its start");
    }
    std::thread::sleep(SETTLED_AFTER);
    let memory = Memory::of(node.process.id())?;
    table.row("after all that, resident", megabytes(memory.resident), "–");
    drop(node);
    print!("{}", table.0);
    Ok(())
}

/// Lines of a table in Markdown.
#[derive(Default)]
struct Table(String);

impl Table {
    fn row(&mut self, what: &str, figure: String, goal: &str) {
        self.0.push_str(&format!("| {what} | {figure} | {goal} |\n"));
    }

    /// The median, and the span it lies in.
    fn times(&mut self, what: &str, mut times: Vec<Duration>, goal: &str) {
        times.sort();
        let (best, median, worst) = (times[0], times[times.len() / 2], times[times.len() - 1]);
        self.row(what, format!("{median:.1?} ({best:.1?} – {worst:.1?})"), goal);
    }
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// What `/proc` says of a process's memory, in bytes.
struct Memory {
    resident: u64,
    proportional: u64,
    anonymous: u64,
}

impl Memory {
    fn of(process: u32) -> Result<Memory> {
        let text = fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
        let field = |name: &str| -> Result<u64> {
            let line = text.lines().find(|line| line.starts_with(name)).ok_or("a field of smaps_rollup is missing")?;
            Ok(line.split_whitespace().nth(1).ok_or("a field without a value")?.parse::<u64>()? * 1024)
        };
        Ok(Memory { resident: field("Rss:")?, proportional: field("Pss:")?, anonymous: field("Anonymous:")? })
    }
}

/// The same component with a custom section more.
fn distinct(module: &[u8], run: usize) -> Vec<u8> {
    let content = format!("{}-{run}", std::process::id());
    let name = b"run";
    let mut bytes = module.to_vec();
    bytes.extend([0, u8::try_from(1 + name.len() + content.len()).expect("a short section"), name.len() as u8]);
    bytes.extend(name);
    bytes.extend(content.as_bytes());
    bytes
}

fn of_module(file: &Path) -> String {
    format!("module = {:?}\n", file.display().to_string())
}

fn of_container() -> String {
    format!("image = {IMAGE:?}\nport = 8080\nreadiness = {{ path = \"/healthz\", interval_secs = 1 }}\n")
}

/// A server in a directory of its own. Everything it started is gone when it is dropped.
struct Node {
    orca: PathBuf,
    directory: PathBuf,
    proxy: SocketAddr,
    process: Child,
    /// Docker's names carry no cluster.
    prefix: String,
}

impl Node {
    fn start(orca: PathBuf) -> Result<Node> {
        let prefix = format!("figures{}", std::process::id());
        let directory = std::env::temp_dir().join(format!("orca-{prefix}"));
        fs::create_dir_all(&directory)?;
        let (proxy, control) = (free_address()?, free_address()?);
        let log = File::create(directory.join("log"))?;
        let mut command = Command::new(&orca);
        command.arg("server").arg("--data-dir").arg(directory.join("data"));
        command.args(["--http", &proxy.to_string(), "--listen", &control.to_string()]);
        command.env("HOME", &directory).env("ORCA_CONTEXT", directory.join("contexts.toml"));
        let process = command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?;
        let node = Node { orca, directory, proxy, process, prefix };
        until("the server", || node.orca(&["status"]).is_ok())?;
        Ok(node)
    }

    fn orca(&self, arguments: &[&str]) -> Result<()> {
        let mut command = Command::new(&self.orca);
        command.args(arguments).env("HOME", &self.directory).env("ORCA_CONTEXT", self.directory.join("contexts.toml"));
        let output = command.stdin(Stdio::null()).output()?;
        if output.status.success() {
            return Ok(());
        }
        let (said, complained) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        Err(format!("orca {}: {}\n{said}{complained}", arguments.join(" "), output.status).into())
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<PathBuf> {
        let file = self.directory.join(name);
        fs::write(&file, bytes)?;
        Ok(file)
    }

    fn project(&self, name: &str) -> String {
        format!("{}-{name}", self.prefix)
    }

    fn deploy(&self, name: &str) -> Result<()> {
        let file = self.directory.join(format!("{name}.toml")).display().to_string();
        self.orca(&["deploy", "--yes", "--file", &file])
    }

    /// From the start of `orca deploy` to the end of the first answer.
    fn time_deploy(&self, name: &str, service: &str) -> Result<Duration> {
        let project = self.project(name);
        let routed = format!("[[service]]\nname = \"web\"\ndomain = \"{name}.test\"\nroutes = [\"/*\"]\n{service}");
        self.write(&format!("{name}.toml"), format!("project = {project:?}\n{routed}").as_bytes())?;
        std::thread::scope(|scope| {
            let begin = Instant::now();
            let deploying = scope.spawn(move || self.deploy(name).map_err(|error| error.to_string()));
            let took = until("the service", || self.answers(name)).map(|()| begin.elapsed());
            deploying.join().expect("it does not panic")?;
            took
        })
    }

    fn answers(&self, name: &str) -> bool {
        self.client(name).and_then(|mut client| client.get()).is_ok_and(|status| status == 200)
    }

    fn client(&self, name: &str) -> io::Result<Client> {
        let stream = TcpStream::connect(self.proxy)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        Ok(Client { stream, request: format!("GET / HTTP/1.1\r\nHost: {name}.test\r\n\r\n") })
    }

    fn time_requests(&self, name: &str) -> Result<Vec<Duration>> {
        let mut client = self.client(name)?;
        let mut times = Vec::with_capacity(REQUESTS);
        for _ in 0..REQUESTS {
            let begin = Instant::now();
            if client.get()? != 200 {
                return Err("a request was not answered with 200".into());
            }
            times.push(begin.elapsed());
        }
        Ok(times)
    }

    /// From the death of a service's one container to the next whole answer.
    fn time_failover(&self, name: &str) -> Result<Duration> {
        let filter = format!("name=orca-{}-web-", self.project(name));
        let listed = Command::new("docker").args(["ps", "--quiet", "--filter", &filter]).output()?;
        let id = String::from_utf8(listed.stdout)?.trim().to_owned();
        let inspected = Command::new("docker").args(["inspect", "--format", "{{.State.Pid}}", &id]).output()?;
        let process = String::from_utf8(inspected.stdout)?.trim().to_owned();
        // Without Docker's help: it would take its time to say that it is done.
        let killed = Command::new("kill").args(["-KILL", &process]).status()?;
        if !killed.success() {
            return Err(format!("the container {id} of {name} could not be killed").into());
        }
        let begin = Instant::now();
        // The first process of a container takes the others with it, and is gone after them.
        let status = PathBuf::from(format!("/proc/{process}"));
        until("the container's end", || !status.exists())?;
        until("the service", || self.answers(name))?;
        Ok(begin.elapsed())
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let filter = format!("name=orca-{}", self.prefix);
        // What cannot be removed stays; there is nobody to tell but the one who reads `docker ps`.
        for (list, remove) in [(["ps", "--all"], &["rm", "--force"][..]), (["network", "ls"], &["network", "rm"])] {
            let listed = Command::new("docker").args(list).args(["--quiet", "--filter", &filter]).output();
            let listed = listed.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
            for id in listed.lines() {
                let _ = Command::new("docker").args(remove).arg(id).output();
            }
        }
        let _ = fs::remove_dir_all(&self.directory);
    }
}

/// An address nobody uses now, by TCP or UDP.
fn free_address() -> io::Result<SocketAddr> {
    TcpListener::bind("127.0.0.1:0")?.local_addr()
}

fn until(what: &str, mut is_so: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        if Instant::now() > deadline {
            return Err(format!("{what} did not answer within {PATIENCE:?}").into());
        }
        std::thread::sleep(LOOK_EVERY);
    }
    Ok(())
}

/// A connection on which requests are sent one after another.
struct Client {
    stream: TcpStream,
    request: String,
}

impl Client {
    /// Sends the request, takes the whole answer, and says its status.
    fn get(&mut self) -> io::Result<u16> {
        self.stream.write_all(self.request.as_bytes())?;
        let mut answer = Vec::new();
        let mut piece = [0; 4096];
        loop {
            let read = self.stream.read(&mut piece)?;
            answer.extend_from_slice(&piece[..read]);
            let text = String::from_utf8_lossy(&answer);
            if let Some((head, body)) = text.split_once("\r\n\r\n") {
                let head = head.to_ascii_lowercase();
                let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")?.parse().ok());
                let is_whole = match length {
                    Some(length) => body.len() >= length,
                    None => body.ends_with("0\r\n\r\n"),
                };
                if is_whole {
                    return head.get(9..12).and_then(|code| code.parse().ok()).ok_or(io::ErrorKind::InvalidData.into());
                }
            }
            if read == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }
}
