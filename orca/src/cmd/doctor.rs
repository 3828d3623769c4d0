//! `doctor`: what is wrong with this machine and with the cluster, each with its fix.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use orca_wire::message::client::{Finding, Request, Response};
use serde::Serialize;

use super::done;
use super::server::place::default_data_dir;
use crate::cli::{DoctorArgs, Global};
use crate::context::{Surroundings, choose};
use crate::exit::{Exit, Failure};
use crate::output::text::{Ink, Text};
use crate::output::{Output, megabytes};
use crate::session::{Session, unexpected};

const DOCKER_SOCKET: &str = "/var/run/docker.sock";
/// Less than this and the next image may not fit.
const DISK_BYTES_MIN: u64 = 2_000_000_000;

pub async fn run(args: DoctorArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Found {
        findings: Vec<Finding>,
    }
    let around = Surroundings::read();
    let mut findings = vec![docker()];
    findings.extend(args.unseal_key.as_deref().map(unseal_key));
    let (reached, server) = cluster(global, &around).await;
    let runs_here = reached.first().is_some_and(|finding| finding.ok);
    findings.extend(reached);
    if !runs_here {
        // A server that runs says this of itself, and of where its data is.
        findings.extend([disk(), port("API", &[6880]), port("proxy", &[80, 8080])]);
    }
    findings.extend(server);
    let bad = findings.iter().filter(|finding| !finding.ok).count();
    if output.json {
        output.object("doctor", &Found { findings });
    } else {
        output.lines(&findings.iter().flat_map(lines).collect::<Vec<_>>());
    }
    if bad > 0 { Ok(Exit::General.into()) } else { done() }
}

fn lines(finding: &Finding) -> Vec<Text> {
    let (ink, mark) = if finding.ok { (Ink::Green, "✔") } else { (Ink::Red, "✖") };
    let mut lines = vec![
        Text::of(ink, format!("{mark} "))
            .and(Ink::Bold, finding.subject.clone())
            .and(Ink::Plain, format!("  {}", finding.message)),
    ];
    if let Some(fix) = finding.fix.as_ref().filter(|_| !finding.ok) {
        lines.push(Text::of(Ink::Cyan, "    fix ").and(Ink::Plain, fix.clone()));
    }
    lines
}

fn good(subject: &str, message: impl Into<String>) -> Finding {
    finding(subject, true, message.into(), None)
}

fn bad(subject: &str, message: impl Into<String>, fix: &str) -> Finding {
    finding(subject, false, message.into(), Some(fix.to_owned()))
}

fn finding(subject: &str, ok: bool, message: String, fix: Option<String>) -> Finding {
    Finding { subject: subject.to_owned(), ok, message, fix, details: BTreeMap::new() }
}

/// Whether the cluster answers, and what it says of itself.
async fn cluster(global: &Global, around: &Surroundings) -> (Vec<Finding>, Vec<Finding>) {
    const SUBJECT: &str = "cluster";
    let began = Instant::now();
    let asked = async {
        let chosen = choose(global.context.as_deref(), around)?;
        let origin = chosen.origin.clone();
        let session = Session::open(chosen, global.timeout).await?;
        match session.ask(&Request::Whoami).await? {
            Response::Whoami { cluster, role, version, .. } => {
                let spent = began.elapsed().as_millis();
                let role = format!("{role:?}").to_lowercase();
                let text = format!("{cluster} ({origin}) answers in {spent} ms, orca {version}, as {role}");
                Ok((session, good(SUBJECT, text), version))
            }
            other => Err(unexpected(&other)),
        }
    };
    let (session, reached, version) = match asked.await {
        Ok(reached) => reached,
        Err(failure) => {
            let why: Vec<&str> = std::iter::once(&failure.message).chain(&failure.why).map(String::as_str).collect();
            let fix = failure.fix.join("; ");
            return (vec![bad(SUBJECT, why.join(": "), &fix)], Vec::new());
        }
    };
    let mut findings = vec![reached];
    let own = env!("CARGO_PKG_VERSION");
    if version != own {
        findings.push(bad("version", format!("this is orca {own}, the server is {version}"), "update the older one"));
    }
    let server = match session.ask(&Request::Doctor).await {
        Ok(Response::Doctor { findings }) => findings,
        Ok(other) => vec![bad("server", unexpected(&other).to_string(), "update the older one")],
        Err(failure) => vec![bad("server", failure.message.clone(), &failure.fix.join("; "))],
    };
    (findings, server)
}

fn docker() -> Finding {
    const SUBJECT: &str = "docker";
    const INSTALL: &str =
        "container services need it: `apt-get install docker.io` (Debian), then `systemctl start docker`";
    match UnixStream::connect(DOCKER_SOCKET) {
        Ok(_) => good(SUBJECT, format!("an engine listens on {DOCKER_SOCKET}")),
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
            let fix = "run the server as root, or add its user to the group `docker`";
            bad(SUBJECT, format!("{DOCKER_SOCKET} may not be opened by this user"), fix)
        }
        Err(error) => bad(SUBJECT, format!("{DOCKER_SOCKET}: {error}"), INSTALL),
    }
}

/// Whether a server could be started here: it takes the first of these that it gets.
fn port(what: &str, ports: &[u16]) -> Finding {
    let mut refused = Vec::new();
    for port in ports {
        match TcpListener::bind((Ipv4Addr::LOCALHOST, *port)) {
            Ok(_) => return good(&format!("port {port}"), format!("free for the {what} of a server on this machine")),
            Err(error) => refused.push(format!("{port}: {error}")),
        }
    }
    let last = ports.last().copied().unwrap_or_default();
    let fix = format!("`ss -ltnp 'sport = :{last}'` shows who holds it; or start the server with another");
    bad(&format!("port {last}"), refused.join("; "), &fix)
}

fn disk() -> Finding {
    const SUBJECT: &str = "disk";
    let data = match default_data_dir() {
        Ok(data) => data,
        Err(failure) => return bad(SUBJECT, failure.message.clone(), &failure.fix.join("; ")),
    };
    let nearest = data.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(nearest) {
        Ok(space) => {
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            let text = format!("{} free for {}", megabytes(free), data.display());
            if free >= DISK_BYTES_MIN {
                good(SUBJECT, text)
            } else {
                bad(SUBJECT, text, "free some: `docker system df` shows what images and volumes take")
            }
        }
        Err(error) => bad(SUBJECT, format!("{}: {error}", nearest.display()), "check that it is mounted"),
    }
}

fn unseal_key(path: &Path) -> Finding {
    const SUBJECT: &str = "unseal key";
    match std::fs::metadata(path) {
        Ok(meta) if meta.permissions().mode() & 0o077 == 0 => {
            good(SUBJECT, format!("{} is for its owner only", path.display()))
        }
        Ok(_) => {
            bad(SUBJECT, format!("{} can be read by others", path.display()), &format!("chmod 600 {}", path.display()))
        }
        Err(error) => {
            let fix = "without it the cluster's secrets are lost: bring it back from where you keep a copy";
            bad(SUBJECT, format!("{}: {error}", path.display()), fix)
        }
    }
}
