//! Putting a project's services: what `orca deploy` proposes, and what `orca plan` shows without proposing it.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{Applied, Change, Command, Detail, Entry, Refusal, busy, host, next_revision};
use crate::event::{Actor, Kind};
use crate::id::{Generation, Label, Revision, ServiceName};
use crate::limit::Limits;
use crate::spec::Service;
use crate::spec::change::change;
use crate::state::{Deployed, Direction, RevisionRecord, State};
use crate::time::Timestamp;

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PutServices {
    pub project: Label,
    pub services: BTreeMap<Label, Service>,
    /// Remove services of the project that are not among these.
    pub prune: bool,
    /// Take the place of a rollout that runs instead of being refused.
    pub replace: bool,
    /// Refuse if the state is not at this generation any more.
    pub if_generation: Option<Generation>,
}

/// What it does to each service.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PutOutcome {
    pub services: BTreeMap<ServiceName, ServiceOutcome>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ServiceOutcome {
    Created {
        revision: Revision,
        replicas: u32,
    },
    /// `replaces` tells whether new replicas are needed; if not, nothing is started or stopped for it but for a
    /// change in their number.
    Changed {
        from: Revision,
        revision: Revision,
        replaces: bool,
        differences: Vec<String>,
    },
    /// The same as what runs, or as what is being rolled out.
    Unchanged {
        revision: Revision,
        rolling_out: bool,
    },
    Removed,
}

impl PutOutcome {
    pub fn changes_anything(&self) -> bool {
        self.services.values().any(|outcome| !matches!(outcome, ServiceOutcome::Unchanged { .. }))
    }
}

/// How far whoever asks for a change may reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    Cluster,
    /// One project only: hosts of others are not its to take.
    Project,
}

/// What `put` would do to this state.
pub fn preview(state: &State, put: &PutServices, reach: Reach) -> Result<PutOutcome, Refusal> {
    if let Some(planned) = put.if_generation
        && planned != state.generation
    {
        return Err(Refusal::Moved { planned, now: state.generation });
    }
    if reach == Reach::Project {
        for (label, spec) in &put.services {
            host::check(state, &ServiceName::new(put.project.clone(), label.clone()), spec)?;
        }
    }
    let mut outcome = PutOutcome::default();
    let mut missing = Vec::new();
    for (label, spec) in &put.services {
        let name = ServiceName::new(put.project.clone(), label.clone());
        for secret in spec.secrets() {
            if state.secret(&put.project, secret).is_none() {
                missing.push((name.clone(), secret.to_owned()));
            }
        }
        for route in &spec.routes {
            // A service that this very put changes or removes may give the route away.
            if let Some(owner) = state.route_owner(route, &name)
                && !gives_up(put, owner)
            {
                return Err(Refusal::RouteTaken { service: name, route: route.clone(), owner: owner.clone() });
            }
        }
        for needs in &spec.depends_on {
            let other = ServiceName::new(put.project.clone(), needs.clone());
            if !put.services.contains_key(needs) && (put.prune || !state.services.contains_key(&other)) {
                return Err(Refusal::NoDependency { service: name, needs: needs.clone() });
            }
        }
        outcome.services.insert(name.clone(), preview_service(state, put, &name, spec)?);
    }
    if !missing.is_empty() {
        return Err(Refusal::SecretsMissing { missing });
    }
    if put.prune {
        for (name, deployed) in &state.services {
            let listed = name.project != put.project || put.services.contains_key(&name.service);
            if !listed && deployed.removal.is_none() {
                outcome.services.insert(name.clone(), ServiceOutcome::Removed);
            }
        }
    }
    Ok(outcome)
}

/// The same, for changes that must stay within these limits.
pub fn preview_within(state: &State, put: &PutServices, reach: Reach, limits: &Limits) -> Result<PutOutcome, Refusal> {
    let outcome = preview(state, put, reach)?;
    let command = limits.hold(Command::PutServices(put.clone()));
    let entry = Entry { at: Timestamp::default(), actor: Actor::Orca, source: None, command };
    match state.clone().apply(0, entry) {
        Applied::Done { .. } | Applied::Unchanged { .. } => Ok(outcome),
        Applied::Refused(refusal) => Err(refusal),
    }
}

