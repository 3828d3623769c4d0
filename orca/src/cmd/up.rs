//! `orca up`: the newcomer's command. A server in the foreground if none runs on its data directory, the project
//! deployed, URLs of each service, and the status until Ctrl-C stops it all. What the current context names is not
//! looked at; `--context` names another cluster.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use orca_cluster::command::Refusal;
use orca_cluster::id::ServiceName;
use orca_cluster::secret::SecretName;
use orca_control::Layout;
use orca_wire::Access;
use orca_wire::identity::Identity;
use orca_wire::message::client::{Request, SetSecret};
use tracing::Level;

use super::server::{self, Server};
use super::settle::{Patience, Urls};
use super::{deploy, done, status};
use crate::cli::{Global, UpArgs};
use crate::context::{Chosen, Origin, Surroundings, choose};
use crate::exit::{Exit, Failure};
use crate::files::{self, Written};
use crate::log;
use crate::moment;
use crate::output::text::Text;
use crate::output::{Output, status as screen};
use crate::session::Session;

/// Random bytes in a generated secret: 128 bits cannot be guessed.
const SECRET_BYTES: usize = 16;
/// A server that has just started knows within this where its proxy listens and whether Docker answers.
const TOLD_MAX: Duration = Duration::from_secs(5);

pub fn run(args: UpArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    log::init_for_server(args.server.log_format, Level::WARN);
    // What is wrong with the files is said before anything is started.
    let written = files::read(std::slice::from_ref(&args.dir), output.side_screen(moment::now()).colour)?;
    // Programs read one `result`, and nothing after it.
    let follows = !args.no_follow && !output.json;
    let patience = Patience::at_most(global.timeout);
    server::block_on(async {
        if let Some(context) = &global.context {
            let session = Session::open(choose(Some(context), &Surroundings::read())?, global.timeout).await?;
            output.notice(&Text::plain(format!("deploying to context `{context}`")));
            bring_up(&session, written, &args, patience, output).await?;
            return if follows { status::follow_cluster(&session, output).await } else { done() };
        }
        // Never to the current context: that may be a cluster far away, which nobody has named here.
        let data = args.server.data_dir.clone().map_or_else(server::place::default_data_dir, Ok)?;
        if let Some(session) = running(&data, args.server.listen, global.timeout).await {
            let place = data.display();
            let text = format!("a server runs on this machine already, its data in {place}; deploying to it");
            output.notice(&Text::plain(text));
            bring_up(&session, written, &args, patience, output).await?;
            return if follows { status::follow_cluster(&session, output).await } else { done() };
        }
        let mut server = Server::start(&args.server).await?;
        if let Err(failure) = server.opened().await {
            server.stop().await;
            return Err(failure);
        }
        output.notice(&Text::plain(format!("server started; its data is in {}", server.data.display())));
        let identity = match server.founded.take() {
            Some(founded) => {
                server::introduce(&server, &founded, output);
                founded.user
            }
            None => administrator(&server.data)?,
        };
        let session = Session::open(of_data(&server.data, server.address(), identity), global.timeout).await?;
        // Who ends the server is not told that the deploy goes on without them.
        let patience = patience.uninterrupted();
        let deployed = tokio::select! {
            told = server.until_told() => told.map(|()| Some(status::stopped(output))),
            ended = bring_up(&session, written, &args, patience, output) => ended.map(|()| None),
        };
        // Once it serves, being interrupted is how it ends.
        let ended = match deployed {
            Ok(Some(interrupted)) => Ok(interrupted),
            Ok(None) if follows => tokio::select! {
                told = server.until_told() => told.and_then(|()| done()),
                followed = status::follow_cluster(&session, output) => followed.and_then(|_| done()),
            },
            Ok(None) => server.until_told().await.and_then(|()| done()),
            Err(failure) => Err(failure),
        };
        output.notice(&Text::plain("stopping; containers go on, `orca up` finds them again"));
        server.stop().await;
        ended
    })
}

