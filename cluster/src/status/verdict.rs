//! Whether what was asked of a service has come about: the one answer for all who wait, made from what is shown and
//! from nothing else. The exit code of a command is this verdict.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::{ServiceState, ServiceStatus};
use crate::id::{Revision, ServiceName};
use crate::state::Outcome;
use crate::waiting::Waiting;

/// What is waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Awaited {
    /// The rollout of this revision ends.
    Revision(Revision),
    /// The same, of a canary that waits no longer.
    Promoted(Revision),
    /// No rollout runs, and it is as asked.
    Settled,
    /// None of its replicas is left.
    Stopped,
    Removed,
}

/// How far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    #[serde(rename = "still_going")]
    Going,
    Done,
    /// The canary waits for a person.
    Canary,
    /// Given up; what served before serves again.
    RolledBack,
    /// Given up, and nothing serves as asked.
    Degraded,
    /// Somebody else's change took its place, or the service was removed.
    Overtaken,
}

impl Verdict {
    pub fn is_failure(self) -> bool {
        match self {
            Verdict::Going | Verdict::Done | Verdict::Canary => false,
            Verdict::RolledBack | Verdict::Degraded | Verdict::Overtaken => true,
        }
    }
}

impl Awaited {
    /// The revision whose receipt tells how it went.
    pub fn revision(self) -> Option<Revision> {
        match self {
            Awaited::Revision(revision) | Awaited::Promoted(revision) => Some(revision),
            Awaited::Settled | Awaited::Stopped | Awaited::Removed => None,
        }
    }

    /// Of this service alone; see [`verdicts`].
    pub fn verdict(self, service: Option<&ServiceStatus>) -> Verdict {
        let Some(service) = service else {
            return if self == Awaited::Removed { Verdict::Done } else { Verdict::Overtaken };
        };
        if service.state == ServiceState::Removing && self != Awaited::Removed {
            return Verdict::Overtaken;
        }
        match self {
            Awaited::Removed => Verdict::Going,
            Awaited::Stopped if service.state == ServiceState::Stopped && service.replicas.is_empty() => Verdict::Done,
            Awaited::Stopped => Verdict::Going,
            Awaited::Settled => settled(service),
            Awaited::Revision(revision) => rolled_out(revision, service),
            Awaited::Promoted(revision) => match rolled_out(revision, service) {
                // The leader has not got to it yet.
                Verdict::Canary => Verdict::Going,
                verdict => verdict,
            },
        }
    }
}

/// How far each of them is. What is not being rolled out waits for its dependencies without end; where one of them has
/// failed, it is over.
pub fn verdicts<'a>(
    awaited: impl IntoIterator<Item = (&'a ServiceName, Awaited)>,
    services: &[ServiceStatus],
) -> BTreeMap<ServiceName, Verdict> {
    let (mut verdicts, mut settling) = (BTreeMap::new(), Vec::new());
    for (name, awaited) in awaited {
        let service = services.iter().find(|service| service.name == *name);
        verdicts.insert(name.clone(), awaited.verdict(service));
        settling.extend(service.filter(|_| awaited == Awaited::Settled));
    }
    // Each turn ends one of them.
    while let Some(service) = settling.iter().find(|service| waits_in_vain(service, &verdicts)) {
        verdicts.insert(service.name.clone(), Verdict::Degraded);
    }
    verdicts
}

fn waits_in_vain(service: &ServiceStatus, verdicts: &BTreeMap<ServiceName, Verdict>) -> bool {
    let in_vain = |waiting: &Waiting| {
        let Waiting::ForDependency { service: needed } = waiting else { return false };
        let needed = ServiceName::new(service.name.project.clone(), needed.clone());
        verdicts.get(&needed).is_some_and(|verdict| verdict.is_failure())
    };
    let goes_on = verdicts.get(&service.name) == Some(&Verdict::Going) && service.rollout.is_none();
    goes_on && service.waiting.iter().any(in_vain)
}

fn settled(service: &ServiceStatus) -> Verdict {
    let was_given_up = service.receipt_of(service.revision).is_some_and(|receipt| receipt.outcome == Outcome::Failed);
    match (&service.rollout, service.state) {
        (_, ServiceState::Canary) => Verdict::Canary,
        (Some(_), _) => Verdict::Going,
        (None, ServiceState::Running | ServiceState::Stopped) => Verdict::Done,
        (None, ServiceState::CrashLooping | ServiceState::Failing) => Verdict::Degraded,
        (None, ServiceState::Degraded) if was_given_up => Verdict::Degraded,
        (
            None,
            ServiceState::Starting
            | ServiceState::Updating
            | ServiceState::RollingBack
            | ServiceState::Degraded
            | ServiceState::Removing,
        ) => Verdict::Going,
    }
}

