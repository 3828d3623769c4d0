//! The tables of every node, computed whole from placements and readiness. They name only replicas last reported
//! ready, on nodes not suspect; canary weights apply here.
//!
//! Whose a route is. Files change in a moment and replicas do not: a route that went where the newest file says would
//! be a 404 or a 503 until somebody is ready there, also if nobody ever is. So a route has a *holder*, which is in the
//! state ([`State::routes`](crate::state::State::routes)): the service that had it in a settled revision last, or that was
//! the first to answer it. The rule:
//!
//! 1. The holder keeps its route as long as it wants it. Whoever else has it in its file waits, and `why` says so.
//! 2. If the holder does not want it, the first service that does takes it as soon as it has a ready replica of what
//!    is wanted, beyond a trial. It is the holder once it has settled; if it is given up before, the route goes back.
//! 3. Until then the holder goes on answering it: while it may still return to the revision that has it, and, with a
//!    ready replica, while another service was asked for it and is not ready. A service that is removed because the file
//!    leaves it out stays for that; one that is removed by `orca rm` does not.
//!    And so does who took it in a deploy that was overtaken by another before it had settled, while nobody else can.
//! 4. A route that nobody holds is there at once, so that its page says what is missing. But where another service
//!    answers those requests by a more general route, it goes on until this one is ready.

use std::collections::BTreeMap;

use super::Step;
use crate::id::{Generation, GoalNumber, ServiceName};
use crate::replica::Phase;
use crate::route::{Absence, Backend, RouteKey, Tables, Upstream};
use crate::spec::{Route, Strategy};
use crate::state::{Deployed, Direction, PlacementState};
use crate::view::View;

/// What the weights of a service's backends add up to, about, when they are not equal.
const WEIGHT_TOTAL: u32 = 1000;

/// The tables, with the number left for whoever sends them.
pub fn tables(view: View<'_>) -> Tables {
    let services = view.state.services.iter();
    let services = services.map(|(name, deployed)| (name.clone(), upstream(view, name, deployed))).collect();
    let routes = Claims::new(view).settle(&services);
    Tables { number: GoalNumber::default(), generation: Generation::default(), routes, services }
}

/// What is to be remembered of who answers which route.
pub fn next(view: View<'_>, tables: &Tables) -> Vec<Step> {
    let held = &view.state.routes;
    let has_settled = |name: &ServiceName, route: &Route| {
        let settled = view.state.services.get(name).and_then(Deployed::settled_record);
        settled.is_some_and(|record| record.spec.routes.contains(route))
    };
    let taken = tables
        .routes
        .iter()
        .filter(|(route, name)| match held.get(*route) {
            Some(holder) => holder != *name && has_settled(name, &route.0),
            None => has_settled(name, &route.0) || answers(&tables.services, name),
        })
        .map(|(route, name)| Step::Route { route: route.clone(), service: Some(name.clone()) });
    let dropped = held.keys().filter(|route| !tables.routes.contains_key(*route));
    taken.chain(dropped.map(|route| Step::Route { route: route.clone(), service: None })).collect()
}

/// Why a service that is to be removed must not go yet: a route that it holds, and who is to answer that and does not.
/// Not only while it is ready itself: it may be again in a moment.
pub fn awaited(view: View<'_>, tables: &Tables, name: &ServiceName) -> Option<(RouteKey, ServiceName)> {
    view.state.services.get(name)?.removal.filter(|removal| removal.hands_over)?;
    view.state.placements_of(name).find(|(_, placement)| placement.state == PlacementState::Serve)?;
    let is_taken = |route| {
        let answering = tables.routes.get(route).filter(|answering| *answering != name);
        answering.is_some_and(|answering| is_ready_for_new(view, answering, &tables.services))
    };
    let held = view.state.routes.iter().filter(|(route, holder)| *holder == name && !is_taken(*route));
    held.map(|(route, _)| route).find_map(|route| {
        let mut others = view.state.services.iter().filter(|(other, _)| *other != name);
        let (taker, _) = others.find(|(_, other)| was_asked_for(other, &route.0))?;
        Some((route.clone(), taker.clone()))
    })
}

