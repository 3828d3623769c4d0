//! `orca up`: the newcomer's command. A server in the foreground if none runs, the project deployed, a URL for each
//! service, and the status until Ctrl-C stops it all.

use std::collections::BTreeSet;
use std::process::ExitCode;

use orca_cluster::secret::SecretName;
use orca_cluster::spec::Host;
use orca_wire::Access;
use orca_wire::message::client::{Request, Response, SetSecret};
use tracing::Level;

use super::server::{self, Server};
use super::{deploy, status};
use crate::cli::{Global, UpArgs};
use crate::context::{Chosen, Surroundings, choose};
use crate::exit::{Exit, Failure};
use crate::files::{self, Written};
use crate::log;
use crate::output::Output;
use crate::session::{Session, unexpected};

/// Random bytes in a generated secret: 128 bits cannot be guessed.
const SECRET_BYTES: usize = 16;

pub fn run(args: UpArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    log::init_for_server(args.server.log_format, Level::WARN);
    // What is wrong with the files is said before anything is started.
    let written = files::read(std::slice::from_ref(&args.dir), output.side_screen(crate::moment::now()).colour)?;
    server::block_on(async {
        match running(global).await {
            Some(session) => {
                output.complain("a server runs on this machine already; deploying to it\n");
                bring_up(&session, None, written, &args, global, output).await
            }
            None => {
                let mut server = Server::start(&args.server).await?;
                if let Err(failure) = server.opened().await {
                    server.stop().await;
                    return Err(failure);
                }
                output.complain(&format!("server started; its data is in {}\n", server.data.display()));
                let access = match server.founded.take() {
                    Some(founded) => {
                        server::introduce(&server, &founded, output);
                        Access::Certificate(founded.user)
                    }
                    None => choose(global.context.as_deref(), &Surroundings::read())?.access,
                };
                let chosen = Chosen { name: "local".to_owned(), addresses: vec![server.address()], access };
                let session = Session::open(chosen, global.timeout).await?;
                let proxy = server.proxy.clone();
                let ended = tokio::select! {
                    ended = bring_up(&session, Some(&proxy), written, &args, global, output) => match ended {
                        Ok(code) if args.no_follow => server.until_told().await.map(|()| code),
                        ended => ended,
                    },
                    told = server.until_told() => told.map(|()| Exit::Done.into()),
                };
                output.complain("stopping; containers go on, `orca up` finds them again\n");
                server.stop().await;
                // Being interrupted is how it ends.
                ended.map(|code| if code == Exit::Interrupted.into() { Exit::Done.into() } else { code })
            }
        }
    })
}

/// The server of the current context, if it answers.
async fn running(global: &Global) -> Option<Session> {
    let chosen = choose(global.context.as_deref(), &Surroundings::read()).ok()?;
    Session::open(chosen, global.timeout).await.ok()
}

async fn bring_up(
    session: &Session,
    proxy: Option<&[std::net::SocketAddr]>,
    written: Written,
    args: &UpArgs,
    global: &Global,
    output: &Output,
) -> Result<ExitCode, Failure> {
    if args.generate_secrets {
        generate_secrets(session, &written, output).await?;
    }
    let urls = urls(&written, proxy.and_then(|addresses| addresses.first()).map_or(80, |address| address.port()));
    let options = deploy::Options { patience: global.timeout, ..deploy::Options::default() };
    let code = deploy::deploy(session, output, written, &options).await?;
    for (service, url) in urls {
        output.complain(&format!("  {service:<20} {url}\n"));
    }
    if args.no_follow {
        return Ok(code);
    }
    status::follow_cluster(session, output).await
}

/// Sets a random value for each secret that the project refers to and that is not set.
async fn generate_secrets(session: &Session, written: &Written, output: &Output) -> Result<(), Failure> {
    for project in &written.projects {
        let wanted: BTreeSet<&str> = project.services.values().flat_map(|service| service.secrets()).collect();
        if wanted.is_empty() {
            continue;
        }
        let request = Request::ListSecrets { project: Some(project.name.clone()) };
        let present = match session.ask(&request).await? {
            Response::Secrets { secrets } => secrets,
            other => return Err(unexpected(&other)),
        };
        let missing = wanted.into_iter().filter(|name| !present.iter().any(|secret| secret.name.name() == *name));
        let mut secrets = Vec::new();
        for name in missing {
            let name = SecretName::new(Some(project.name.clone()), name)
                .map_err(|error| Failure::from_error(Exit::Input, &error))?;
            output.complain(&format!("secret {name} generated\n"));
            secrets.push(SetSecret { name, value: random_text()? });
        }
        if !secrets.is_empty() {
            session.ask(&Request::SetSecrets { secrets }).await?;
        }
    }
    Ok(())
}

fn random_text() -> Result<String, Failure> {
    let mut bytes = [0; SECRET_BYTES];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Failure::general("the operating system gives no random bytes"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Where each service that is routed to can be reached from this machine.
fn urls(written: &Written, port: u16) -> Vec<(String, String)> {
    let at = |host: &str| match port {
        80 => format!("http://{host}"),
        port => format!("http://{host}:{port}"),
    };
    let mut urls = Vec::new();
    for project in &written.projects {
        for (name, service) in &project.services {
            for route in &service.routes {
                let host = match &route.host {
                    Host::Exact(host) => host.clone(),
                    Host::Wildcard(host) => format!("any.{host}"),
                    Host::Any => "127.0.0.1".to_owned(),
                };
                urls.push((name.to_string(), format!("{}{}", at(&host), route.path)));
            }
        }
    }
    urls
}