fn rolled_out(revision: Revision, service: &ServiceStatus) -> Verdict {
    let ended = service.receipt_of(revision).map(|receipt| receipt.outcome);
    let is_as_asked = matches!(service.state, ServiceState::Running | ServiceState::Stopped);
    match (&service.rollout, ended) {
        (Some(rollout), _) if rollout.to == revision => {
            if service.state == ServiceState::Canary {
                Verdict::Canary
            } else {
                Verdict::Going
            }
        }
        (_, Some(Outcome::Done)) => Verdict::Done,
        (None, Some(Outcome::RolledBack)) if is_as_asked => Verdict::RolledBack,
        (None, Some(Outcome::RolledBack | Outcome::Failed)) => Verdict::Degraded,
        (Some(_), Some(Outcome::RolledBack | Outcome::Failed) | None) => Verdict::Overtaken,
        (None, None) if service.revision == revision => {
            if is_as_asked {
                Verdict::Done
            } else {
                Verdict::Going
            }
        }
        (None, None) if service.revision > revision => Verdict::Overtaken,
        (None, None) => Verdict::RolledBack,
    }
}

#[cfg(test)]
mod tests {
    use super::super::RolloutStatus;
    use super::*;
    use crate::spec::Strategy;
    use crate::state::{Receipt, Window};
    use crate::time::Timestamp;
    use crate::traffic::Tally;

    fn service(name: &str, revision: u64, state: ServiceState) -> ServiceStatus {
        ServiceStatus {
            name: name.parse().unwrap(),
            state,
            source: "myorg/api:1".to_owned(),
            module: false,
            revision: Revision(revision),
            digest: None,
            strategy: Strategy::Rolling,
            wanted: 1,
            ready: 1,
            replicas: Vec::new(),
            routes: Vec::new(),
            schedules: BTreeMap::new(),
            rollout: None,
            waiting: Vec::new(),
            why: None,
            recent: Window::default(),
            last_receipt: None,
        }
    }

    fn rollout(to: u64, from: u64) -> RolloutStatus {
        RolloutStatus {
            to: Revision(to),
            from: Some(Revision(from)),
            started: Timestamp(0),
            back: false,
            because: None,
            ready_timeout_secs: 120,
        }
    }

    fn receipt(revision: u64, outcome: Outcome) -> Receipt {
        Receipt {
            revision: Revision(revision),
            from: None,
            outcome,
            started: Timestamp(0),
            ended: Timestamp(1),
            replaced: 0,
            before: Window::default(),
            during: Window::default(),
            after: None,
            failure: None,
            tally: Tally::default(),
        }
    }

    #[test]
    fn every_end_of_a_rollout_is_told_apart() {
        let awaited = Awaited::Revision(Revision(5));
        let with = |revision: u64, state: ServiceState, rollout, ended: Option<(u64, Outcome)>| {
            let mut service = service("shop/api", revision, state);
            service.rollout = rollout;
            service.last_receipt = ended.map(|(revision, outcome)| receipt(revision, outcome));
            awaited.verdict(Some(&service))
        };
        let (running, updating) = (ServiceState::Running, ServiceState::Updating);
        assert_eq!(awaited.verdict(None), Verdict::Overtaken);
        assert_eq!(Awaited::Removed.verdict(None), Verdict::Done);
        assert_eq!(with(5, updating, Some(rollout(5, 4)), Some((4, Outcome::Done))), Verdict::Going);
        assert_eq!(with(4, ServiceState::RollingBack, Some(rollout(5, 4)), None), Verdict::Going);
        assert_eq!(with(5, ServiceState::Canary, Some(rollout(5, 4)), None), Verdict::Canary);
        assert_eq!(with(5, running, None, Some((5, Outcome::Done))), Verdict::Done);
        assert_eq!(with(6, updating, Some(rollout(6, 5)), Some((5, Outcome::Done))), Verdict::Done);
        assert_eq!(with(4, running, None, Some((5, Outcome::RolledBack))), Verdict::RolledBack);
        assert_eq!(with(4, ServiceState::Degraded, None, Some((5, Outcome::RolledBack))), Verdict::Degraded);
        assert_eq!(with(5, ServiceState::Failing, None, Some((5, Outcome::Failed))), Verdict::Degraded);
        assert_eq!(with(6, updating, Some(rollout(6, 4)), None), Verdict::Overtaken);
        assert_eq!(with(5, ServiceState::Removing, None, None), Verdict::Overtaken);
    }

    #[test]
    fn what_waits_for_a_service_that_failed_is_not_waited_for() {
        let mut services = ["shop/api", "shop/db", "shop/worker"].map(|name| service(name, 1, ServiceState::Starting));
        let all = |services: &[ServiceStatus], verdict| {
            let awaited = services.iter().map(|service| (&service.name, Awaited::Settled));
            verdicts(awaited, services).values().all(|is| *is == verdict)
        };
        for (at, needs) in [(0, "db"), (2, "api")] {
            services[at].waiting = vec![Waiting::ForDependency { service: needs.parse().unwrap() }];
        }
        services[1].state = ServiceState::Failing;
        assert!(all(&services, Verdict::Degraded));
        // Unless it is on its way again.
        services[1].state = ServiceState::Starting;
        assert!(all(&services, Verdict::Going));
    }

    #[test]
    fn a_canary_that_was_promoted_is_waited_for() {
        let mut canary = service("shop/api", 5, ServiceState::Canary);
        canary.rollout = Some(rollout(5, 4));
        assert_eq!(Awaited::Settled.verdict(Some(&canary)), Verdict::Canary);
        assert_eq!(Awaited::Revision(Revision(5)).verdict(Some(&canary)), Verdict::Canary);
        assert_eq!(Awaited::Promoted(Revision(5)).verdict(Some(&canary)), Verdict::Going);
    }
}
