//! Plan and deploy: the same question, asked with and without consequences. And the modules that a deploy needs here
//! first.

use std::collections::{BTreeMap, BTreeSet};

use orca_cluster::command::put::{PutOutcome, PutServices, Reach, ServiceOutcome, preview, preview_within};
use orca_cluster::command::{Command, Detail};
use orca_cluster::id::{Label, ServiceName};
use orca_cluster::limit::Limits;
use orca_cluster::spec::{Allowance, HostDemand, Service, Settings, Source, change, check};
use orca_cluster::state::{Deployed, State};
use orca_wire::cause::chain;
use orca_wire::message::client::{Deploy, Reason, Refused, Response};
use tracing::warn;

use super::{Answer, Core, blob, failed, invalid, not_found, refused};
use crate::auth::{Caller, Object, Verb};
use crate::blob::Upload;

/// Digests one may ask about at once: more than any project has modules.
const DIGESTS_MAX: usize = 1_000;

/// Times that a deploy which is bound to the state it was allowed in looks at a newer one.
const LOOKS_MAX: u32 = 20;

pub async fn plan(core: &Core, caller: &Caller, deploy: Deploy) -> Answer {
    core.authorise(caller, Verb::Plan, Object::Project(&deploy.project.name))?;
    let is_picked = !deploy.only.is_empty();
    let mut put = put(deploy)?;
    let state = core.read().await?;
    put.settings = new_settings(core, caller, &state, put.settings)?;
    let outcome = preview_within(&state, &put, reach(caller), &Limits::OURS).map_err(refused)?;
    check_host(core, caller, &state, &put, &outcome)?;
    Ok(Response::Planned { generation: state.generation, outcome: told(outcome, is_picked) })
}

pub async fn deploy(core: &Core, caller: &Caller, deploy: Deploy) -> Answer {
    core.authorise(caller, Verb::Deploy, Object::Project(&deploy.project.name))?;
    let is_picked = !deploy.only.is_empty();
    let mut put = put(deploy)?;
    let settings = put.settings.take();
    check_modules(core, &put.services)?;
    let mut looks = 0;
    let (outcome, changed) = loop {
        looks += 1;
        let state = core.read().await?;
        put.settings = new_settings(core, caller, &state, settings.clone())?;
        let outcome = preview(&state, &put, reach(caller)).map_err(refused)?;
        if !outcome.changes_anything() {
            return Ok(Response::Deployed { generation: state.generation, outcome: told(outcome, is_picked) });
        }
        let mut bound = put.clone();
        let named = put.services.values().any(|service| !service.routes.is_empty());
        let is_limited = reach(caller) == Reach::Project && named;
        if check_host(core, caller, &state, &put, &outcome)? || is_limited {
            // Allowed for what this state would make of it, and for nothing else.
            bound.if_generation = Some(state.generation);
        }
        let ours = bound.if_generation != put.if_generation;
        match core.propose(caller, Command::PutServices(bound)).await {
            Ok(changed) => break (outcome, changed),
            // The state has moved for a reason of its own, which the caller did not ask to be told.
            Err(Refused { reason: Reason::Conflict, .. }) if ours && looks < LOOKS_MAX => {}
            Err(refused) => return Err(refused),
        }
    };
    let outcome = match changed.detail {
        Some(Detail::Put(outcome)) => outcome,
        // Somebody deployed the same between our look and our proposal.
        None => unchanged(outcome),
        Some(Detail::None | Detail::Node(_) | Detail::Revision(_)) => {
            return Err(failed("the deploy was answered with something else; this is a defect in orca".to_owned()));
        }
    };
    Ok(Response::Deployed { generation: changed.generation, outcome: told(outcome, is_picked) })
}

fn told(outcome: PutOutcome, is_picked: bool) -> PutOutcome {
    if is_picked { outcome.of_picked() } else { outcome }
}

fn reach(caller: &Caller) -> Reach {
    if caller.project.is_some() { Reach::Project } else { Reach::Cluster }
}

fn unchanged(outcome: PutOutcome) -> PutOutcome {
    let services = outcome.services.into_iter().filter_map(|(name, outcome)| {
        let outcome = match outcome {
            ServiceOutcome::Created { revision, .. } | ServiceOutcome::Changed { revision, .. } => {
                ServiceOutcome::Unchanged { revision, rolling_out: true, proven: false }
            }
            ServiceOutcome::Unchanged { .. } => outcome,
            ServiceOutcome::Removed => return None,
        };
        Some((name, outcome))
    });
    PutOutcome { services: services.collect(), settings: Vec::new(), unlisted: outcome.unlisted }
}

/// The command that a deploy stands for. Its services were checked one by one when they were decoded.
fn put(deploy: Deploy) -> Result<PutServices, Refused> {
    let Deploy { project, only, prune, replace, if_generation, settings } = deploy;
    if prune && !only.is_empty() {
        let message = "services to deploy are named, so nothing else may be removed with --prune".to_owned();
        return Err(invalid(message, Some("leave out one of the two")));
    }
    let only: BTreeSet<Label> = only.into_iter().collect();
    if let Some(unknown) = only.iter().find(|name| !project.services.contains_key(*name)) {
        return Err(not_found(format!("project {} has no service {unknown}", project.name), None));
    }
    let mut services = project.services;
    services.retain(|name, _| only.is_empty() || only.contains(name));
    Ok(PutServices { project: project.name, services, prune, replace, if_generation, settings, recalls: true })
}

