//! The table. Each row is injected for real; the code and the words are what `orca why` must say of it.

use std::fs;
use std::path::PathBuf;

use super::World;
use super::fault::{Case, Fault, Place};
use crate::support::{PATIENCE, docker, module, probe, wait_until};

pub fn all(world: &World) -> Vec<Fault> {
    let groups = [
        images(world),
        commands(world),
        exits(),
        endings(),
        listening(),
        readiness(),
        liveness(),
        secrets(),
        host(world),
        room(),
        others(),
        modules(world),
    ];
    groups.into_iter().flatten().collect()
}

/// Having the image.
fn images(world: &World) -> Vec<Fault> {
    let of =
        |name: &str, image: &str, tables: &str| service(name, &format!("image = \"{image}\"\nport = 8080"), tables);
    let private = format!("{}/org/private:1", world.closed.address);
    let wrong = "[service.registry]\nusername = \"reader\"\npassword = \"${secrets.WRONG_PASSWORD}\"";
    vec![
        Fault::new("image-missing", of("image-missing", &format!("{}/org/gone:1", world.open.address), ""))
            .is("image-missing", ["/org/gone:1 does not exist"]),
        Fault::new("image-for-members", of("image-for-members", &private, ""))
            .is("image-denied", ["/org/private:1 only to those who log in"]),
        Fault::new("wrong-password", of("wrong-password", &private, wrong))
            .is("image-denied", ["refuses to give", "the credentials in [service.registry]"]),
        Fault::new("no-registry", of("no-registry", "127.0.0.1:1/org/app:1", ""))
            .is("registry-unreachable", ["cannot reach the registry 127.0.0.1:1", "connection refused"]),
        Fault::new("wrong-architecture", of("wrong-architecture", "orca-test/app:wrongarch", ""))
            .is("wrong-architecture", ["is built for", "and the node is"]),
    ]
}

/// Starting what the image has.
fn commands(world: &World) -> Vec<Fault> {
    let of = |name: &'static str, image: &str| {
        Fault::new(name, service(name, &format!("image = \"{}\"", world.images.tag(image)), ""))
    };
    vec![
        Fault::new("command-missing", bare("command-missing", &["/no-such-program"], ""))
            .is("no-such-command", ["`/no-such-program` cannot be run: no such file in the image"]),
        Fault::new("command-not-in-path", bare("command-not-in-path", &["serve", "--prod"], ""))
            .is("no-such-command", ["`serve` cannot be run", "looked in", "/usr/bin/serve"]),
        Fault::new("command-is-directory", bare("command-is-directory", &["/tmp"], ""))
            .is("no-such-command", ["`/tmp` cannot be run: /tmp is a directory"]),
        of("entry-point-missing", "no-file").is("no-such-command", ["`/run` cannot be run: no such file in the image"]),
        of("not-executable", "no-mode").is("no-such-command", ["`/run` cannot be run: /run is not executable"]),
        of("no-interpreter", "no-shell")
            .is("exec-failed", ["`/run` is in the image and cannot be started: its interpreter"]),
        of("not-a-program", "no-format")
            .is("exec-failed", ["`/run` is in the image and cannot be started", "or it is no program"]),
        of("library-missing", "no-library").is("missing-library", ["which is not in the image", "shared libraries"]),
    ]
}

/// Ending before it was ever ready.
fn exits() -> Vec<Fault> {
    let volume = "[[service.volume]]\nname = \"settings\"\npath = \"/data\"\nread_only = true";
    vec![
        Fault::new("exit-0", bare("exit-0", &["/orca-test-app", "echo", "all done"], ""))
            .is("crash-looping", ["exits with code 0", "must go on running", "log: all done", "times in a row"]),
        Fault::new("exit-1", app("exit-1", "", "[service.env]\nEXIT_AT_START = \"1\""))
            .is("crash-looping", ["exits with code 1", "log: fatal: told to exit with 1 at start"]),
        Fault::new("exit-127", bare("exit-127", &["/orca-test-app", "exit", "127"], ""))
            .is("crash-looping", ["exits with code 127", "log: exit 127"]),
        Fault::new("segmentation-fault", bare("segmentation-fault", &["/orca-test-app", "raise", "11"], ""))
            .is("crash-looping", ["it is killed by SIGSEGV (code 139)"]),
        Fault::new("read-only", bare("read-only", &["/orca-test-app", "write", "/data/x"], volume))
            .is("read-only", ["exits with code 1", "read-only", "log: cannot write /data/x"]),
        Fault::new("disk-full", bare("disk-full", &["/orca-test-app", "write", "/dev/full"], ""))
            .is("disk-full", ["a disk it writes to is full", "No space left on device"]),
        Fault::new("exit-after-a-while", bare("exit-after-a-while", &["/orca-test-app", "sleep", "2000"], ""))
            .later(|_| {})
            .is("crash-looping", ["exits with code 0 after 2.", "times in a row"]),
    ]
}

