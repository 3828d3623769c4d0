//! The tables of every node, computed whole from placements and readiness. They name only replicas last reported
//! ready, on nodes not suspect; canary weights apply here.

use std::collections::BTreeMap;
use std::time::Duration;

use super::View;
use crate::id::{Generation, GoalNumber, ServiceName};
use crate::replica::Phase;
use crate::route::{Absence, Backend, RouteKey, Tables, Upstream};
use crate::spec::Strategy;
use crate::state::{Deployed, Direction, PlacementState};

/// How long a request may wait for its response to begin: what nginx and HAProxy allow by default.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(60);
/// What the weights of a service's backends add up to, about, when they are not equal.
const WEIGHT_TOTAL: u32 = 1000;

/// The tables, with the number left for whoever sends them.
pub fn tables(view: View<'_>) -> Tables {
    let mut routes = BTreeMap::new();
    let mut services = BTreeMap::new();
    for (name, deployed) in &view.state.services {
        if deployed.removal.is_none() {
            for route in &deployed.spec().routes {
                routes.insert(RouteKey(route.clone()), name.clone());
            }
        }
        services.insert(name.clone(), upstream(view, name, deployed));
    }
    Tables { number: GoalNumber::default(), generation: Generation::default(), routes, services }
}

fn upstream(view: View<'_>, name: &ServiceName, deployed: &Deployed) -> Upstream {
    let spec = deployed.spec();
    // A service may be on its way from one kind to the other.
    let is_module =
        |revision| deployed.revisions.get(&revision).map_or(spec.is_module(), |record| record.spec.is_module());
    let template = deployed.template();
    let mut old = Vec::new();
    let mut new = Vec::new();
    let mut placed = false;
    for (replica, placement) in view.state.placements_of(name) {
        if placement.state != PlacementState::Serve {
            continue;
        }
        placed = true;
        let Some(report) = view.inventory.replica(placement.node, replica) else { continue };
        let reachable = is_module(placement.revision) || report.address.is_some();
        if report.phase != Phase::Ready || view.inventory.is_suspect(placement.node, view.now) || !reachable {
            continue;
        }
        let backend =
            Backend { replica, revision: placement.revision, node: placement.node, address: report.address, weight: 1 };
        if placement.revision == template { new.push(backend) } else { old.push(backend) }
    }
    if let Some(rollout) = &deployed.rollout {
        // On the way back it is what was tried that leaves.
        let forward = rollout.direction == Direction::Forward;
        let complete = new.len() >= deployed.wanted() as usize;
        let (tried, before) = if forward { (&mut new, &mut old) } else { (&mut old, &mut new) };
        match deployed.revisions.get(&rollout.to).map(|record| record.spec.deploy.strategy) {
            // Given up: not one request more, as soon as there are enough replicas without it.
            _ if !forward && complete => tried.clear(),
            // All traffic moves at once: not before the old ones are told to go, as long as they take it.
            Some(Strategy::BlueGreen) if forward && !before.is_empty() => tried.clear(),
            Some(Strategy::Canary { weight }) if !rollout.promoted && !before.is_empty() && !tried.is_empty() => {
                share(tried, u32::from(weight));
                share(before, 100 - u32::from(weight));
            }
            _ => {}
        }
    }
    old.append(&mut new);
    let absence = match (deployed.stopped || deployed.removal.is_some(), placed && deployed.settled.is_some()) {
        (true, _) => Absence::Stopped,
        (false, true) => Absence::Failing,
        (false, false) => Absence::Starting,
    };
    let module = match old.as_slice() {
        [] => spec.is_module(),
        backends => backends.iter().any(|backend| backend.address.is_none()),
    };
    Upstream { backends: old, absence, response_timeout: RESPONSE_TIMEOUT, module }
}

/// Gives a group of backends this many per cent of the requests together.
fn share(backends: &mut [Backend], percent: u32) {
    let each = WEIGHT_TOTAL * percent / 100 / u32::try_from(backends.len()).unwrap_or(u32::MAX).max(1);
    for backend in backends {
        backend.weight = u16::try_from(each).unwrap_or(u16::MAX).max(1);
    }
}