/// The settings, if they are others than this state has; then it takes who may change them. Who has them among their
/// files and leaves them as they are needs no permission.
pub fn new_settings(
    core: &Core,
    caller: &Caller,
    state: &State,
    settings: Option<Settings>,
) -> Result<Option<Settings>, Refused> {
    let Some(settings) = settings.filter(|settings| *settings != state.settings) else { return Ok(None) };
    core.authorise(caller, Verb::ChangeSettings, Object::Cluster).map_err(|refused| {
        let differences = change::settings(&state.settings, &settings).join(", ");
        let message = format!("cluster.toml is not what is set ({differences}), and {}", refused.message);
        Refused {
            message,
            hint: Some("leave cluster.toml out, or let an administrator deploy it".to_owned()),
            ..refused
        }
    })?;
    if let Some(fault) = check::settings(&settings).first() {
        return Err(invalid(fault.to_string(), fault.hint.as_deref()));
    }
    Ok(Some(settings))
}

/// Whether what changes may reach into the host as it wants to; true if anything in it does, changed or not.
fn check_host(
    core: &Core,
    caller: &Caller,
    state: &State,
    put: &PutServices,
    outcome: &PutOutcome,
) -> Result<bool, Refused> {
    let mut demands_any = false;
    for (label, service) in &put.services {
        let name = ServiceName::new(put.project.clone(), label.clone());
        if let Some(ServiceOutcome::Unchanged { .. }) = outcome.services.get(&name) {
            // Allowed because it is there; should it change before we have proposed, it would be put back unasked.
            demands_any |= !service.host_demands().is_empty();
            continue;
        }
        let settings = put.settings.as_ref().unwrap_or(&state.settings);
        demands_any |= check_service(core, caller, settings, &name, service)?;
    }
    Ok(demands_any)
}

/// The same for one service.
pub fn check_service(
    core: &Core,
    caller: &Caller,
    settings: &Settings,
    name: &ServiceName,
    service: &Service,
) -> Result<bool, Refused> {
    if service.host_demands().is_empty() {
        return Ok(false);
    }
    core.authorise(caller, Verb::ReachHost, Object::Cluster)?;
    let Some(demand) = settings.forbids(service) else { return Ok(true) };
    let what = match demand {
        HostDemand::Privileged => "to be privileged".to_owned(),
        HostDemand::Network => "the host's network".to_owned(),
        HostDemand::Path(path) => format!("the host's {path}"),
    };
    let allow = Allowance::from(demand);
    Err(Refused {
        reason: Reason::Unauthorised,
        message: format!("{name} wants {what}, which this cluster does not allow"),
        hint: Some(format!("add \"{allow}\" to `allow_host` under [policy] in cluster.toml")),
        unfit: Vec::new(),
    })
}

/// Whether the caller may get inside a service, or choose anew what runs in it: if any revision of it reaches into the
/// host, that takes who may let it.
pub fn reaches_host(core: &Core, caller: &Caller, deployed: &Deployed) -> Result<(), Refused> {
    if deployed.reaches_host() { core.authorise(caller, Verb::ReachHost, Object::Cluster) } else { Ok(()) }
}

fn check_modules(core: &Core, services: &BTreeMap<Label, Service>) -> Result<(), Refused> {
    let mut missing = Vec::new();
    for (label, service) in services {
        let Source::Module(module) = &service.source else { continue };
        let Some(digest) = &module.digest else {
            return Err(invalid(format!("service {label}: module {} has no digest", module.path), None));
        };
        if !core.blobs.has(digest).map_err(blob)? {
            missing.push(format!("{} of service {label} (sha256:{digest})", module.path));
        }
    }
    if missing.is_empty() {
        return Ok(());
    }
    let message = format!("modules are not here yet: {}", missing.join(", "));
    Err(invalid(message, Some("upload them first; `orca deploy` does")))
}

pub fn missing_modules(core: &Core, caller: &Caller, digests: Vec<String>) -> Answer {
    core.authorise(caller, Verb::UploadModule, Object::Cluster)?;
    if digests.len() > DIGESTS_MAX {
        return Err(invalid(format!("{} digests at once; at most {DIGESTS_MAX} are looked up", digests.len()), None));
    }
    let mut missing = Vec::new();
    for digest in digests {
        if !core.blobs.has(&digest).map_err(blob)? {
            missing.push(digest);
        }
    }
    Ok(Response::MissingModules { digests: missing })
}

/// Begins to take a module in.
pub async fn receive_module(core: &Core, caller: &Caller, digest: &str, size: u64) -> Result<Upload, Refused> {
    core.authorise(caller, Verb::UploadModule, Object::Cluster)?;
    let state = core.raft.state();
    core.blobs.receive(digest, size, &modules(&state)).await.map_err(blob)
}

/// Keeps a module that has been taken in, and lets go of those that nothing refers to.
pub async fn keep_module(core: &Core, upload: Upload) -> Answer {
    upload.finish().await.map_err(blob)?;
    let state = core.raft.state();
    let (blobs, swept) = (core.blobs.clone(), state.clone());
    let sweep = tokio::task::spawn_blocking(move || blobs.sweep(&modules(&swept)));
    match sweep.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => warn!(error = chain(&error), "old modules could not be removed"),
        Err(error) => warn!(%error, "old modules could not be removed"),
    }
    Ok(Response::Done { generation: state.generation })
}

/// The digests of all modules that a kept revision names.
pub fn modules(state: &State) -> BTreeSet<&str> {
    let revisions = state.services.values().flat_map(|deployed| deployed.revisions.values());
    revisions
        .filter_map(|record| match &record.spec.source {
            Source::Module(module) => module.digest.as_deref(),
            Source::Image(_) => None,
        })
        .collect()
}