/// Ending after it was ready; it serves again at once, and that it did not is still worth telling.
fn endings() -> Vec<Fault> {
    vec![
        Fault::new("exit-later", app("exit-later", "", ""))
            .later(|case| case.get("/exit?3"))
            .is("exited", ["it serves, but was restarted", "exited with code 3", "log: told to exit with 3"]),
        Fault::new("abort", app("abort", "", ""))
            .later(|case| case.get("/crash"))
            .is("exited", ["it was killed by SIGABRT (code 134)", "log: told to crash"]),
        Fault::new("killed", app("killed", "", ""))
            .later(|case| drop(docker(&["kill", &case.container()])))
            .is("exited", ["it was killed by SIGKILL (code 137)"]),
        Fault::new("out-of-memory", app("out-of-memory", "", "[service.resources]\nmemory = \"32Mi\""))
            .later(|case| case.get("/eat"))
            .is("out-of-memory", ["the kernel killed it for using more than its limit of 32Mi of memory"]),
        Fault::new("removed-again", app("removed-again", "", ""))
            .later(|case| {
                for _ in 0..2 {
                    let container = case.container();
                    docker(&["rm", "--force", &container]);
                    wait_until("a new container", PATIENCE, || is_replaced(case, &container));
                }
            })
            .is("removed-outside", ["it serves, but was restarted", "somebody other than Orca removed its container"]),
    ]
}

/// Listening where nobody looks.
fn listening() -> Vec<Fault> {
    let of = |name, variable: &str| app(name, "", &format!("[service.env]\n{variable}"));
    vec![
        Fault::new("listens-on-loopback", of("listens-on-loopback", "BIND = \"127.0.0.1\""))
            .is("listens-on-loopback", ["the process listens on 127.0.0.1:8080", "connection refused"]),
        Fault::new("listens-on-another", of("listens-on-another", "PORT = \"9090\""))
            .is("listens-elsewhere", ["the process listens on port 9090, not on 8080"]),
        Fault::new("listens-on-nothing", bare_on_port("listens-on-nothing", &["/orca-test-app", "sleep", "600000"]))
            .is("not-listening", ["the process runs, but listens on no port; 8080 is expected"]),
        Fault::new("starts-slowly", of("starts-slowly", "START_DELAY_MS = \"60000\""))
            .is("not-listening", ["listens on no port", "connect to port 8080 -> connection refused"]),
    ]
}

/// A readiness probe that does not pass.
fn readiness() -> Vec<Fault> {
    let of = |name: &str, check: &str| app(name, "", &format!("[service.readiness]\ntimeout_secs = 1\n{check}"));
    let often = "path = \"/healthz\"\ninterval_secs = 1\nfailure_threshold = 1";
    vec![
        Fault::new("readiness-404", of("readiness-404", "path = \"/no-such-path\""))
            .is("probe-status", ["asks for /no-such-path", "404"]),
        Fault::new("readiness-500", of("readiness-500", "path = \"/status?500\""))
            .is("probe-status", ["gets status 500: GET /status?500"]),
        Fault::new("readiness-hangs", of("readiness-hangs", "path = \"/hang\""))
            .is("probe-timeout", ["takes connections, but gives no answer to GET /hang within 1 s"]),
        Fault::new("readiness-tcp", bare_tcp("readiness-tcp")).is("not-listening", ["listens on no port"]),
        Fault::new("readiness-command", of("readiness-command", "exec = [\"/orca-test-app\", \"exit\", \"3\"]"))
            .is("probe-exit", ["exits with 3: `/orca-test-app exit 3`", "it printed: exit 3"]),
        Fault::new("readiness-no-command", of("readiness-no-command", "exec = [\"/no-such-check\"]"))
            .is("probe-command", ["command cannot be run in the container", "no such file or directory"]),
        Fault::new("readiness-slow", of("readiness-slow", "exec = [\"/orca-test-app\", \"sleep\", \"60000\"]"))
            .is("probe-timeout", ["command does not end within 1 s"]),
        Fault::new("readiness-grpc", of("readiness-grpc", "grpc = true"))
            .is("probe-grpc", ["gRPC health check fails", "does not speak HTTP/2"]),
        Fault::new("unready-later", of("unready-later", often))
            .later(|case| case.get("/unready"))
            .is("probe-status", ["it was ready, and is not any more", "status 503: GET /healthz"]),
        Fault::new("frozen", of("frozen", often))
            .later(|case| drop(docker(&["pause", &case.container()])))
            .is("probe-timeout", ["it was ready, and is not any more", "no answer to GET /healthz within 1 s"]),
    ]
}

