//! `deploy` and `plan`: from files to a cluster that runs what they say.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Duration;

use orca_cluster::command::put::{PutOutcome, ServiceOutcome};
use orca_cluster::id::{Generation, Label, ServiceName};
use orca_cluster::replica::Engine;
use orca_cluster::spec::{Project, Settings};
use orca_cluster::status::verdict::Awaited;
use orca_cluster::status::{NodeCondition, NodeStatus};
use orca_wire::message::client::{Deploy, Request, Response};
use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::settle::{self, Ended, Patience};
use super::{done, patient_session, session};
use crate::cli::{DeployArgs, Files, Global, PlanArgs, ServiceArg};
use crate::exit::{Exit, Failure};
use crate::files::{self, Written};
use crate::output::progress::Needs;
use crate::output::text::{Ink, Text};
use crate::output::{Output, count, plan as screen};
use crate::session::{Session, pick, unexpected};

/// Between two looks at nodes that have not told of their engine yet.
const LOOK_AGAIN: Duration = Duration::from_millis(100);

/// How to deploy what was read.
#[derive(Debug, Clone, Default)]
pub struct Options {
    pub services: Vec<ServiceArg>,
    pub prune: bool,
    pub replace: bool,
    pub if_index: Option<Generation>,
    pub detach: bool,
    pub patience: Patience,
}

impl Options {
    fn of(services: Vec<ServiceArg>, files: &Files) -> Options {
        let Files { files: _, prune, if_index, replace } = *files;
        Options { services, prune, replace, if_index, ..Options::default() }
    }
}

type Services = BTreeMap<ServiceName, ServiceOutcome>;

#[derive(Debug, Serialize)]
struct Planned<'a> {
    index: Generation,
    changes: bool,
    services: &'a Services,
    /// What becomes different in the cluster's settings.
    settings: &'a [String],
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    unlisted: &'a BTreeSet<ServiceName>,
}

pub async fn run(args: DeployArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let DeployArgs { services, files, wait, dry_run } = args;
    let options =
        Options { detach: wait.detach, patience: Patience::at_most(global.timeout), ..Options::of(services, &files) };
    let written = files::read(&files.files, output.side_screen(crate::moment::now()).colour)?;
    let session = patient_session(global).await?;
    if dry_run {
        look(&session, output, &written, &options).await?;
        return done();
    }
    deploy(&session, output, written, &options).await?.tell(output)
}

pub async fn plan(args: PlanArgs, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let PlanArgs { services, files, exit_code } = args;
    let options = Options::of(services, &files);
    let written = files::read(&files.files, output.side_screen(crate::moment::now()).colour)?;
    let session = session(global).await?;
    let outcome = look(&session, output, &written, &options).await?;
    if exit_code && outcome.changes_anything() { Ok(Exit::Changes.into()) } else { done() }
}

/// Shows what a deploy would do.
async fn look(session: &Session, output: &Output, written: &Written, options: &Options) -> Result<PutOutcome, Failure> {
    let asked = Asked::of(written, options)?;
    let (index, outcome) = asked.plan(session).await.map_err(|failure| written.place(failure))?;
    show(output, index, &outcome, &written.projects);
    screen::unlisted(&outcome.unlisted).iter().for_each(|line| output.notice(line));
    Ok(outcome)
}

/// Makes the cluster run what was read, and waits until it does.
pub async fn deploy(session: &Session, output: &Output, written: Written, options: &Options) -> Result<Ended, Failure> {
    let asked = Asked::of(&written, options)?;
    let (index, outcome) = asked.plan(session).await.map_err(|failure| written.place(failure))?;
    let is_there = !outcome.changes_anything() && outcome.services.values().all(|what| awaited(what).is_none());
    if output.json {
        show(output, index, &outcome, &written.projects);
    } else if !is_there {
        lines(index, &outcome, &written.projects).iter().for_each(|line| output.notice(line));
    }
    screen::unlisted(&outcome.unlisted).iter().for_each(|line| output.notice(line));
    if is_there {
        return Ok(Ended::unchanged(index));
    }
    for (name, what) in &outcome.services {
        if let ServiceOutcome::Unchanged { rolling_out: false, proven: false, .. } = what {
            let text = format!("  {name} is as in the files, and has not been ready yet");
            output.notice(&Text::of(Ink::Yellow, text));
        }
    }
    let starting = containers(&written.projects).into_iter();
    let starting: Vec<ServiceName> = starting.filter(|name| outcome.services.get(name).is_some_and(starts)).collect();
    if !starting.is_empty()
        && let Some(failure) = no_engine(&nodes(session, Duration::ZERO).await?, &starting)
    {
        // It may come back: what is deployed waits for it, as long as it may take to get ready.
        output.warn(&format!("{failure}: {}; to put that right: {}", failure.why.join("; "), failure.fix.join("; ")));
    }
    let removed = outcome.services.values().filter(|what| matches!(what, ServiceOutcome::Removed)).count();
    if removed > 0 {
        output.confirm(&format!("Remove {}?", count(removed as u64, "service")))?;
    }
    upload(session, output, &written).await?;
    let (reached, services) = asked.deploy(session).await.map_err(|failure| written.place(failure))?;
    let waiting: Vec<_> = services.iter().filter_map(|(name, what)| Some((name.clone(), awaited(what)?))).collect();
    if waiting.is_empty() {
        return Ok(match outcome.settings.is_empty() {
            true => Ended::unchanged(reached),
            false => Ended::settings(reached),
        });
    }
    if options.detach {
        return Ok(Ended::detached());
    }
    Ok(settle::settle(session, output, waiting, needs(&written.projects), reached, options.patience).await)
}

