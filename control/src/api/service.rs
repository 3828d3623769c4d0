//! Changes to one service that is there, and to the cluster's settings.

use orca_cluster::command::put::PutOutcome;
use orca_cluster::command::service::{check_rollback, check_scale};
use orca_cluster::command::{Command, host};
use orca_cluster::id::{Revision, ServiceName};
use orca_cluster::spec::{Settings, change, check};
use orca_wire::message::client::Response;

use super::{Answer, Core, deploy, invalid, refused};
use crate::auth::{Caller, Object, Verb};

/// What [`set_settings`] would do.
pub async fn plan_settings(core: &Core, caller: &Caller, settings: Settings) -> Answer {
    core.authorise(caller, Verb::Plan, Object::Cluster)?;
    let state = core.read().await?;
    let settings = deploy::new_settings(core, caller, &state, Some(settings))?;
    let differences = settings.map(|settings| change::settings(&state.settings, &settings));
    let outcome = PutOutcome { settings: differences.unwrap_or_default(), ..PutOutcome::default() };
    Ok(Response::Planned { generation: state.generation, outcome })
}

pub async fn set_settings(core: &Core, caller: &Caller, settings: Settings) -> Answer {
    core.authorise(caller, Verb::ChangeSettings, Object::Cluster)?;
    if let Some(fault) = check::settings(&settings).first() {
        return Err(invalid(fault.to_string(), fault.hint.as_deref()));
    }
    Ok(core.propose(caller, Command::SetSettings(settings)).await?.response())
}

pub async fn scale(core: &Core, caller: &Caller, service: ServiceName, replicas: u32) -> Answer {
    core.authorise(caller, Verb::Operate, Object::Project(&service.project))?;
    // Here and not when it is applied: what an entry means must not change with the rules.
    check_scale(&*core.read().await?, &service, replicas).map_err(refused)?;
    operate(core, caller, &service, Command::Scale { service: service.clone(), replicas }).await
}

pub async fn stop(core: &Core, caller: &Caller, service: ServiceName) -> Answer {
    operate(core, caller, &service, Command::Stop { service: service.clone() }).await
}

pub async fn start(core: &Core, caller: &Caller, service: ServiceName) -> Answer {
    operate(core, caller, &service, Command::Start { service: service.clone() }).await
}

pub async fn restart(core: &Core, caller: &Caller, service: ServiceName) -> Answer {
    operate(core, caller, &service, Command::Restart { service: service.clone(), pull: false }).await
}

/// The image's name may mean something else by now: for what reaches into the host that is like deploying it.
pub async fn redeploy(core: &Core, caller: &Caller, service: ServiceName) -> Answer {
    core.authorise(caller, Verb::Operate, Object::Project(&service.project))?;
    if let Some(deployed) = core.read().await?.services.get(&service) {
        deploy::reaches_host(core, caller, deployed)?;
    }
    operate(core, caller, &service, Command::Restart { service: service.clone(), pull: true }).await
}

pub async fn promote(core: &Core, caller: &Caller, service: ServiceName) -> Answer {
    operate(core, caller, &service, Command::Promote { service: service.clone() }).await
}

pub async fn remove(core: &Core, caller: &Caller, service: ServiceName, volumes: bool) -> Answer {
    core.authorise(caller, Verb::Remove, Object::Project(&service.project))?;
    Ok(core.propose(caller, Command::Remove { service, volumes }).await?.response())
}

/// Going back may bring back a revision that reaches into the host: then it takes what deploying it would take.
pub async fn rollback(core: &Core, caller: &Caller, service: ServiceName, mut to: Option<Revision>) -> Answer {
    core.authorise(caller, Verb::Operate, Object::Project(&service.project))?;
    let state = core.read().await?;
    if let Some(deployed) = state.services.get(&service) {
        // Of a rollout that runs it is known where it came from.
        if deployed.rollout.is_none() {
            to = to.or_else(|| deployed.previous());
        }
        if let (Some(_), Some(record)) = (&caller.project, to.and_then(|to| deployed.revisions.get(&to))) {
            host::check(&state, &service, &record.spec).map_err(refused)?;
        }
        // Here and not when it is applied: what an entry means must not change with the rules.
        check_rollback(&state, &service, to).map_err(refused)?;
        for spec in deployed.specs_to_allow(to) {
            deploy::check_service(core, caller, &state.settings, &service, spec)?;
        }
    }
    Ok(core.propose(caller, Command::Rollback { service, to }).await?.response())
}

async fn operate(core: &Core, caller: &Caller, service: &ServiceName, command: Command) -> Answer {
    core.authorise(caller, Verb::Operate, Object::Project(&service.project))?;
    Ok(core.propose(caller, command).await?.response())
}
