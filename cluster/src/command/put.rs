//! Putting a project's services: what `orca deploy` proposes, and what `orca plan` shows without proposing it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::service::{busy, next_revision};
use super::{Change, Command, Detail, Refusal, host};
use crate::event::Kind;
use crate::id::{Generation, Label, Revision, ServiceName};
use crate::limit::Limits;
use crate::spec::change::{self, change};
use crate::spec::check::{Fault, Kind as Mistake, Place};
use crate::spec::{Host, Project, Service, Settings};
use crate::state::{Deployed, Direction, Removal, RevisionRecord, State};

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
    /// The cluster's settings from now on, for these services already; entries of earlier versions have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub settings: Option<Settings>,
    /// What was left out of the files, and stays until another has its routes, comes back if it is among these; entries of
    /// earlier versions refuse that.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub recalls: bool,
}

/// What it does to each service, and to the cluster's settings.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct PutOutcome {
    pub services: BTreeMap<ServiceName, ServiceOutcome>,
    /// What becomes different in the settings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub settings: Vec<String>,
    /// Services of the project that are not among these, and stay: nobody asked to prune.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub unlisted: BTreeSet<ServiceName>,
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
        /// It stays stopped: nothing is started until somebody says so.
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        stopped: bool,
    },
    /// The same as what is wanted already.
    Unchanged {
        revision: Revision,
        rolling_out: bool,
        /// Whether it is known to get ready: a first deploy that failed is wanted still, and is not.
        #[serde(default)]
        proven: bool,
    },
    Removed,
}

impl PutOutcome {
    /// Of services that were picked from their files: whether those list the others too is not known from these.
    #[must_use]
    pub fn of_picked(self) -> PutOutcome {
        PutOutcome { unlisted: BTreeSet::new(), ..self }
    }

    pub fn changes_anything(&self) -> bool {
        !self.settings.is_empty()
            || self.services.values().any(|outcome| !matches!(outcome, ServiceOutcome::Unchanged { .. }))
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
    let mut unfit = unfit(state, put, reach);
    match unfit.len() {
        0 => {}
        1 => return Err(unfit.remove(0)),
        _ => return Err(Refusal::Several(unfit)),
    }
    let settings = put.settings.as_ref().map(|settings| change::settings(&state.settings, settings));
    let mut outcome = PutOutcome { settings: settings.unwrap_or_default(), ..PutOutcome::default() };
    for (label, spec) in &put.services {
        let name = ServiceName::new(put.project.clone(), label.clone());
        outcome.services.insert(name.clone(), preview_service(state, put, &name, spec)?);
    }
    for (name, deployed) in &state.services {
        let listed = name.project != put.project || put.services.contains_key(&name.service);
        if listed || deployed.removal.is_some() {
            continue;
        }
        if put.prune {
            outcome.services.insert(name.clone(), ServiceOutcome::Removed);
        } else {
            outcome.unlisted.insert(name.clone());
        }
    }
    Ok(outcome)
}

/// All that does not fit what the cluster has: whoever wrote the files is told of everything at once.
fn unfit(state: &State, put: &PutServices, reach: Reach) -> Vec<Refusal> {
    let mut unfit = Vec::new();
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
                let (service, owner) = (name.clone(), owner.clone());
                unfit.push(Refusal::RouteTaken { service, route: route.clone(), owner });
            }
        }
        if reach == Reach::Project
            && let Err(taken) = host::check(state, &name, spec)
        {
            unfit.push(taken);
        }
        for needs in &spec.depends_on {
            let other = ServiceName::new(put.project.clone(), needs.clone());
            if !put.services.contains_key(needs) && (put.prune || !state.services.contains_key(&other)) {
                unfit.push(Refusal::NoDependency { service: name.clone(), needs: needs.clone() });
            }
        }
    }
    if !missing.is_empty() {
        unfit.push(Refusal::SecretsMissing { missing });
    }
    unfit
}

