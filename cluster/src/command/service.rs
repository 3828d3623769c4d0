//! Commands about one service. All but its removal end in a revision, or in what its newest one is to do.

use super::{Change, Detail, Refusal};
use crate::event::Kind;
use crate::id::{Revision, ServiceName};
use crate::spec::change::change;
use crate::spec::{Service, Strategy, VolumeSource, check};
use crate::state::{
    Deployed, Direction, Failure, PlacementState, REVISIONS_KEPT, Removal, RevisionRecord, Rollout, State,
};

impl Change<'_> {
    pub(super) fn scale(&mut self, name: &ServiceName, replicas: u32) -> Result<Option<Detail>, Refusal> {
        let deployed = self.present(name)?;
        let record = deployed.target_record();
        let before = record.spec.replicas;
        if before == replicas {
            return Ok(None);
        }
        let mut spec = record.spec.clone();
        spec.replicas = replicas;
        if let Some(reason) = cannot_scale(&spec) {
            return Err(Refusal::CannotScale { service: name.clone(), replicas, reason });
        }
        let record = RevisionRecord { spec, note: format!("scale to {replicas}"), ..record.clone() };
        let revision = self.revise(name, record);
        self.say(Kind::Scaled, Some(name), format!("scaled from {before} to {replicas} replicas"));
        Ok(Some(Detail::Revision(revision)))
    }

    pub(super) fn set_stopped(&mut self, name: &ServiceName, stopped: bool) -> Result<Option<Detail>, Refusal> {
        let at = self.at;
        let deployed = self.present(name)?;
        if deployed.stopped == stopped {
            return Ok(None);
        }
        deployed.stopped = stopped;
        let (target, proven) = (deployed.target, deployed.is_proven());
        match &mut deployed.rollout {
            Some(rollout) if !stopped && rollout.direction == Direction::Forward => rollout.started = at,
            // Deployed while it was stopped: now it can be seen whether it gets ready.
            None if !stopped && !proven => self.begin(name, target),
            Some(_) | None => {}
        }
        match stopped {
            true => self.say(Kind::Stopped, Some(name), "stopped".to_owned()),
            false => self.say(Kind::Started, Some(name), "started".to_owned()),
        }
        Ok(Some(Detail::None))
    }

    pub(super) fn restart(&mut self, name: &ServiceName, pull: bool) -> Result<Option<Detail>, Refusal> {
        let deployed = self.present(name)?;
        if let Some(rollout) = &deployed.rollout {
            return Err(busy(name, rollout));
        }
        let record = deployed.target_record();
        let record = RevisionRecord {
            template: next_revision(deployed),
            digest: if pull { None } else { record.digest.clone() },
            pull,
            note: if pull { "redeploy" } else { "restart" }.to_owned(),
            ..record.clone()
        };
        let revision = self.revise(name, record);
        self.promote_at_once(name);
        let what = if pull { "redeployed" } else { "restarted" };
        self.say(Kind::Restarted, Some(name), format!("{what} as {revision}"));
        Ok(Some(Detail::Revision(revision)))
    }

    pub(super) fn remove(&mut self, name: &ServiceName, removal: Removal) -> Result<Option<Detail>, Refusal> {
        let deployed = self.state.services.get_mut(name).ok_or_else(|| Refusal::NoService(name.clone()))?;
        if deployed.removal == Some(removal) {
            return Ok(None);
        }
        deployed.removal = Some(removal);
        deployed.rollout = None;
        let text = if removal.volumes { "removed, with its volumes" } else { "removed" };
        self.say(Kind::ServiceRemoved, Some(name), text.to_owned());
        Ok(Some(Detail::None))
    }

    pub(super) fn promote(&mut self, name: &ServiceName) -> Result<Option<Detail>, Refusal> {
        let deployed = self.present(name)?;
        let canary = matches!(deployed.spec().deploy.strategy, Strategy::Canary { .. });
        match &mut deployed.rollout {
            Some(rollout) if canary && rollout.direction == Direction::Forward && !rollout.promoted => {
                rollout.promoted = true;
                let to = rollout.to;
                self.say(Kind::Promoted, Some(name), format!("{to} promoted"));
                Ok(Some(Detail::None))
            }
            _ => Err(Refusal::NothingToPromote(name.clone())),
        }
    }

    pub(super) fn rollback(&mut self, name: &ServiceName, to: Option<Revision>) -> Result<Option<Detail>, Refusal> {
        let deployed = self.present(name)?;
        // While a rollout runs, going back means to where it came from, whose replicas are still there.
        if let (Some(rollout), None) = (&deployed.rollout, to) {
            let to = rollout.to;
            if deployed.settled.is_none() {
                return Err(Refusal::NothingBefore(name.clone()));
            }
            if rollout.direction != Direction::Forward {
                return Ok(None);
            }
            let why = Failure {
                cause: format!("{} asked to go back", self.actor),
                evidence: Vec::new(),
                fix: None,
                asked: true,
            };
            self.turn_back(name, why);
            self.say(Kind::RolledBack, Some(name), format!("rollout of {to} called back"));
            return Ok(Some(Detail::None));
        }
        let to = match to {
            Some(to) => to,
            // As entries of earlier versions have it: now the revision comes with it.
            None => previous_template(deployed).ok_or_else(|| Refusal::NothingBefore(name.clone()))?,
        };
        let Some(record) = deployed.revisions.get(&to) else {
            return Err(Refusal::NoRevision { service: name.clone(), revision: to });
        };
        if deployed.target == to {
            return Ok(None);
        }
        // Its replicas may be there still, and do: nothing is restarted then.
        let next = next_revision(deployed);
        let record = record.clone();
        let there = self
            .state
            .placements_of(name)
            .any(|(_, placement)| placement.revision == record.template && placement.state == PlacementState::Serve);
        let record = RevisionRecord {
            template: if there { record.template } else { next },
            pull: false,
            note: format!("rollback to {to}"),
            ..record.clone()
        };
        if let Some((route, owner)) = record
            .spec
            .routes
            .iter()
            .find_map(|route| Some((route.clone(), self.state.route_owner(route, name)?.clone())))
        {
            return Err(Refusal::RouteTaken { service: name.clone(), route, owner });
        }
        let revision = self.revise(name, record);
        self.promote_at_once(name);
        self.say(Kind::RolledBack, Some(name), format!("back to {to}, as {revision}"));
        Ok(Some(Detail::Revision(revision)))
    }

    /// No canary: what comes is known, and a person wants all of it now.
    fn promote_at_once(&mut self, name: &ServiceName) {
        if let Some(rollout) = self.state.services.get_mut(name).and_then(|deployed| deployed.rollout.as_mut()) {
            rollout.promoted = true;
        }
    }

    /// A service that exists and is not going.
    fn present(&mut self, name: &ServiceName) -> Result<&mut Deployed, Refusal> {
        let deployed = self.state.services.get_mut(name).ok_or_else(|| Refusal::NoService(name.clone()))?;
        match deployed.removal {
            Some(_) => Err(Refusal::Removing(name.clone())),
            None => Ok(deployed),
        }
    }

    /// Makes this the service's newest revision and its target, and starts the rollout to it.
    pub(super) fn revise(&mut self, name: &ServiceName, record: RevisionRecord) -> Revision {
        let record = RevisionRecord { at: self.at, by: self.actor.clone(), ..record };
        let deployed = self.state.services.get_mut(name).expect("the caller has looked it up");
        let revision = next_revision(deployed);
        let same = record.template == deployed.template();
        deployed.revisions.insert(revision, record);
        deployed.target = revision;
        match &mut deployed.rollout {
            // The same replicas, on their way already: now it is the way to this revision.
            Some(rollout) if same && rollout.direction == Direction::Forward => rollout.to = revision,
            Some(_) | None => self.begin(name, revision),
        }
        self.forget_old_revisions(name);
        revision
    }

    /// Starts the rollout of the target, in place of any that runs.
    pub(super) fn begin(&mut self, name: &ServiceName, to: Revision) {
        let at = self.at;
        let deployed = self.state.services.get_mut(name).expect("the caller has looked it up");
        let from = deployed.settled;
        deployed.rollout = Some(Rollout {
            to,
            from,
            started: at,
            direction: Direction::Forward,
            promoted: false,
            baseline: None,
            replaced: 0,
            trial: None,
        });
    }

    /// Makes the settled revision the target again.
    pub(super) fn turn_back(&mut self, name: &ServiceName, why: Failure) {
        let deployed = self.state.services.get_mut(name).expect("the caller has looked it up");
        if let (Some(settled), Some(rollout)) = (deployed.settled, &mut deployed.rollout) {
            rollout.direction = Direction::Back { why };
            deployed.target = settled;
        }
    }

    pub(super) fn forget_old_revisions(&mut self, service: &ServiceName) {
        let in_use: Vec<_> = self.state.placements_of(service).map(|(_, placement)| placement.revision).collect();
        let Some(deployed) = self.state.services.get_mut(service) else { return };
        let rollout = deployed.rollout.as_ref();
        let rolling: Vec<_> = rollout.iter().flat_map(|rollout| [Some(rollout.to), rollout.from]).flatten().collect();
        let newest: Vec<_> = deployed.revisions.keys().rev().take(REVISIONS_KEPT).copied().collect();
        let roots = newest.iter().chain(&in_use).chain(&rolling).chain([&deployed.target]).chain(&deployed.settled);
        let kept: std::collections::BTreeSet<_> = roots
            .filter_map(|revision| Some([*revision, deployed.revisions.get(revision)?.template]))
            .flatten()
            .collect();
        deployed.revisions.retain(|revision, _| kept.contains(revision));
    }
}

