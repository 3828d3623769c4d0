//! `/metrics`, in Prometheus' text format: what the overview knows, written out. Nothing is counted here but what
//! this process itself did.

use std::collections::BTreeMap;
use std::fmt::{self, Write as _};
use std::sync::atomic::Ordering;
use std::time::Duration;

use orca_cluster::replica::Phase;
use orca_cluster::state::PlacementState;
use orca_cluster::traffic::{Counters, bucket_of};

use crate::api::Core;
use crate::driver::Overview;

/// Upper bounds of the latency histogram, as powers of two of microseconds: there our own buckets begin, so that the
/// counts are exact. From 0.5 ms to a minute.
const LATENCY_POWERS: [u32; 11] = [9, 10, 12, 14, 16, 17, 18, 20, 22, 24, 26];

pub fn render(core: &Core, overview: &Overview) -> String {
    let mut page = Page::default();
    traffic(&mut page, overview);
    replicas(&mut page, overview);
    let metrics = core.raft.metrics();
    page.gauge("orca_raft_term", "Raft's current term.", metrics.term.0);
    page.gauge("orca_raft_last_index", "The last entry of this node's log.", metrics.last_index.unwrap_or(0));
    page.gauge("orca_raft_applied_index", "The last entry applied here.", metrics.applied_index.unwrap_or(0));
    page.gauge("orca_raft_is_leader", "1 if this node leads.", u64::from(overview.term.is_some()));
    page.gauge("orca_state_generation", "Changes of the cluster's state.", overview.state.generation.0);
    page.counter(
        "orca_proposals_total",
        "Changes people and programs asked for.",
        core.proposals.load(Ordering::Relaxed),
    );
    page.counter("orca_refused_total", "Requests refused for who asked.", core.refusals.total());
    page.gauge(
        "orca_agents_connected",
        "Nodes whose agents are connected here.",
        core.sessions.connected().len() as u64,
    );
    page.text
}

fn traffic(page: &mut Page, overview: &Overview) {
    let view = overview.view(overview.at);
    let services: Vec<_> = overview
        .state
        .services
        .keys()
        .map(|name| {
            (vec![("project", name.project.to_string()), ("service", name.service.to_string())], view.totals(name))
        })
        .collect();
    page.head("orca_requests_total", "counter", "Requests that ended, by class of status.");
    for (labels, totals) in &services {
        for (class, count) in (1..).zip(totals.statuses) {
            let mut labels = labels.clone();
            labels.push(("status", format!("{class}xx")));
            page.sample("orca_requests_total", &labels, count);
        }
    }
    page.head("orca_connections_cut_total", "counter", "Responses and upgraded connections ended before their end.");
    for (labels, totals) in &services {
        page.sample("orca_connections_cut_total", labels, totals.cut);
    }
    page.head("orca_request_duration_seconds", "histogram", "From a request's head to the end of its response.");
    for (labels, totals) in &services {
        latency(page, labels, totals);
    }
}

fn latency(page: &mut Page, labels: &[(&'static str, String)], totals: &Counters) {
    let counts = totals.latency.counts();
    for power in LATENCY_POWERS {
        let bound = Duration::from_micros(1 << power);
        let below: u64 = counts.iter().take(bucket_of(bound)).sum();
        let mut labels = labels.to_vec();
        labels.push(("le", bound.as_secs_f64().to_string()));
        page.sample("orca_request_duration_seconds_bucket", &labels, below);
    }
    let mut all = labels.to_vec();
    all.push(("le", "+Inf".to_owned()));
    page.sample("orca_request_duration_seconds_bucket", &all, totals.latency.total());
    let seconds = Duration::from_micros(totals.latency_total_us).as_secs_f64();
    page.sample("orca_request_duration_seconds_sum", labels, seconds);
    page.sample("orca_request_duration_seconds_count", labels, totals.latency.total());
}

fn replicas(page: &mut Page, overview: &Overview) {
    let mut ready: BTreeMap<_, u64> = BTreeMap::new();
    let mut busy: BTreeMap<_, u64> = BTreeMap::new();
    let view = overview.view(overview.at);
    for (id, placement) in &overview.state.placements {
        let report = overview.inventory.replica(placement.node, *id);
        let is_ready = report.is_some_and(|report| report.phase == Phase::Ready);
        *ready.entry(&placement.service).or_default() +=
            u64::from(is_ready && placement.state == PlacementState::Serve);
        *busy.entry(&placement.service).or_default() += view.in_flight(*id);
    }
    type Value<'a> = Box<dyn Fn(&orca_cluster::id::ServiceName) -> u64 + 'a>;
    let gauges: [(&str, &str, Value<'_>); 3] = [
        (
            "orca_replicas_wanted",
            "Replicas there should be.",
            Box::new(|name| overview.state.services.get(name).map_or(0, |deployed| u64::from(deployed.wanted()))),
        ),
        ("orca_replicas_ready", "Replicas that get requests.", Box::new(|name| ready.get(name).copied().unwrap_or(0))),
        (
            "orca_requests_in_flight",
            "Requests and upgraded connections going on.",
            Box::new(|name| busy.get(name).copied().unwrap_or(0)),
        ),
    ];
    for (metric, help, value) in gauges {
        page.head(metric, "gauge", help);
        for name in overview.state.services.keys() {
            let labels = [("project", name.project.to_string()), ("service", name.service.to_string())];
            page.sample(metric, &labels, value(name));
        }
    }
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn gauge(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, "gauge", help);
        self.sample(name, &[], value);
    }

    fn counter(&mut self, name: &str, help: &str, value: u64) {
        self.head(name, "counter", help);
        self.sample(name, &[], value);
    }

    fn head(&mut self, name: &str, kind: &str, help: &str) {
        self.line(format_args!("# HELP {name} {help}"));
        self.line(format_args!("# TYPE {name} {kind}"));
    }

    /// Names of projects and services are labels of DNS: nothing in them needs escaping.
    fn sample(&mut self, name: &str, labels: &[(&'static str, String)], value: impl fmt::Display) {
        if labels.is_empty() {
            return self.line(format_args!("{name} {value}"));
        }
        let labels: Vec<String> = labels.iter().map(|(label, value)| format!("{label}=\"{value}\"")).collect();
        self.line(format_args!("{name}{{{}}} {value}", labels.join(",")));
    }

    fn line(&mut self, line: fmt::Arguments<'_>) {
        // Writing to a String cannot fail.
        let _ = writeln!(self.text, "{line}");
    }
}

#[cfg(test)]
mod tests {
    use orca_cluster::traffic::{HISTOGRAM_BUCKETS, Histogram};

    use super::*;

    #[test]
    fn a_histogram_has_its_sum_and_its_count() {
        let mut counts = vec![0; HISTOGRAM_BUCKETS];
        counts[bucket_of(Duration::from_millis(250))] = 2;
        let latency_of = Histogram::from_counts(counts);
        let totals = Counters { latency: latency_of, latency_total_us: 500_250, ..Counters::default() };
        let mut page = Page::default();
        latency(&mut page, &[("service", "web".to_owned())], &totals);
        let last: Vec<&str> = page.text.lines().rev().take(3).collect();
        assert_eq!(
            last,
            [
                "orca_request_duration_seconds_count{service=\"web\"} 2",
                "orca_request_duration_seconds_sum{service=\"web\"} 0.50025",
                "orca_request_duration_seconds_bucket{service=\"web\",le=\"+Inf\"} 2",
            ]
        );
    }
}
