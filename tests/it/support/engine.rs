//! A Docker engine of a test's own, to be killed and started again. It shares the host's network with the usual one and
//! leaves its packet filter alone; what distinguishes it are its directories, its socket and its addresses.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::node::signal;
use super::ran::Running;
use super::wait::{PATIENCE, wait_until};

/// Away from Docker's own pools, so that no two networks meet.
const ADDRESSES: &str = "base=10.213.0.0/16,size=24";

#[derive(Debug)]
pub struct Engine {
    /// Short: a socket's path has 107 bytes at most.
    directory: TempDir,
    keeps_containers: bool,
    process: Option<Child>,
}

impl Engine {
    /// One that runs and has the test images. `keeps_containers` is Docker's `live-restore`: containers run on without
    /// their engine, else they are stopped with it.
    #[track_caller]
    pub fn start(keeps_containers: bool) -> Engine {
        let directory = tempfile::Builder::new().prefix("engine-").tempdir().unwrap();
        let mut engine = Engine { directory, keeps_containers, process: None };
        // Without a key of its own it would have the identity of the usual one.
        let key = engine.path("key.json");
        fs::write(engine.path("daemon.json"), format!("{{\"deprecated-key-path\":{key:?}}}")).unwrap();
        engine.boot();
        let archive = engine.path("images.tar");
        super::docker(&["save", "--output", archive.to_str().unwrap(), "orca-test/app:1", "orca-test/app:2"]);
        engine.docker(&["load", "--quiet", "--input", archive.to_str().unwrap()]);
        engine
    }

    /// As `DOCKER_HOST` names it.
    pub fn host(&self) -> String {
        format!("unix://{}", self.path("docker.sock").display())
    }

    /// Starts it and waits until it answers.
    #[track_caller]
    pub fn boot(&mut self) {
        // Of a killed one; the new one would wait for a containerd that is gone.
        for left in ["docker.pid", "exec/containerd/containerd.pid"] {
            drop(fs::remove_file(self.path(left)));
        }
        let log = File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = Command::new("dockerd");
        command.arg("--config-file").arg(self.path("daemon.json"));
        command.arg("--data-root").arg(self.path("data")).arg("--exec-root").arg(self.path("exec"));
        command.arg("--pidfile").arg(self.path("docker.pid")).args(["--host", &self.host()]);
        command.args(["--bridge", "none", "--default-address-pool", ADDRESSES]);
        command.args(["--iptables=false", "--ip6tables=false", "--ip-forward=false"]);
        command.arg(format!("--live-restore={}", self.keeps_containers));
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).process_group(0);
        self.process = Some(command.spawn().unwrap());
        wait_until("an answer of the test's own engine", PATIENCE, || self.answers());
    }

    fn answers(&self) -> bool {
        let mut command = self.command();
        command.args(["version"]).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().is_ok_and(|status| status.success())
    }

    /// SIGKILL: the engine is gone, its containers are not.
    pub fn kill9(&mut self) {
        let mut process = self.process.take().expect("the engine runs");
        process.kill().unwrap();
        process.wait().unwrap();
    }

    /// SIGTERM, as its service manager does it, and wait for the end.
    #[track_caller]
    pub fn terminate(&mut self) {
        let mut process = self.process.take().expect("the engine runs");
        signal(process.id(), "TERM");
        wait_until("the end of the test's own engine", PATIENCE, || process.try_wait().unwrap().is_some());
    }

    fn command(&self) -> Command {
        let mut command = Command::new("docker");
        command.env("DOCKER_HOST", self.host());
        command
    }

    /// Runs `docker` with this engine; it must succeed, and gives what it printed.
    #[track_caller]
    pub fn docker(&self, arguments: &[&str]) -> String {
        let mut command = self.command();
        command.args(arguments);
        Running::start(command, b"").end().succeeded().stdout.trim_end().to_owned()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.process.is_none() && !std::thread::panicking() {
            self.boot();
        }
        if let Some(mut process) = self.process.take() {
            // Its containers first: they would outlive it.
            let list = self.command().args(["ps", "--all", "--quiet"]).output();
            let list = list.map(|output| String::from_utf8_lossy(&output.stdout).into_owned()).unwrap_or_default();
            let ids: Vec<&str> = list.split_whitespace().collect();
            if !ids.is_empty() {
                drop(self.command().args(["rm", "--force", "--volumes"]).args(ids).output());
            }
            drop(self.command().args(["network", "prune", "--force"]).output());
            signal(process.id(), "TERM");
            drop(process.wait());
        }
        if std::thread::panicking() {
            eprintln!("--- the log of the test's own engine\n{}", tail(&self.path("log")));
        }
        unmount_below(self.directory.path());
    }
}

/// What a killed engine left mounted keeps the directory from being removed.
fn unmount_below(directory: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let mut below: Vec<&str> = points.filter(|point| Path::new(point).starts_with(directory)).collect();
    below.reverse();
    for point in below {
        drop(Command::new("umount").args(["--lazy", point]).stderr(Stdio::null()).status());
    }
}

fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}