pub(super) fn busy(name: &ServiceName, rollout: &Rollout) -> Refusal {
    Refusal::Busy { service: name.clone(), to: rollout.to, since: rollout.started }
}

pub(super) fn next_revision(deployed: &Deployed) -> Revision {
    let last = deployed.revisions.keys().next_back().copied().unwrap_or_default();
    Revision(last.0 + 1)
}

/// Whether this many replicas may be asked of a service, by the rules of this version. Asked before it is proposed.
pub fn check_scale(state: &State, service: &ServiceName, replicas: u32) -> Result<(), Refusal> {
    // Whether it is there is for the command to say.
    let Some(deployed) = state.services.get(service) else { return Ok(()) };
    let spec = Service { replicas, ..deployed.spec().clone() };
    match check::service(&spec).into_iter().next() {
        Some(fault) => Err(Refusal::CannotScale { service: service.clone(), replicas, reason: fault.message }),
        None => Ok(()),
    }
}

/// Whether what this revision refers to is there still, by the rules of this version: nothing is stopped for what could
/// not be started. Asked before it is proposed.
pub fn check_rollback(state: &State, service: &ServiceName, to: Option<Revision>) -> Result<(), Refusal> {
    // Whether they are there is for the command to say.
    let deployed = state.services.get(service);
    let Some(record) = deployed.zip(to).and_then(|(deployed, to)| deployed.revisions.get(&to)) else { return Ok(()) };
    let is_missing = |secret: &&str| state.secret(&service.project, secret).is_none();
    let missing = record.spec.secrets().into_iter().filter(is_missing);
    let missing: Vec<_> = missing.map(|secret| (service.clone(), secret.to_owned())).collect();
    if missing.is_empty() { Ok(()) } else { Err(Refusal::SecretsMissing { missing }) }
}