fn gives_up(put: &PutServices, owner: &ServiceName) -> bool {
    owner.project == put.project && (put.services.contains_key(&owner.service) || put.prune)
}

fn preview_service(
    state: &State,
    put: &PutServices,
    name: &ServiceName,
    spec: &Service,
) -> Result<ServiceOutcome, Refusal> {
    let Some(deployed) = state.services.get(name) else {
        return Ok(ServiceOutcome::Created { revision: Revision(1), replicas: spec.replicas });
    };
    if deployed.removal.is_some() {
        return Err(Refusal::Removing(name.clone()));
    }
    // While a failed rollout goes back, the question is what was asked for last, not what is returned to.
    let goes_back = deployed.rollout.as_ref().is_some_and(|r| r.direction != Direction::Forward);
    let difference = change(deployed.spec(), spec);
    if difference.is_nothing() && !goes_back {
        let rolling_out = deployed.rollout.is_some();
        return Ok(ServiceOutcome::Unchanged { revision: deployed.target, rolling_out });
    }
    if let Some(rollout) = &deployed.rollout
        && !put.replace
    {
        return Err(busy(name, rollout));
    }
    Ok(ServiceOutcome::Changed {
        from: deployed.target,
        revision: next_revision(deployed),
        replaces: difference.needs_new_replicas() || deployed.settled.is_none(),
        differences: difference.describe(),
    })
}

impl Change<'_> {
    pub(super) fn put_services(&mut self, put: PutServices) -> Result<Option<Detail>, Refusal> {
        // How far the caller reaches was judged on this very state: such a put is bound to its generation.
        let outcome = preview(self.state, &put, Reach::Cluster)?;
        if !outcome.changes_anything() {
            return Ok(None);
        }
        let PutServices { project, mut services, .. } = put;
        for (name, what) in &outcome.services {
            match what {
                ServiceOutcome::Unchanged { .. } => {}
                ServiceOutcome::Removed => {
                    self.remove(name, false)?;
                }
                ServiceOutcome::Created { revision, .. } => {
                    let spec = services.remove(&name.service).expect("previewed from this map");
                    self.create(name, *revision, spec);
                    self.say(Kind::Deployed, Some(name), format!("created as {revision}"));
                }
                ServiceOutcome::Changed { revision, replaces, differences, .. } => {
                    let spec = services.remove(&name.service).expect("previewed from this map");
                    self.update(name, *revision, *replaces, spec);
                    self.say(Kind::Deployed, Some(name), format!("{revision}: {}", differences.join(", ")));
                }
            }
        }
        debug_assert!(outcome.services.keys().all(|name| name.project == project));
        Ok(Some(Detail::Put(outcome)))
    }

    fn create(&mut self, name: &ServiceName, revision: Revision, spec: Service) {
        let record = RevisionRecord {
            spec,
            template: revision,
            digest: None,
            pull: false,
            at: self.at,
            by: self.actor.clone(),
            note: "deploy".to_owned(),
        };
        let deployed = Deployed {
            revisions: BTreeMap::from([(revision, record)]),
            target: revision,
            settled: None,
            rollout: None,
            stopped: false,
            removal: None,
            receipts: Default::default(),
            home: None,
            schedules: BTreeMap::new(),
        };
        self.state.services.insert(name.clone(), deployed);
        self.begin(name, revision);
    }

    fn update(&mut self, name: &ServiceName, revision: Revision, replaces: bool, spec: Service) {
        let deployed = self.state.services.get(name).expect("previewed from this state");
        let before = deployed.target_record();
        let record = RevisionRecord {
            spec,
            template: if replaces { revision } else { before.template },
            digest: if replaces { None } else { before.digest.clone() },
            pull: !replaces && before.pull,
            at: self.at,
            by: self.actor.clone(),
            note: "deploy".to_owned(),
        };
        self.revise(name, record);
    }
}
