//! `doctor`: what is wrong with this machine and with the cluster, each with its fix.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use orca_wire::message::client::{Finding, Request, Response};
use serde::Serialize;

use super::done;
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
    let mut findings = vec![docker(), disk(&around)];
    findings.extend(args.unseal_key.as_deref().map(unseal_key));
    let (reached, server) = cluster(global, &around).await;
    let runs_here = reached.first().is_some_and(|finding| finding.ok);
    findings.extend(reached);
    if !runs_here {
        findings.extend([6880, 8080].map(port));
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
        let name = chosen.name.clone();
        let session = Session::open(chosen, global.timeout).await?;
        match session.ask(&Request::Whoami).await? {
            Response::Whoami { cluster, role, version, .. } => {
                let spent = began.elapsed().as_millis();
                let role = format!("{role:?}").to_lowercase();
                let text = format!("{cluster} (context `{name}`) answers in {spent} ms, orca {version}, as {role}");
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

/// Whether a server could be started here.
fn port(port: u16) -> Finding {
    let subject = format!("port {port}");
    match TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
        Ok(_) => good(&subject, "free for a server on this machine"),
        Err(error) => {
            let fix = format!("`ss -ltnp 'sport = :{port}'` shows who holds it; or start the server with another");
            bad(&subject, error.to_string(), &fix)
        }
    }
}

fn disk(around: &Surroundings) -> Finding {
    const SUBJECT: &str = "disk";
    let root = rustix::process::geteuid().is_root();
    let home = around.home.clone().unwrap_or_else(|| PathBuf::from("/"));
    let data = if root { PathBuf::from("/var/lib/orca") } else { home.join(".local/share/orca") };
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