/// What keeps the files from being deployed, with what of them does not fit the cluster.
pub async fn obstacle(session: &Session, written: &Written) -> Result<Option<Failure>, Failure> {
    Ok(Asked::of(written, &Options::default())?.plan(session).await.err())
}

/// Whether new replicas are to come of it.
fn starts(what: &ServiceOutcome) -> bool {
    match what {
        ServiceOutcome::Created { replicas, .. } => *replicas > 0,
        ServiceOutcome::Changed { replaces, stopped, .. } => *replaces && !stopped,
        ServiceOutcome::Unchanged { .. } | ServiceOutcome::Removed => false,
    }
}

/// The services that are containers.
pub fn containers(projects: &[Project]) -> Vec<ServiceName> {
    let all = projects.iter().flat_map(|project| project.services.values().map(move |service| (project, service)));
    let containers = all.filter(|(_, service)| !service.is_module());
    containers.map(|(project, service)| project.service_name(&service.name)).collect()
}

/// What is known of the nodes, once each has told whether it has an engine; or after so long, what is known then.
pub async fn nodes(session: &Session, patience: Duration) -> Result<Vec<NodeStatus>, Failure> {
    let told = |node: &NodeStatus| match node.condition {
        NodeCondition::Dead => true,
        NodeCondition::Unheard => false,
        NodeCondition::Alive | NodeCondition::Suspect => {
            node.facts.as_ref().is_some_and(|facts| facts.containers != Engine::Unknown)
        }
    };
    let until = Instant::now() + patience;
    loop {
        let nodes = match session.ask(&Request::Nodes).await? {
            Response::Nodes { nodes } => nodes,
            other => return Err(unexpected(&other)),
        };
        if nodes.iter().all(told) || Instant::now() >= until {
            return Ok(nodes);
        }
        sleep(LOOK_AGAIN).await;
    }
}

/// That none of the nodes can run these containers, if each of them has said so.
pub fn no_engine(nodes: &[NodeStatus], containers: &[ServiceName]) -> Option<Failure> {
    let mut reasons = Vec::new();
    for node in nodes.iter().filter(|node| node.condition != NodeCondition::Dead) {
        match node.facts.as_ref().map(|facts| &facts.containers) {
            Some(Engine::Unreachable { reason }) => reasons.push(format!("{}: {reason}", node.name)),
            Some(Engine::Ready { .. } | Engine::Unknown) | None => return None,
        }
    }
    if reasons.is_empty() {
        return None;
    }
    let names: Vec<String> = containers.iter().map(ToString::to_string).collect();
    let are = if names.len() == 1 { "is a container" } else { "are containers" };
    let mut failure = Failure::general(format!("no Docker engine answers, and {} {are}", names.join(", ")));
    failure.why = reasons;
    Some(failure.fix("install one (Debian: `apt-get install docker.io`) or start it (`systemctl start docker`)"))
}

fn needs(projects: &[Project]) -> Needs {
    let mut needs = Needs::new();
    for project in projects {
        for (name, service) in &project.services {
            let others = service.depends_on.iter().map(|other| project.service_name(other)).collect();
            needs.insert(project.service_name(name), others);
        }
    }
    needs
}

fn awaited(what: &ServiceOutcome) -> Option<Awaited> {
    match what {
        ServiceOutcome::Created { revision, .. } | ServiceOutcome::Changed { revision, .. } => {
            Some(Awaited::Revision(*revision))
        }
        ServiceOutcome::Unchanged { revision, rolling_out: true, .. } => Some(Awaited::Revision(*revision)),
        // A first deploy that failed changes nothing the second time, and is no success then either.
        ServiceOutcome::Unchanged { rolling_out: false, proven: false, .. } => Some(Awaited::Settled),
        ServiceOutcome::Unchanged { rolling_out: false, proven: true, .. } => None,
        ServiceOutcome::Removed => Some(Awaited::Removed),
    }
}

/// What the cluster is asked to become.
enum Asked {
    /// With the settings in each: they count for every service that is deployed with them.
    Projects(Vec<Deploy>),
    /// A `cluster.toml` and nothing else.
    Settings(Settings),
}