/// What does not fit, one by one, if that is what a put was refused for.
pub fn misfits(refusal: &Refusal) -> &[Refusal] {
    match refusal {
        Refusal::Several(all) => all,
        Refusal::RouteTaken { .. }
        | Refusal::HostTaken { .. }
        | Refusal::NoDependency { .. }
        | Refusal::SecretsMissing { .. } => std::slice::from_ref(refusal),
        Refusal::NoService(_)
        | Refusal::NoRevision { .. }
        | Refusal::NothingBefore(_)
        | Refusal::NoSecret(_)
        | Refusal::SecretInUse { .. }
        | Refusal::NoToken(_)
        | Refusal::Moved { .. }
        | Refusal::Busy { .. }
        | Refusal::CannotScale { .. }
        | Refusal::Removing(_)
        | Refusal::NothingToPromote(_)
        | Refusal::SecretMoved { .. }
        | Refusal::NoDataKey(_)
        | Refusal::DataKeyTaken(_)
        | Refusal::Founded
        | Refusal::TooMuch(_)
        | Refusal::LastAdmin => &[],
    }
}

/// The same as faults of the services they are about: whoever has the files finds the lines.
pub fn faults(project: &Project, refusals: &[Refusal]) -> Vec<(Label, Fault)> {
    let mut faults = Vec::new();
    let mut note = |service: &ServiceName, kind: Mistake, at: Place, message: String, hint: String| {
        if service.project == project.name {
            faults.push((service.service.clone(), Fault { kind, hint: Some(hint), ..Fault::new(at, message) }));
        }
    };
    for refusal in refusals {
        match refusal {
            Refusal::RouteTaken { service, route, owner } => {
                let at = Place::of("routes").key(route.to_string());
                let message = format!("`{route}` is already routed to `{owner}`");
                note(service, Mistake::Conflict, at, message, "give it another domain or path".to_owned());
            }
            Refusal::HostTaken { service, host, owner, held } => {
                let (at, message) = match **host {
                    Host::Any => (
                        Place::of("routes"),
                        format!("without a domain it takes requests from `{owner}`, a service of another project"),
                    ),
                    Host::Exact(_) | Host::Wildcard(_) => (
                        Place::of("domain").key(host.to_string()),
                        format!("`{host}` belongs to `{owner}`, a service of another project, which has `{held}`"),
                    ),
                };
                let hint = "give it a domain of its own, or ask somebody whose token is not limited to a project";
                note(service, Mistake::Conflict, at, message, hint.to_owned());
            }
            Refusal::NoDependency { service, needs } => {
                let at = Place::of("depends_on").key(needs.to_string());
                let message = format!("there is no service `{needs}` in this project");
                note(service, Mistake::Value, at, message, "add it, or correct `depends_on`".to_owned());
            }
            Refusal::SecretsMissing { missing } => {
                for (service, secret) in missing {
                    let Some(spec) = project.services.get(&service.service) else { continue };
                    let message = format!("`{}` needs secret {secret}, which is not set", service.service);
                    let hint = format!("orca secrets set {secret} --project {}", service.project);
                    note(service, Mistake::Missing, secret_place(spec, secret), message, hint);
                }
            }
            Refusal::NoService(_)
            | Refusal::NoRevision { .. }
            | Refusal::NothingBefore(_)
            | Refusal::NoSecret(_)
            | Refusal::SecretInUse { .. }
            | Refusal::NoToken(_)
            | Refusal::Moved { .. }
            | Refusal::Busy { .. }
            | Refusal::CannotScale { .. }
            | Refusal::Removing(_)
            | Refusal::NothingToPromote(_)
            | Refusal::SecretMoved { .. }
            | Refusal::NoDataKey(_)
            | Refusal::DataKeyTaken(_)
            | Refusal::Founded
            | Refusal::TooMuch(_)
            | Refusal::LastAdmin
            | Refusal::Several(_) => {}
        }
    }
    faults
}