/// The server that works on this data directory, if it answers there.
async fn running(data: &Path, listen: SocketAddr, patience: Option<Duration>) -> Option<Session> {
    let identity = administrator(data).ok()?;
    let address = SocketAddr::new(server::reachable(listen.ip()), listen.port()).to_string();
    Session::open(of_data(data, address, identity), patience).await.ok()
}

fn of_data(data: &Path, address: String, identity: Identity) -> Chosen {
    let access = Access::Certificate(identity);
    Chosen { origin: Origin::Data(data.to_owned()), addresses: vec![address], access }
}

/// Who founded the cluster: whoever may read the data directory may act for them.
fn administrator(data: &Path) -> Result<Identity, Failure> {
    Identity::load(&Layout::new(data).admin(), None, moment::now()).map_err(|error| {
        Failure::from_error(Exit::Unauthorised, &error)
            .fix("run it with `orca server`, and deploy with a context of that cluster: orca up --context NAME")
    })
}

async fn bring_up(
    session: &Session,
    mut written: Written,
    args: &UpArgs,
    patience: Patience,
    output: &Output,
) -> Result<(), Failure> {
    let containers = deploy::containers(&written.projects);
    if !containers.is_empty()
        && let Some(failure) = deploy::no_engine(&deploy::nodes(session, TOLD_MAX).await?, &containers)
    {
        return Err(failure.more("orca doctor"));
    }
    if args.generate_secrets {
        generate_secrets(session, output, &mut written).await?;
    }
    let names = |project: &orca_cluster::spec::Project| {
        project.services.keys().map(|service| project.service_name(service)).collect::<Vec<ServiceName>>()
    };
    let names: BTreeSet<ServiceName> = written.projects.iter().flat_map(names).collect();
    let options = deploy::Options { patience, ..deploy::Options::default() };
    let ended = deploy::deploy(session, output, written, &options).await?;
    if ended.has_failed() {
        return ended.tell(output).map(drop);
    }
    match urls(session, &names).await {
        Ok(urls) => ended.with_urls(urls).tell(output).map(drop),
        // It is deployed all the same.
        Err(failure) => ended.tell(output).and(Err(failure)),
    }
}

async fn urls(session: &Session, names: &BTreeSet<ServiceName>) -> Result<Urls, Failure> {
    // The ports of its proxy are known when it has told of itself.
    let nodes = deploy::nodes(session, TOLD_MAX).await?;
    let services = session.status(None).await?.services.into_iter().filter(|service| names.contains(&service.name));
    Ok(services.map(|service| (service.name.clone(), screen::urls(&service, &nodes))).collect())
}

/// Sets a random value for each secret that is not set, if nothing else keeps the project from being deployed: what is
/// refused has changed nothing.
async fn generate_secrets(session: &Session, output: &Output, written: &mut Written) -> Result<(), Failure> {
    let Some(obstacle) = deploy::obstacle(session, written).await? else { return Ok(()) };
    let mut names = BTreeSet::new();
    let mut else_fits = !obstacle.unfit.is_empty();
    for refusal in &obstacle.unfit {
        let Refusal::SecretsMissing { missing } = refusal else {
            else_fits = false;
            continue;
        };
        for (service, name) in missing {
            let name = SecretName::new(Some(service.project.clone()), name);
            names.insert(name.map_err(|error| Failure::from_error(Exit::Input, &error))?);
        }
    }
    if !else_fits {
        return Err(written.place(obstacle));
    }
    let mut secrets = Vec::new();
    for name in &names {
        secrets.push(SetSecret { name: name.clone(), value: random_text()? });
    }
    session.ask(&Request::SetSecrets { secrets }).await?;
    for name in names {
        output.notice(&Text::plain(format!("secret {name} generated")));
    }
    Ok(())
}

fn random_text() -> Result<String, Failure> {
    let mut bytes = [0; SECRET_BYTES];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| Failure::general("the operating system gives no random bytes"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