/// Whether people want this service to have the route. That may have been given up since, and be tried again.
fn was_asked_for(deployed: &Deployed, route: &Route) -> bool {
    deployed.removal.is_none()
        && (deployed.newest_record().spec.routes.contains(route) || deployed.spec().routes.contains(route))
}

/// Who has something to say about each route.
struct Claims<'a> {
    view: View<'a>,
    routes: BTreeMap<&'a Route, Claim<'a>>,
}

#[derive(Default)]
struct Claim<'a> {
    holder: Option<&'a ServiceName>,
    /// Who wants it now.
    wanting: Vec<&'a ServiceName>,
    /// Who was asked for it last.
    asked: Vec<&'a ServiceName>,
}

impl<'a> Claims<'a> {
    fn new(view: View<'a>) -> Claims<'a> {
        let mut routes: BTreeMap<&Route, Claim<'_>> = BTreeMap::new();
        for (route, holder) in &view.state.routes {
            let holder = view.state.services.get_key_value(holder).map(|(name, _)| name);
            routes.insert(&route.0, Claim { holder, ..Claim::default() });
        }
        for (name, deployed) in &view.state.services {
            let settled = deployed.settled_record();
            // From before holders were remembered, or of a moment ago.
            for route in settled.iter().flat_map(|record| &record.spec.routes) {
                routes.entry(route).or_default().holder.get_or_insert(name);
            }
            if deployed.removal.is_some() {
                continue;
            }
            for route in &deployed.spec().routes {
                routes.entry(route).or_default().wanting.push(name);
            }
            for route in &deployed.newest_record().spec.routes {
                routes.entry(route).or_default().asked.push(name);
            }
        }
        Claims { view, routes }
    }

    /// Who answers each of them; a route that is absent is answered by nobody.
    fn settle(&self, services: &BTreeMap<ServiceName, Upstream>) -> BTreeMap<RouteKey, ServiceName> {
        let mut answering = BTreeMap::new();
        for (route, claim) in &self.routes {
            if let Some(holder) = claim.holder
                && let Some(name) = self.held(route, claim, holder, services)
            {
                let stand_in = || self.stand_in(route, services).unwrap_or(name);
                answering.insert(*route, if answers(services, name) { name } else { stand_in() });
            }
        }
        let mut new = BTreeMap::new();
        for (route, claim) in self.routes.iter().filter(|(_, claim)| claim.holder.is_none()) {
            let ready = claim.wanting.iter().find(|name| is_ready_for_new(self.view, name, services));
            let first = || claim.wanting.first().filter(|name| !is_answered(&answering, route, name, services));
            new.extend(ready.or_else(first).map(|name| (*route, *name)));
        }
        answering.extend(new);
        answering.into_iter().map(|(route, name)| (RouteKey(route.clone()), name.clone())).collect()
    }

    fn held(
        &self,
        route: &Route,
        claim: &Claim<'a>,
        holder: &'a ServiceName,
        services: &BTreeMap<ServiceName, Upstream>,
    ) -> Option<&'a ServiceName> {
        if claim.wanting.contains(&holder) {
            return Some(holder);
        }
        if let Some(taker) = claim.wanting.iter().find(|name| is_ready_for_new(self.view, name, services)) {
            return Some(taker);
        }
        let mut others = claim.asked.iter().chain(&claim.wanting);
        // Who cannot answer now lets the page be that of whoever is to come, if somebody is.
        let is_awaited = others.any(|name| *name != holder) && (answers(services, holder) || claim.wanting.is_empty());
        let keeps = self.view.state.services.get(holder).is_some_and(|deployed| match deployed.removal {
            None => is_awaited || deployed.claims(route),
            Some(removal) => is_awaited && removal.hands_over,
        });
        if keeps { Some(holder) } else { claim.wanting.first().copied() }
    }