/// Where a service first refers to a secret.
fn secret_place(spec: &Service, secret: &str) -> Place {
    let variable = spec.env.iter().find(|(_, value)| value.secrets().any(|name| name == secret));
    if let Some((variable, _)) = variable {
        return Place::of("env").key(variable.clone());
    }
    let is_username =
        spec.registry.as_ref().is_some_and(|registry| registry.username.secrets().any(|name| name == secret));
    Place::of(if is_username { "registry.username" } else { "registry.password" })
}

/// What `put` would do, for changes that must stay within these limits.
pub fn preview_within(state: &State, put: &PutServices, reach: Reach, limits: &Limits) -> Result<PutOutcome, Refusal> {
    let outcome = preview(state, put, reach)?;
    match limits.refuses(state, &Command::PutServices(put.clone())) {
        None => Ok(outcome),
        Some(refusal) => Err(refusal),
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
    let recalled = match deployed.removal {
        Some(Removal { hands_over: true, volumes: false }) if put.recalls => true,
        Some(_) => return Err(Refusal::Removing(name.clone())),
        None => false,
    };
    // While a failed rollout goes back, the question is what was asked for last, not what is returned to.
    let goes_back = deployed.rollout.as_ref().is_some_and(|r| r.direction != Direction::Forward);
    let difference = change(deployed.spec(), spec);
    if difference.is_nothing() && !goes_back && !recalled {
        let (rolling_out, proven) = (deployed.rollout.is_some(), deployed.is_proven());
        return Ok(ServiceOutcome::Unchanged { revision: deployed.target, rolling_out, proven });
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
        differences: recalled
            .then(|| "its removal is called off".to_owned())
            .into_iter()
            .chain(difference.describe())
            .collect(),
        stopped: deployed.stopped,
    })
}