/// A liveness probe that fails, so that it is started again.
fn liveness() -> Vec<Fault> {
    let of = |name: &str, path: &str| {
        // Late enough for the deploy to go well.
        let probe = format!(
            "path = \"{path}\"\ninitial_delay_secs = 4\ninterval_secs = 1\ntimeout_secs = 1\nfailure_threshold = 1"
        );
        app(name, "", &format!("[service.liveness]\n{probe}"))
    };
    vec![
        Fault::new("liveness-hangs", of("liveness-hangs", "/hang"))
            .later(|_| {})
            .is("not-alive", ["its liveness probe failed", "GET /hang -> no answer in time"]),
        Fault::new("liveness-500", of("liveness-500", "/status?500"))
            .later(|_| {})
            .is("not-alive", ["its liveness probe failed", "GET /status?500 -> status 500"]),
    ]
}

fn secrets() -> Vec<Fault> {
    let of = |name: &str, secret: &str| app(name, "", &format!("[service.env]\nKEY = \"${{secrets.{secret}}}\""));
    vec![
        Fault::new("secret-not-set", of("secret-not-set", "NEVER_SET"))
            .refused(2, ["needs secret NEVER_SET, which is not set", "orca secrets set NEVER_SET"]),
        Fault::new("secret-removed", of("secret-removed", "SET_ONCE")).later_refused(
            2,
            |case| {
                let project = case.node.project();
                let remove = || case.orca(&["secrets", "rm", "SET_ONCE", "--project", project, "-y"]);
                let refused = remove();
                assert_eq!(refused.code, 6, "it is in use: {refused}");
                case.node.deploy_with(&app("secret-removed", "", ""), &["--wait", "--timeout", "60s"]).succeeded();
                remove().succeeded();
                case.orca(&["rollback", &case.name(), "--to", "1", "--wait", "--timeout", "60s"])
            },
            ["needs secret SET_ONCE, which is not set", "orca secrets set SET_ONCE"],
        ),
    ]
}

/// What two want and only one can have.
fn host(world: &World) -> Vec<Fault> {
    let port = world.node.proxy().port();
    let volume = "[[service.volume]]\nname = \"shared\"\npath = \"/data\"";
    let taken = service(
        "host-port-taken",
        &format!("image = \"orca-test/app:1\"\nnetwork = \"host\"\nport = {port}"),
        &format!("[service.env]\nPORT = \"{port}\""),
    );
    let path = "[[service.volume]]\nhost = \"/no-such-directory\"\npath = \"/data\"";
    vec![
        Fault::new("host-port-taken", taken).is("port-taken", ["of the host is taken by orca (process"]),
        Fault::new("host-path-missing", app("host-path-missing", "", path))
            .is("refused", ["the host path /no-such-directory cannot be mounted"]),
        Fault::new("volume-held", app("volume-holder", "", volume))
            .update(app("volume-held", "", volume))
            .is("volume-busy", ["shared is held by", "/volume-holder/r"]),
    ]
}

/// No node will do.
fn room() -> Vec<Fault> {
    vec![
        Fault::new("no-memory", app("no-memory", "", "[service.resources]\nmemory = \"900Gi\""))
            .is("no-room", ["no node has 900Gi of memory", "n1: memory"]),
        Fault::new("no-cpu", app("no-cpu", "", "[service.resources]\ncpu = 900.0"))
            .is("no-room", ["no node has 900 CPUs", "n1: cpu"]),
        Fault::new("no-such-node", app("no-such-node", "", "[service.placement]\nnode = \"n99\""))
            .is("no-such-node", ["pinned to node `n99`, and there is none of that name"]),
        Fault::new("no-such-label", app("no-such-label", "", "[service.placement]\nlabels = { zone = \"eu-9\" }"))
            .is("no-such-label", ["no node has the label zone = `eu-9`"]),
        Fault::new("no-engine", app("no-engine", "", ""))
            .at(Place::Lonely)
            .is("no-engine", ["no Docker engine answers", "docker.sock does not exist"]),
    ]
}