    /// Who has answered a route since a deploy that was overtaken by another before it had settled, and can for as long
    /// as replicas of it are there.
    fn stand_in(&self, route: &Route, services: &BTreeMap<ServiceName, Upstream>) -> Option<&'a ServiceName> {
        let mut all = self.view.state.services.iter().filter(|(_, deployed)| deployed.removal.is_none());
        let (name, _) = all.find(|(name, deployed)| {
            let has_route = |backend: &Backend| {
                let template = backend.revision;
                let settled = deployed.settled_record().map(|record| record.template);
                let is_overtaken = template != deployed.template() && settled != Some(template);
                let record = deployed.record_for(template).filter(|_| is_overtaken);
                record.is_some_and(|record| record.spec.routes.contains(route))
            };
            services.get(*name).is_some_and(|upstream| upstream.backends.iter().any(has_route))
        })?;
        Some(name)
    }
}

/// Whether a service has a ready replica of what is wanted of it, beyond a trial: a canary that gets a few requests is
/// beside replicas that may know nothing of a new route.
fn is_ready_for_new(view: View<'_>, name: &ServiceName, services: &BTreeMap<ServiceName, Upstream>) -> bool {
    let Some(deployed) = view.state.services.get(name) else { return false };
    let backends = services.get(name).map_or(&[][..], |upstream| &upstream.backends);
    let template = deployed.template();
    let fresh = backends.iter().filter(|backend| backend.revision == template).count();
    fresh > 0 && (fresh == backends.len() || canary_weight(deployed).is_none())
}

fn answers(services: &BTreeMap<ServiceName, Upstream>, name: &ServiceName) -> bool {
    services.get(name).is_some_and(|upstream| !upstream.backends.is_empty())
}

/// Whether requests of a route that is about to come are answered by another service than this one as long as it has not.
fn is_answered(
    answering: &BTreeMap<&Route, &ServiceName>,
    route: &Route,
    name: &ServiceName,
    services: &BTreeMap<ServiceName, Upstream>,
) -> bool {
    // A host that has a route of its own never falls through to a more general one.
    let is_known = answering.keys().any(|other| other.host == route.host);
    answering.iter().any(|(other, owner)| {
        let may_answer = !is_known || other.host == route.host;
        may_answer && other.covers(route) && *owner != name && answers(services, owner)
    })
}

/// The share of the requests that goes to what is being tried, if it is a canary that nobody has promoted.
fn canary_weight(deployed: &Deployed) -> Option<u8> {
    let rollout = deployed.rollout.as_ref().filter(|rollout| rollout.direction == Direction::Forward)?;
    match deployed.revisions.get(&rollout.to)?.spec.deploy.strategy {
        Strategy::Canary { weight } if !rollout.promoted => Some(weight),
        Strategy::Canary { .. } | Strategy::Rolling | Strategy::Recreate | Strategy::BlueGreen => None,
    }
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
    let given_up = deployed.settled.is_none() && deployed.rollout.is_none();
    let absence = match deployed.wanted() {
        _ if deployed.stopped || deployed.removal.is_some() => Absence::Stopped,
        0 => Absence::ScaledToZero,
        _ if given_up || placed && deployed.settled.is_some() => Absence::Failing,
        _ => Absence::Starting,
    };
    let module = match old.as_slice() {
        [] => spec.is_module(),
        backends => backends.iter().any(|backend| backend.address.is_none()),
    };
    // The longest, as long as there are replicas of two kinds: none is to be cut short by what holds for another.
    let of_backend = |backend: &Backend| Some(deployed.record_for(backend.revision)?.spec.response_timeout());
    let response_timeout = old.iter().filter_map(of_backend).max().unwrap_or_else(|| spec.response_timeout());
    Upstream { backends: old, absence, response_timeout, module }
}

/// Gives a group of backends this many per cent of the requests together.
fn share(backends: &mut [Backend], percent: u32) {
    let each = WEIGHT_TOTAL * percent / 100 / u32::try_from(backends.len()).unwrap_or(u32::MAX).max(1);
    for backend in backends {
        backend.weight = u16::try_from(each).unwrap_or(u16::MAX).max(1);
    }
}