/// What entries have been refused for since the first version, and are for ever: these rules do not follow those of
/// [`check`], or a log would mean another thing after an update.
fn cannot_scale(spec: &Service) -> Option<String> {
    const REPLICAS_MAX: u32 = 500;
    let replicas = spec.replicas;
    if replicas > REPLICAS_MAX {
        return Some(format!("a service has at most {REPLICAS_MAX} replicas, not {replicas}"));
    }
    let written = spec.volumes.iter().find_map(|volume| match &volume.source {
        VolumeSource::Named(name) if !volume.read_only => Some(name),
        VolumeSource::Named(_) | VolumeSource::Host(_) => None,
    });
    let volume = written.filter(|_| replicas > 1)?;
    Some(format!("{replicas} replicas cannot all hold the volume `{volume}`"))
}

impl Deployed {
    /// What `orca rollback` goes back to if it is not told: the newest revision before the target that has served. One
    /// that was given up, or overtaken before it got ready, is nothing to go back to; one that only had another number
    /// of the same replicas is not what anybody means.
    pub fn previous(&self) -> Option<Revision> {
        let target = self.target_record();
        let is_rescale = |record: &RevisionRecord| {
            let same = Service { replicas: target.spec.replicas, ..record.spec.clone() };
            record.template == target.template && change(&same, &target.spec).is_nothing()
        };
        let before = self.revisions.range(..self.target).rev();
        before.filter(|(_, record)| !is_rescale(record)).map(|(revision, _)| *revision).find(|at| has_served(self, *at))
    }
}

/// The newest revision before the target that other replicas than the target's were made from, and that has served.
fn previous_template(deployed: &Deployed) -> Option<Revision> {
    let template = deployed.template();
    deployed
        .revisions
        .range(..deployed.target)
        .rev()
        .find(|(revision, record)| record.template != template && has_served(deployed, **revision))
        .map(|(revision, _)| *revision)
}

fn has_served(deployed: &Deployed, revision: Revision) -> bool {
    let last = deployed.receipts.iter().rev().find(|receipt| receipt.revision == revision);
    // Every rollout begins from what had settled by then.
    deployed.settled == Some(revision)
        || deployed.receipts.iter().any(|receipt| receipt.from == Some(revision))
        || last.is_some_and(|receipt| receipt.outcome.is_done())
}