/// Not its own fault, or nobody's.
fn others() -> Vec<Fault> {
    let with =
        |name: &str, needs: String| format!("{needs}\n{}", app(name, &format!("depends_on = [\"{name}-db\"]"), ""));
    let exit = "[service.env]\nEXIT_AT_START = \"1\"";
    let probe = "[service.env]\nVERSION = \"2\"\n[service.readiness]\npath = \"/no-such-path\"";
    vec![
        Fault::new(
            "dependency-not-ready",
            with("dependency-not-ready", app("dependency-not-ready-db", "", "[service.env]\nPORT = \"9090\"")),
        )
        .detached()
        .is("dependency", ["it depends on `dependency-not-ready-db`, which is not ready", "listens on port 9090"]),
        Fault::new("dependency-loops", with("dependency-loops", app("dependency-loops-db", "", exit)))
            .detached()
            .is("dependency", ["it depends on `dependency-loops-db`, which is not ready", "exits with code 1"]),
        Fault::new("stopped", app("stopped", "", ""))
            .later(|case| drop(case.orca(&["stop", &case.name()]).succeeded()))
            .is("stopped", ["it was stopped by `orca stop`"]),
        Fault::new("update-exits", app("update-exits", "", "")).update(app("update-exits", "", exit)).exits(7).is(
            "rolled-back",
            ["it serves v1, because v2 was given up", "exits with code 1", "log: fatal: told to exit"],
        ),
        Fault::new("update-not-ready", app("update-not-ready", "", ""))
            .update(app("update-not-ready", "", probe))
            .exits(7)
            .is("rolled-back", ["because v2 was given up", "asks for /no-such-path"]),
    ]
}

/// Components that cannot run, or fail at each request.
fn modules(world: &World) -> Vec<Fault> {
    let file = |name: &str, bytes: &[u8]| -> PathBuf {
        let path = world.node.directory().join(format!("{name}.wasm"));
        fs::write(&path, bytes).unwrap();
        path
    };
    let of = |name: &'static str, bytes: &[u8]| Fault::new(name, module(name, &file(name, bytes), &times()));
    vec![
        // A core module with nothing in it.
        of("not-a-component", b"\0asm\x01\0\0\0").is("module-invalid", ["its module cannot be run", "core module"]),
        // A component with nothing in it.
        of("no-export", b"\0asm\x0d\0\x01\0").is("module-invalid", ["exports neither `wasi:http/incoming-handler"]),
        // `(component (import "pay" (func)))`
        of("unknown-import", b"\0asm\x0d\0\x01\0\x07\x05\x01\x40\0\x01\0\x0a\x08\x01\0\x03pay\x01\0")
            .is("module-invalid", ["imports `pay`, which Orca does not offer"]),
        of("damaged-module", b"\0asm\x0d\0\x01\0\x07\xff\xff").is("module-invalid", ["does not compile"]),
        Fault::new("traps", probe("traps", &times()))
            .later(|case| (0..20).for_each(|_| case.get("/trap")))
            .is("errors", ["it is ready, but 20 of its 20 requests in the last minute ended in an error"]),
        Fault::new("module-lost", probe("module-lost", &times()))
            .at(Place::Lonely)
            .later(|case| {
                for directory in ["modules", "agent/modules"] {
                    fs::remove_dir_all(case.node.data_dir().join(directory)).unwrap();
                }
                case.orca(&["restart", &case.name(), "--detach"]).succeeded();
            })
            .is("module-missing", ["neither on its node nor on a control node", "sha256:"]),
    ]
}

/// Whether another container than this one runs.
fn is_replaced(case: &Case<'_>, old: &str) -> bool {
    let label = format!("label=orca.service={}", case.name());
    let all = docker(&["ps", "--quiet", "--filter", &label]);
    all.lines().any(|container| container != old)
}

/// So that what never gets ready is soon known not to.
fn times() -> String {
    "[service.deploy]\nready_timeout_secs = 6\ndrain_timeout_secs = 1\nstop_grace_secs = 1\n".to_owned()
}

fn service(name: &str, keys: &str, tables: &str) -> String {
    format!("[[service]]\nname = \"{name}\"\n{keys}\n{tables}\n{}", times())
}

/// The test's own service, reached as `NAME.test`.
fn app(name: &str, keys: &str, tables: &str) -> String {
    let own = format!("image = \"orca-test/app:1\"\nport = 8080\ndomain = \"{name}.test\"\nroutes = [\"/*\"]\n{keys}");
    service(name, &own, tables)
}

/// A command, without a port.
fn bare(name: &str, command: &[&str], tables: &str) -> String {
    service(name, &format!("image = \"orca-test/bare:1\"\ncommand = {command:?}"), tables)
}

fn bare_on_port(name: &str, command: &[&str]) -> String {
    service(name, &format!("image = \"orca-test/bare:1\"\ncommand = {command:?}\nport = 8080"), "")
}

fn bare_tcp(name: &str) -> String {
    let keys = "image = \"orca-test/bare:1\"\ncommand = [\"/orca-test-app\", \"sleep\", \"600000\"]\nport = 8080";
    service(name, keys, "[service.readiness]\ntcp = true\ninterval_secs = 1")
}
