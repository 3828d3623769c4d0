//! `doctor`: what is wrong with this machine and with the cluster, each with its fix.

use std::net::{Ipv4Addr, TcpListener};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use orca_agent::docker::socket_from_environment;
use orca_cluster::doctor::{self, Finding};
use orca_cluster::replica::Engine;
use orca_cluster::resource::Memory;
use orca_wire::message::client::{Request, Response};
use serde::Serialize;

use super::done;
use super::server::place::default_data_dir;
use super::server::{PORT_PUBLIC, PORT_UNPRIVILEGED};
use crate::cli::{DoctorArgs, Global};
use crate::context::{Surroundings, choose};
use crate::exit::{Exit, Failure};
use crate::output::text::{Ink, Text};
use crate::output::{Output, megabytes};
use crate::session::{Session, unexpected};

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
        let proxy = port("proxy", Ipv4Addr::UNSPECIFIED, &[PORT_PUBLIC, PORT_UNPRIVILEGED]);
        findings.extend([disk(), port("API", Ipv4Addr::LOCALHOST, &[6880]), proxy]);
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
                Ok((session, Finding::good(SUBJECT, text), version))
            }
            other => Err(unexpected(&other)),
        }
    };
    let (session, reached, version) = match asked.await {
        Ok(reached) => reached,
        Err(failure) => {
            let why: Vec<&str> = std::iter::once(&failure.message).chain(&failure.why).map(String::as_str).collect();
            let fix = failure.fix.join("; ");
            return (vec![Finding::bad(SUBJECT, why.join(": "), fix)], Vec::new());
        }
    };
    let mut findings = vec![reached];
    let own = env!("CARGO_PKG_VERSION");
    if version != own {
        let text = format!("this is orca {own}, the server is {version}");
        findings.push(Finding::bad("version", text, "update the older one"));
    }
    let server = match session.ask(&Request::Doctor).await {
        Ok(Response::Doctor { findings }) => findings,
        Ok(other) => vec![Finding::bad("server", unexpected(&other).to_string(), "update the older one")],
        Err(failure) => vec![Finding::bad("server", failure.message.clone(), failure.fix.join("; "))],
    };
    (findings, server)
}

fn docker() -> Finding {
    const SUBJECT: &str = "docker";
    let socket = socket_from_environment();
    match UnixStream::connect(&socket) {
        Ok(_) => Finding::good(SUBJECT, format!("an engine listens on {}", socket.display())),
        Err(error) => {
            let reason = format!("{}: {error}", socket.display());
            doctor::engine(SUBJECT, &Engine::Unreachable { reason })
        }
    }
}

/// Whether a server could be started here: it takes the first of these that it gets.
fn port(what: &str, ip: Ipv4Addr, ports: &[u16]) -> Finding {
    let mut refused = Vec::new();
    for port in ports {
        match TcpListener::bind((ip, *port)) {
            Ok(_) => {
                let text = format!("free for the {what} of a server on this machine");
                return Finding::good(format!("port {port}"), text);
            }
            Err(error) => refused.push(format!("{port}: {error}")),
        }
    }
    let last = ports.last().copied().unwrap_or_default();
    let fix = format!("`ss -ltnp 'sport = :{last}'` shows who holds it; or start the server with another");
    Finding::bad(format!("port {last}"), refused.join("; "), fix)
}

fn disk() -> Finding {
    const SUBJECT: &str = "disk";
    let data = match default_data_dir() {
        Ok(data) => data,
        Err(failure) => return Finding::bad(SUBJECT, failure.message.clone(), failure.fix.join("; ")),
    };
    let nearest = data.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match rustix::fs::statvfs(nearest) {
        Ok(space) => {
            let free = space.f_bavail.saturating_mul(space.f_frsize);
            doctor::disk(SUBJECT, Memory(free), &format!("{} free for {}", megabytes(free), data.display()))
        }
        Err(error) => Finding::bad(SUBJECT, format!("{}: {error}", nearest.display()), "check that it is mounted"),
    }
}

fn unseal_key(path: &Path) -> Finding {
    let mode = std::fs::metadata(path).map(|data| data.permissions().mode());
    let told = format!("{} is for its owner only", path.display());
    doctor::unseal_key(path, mode.map_err(|error| error.to_string()), &told)
}