#[cfg(test)]
pub(in crate::command) mod tests {
    use super::*;
    use crate::command::put::tests::put;
    use crate::command::{Applied, Command, Entry};
    use crate::event::Actor;
    use crate::spec::Source;
    use crate::state::{Outcome, Receipt};
    use crate::time::Timestamp;

    pub(in crate::command) fn deploy(state: &mut State, project: &str, text: &str) -> Applied {
        apply(state, Command::PutServices(put(project, text)))
    }

    pub(in crate::command) fn apply(state: &mut State, command: Command) -> Applied {
        let index = state.generation.0 + 1;
        state.apply(index, Entry { at: Timestamp(index), actor: Actor::Orca, source: None, command })
    }

    pub(in crate::command) fn web() -> ServiceName {
        "shop/web".parse().unwrap()
    }

    pub(in crate::command) fn deployed(state: &mut State) -> &mut Deployed {
        state.services.get_mut(&web()).unwrap()
    }

    /// The rollout of what is wanted ends well.
    pub(in crate::command) fn settle(state: &mut State) {
        let deployed = deployed(state);
        (deployed.rollout, deployed.settled) = (None, Some(deployed.target));
    }

    #[test]
    fn rollback_goes_to_the_revision_before_whatever_changed_but_not_to_another_number_of_the_same() {
        let text = |image: u32, path: &str, replicas: u32| {
            format!(
                "[[service]]\nname = \"web\"\nimage = \"web:{image}\"\nport = 80\nreplicas = {replicas}\n\
                 domain = \"a.test\"\nroutes = [\"{path}\"]\n"
            )
        };
        let mut state = State::default();
        for (image, path, replicas) in [(1, "/*", 1), (2, "/*", 1), (2, "/x", 1), (2, "/x", 3)] {
            deploy(&mut state, "shop", &text(image, path, replicas));
            settle(&mut state);
            let revision = deployed(&mut state).target;
            deployed(&mut state).receipts.push_back(served(revision));
        }
        assert_eq!(deployed(&mut state).previous(), Some(Revision(2)), "only the route is another");
        apply(&mut state, Command::Rollback { service: web(), to: Some(Revision(2)) });
        let target = deployed(&mut state).target_record().clone();
        assert_eq!((target.spec.routes.first().unwrap().path.as_str(), target.spec.replicas), ("/", 1));
    }

    #[test]
    fn nothing_goes_back_to_what_a_missing_secret_keeps_from_starting() {
        let mut state = State::default();
        deploy(&mut state, "shop", "[[service]]\nname = \"web\"\nimage = \"web:1\"\n");
        let first = deployed(&mut state).target;
        let spec = &mut deployed(&mut state).revisions.get_mut(&first).unwrap().spec;
        spec.env.insert("KEY".to_owned(), "${secrets.KEY}".parse().unwrap());
        deploy(&mut state, "shop", "[[service]]\nname = \"web\"\nimage = \"web:2\"\n");
        let refused = check_rollback(&state, &web(), Some(first)).unwrap_err();
        assert!(refused.to_string().contains("shop/web needs secret KEY, which is not set"), "{refused}");
        for to in [None, Some(deployed(&mut state).target), Some(Revision(9))] {
            assert_eq!(check_rollback(&state, &web(), to), Ok(()));
        }
    }

    fn served(revision: Revision) -> Receipt {
        Receipt {
            revision,
            from: None,
            outcome: Outcome::Done,
            started: Timestamp(1),
            ended: Timestamp(2),
            replaced: 0,
            before: Default::default(),
            during: Default::default(),
            after: None,
            failure: None,
            tally: Default::default(),
        }
    }

    #[test]
    fn what_scale_is_refused_for_when_it_is_applied_is_what_it_always_was() {
        let mut state = State::default();
        deploy(&mut state, "shop", "[[service]]\nname = \"web\"\nimage = \"web:1\"\n");
        // A rule of a later version, which does not let this through any more.
        let target = deployed(&mut state).target;
        deployed(&mut state).revisions.get_mut(&target).unwrap().spec.source = Source::Image("NOT/an image".to_owned());
        let scale = |replicas| Command::Scale { service: web(), replicas };
        assert!(matches!(check_scale(&state, &web(), 2), Err(Refusal::CannotScale { .. })));
        assert!(matches!(apply(&mut state, scale(2)), Applied::Done { .. }));
        assert!(matches!(apply(&mut state, scale(501)), Applied::Refused(Refusal::CannotScale { .. })));
    }
}
