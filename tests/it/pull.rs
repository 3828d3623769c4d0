//! An image that takes long to come: it is told how far it is, and its time is not that of the revision.

use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::process::Command;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;

use crate::support::{Node, PATIENCE, Registry, docker, requires_docker, wait_until};

/// Of an image, what its base does not have.
const LAYER_BYTES: usize = 8_400_000;
/// What comes before the gate is opened. The engine tells less, of what comes all at once.
const LET_THROUGH: usize = 4_200_000;

/// Passes on what clients say to a registry, and of its answers only so many bytes until it is opened.
#[derive(Clone)]
struct Gate {
    address: String,
    left: Arc<(Mutex<Option<usize>>, Condvar)>,
}

impl Gate {
    fn before(registry: &Registry) -> Gate {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let gate = Gate { address, left: Arc::new((Mutex::new(Some(LET_THROUGH)), Condvar::new())) };
        let (passing, to) = (gate.clone(), registry.address.clone());
        thread::spawn(move || {
            for near in listener.incoming() {
                let (near, far) = (near.unwrap(), TcpStream::connect(&to).unwrap());
                let (mut asks, mut asked) = (near.try_clone().unwrap(), far.try_clone().unwrap());
                thread::spawn(move || {
                    // A connection that breaks is for whoever made it to see.
                    drop(io::copy(&mut asks, &mut asked));
                    drop(asked.shutdown(Shutdown::Write));
                });
                let passing = passing.clone();
                thread::spawn(move || drop(passing.answer(far, near)));
            }
        });
        gate
    }

    fn answer(&self, mut far: TcpStream, mut near: TcpStream) -> io::Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            let length = far.read(&mut buffer)?;
            if length == 0 {
                return near.shutdown(Shutdown::Both);
            }
            let (left, opened) = &*self.left;
            let mut left = opened.wait_while(left.lock().unwrap(), |left| *left == Some(0)).unwrap();
            *left = left.map(|left| left.saturating_sub(length));
            drop(left);
            near.write_all(&buffer[..length])?;
        }
    }

    fn open(&self) {
        *self.left.0.lock().unwrap() = None;
        self.left.1.notify_all();
    }
}

/// `orca-test/app:1` and a layer that nobody has, in the registry only.
fn push(registry: &Registry) {
    let place = tempfile::tempdir().unwrap();
    let file = place.path().join("layer");
    let mut bytes = Vec::new();
    std::fs::File::open("/dev/urandom").unwrap().take(LAYER_BYTES as u64).read_to_end(&mut bytes).unwrap();
    std::fs::write(&file, bytes).unwrap();
    let image = format!("{}/org/large:1", registry.address);
    let container = docker(&["create", "orca-test/app:1"]).trim().to_owned();
    docker(&["cp", file.to_str().unwrap(), &format!("{container}:/layer")]);
    docker(&["commit", &container, &image]);
    docker(&["rm", &container]);
    docker(&["push", &image]);
    docker(&["rmi", &image]);
}

#[test]
fn a_pull_that_takes_longer_than_a_replica_may_take_to_get_ready_is_told_and_waited_for() {
    requires_docker!();
    let registry = Registry::start(None);
    push(&registry);
    let gate = Gate::before(&registry);
    let image = format!("{}/org/large:1", gate.address);
    let node = Node::start();
    let toml = format!(
        "[[service]]\nname = \"web\"\nimage = \"{image}\"\nport = 8080\ndomain = \"web.test\"\nroutes = [\"/*\"]\n\
         [service.deploy]\nready_timeout_secs = 5\n"
    );
    let deploying = node.start_deploy(&toml, &[]);
    wait_until("what has come of the whole, after the time to get ready", PATIENCE, || {
        let told = deploying.stderr();
        let later = told.split("still waiting after 10s: for the image of r1: pulling ").nth(1);
        later.is_some_and(|rest| rest.contains(" of 8.4 MB"))
    });
    let why = node.orca(&["why", &node.name("web")]);
    assert!(why.stdout.contains(" of 8.4 MB"), "{why}");
    let replica = &node.status("web")["replicas"][0];
    let [bytes, total] = ["bytes", "total"].map(|key| replica["pulling"][key].as_u64().unwrap());
    assert!(bytes < total && total > LAYER_BYTES as u64, "{replica}");
    gate.open();
    let deployed = deploying.end();
    eprintln!("{deployed}");
    deployed.succeeded();
    assert_eq!(node.text("web", "/version").trim(), "1");
    assert_eq!(node.status("web")["replicas"][0]["pulling"], serde_json::Value::Null);
    drop(node);
    drop(Command::new("docker").args(["rmi", "--force", &image]).output());
}