impl Change<'_> {
    pub(super) fn put_services(&mut self, put: PutServices) -> Result<Option<Detail>, Refusal> {
        // How far the caller reaches was judged on this very state: such a put is bound to its generation.
        let outcome = preview(self.state, &put, Reach::Cluster)?;
        if !outcome.changes_anything() {
            return Ok(None);
        }
        let PutServices { project, mut services, settings, prune: _, replace: _, if_generation: _, recalls: _ } = put;
        if let Some(settings) = settings {
            self.set_settings(settings)?;
        }
        for (name, what) in &outcome.services {
            match what {
                ServiceOutcome::Unchanged { .. } => {}
                ServiceOutcome::Removed => {
                    self.remove(name, Removal { volumes: false, hands_over: true })?;
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
        let deployed = self.state.services.get_mut(name).expect("previewed from this state");
        deployed.removal = None;
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

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::command::{Applied, Entry};
    use crate::event::Actor;
    use crate::spec::Allowance;
    use crate::spec::toml::{SourceFile, project};
    use crate::time::Timestamp;

    /// A project of this name with these services, over whatever rolls out.
    pub(crate) fn put(name: &str, text: &str) -> PutServices {
        let file = SourceFile { name: "service.toml".to_owned(), text: text.to_owned() };
        let Project { name, services } = project(&file, &name.parse().unwrap()).unwrap();
        PutServices {
            project: name,
            services,
            prune: false,
            replace: true,
            if_generation: None,
            settings: None,
            recalls: true,
        }
    }

    #[test]
    fn all_that_does_not_fit_is_refused_at_once() {
        let mut state = State::default();
        let hello = put("hello", "[[service]]\nname = \"web\"\nmodule = \"./web.wasm\"\n");
        let command = Command::PutServices(hello.clone());
        state.apply(1, Entry { at: Timestamp(1), actor: Actor::Orca, source: None, command });
        let api =
            "[[service]]\nname = \"api\"\nimage = \"a\"\nport = 1\nroutes = [\"/*\"]\nenv = { A = \"${secrets.A}\" }\n";
        let refused = preview(&state, &put("shop", api), Reach::Cluster).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "/* is already routed to hello/web; give shop/api another domain or path; \
             shop/api needs secret A, which is not set: `orca secrets set A --project shop`"
        );
        let again = preview(&state, &hello, Reach::Cluster).unwrap().services.into_values().next();
        let unproven = ServiceOutcome::Unchanged { revision: Revision(1), rolling_out: true, proven: false };
        assert_eq!(again, Some(unproven));
    }

    #[test]
    fn settings_come_with_the_services_that_need_them_or_not_at_all() {
        let settings = Settings { allow_host: [Allowance::from("/srv".to_owned())].into(), ..Settings::default() };
        let with = |text: &str| PutServices { settings: Some(settings.clone()), ..put("shop", text) };
        let mut state = State::default();
        let mut apply = |index, put: PutServices| {
            let command = Command::PutServices(put);
            let applied = state.apply(index, Entry { at: Timestamp(1), actor: Actor::Orca, source: None, command });
            (applied, state.clone())
        };
        let lacks = "[[service]]\nname = \"api\"\nimage = \"a\"\nenv = { A = \"${secrets.A}\" }\n";
        let (refused, after) = apply(1, with(lacks));
        assert!(matches!(refused, Applied::Refused(Refusal::SecretsMissing { .. })), "{refused:?}");
        assert_eq!(after.settings, Settings::default());

        let web = "[[service]]\nname = \"web\"\nmodule = \"./web.wasm\"\n";
        let (done, after) = apply(2, with(web));
        let Applied::Done { detail: Detail::Put(outcome), .. } = done else { panic!("{done:?}") };
        assert_eq!((outcome.settings, outcome.services.len()), (vec!["allow_host /srv added".to_owned()], 1));
        assert_eq!(after.settings, settings);
        let told: Vec<&str> = after.events.iter().map(|event| event.text.as_str()).collect();
        assert_eq!(told, ["cluster settings changed: allow_host /srv added", "created as v1"]);

        let (again, _) = apply(3, with(web));
        assert!(matches!(again, Applied::Unchanged { .. }), "{again:?}");
        // A file that says nothing of settings leaves them.
        let (_, after) = apply(4, put("shop", "[[service]]\nname = \"web\"\nmodule = \"./other.wasm\"\n"));
        assert_eq!(after.settings, settings);
    }

    #[test]
    fn what_the_files_do_not_list_is_removed_or_said_to_stay() {
        let mut state = State::default();
        let mut apply = |put: PutServices| {
            let entry =
                Entry { at: Timestamp(1), actor: Actor::Orca, source: None, command: Command::PutServices(put) };
            state.apply(1, entry);
            state.clone()
        };
        let services = |names: &[&str]| {
            names.iter().map(|name| format!("[[service]]\nname = \"{name}\"\nimage = \"a\"\n")).collect::<String>()
        };
        apply(put("blog", &services(&["web"])));
        let state = apply(put("shop", &services(&["api", "old", "older"])));
        let kept = put("shop", &services(&["api"]));
        let pruned = PutServices { prune: true, ..kept.clone() };
        let names: BTreeSet<ServiceName> = ["shop/old", "shop/older"].map(|name| name.parse().unwrap()).into();

        let outcome = preview(&state, &kept, Reach::Cluster).unwrap();
        assert_eq!((&outcome.unlisted, outcome.services.len(), outcome.changes_anything()), (&names, 1, false));
        assert!(outcome.of_picked().unlisted.is_empty());
        let outcome = preview(&state, &pruned, Reach::Cluster).unwrap();
        assert!(outcome.unlisted.is_empty());
        assert!(names.iter().all(|name| outcome.services[name] == ServiceOutcome::Removed));
        // What is going already is neither.
        let state = apply(pruned);
        assert!(preview(&state, &kept, Reach::Cluster).unwrap().unlisted.is_empty());
    }
}