impl Asked {
    /// Projects of which no service is asked for are left out.
    fn of(written: &Written, options: &Options) -> Result<Asked, Failure> {
        let Written { projects, settings, .. } = written;
        if let (true, Some(settings)) = (projects.is_empty(), settings) {
            return Ok(Asked::Settings(settings.clone()));
        }
        let known: Vec<ServiceName> = projects
            .iter()
            .flat_map(|project| project.services.keys().map(|service| project.service_name(service)))
            .collect();
        let mut only: BTreeMap<Label, Vec<Label>> = BTreeMap::new();
        for arg in &options.services {
            let (name, _) = pick(arg, known.iter(), "name another file or directory with -f")?;
            if !known.contains(&name) {
                return Err(Failure::new(Exit::NotFound, format!("there is no service {name} in these files"))
                    .fix("name another file or directory with -f"));
            }
            only.entry(name.project).or_default().push(name.service);
        }
        let wanted = |project: &&Project| options.services.is_empty() || only.contains_key(&project.name);
        let wanted: Vec<&Project> = projects.iter().filter(wanted).collect();
        if options.if_index.is_some() && wanted.len() > 1 {
            return Err(Failure::input("--if-index is for one project: the first would move the index for the others")
                .fix("deploy them one by one, with -f"));
        }
        let deploy = |project: &Project| Deploy {
            project: project.clone(),
            only: only.get(&project.name).cloned().unwrap_or_default(),
            prune: options.prune,
            replace: options.replace,
            if_generation: options.if_index,
            settings: settings.clone(),
        };
        Ok(Asked::Projects(wanted.into_iter().map(deploy).collect()))
    }

    /// What all of it together would do.
    async fn plan(&self, session: &Session) -> Result<(Generation, PutOutcome), Failure> {
        let (mut index, mut all) = (Generation::default(), PutOutcome::default());
        let mut unfit: Option<Failure> = None;
        let requests = match self {
            Asked::Projects(deploys) => deploys.iter().cloned().map(Request::Plan).collect(),
            Asked::Settings(settings) => vec![Request::PlanSettings(settings.clone())],
        };
        for request in requests {
            match session.ask(&request).await {
                Ok(Response::Planned { generation, outcome }) => {
                    index = index.max(generation);
                    all.services.extend(outcome.services);
                    all.settings = outcome.settings;
                    all.unlisted.extend(outcome.unlisted);
                }
                Ok(Response::Unchanged { generation }) => index = index.max(generation),
                Ok(other) => return Err(unexpected(&other)),
                Err(failure) if failure.unfit.is_empty() => return Err(failure),
                // The other projects are asked for too, so that everything is told at once.
                Err(failure) => {
                    if let Some(first) = &mut unfit {
                        first.unfit.extend(failure.unfit.iter().cloned());
                    } else {
                        unfit = Some(failure);
                    }
                }
            }
        }
        unfit.map_or(Ok((index, all)), Err)
    }

    /// Has it done, and tells what became of each service.
    async fn deploy(self, session: &Session) -> Result<(Generation, Services), Failure> {
        let (mut reached, mut services) = (Generation::default(), Services::new());
        let requests = match self {
            Asked::Projects(deploys) => deploys.into_iter().map(Request::Deploy).collect(),
            Asked::Settings(settings) => vec![Request::SetSettings(settings)],
        };
        for request in requests {
            match session.ask(&request).await? {
                Response::Deployed { generation, outcome } => {
                    reached = reached.max(generation);
                    services.extend(outcome.services);
                }
                Response::Done { generation } => reached = generation,
                // Somebody else has done the same since the plan.
                Response::Unchanged { generation } => reached = reached.max(generation),
                other => return Err(unexpected(&other)),
            }
        }
        Ok((reached, services))
    }
}

/// Brings the modules that the cluster lacks.
async fn upload(session: &Session, output: &Output, written: &Written) -> Result<(), Failure> {
    if written.modules.is_empty() {
        return Ok(());
    }
    let digests: Vec<String> = written.modules.keys().cloned().collect();
    let missing = match session.ask(&Request::MissingModules { digests }).await? {
        Response::MissingModules { digests } => digests,
        other => return Err(unexpected(&other)),
    };
    for digest in missing {
        let Some(bytes) = written.modules.get(&digest) else { continue };
        let size = bytes.len() as u64;
        let mut stream = session.stream(&Request::PutModule { digest: digest.clone(), size }).await?;
        stream.send_bytes(bytes).await.map_err(|error| session.broken(&error))?;
        stream.finish().await.map_err(|error| session.broken(&error))?;
        session.answer(&mut stream).await?;
        let text = format!("uploaded module {}, {}", &digest[..12.min(digest.len())], crate::output::megabytes(size));
        output.notice(&Text::of(Ink::Dim, format!("  {text}")));
    }
    Ok(())
}

fn show(output: &Output, index: Generation, outcome: &PutOutcome, projects: &[Project]) {
    if output.json {
        let PutOutcome { services, settings, unlisted } = outcome;
        let changes = outcome.changes_anything();
        output.object("plan", &Planned { index, changes, services, settings, unlisted });
    } else {
        output.lines(&lines(index, outcome, projects));
    }
}

fn lines(index: Generation, outcome: &PutOutcome, projects: &[Project]) -> Vec<Text> {
    let spec = |name: &ServiceName| {
        let project = projects.iter().find(|project| project.name == name.project)?;
        project.services.get(&name.service)
    };
    let changes = outcome.services.iter().map(|(name, what)| (name, (what, spec(name)))).collect();
    screen::plan(index, &changes, &outcome.settings)
}
