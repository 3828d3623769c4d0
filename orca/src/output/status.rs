//! What `status`, `ps`, `nodes` and `top` show.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use orca_cluster::id::{Label, NodeId};
use orca_cluster::replica::{Cause, Engine, Phase};
use orca_cluster::spec::Strategy;
use orca_cluster::state::{LastRun, Run, RunEnding, ScheduleRecord, Window};
use orca_cluster::status::{NodeCondition, NodeStatus, ReplicaStatus, ServiceState, ServiceStatus, Status};
use orca_cluster::waiting::Waiting;
use orca_cluster::why::{Code, phase_word, saw_words};
use orca_wire::message::client::RevisionInfo;

use super::text::{Ink, Side, Text, table};
use super::{Screen, count, grouped, history, latency, short_source};
use crate::moment;

use Side::{Left, Right};

/// Revisions shown at the end of one service's status; `orca history` has them all.
const REVISIONS_SHOWN: usize = 5;

/// The whole cluster on one screen.
pub fn cluster(screen: &Screen, status: &Status) -> Vec<Text> {
    let nodes = count(status.nodes.len() as u64, "node");
    let services = count(status.services.len() as u64, "service");
    let mut lines = vec![
        Text::of(Ink::Bold, name_of(status))
            .and(Ink::Dim, format!("  {nodes}, {services}, index {}", status.generation)),
    ];
    lines.extend(self::nodes(screen, &status.nodes));
    if status.services.is_empty() {
        lines.push(Text::new());
        lines.push(Text::plain("Nothing is deployed.").and(Ink::Dim, "  Begin with `orca init`, then `orca deploy`."));
        return lines;
    }
    let mut projects: BTreeMap<&Label, Vec<&ServiceStatus>> = BTreeMap::new();
    for service in &status.services {
        projects.entry(&service.name.project).or_default().push(service);
    }
    for (project, services) in projects {
        lines.push(Text::new());
        lines.push(Text::of(Ink::Bold, project.as_str()));
        lines.extend(project_table(screen, &status.nodes, &services));
        for service in services {
            lines.extend(trouble(service));
        }
    }
    lines
}

fn name_of(status: &Status) -> String {
    if status.cluster.is_empty() { "cluster".to_owned() } else { format!("cluster {}", status.cluster) }
}

fn project_table(screen: &Screen, nodes: &[NodeStatus], services: &[&ServiceStatus]) -> Vec<Text> {
    let rows = services.iter().map(|service| {
        let (ink, symbol, word) = state(service.state);
        let ready = if service.ready < service.wanted { Ink::Yellow } else { Ink::Plain };
        let mut row = vec![
            Text::of(ink, symbol).and(Ink::Plain, format!(" {}", service.name.service)),
            Text::of(ink, word),
            Text::of(ready, format!("{}/{}", service.ready, service.wanted)),
            Text::plain(short_source(&service.source)).and(Ink::Dim, format!(" {}", service.revision)),
        ];
        row.extend(traffic(&service.recent));
        row.push(Text::of(Ink::Cyan, first_url(service, nodes)));
        row.push(Text::of(Ink::Dim, service_age(screen, service)));
        row
    });
    table(2, &[Left, Left, Right, Left, Right, Right, Right, Left, Right], rows.collect())
}

/// Requests a second, p99 and 5xx; empty where nothing was asked.
fn traffic(recent: &Window) -> [Text; 3] {
    if recent.requests == 0 {
        return [Text::new(), Text::new(), Text::new()];
    }
    let errors = if recent.errors == 0 { Text::of(Ink::Dim, "no 5xx") } else { errors_text(recent) };
    [
        Text::plain(format!("{}/s", rate(recent))),
        recent.p99_us.map(|p99| Text::plain(format!("p99 {}", latency(p99)))).unwrap_or_default(),
        errors,
    ]
}

fn errors_text(recent: &Window) -> Text {
    Text::of(Ink::Red, format!("{} 5xx", grouped(recent.errors)))
}

fn rate(window: &Window) -> String {
    let seconds = window.to.since(window.from).as_secs_f64();
    let rate = if seconds > 0.0 { window.requests as f64 / seconds } else { 0.0 };
    if rate > 0.0 && rate < 0.05 {
        "<0.1".to_owned()
    } else if rate < 99.95 {
        format!("{rate:.1}")
    } else {
        grouped(rate.round() as u64)
    }
}

fn first_url(service: &ServiceStatus, nodes: &[NodeStatus]) -> String {
    let urls = urls(service, nodes);
    match urls.as_slice() {
        [] => String::new(),
        [one] => one.clone(),
        [first, rest @ ..] => format!("{first} +{}", rest.len()),
    }
}

/// Since it settled, else since its oldest replica was made.
fn service_age(screen: &Screen, service: &ServiceStatus) -> String {
    let settled = service.last_receipt.as_ref().map(|receipt| receipt.ended);
    let since = settled.or_else(|| service.replicas.iter().map(|replica| replica.since).min());
    since.map(|since| screen.ago(since)).unwrap_or_default()
}

/// What is wrong, below the table.
fn trouble(service: &ServiceStatus) -> Vec<Text> {
    let Some(why) = &service.why else { return Vec::new() };
    if matches!(service.state, ServiceState::Running | ServiceState::Starting) && why.code == Code::Starting {
        return Vec::new();
    }
    let (ink, _, _) = state(service.state);
    let mut lines = vec![Text::of(ink, format!("    {}: ", service.name.service)).and(Ink::Plain, &why.cause)];
    if let Some(fix) = &why.fix {
        lines.push(Text::of(Ink::Cyan, "      fix ").and(Ink::Plain, fix));
    }
    lines
}

pub fn state(state: ServiceState) -> (Ink, &'static str, &'static str) {
    match state {
        ServiceState::Running => (Ink::Green, "●", "running"),
        ServiceState::Starting => (Ink::Cyan, "◐", "starting"),
        ServiceState::Updating => (Ink::Cyan, "◐", "updating"),
        ServiceState::RollingBack => (Ink::Yellow, "◑", "rolling back"),
        ServiceState::Canary => (Ink::Magenta, "◇", "canary"),
        ServiceState::Degraded => (Ink::Yellow, "▲", "degraded"),
        ServiceState::Failing => (Ink::Red, "✖", "failing"),
        ServiceState::CrashLooping => (Ink::Red, "✖", "crash-looping"),
        ServiceState::Stopped => (Ink::Dim, "■", "stopped"),
        ServiceState::Removing => (Ink::Dim, "◌", "removing"),
    }
}

/// Where its routes can be asked from a browser.
pub fn urls(service: &ServiceStatus, nodes: &[NodeStatus]) -> Vec<String> {
    service.routes.iter().map(|route| url(route, nodes)).collect()
}

fn url(route: &str, nodes: &[NodeStatus]) -> String {
    let proxy = nodes.iter().find_map(|node| Some((node, *node.facts.as_ref()?.proxy.first()?)));
    let port = match proxy {
        Some((_, proxy)) if proxy.port() != 80 => format!(":{}", proxy.port()),
        Some(_) | None => String::new(),
    };
    let (host, path) = route.split_at(route.find('/').unwrap_or(route.len()));
    let host = match (host, proxy) {
        ("", Some((node, proxy))) => proxy_host(node, proxy),
        ("", None) => "*".to_owned(),
        (name, _) => name.to_owned(),
    };
    let path = match path.strip_suffix("/*") {
        Some("") => "/",
        Some(prefix) => prefix,
        None => path,
    };
    format!("http://{host}{port}{path}")
}

fn proxy_host(node: &NodeStatus, proxy: SocketAddr) -> String {
    let listens_on = proxy.ip();
    let advertised = node.address.rsplit_once(':').map_or(node.address.as_str(), |(host, _)| host);
    let is_local = |ip: IpAddr| ip.is_loopback() || ip.is_unspecified();
    match (listens_on.is_unspecified(), advertised.trim_matches(['[', ']']).parse::<IpAddr>()) {
        (true, Ok(ip)) if is_local(ip) => "localhost".to_owned(),
        (true, _) => advertised.to_owned(),
        (false, _) if listens_on.is_loopback() => "localhost".to_owned(),
        (false, _) => match listens_on {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        },
    }
}

pub fn nodes(screen: &Screen, nodes: &[NodeStatus]) -> Vec<Text> {
    let rows = nodes.iter().map(|node| {
        let (ink, word) = match node.condition {
            NodeCondition::Alive => (Ink::Green, "alive".to_owned()),
            NodeCondition::Suspect => (Ink::Yellow, format!("silent for {}", heard(screen, node))),
            NodeCondition::Dead => (Ink::Red, format!("dead, silent for {}", heard(screen, node))),
            NodeCondition::Unheard => (Ink::Yellow, "not heard yet".to_owned()),
        };
        let mut row = vec![
            Text::plain(node.name.clone()),
            Text::of(ink, word),
            Text::of(Ink::Dim, node.address.clone()),
            Text::plain(count(node.replicas, "replica")),
        ];
        if let Some(facts) = &node.facts {
            row.push(Text::plain(format!("{} CPU", facts.cpu)));
            row.push(Text::plain(format!("{} of {} free", facts.memory_available, facts.memory)));
            row.push(Text::plain(format!("disk {} free", facts.disk_available)));
            row.push(match &facts.containers {
                Engine::Ready { version } => Text::of(Ink::Dim, format!("Docker {version}")),
                Engine::Unreachable { .. } => Text::of(Ink::Yellow, "no Docker"),
                Engine::Unknown => Text::new(),
            });
            let labels: Vec<String> = facts.labels.iter().map(|(key, value)| format!("{key}={value}")).collect();
            row.push(Text::of(Ink::Dim, labels.join(" ")));
        }
        row
    });
    table(2, &[Left, Left, Left, Right, Right, Right, Right, Left, Left], rows.collect())
}

fn heard(screen: &Screen, node: &NodeStatus) -> String {
    node.last_heard.map_or_else(|| "ever".to_owned(), |at| screen.ago(at))
}

/// One service in detail.
pub fn service(
    screen: &Screen,
    nodes: &[NodeStatus],
    service: &ServiceStatus,
    revisions: &[RevisionInfo],
) -> Vec<Text> {
    let (ink, symbol, word) = state(service.state);
    let mut lines = vec![
        Text::of(Ink::Bold, service.name.to_string())
            .and(ink, format!("  {symbol} {word}"))
            .and(Ink::Plain, format!("  {}/{} ready", service.ready, service.wanted)),
    ];
    let mut field = |label: &str, text: Text| lines.push(Text::of(Ink::Dim, format!("  {label:<9}")).then(text));
    let kind = if service.module { "module" } else { "image" };
    field(kind, Text::plain(service.source.clone()).and(Ink::Dim, digest_text(service.digest.as_deref())));
    field("revision", Text::plain(format!("{}, {}", service.revision, strategy_words(service.strategy))));
    for url in urls(service, nodes) {
        field("url", Text::of(Ink::Cyan, url));
    }
    for (cron, record) in &service.schedules {
        field("schedule", schedule(screen, cron, record));
    }
    if service.recent.requests > 0 {
        let recent = &service.recent;
        let p99 = recent.p99_us.map(|p99| format!(", p99 {}", latency(p99))).unwrap_or_default();
        let mut text = Text::plain(format!("{} requests/s{p99}, ", rate(recent)));
        text = if recent.errors == 0 { text.and(Ink::Plain, "no 5xx") } else { text.then(errors_text(recent)) };
        field("traffic", text.and(Ink::Dim, " (last minute)"));
    }
    if let Some(rollout) = &service.rollout {
        let verb = if rollout.back { "giving up" } else { "rolling out" };
        let mut text = format!("{verb} {} since {}", rollout.to, screen.ago(rollout.started));
        if let Some(because) = &rollout.because {
            text.push_str(&format!(": {because}"));
        }
        field("rollout", Text::plain(text));
    }
    for (at, reason) in waits(screen, nodes, service).into_iter().enumerate() {
        field(if at == 0 { "waiting" } else { "" }, Text::plain(reason));
    }
    if let Some(why) = &service.why
        && why.code != Code::Starting
    {
        lines.push(Text::new());
        lines.extend(super::why::diagnosis(why));
    }
    if !service.replicas.is_empty() {
        lines.push(Text::new());
        lines.extend(replicas(screen, std::slice::from_ref(service), false));
    }
    if let Some(receipt) = &service.last_receipt {
        lines.push(Text::new());
        lines.push(Text::of(Ink::Dim, "last rollout  ").then(history::receipt_line(screen, receipt)));
        if let Some(failure) = &receipt.failure {
            lines.push(Text::of(Ink::Red, "         why  ").and(Ink::Plain, &failure.cause));
        }
    }
    if !revisions.is_empty() {
        lines.push(Text::new());
        let first = revisions.len().saturating_sub(REVISIONS_SHOWN);
        lines.extend(history::revisions(screen, &revisions[first..], &[]));
    }
    lines
}

/// What runs now or ran last, and when the next is due.
fn schedule(screen: &Screen, cron: &str, record: &ScheduleRecord) -> Text {
    let date = |at| moment::date(at, &screen.zone);
    let mut text = Text::plain(cron.to_owned());
    if let Some(next) = record.next {
        text = text.and(Ink::Dim, format!(", next {}", date(next)));
    }
    if let Some(Run { due, replica }) = &record.run {
        return text.and(Ink::Cyan, format!(", that of {} is on {replica}", date(*due)));
    }
    let Some(LastRun { due, replica: _, ending }) = &record.last else { return text };
    let (ink, how) = match ending {
        RunEnding::Done => (Ink::Dim, "done".to_owned()),
        RunEnding::Failed { reason } => (Ink::Red, format!("failed: {reason}")),
        RunEnding::Skipped { reason } => (Ink::Yellow, format!("skipped: {reason}")),
        RunEnding::Unknown { reason } => (Ink::Yellow, format!("unknown: {reason}")),
    };
    text.and(Ink::Plain, format!(", that of {} ", date(*due))).and(ink, how)
}

fn digest_text(digest: Option<&str>) -> String {
    digest.map(|digest| format!("  {}", digest.chars().take(19).collect::<String>())).unwrap_or_default()
}

fn strategy_words(strategy: Strategy) -> String {
    match strategy {
        Strategy::Rolling => "rolling".to_owned(),
        Strategy::Recreate => "recreate".to_owned(),
        Strategy::BlueGreen => "blue-green".to_owned(),
        Strategy::Canary { weight } => format!("canary with {weight}%"),
    }
}

/// One line for each replica.
pub fn replicas(screen: &Screen, services: &[ServiceStatus], with_service: bool) -> Vec<Text> {
    let rows = services.iter().flat_map(|service| service.replicas.iter().map(move |replica| (service, replica)));
    let rows = rows.map(|(service, replica)| {
        let (ink, word) = phase(replica);
        let service = if with_service { service.name.to_string() } else { String::new() };
        let address = replica.address.map(|address| address.to_string()).unwrap_or_default();
        vec![
            Text::plain(service),
            Text::plain(replica.id.to_string()),
            Text::plain(replica.node_name.clone()),
            Text::of(Ink::Dim, replica.revision.to_string()),
            Text::of(ink, word),
            Text::of(Ink::Dim, address),
            Text::plain(usage(replica)),
            Text::plain(busy(replica)),
            restarts(replica),
            Text::of(Ink::Dim, screen.ago(replica.since)),
        ]
    });
    table(
        if with_service { 0 } else { 2 },
        &[Left, Left, Left, Left, Left, Left, Right, Right, Left, Right],
        rows.collect(),
    )
}

fn phase(replica: &ReplicaStatus) -> (Ink, String) {
    let ink = match replica.phase {
        Phase::Ready if replica.leaving => Ink::Dim,
        Phase::Ready => Ink::Green,
        Phase::Pending | Phase::Pulling | Phase::Creating | Phase::Starting => Ink::Cyan,
        Phase::Unready | Phase::BackOff => Ink::Red,
        Phase::Unknown => Ink::Yellow,
        Phase::Stopping | Phase::Gone => Ink::Dim,
    };
    let word = match replica.phase {
        Phase::Ready if replica.leaving => "draining",
        Phase::Unknown => "unknown, its node is silent",
        phase => phase_word(phase),
    };
    (ink, replica.pulling.map_or_else(|| word.to_owned(), |pulling| pulling.to_string()))
}

/// `pulling 12.4 of 80.1 MB, 9s`.
pub fn pulling(screen: &Screen, replica: &ReplicaStatus) -> String {
    let (_, word) = phase(replica);
    format!("{word}, {}", screen.ago(replica.since))
}

fn usage(replica: &ReplicaStatus) -> String {
    let usage = replica.usage;
    if usage.memory.0 == 0 && usage.cpu.0 == 0 {
        return String::new();
    }
    format!("{:.2} CPU, {}", f64::from(usage.cpu.0) / 1000.0, usage.memory)
}

fn busy(replica: &ReplicaStatus) -> String {
    let all = u64::from(replica.in_flight.requests) + u64::from(replica.in_flight.upgraded);
    if all == 0 { String::new() } else { format!("{} in flight", grouped(all)) }
}

fn restarts(replica: &ReplicaStatus) -> Text {
    let exit = replica.last_exit.as_ref().map(|exit| match (exit.out_of_memory, exit.code) {
        (true, _) => ", last: out of memory".to_owned(),
        (false, code) => format!(", last exit {code}"),
    });
    match replica.restarts {
        0 if replica.failures == 0 => Text::new(),
        restarts => Text::of(Ink::Yellow, format!("{}{}", count(restarts, "restart"), exit.unwrap_or_default())),
    }
}

/// Why a service is not done yet, in words. What a rollout has placed is waited for from then on, however often it was
/// started since, and until it is given up.
pub fn waits(screen: &Screen, nodes: &[NodeStatus], service: &ServiceStatus) -> Vec<String> {
    let forward = service.rollout.as_ref().filter(|rollout| !rollout.back);
    let words = |reason: &Waiting| {
        let Waiting::ForReady { replica, trouble, .. } = reason else { return waiting(screen, nodes, reason) };
        let replica = service.replicas.iter().find(|known| known.id == *replica);
        let Some((rollout, replica)) = forward.zip(replica).filter(|(rollout, it)| it.placed >= rollout.started) else {
            return waiting(screen, nodes, reason);
        };
        if replica.phase == Phase::Pulling && trouble.is_none() {
            let what = if service.module { "module" } else { "image" };
            return format!("for the {what} of {}: {}", replica.id, pulling(screen, replica));
        }
        // As the rollout counts it.
        let since = replica.placed + Duration::from_millis(replica.pulled.map_or(0, |pulled| pulled.millis));
        let reason = Waiting::ForReady { replica: replica.id, since, trouble: trouble.clone() };
        let text = waiting(screen, nodes, &reason);
        match rollout.ready_timeout_secs {
            _ if replica.phase == Phase::Pulling => text,
            0 => text,
            seconds => format!("{text}; given up after {}", moment::age(Duration::from_secs(seconds))),
        }
    };
    service.waiting.iter().map(words).collect()
}

fn waiting(screen: &Screen, nodes: &[NodeStatus], waiting: &Waiting) -> String {
    let named =
        |id: &NodeId| nodes.iter().find(|node| node.id == *id).map_or_else(|| id.to_string(), |node| node.name.clone());
    match waiting {
        Waiting::ForReady { replica, since, trouble } => {
            let mut text = format!("for {replica} to get ready, {} so far", screen.ago(*since));
            if let Some(trouble) = trouble {
                text.push_str(&format!(": {}", cause(&trouble.cause)));
            }
            if let Some(at) = trouble.as_ref().and_then(|trouble| trouble.retry_at) {
                let left = at.since(screen.now);
                if left > Duration::ZERO {
                    text.push_str(&format!("; tried again in {}", moment::took(left)));
                }
            }
            text
        }
        Waiting::ForRoom { refused } => {
            let reasons: Vec<String> = refused.iter().map(|(node, why)| format!("{}: {why}", named(node))).collect();
            match reasons.as_slice() {
                [] => "for a node it could run on; there is none".to_owned(),
                reasons => format!("for room on a node ({})", reasons.join("; ")),
            }
        }
        Waiting::ForNode { node, last_heard } => match last_heard {
            Some(at) => format!(
                "for node {}, not heard for {}; what it holds is not given to another",
                named(node),
                screen.ago(*at)
            ),
            None => format!("for node {}, not heard yet; what it holds is not given to another", named(node)),
        },
        Waiting::ForDependency { service } => format!("for `{service}`, on which it depends, to get ready"),
        Waiting::ForDrain { replica, in_flight, until } => {
            let left = until.since(screen.now).as_secs();
            format!("for {replica} to finish {}, at most {left}s more", count(*in_flight, "connection"))
        }
        Waiting::ForStop { replica } => format!("for {replica} to stop"),
        Waiting::ForProxies => "for the proxies to take over the new routes".to_owned(),
        Waiting::ForTaker { route, service } => format!("for {service} to get ready, which is to answer {}", route.0),
        Waiting::ForPromotion { revision, weight } => {
            format!("for a person: {revision} gets {weight}% of the requests; `orca promote` or `orca rollback`")
        }
        Waiting::ForMeasurement { revision, weight, until, requests, requests_min } => {
            let left = match until.since(screen.now).as_secs() {
                0 => format!("when it has answered {requests_min}"),
                left => format!("in {left}s"),
            };
            let answered = count(*requests, "request");
            format!("for {revision}, which gets {weight}% of the requests, to be judged {left}; {answered} so far")
        }
    }
}

/// What keeps a replica, in a few words; `orca why` has the rest.
pub fn cause(cause: &Cause) -> String {
    match cause {
        Cause::NoEngine { .. } => "no Docker engine answers".to_owned(),
        Cause::ImageMissing { image, present: false } => format!("image {image} does not exist"),
        Cause::ImageMissing { image, present: true } => format!("image {image} is in no registry"),
        Cause::ImageDenied { image } => format!("the registry refuses to give {image}"),
        Cause::PullFailed { image, present: false, .. } => format!("image {image} could not be pulled"),
        Cause::PullFailed { image, present: true, .. } => format!("image {image} could not be pulled again"),
        Cause::WrongArchitecture { image, has, .. } => format!("image {image} is built for {has}"),
        Cause::NoSuchCommand { command, .. } => format!("`{command}` cannot be run"),
        Cause::SecretMissing { name } => format!("secret {name} is not set"),
        Cause::PortTaken { port, by } => format!("port {port} is taken by {by}"),
        Cause::VolumeBusy { volume, by } => format!("volume {volume} is held by {by}"),
        Cause::DiskFull { .. } => "the disk is full".to_owned(),
        Cause::Refused { .. } => "the engine refuses to start it".to_owned(),
        Cause::Unreadable { .. } => "the engine cannot look into its container".to_owned(),
        Cause::ModuleInvalid { .. } => "its module cannot be run".to_owned(),
        Cause::ModuleMissing { .. } => "its module is on no control node".to_owned(),
        Cause::Exited => "it exited".to_owned(),
        Cause::Vanished => "its container was removed".to_owned(),
        Cause::ProbeFailing { check, saw, .. } => format!("{check} -> {}", saw_words(saw)),
        Cause::NotAlive { check, saw } => format!("not alive: {check} -> {}", saw_words(saw)),
    }
}

/// Usage and traffic, busiest first.
pub fn top(screen: &Screen, status: &Status) -> Vec<Text> {
    let mut lines = vec![
        Text::of(Ink::Bold, name_of(status)).and(Ink::Dim, format!("  {}", moment::clock(status.at, &screen.zone))),
    ];
    lines.extend(nodes(screen, &status.nodes));
    lines.push(Text::new());
    let mut services: Vec<&ServiceStatus> = status.services.iter().collect();
    let cpu = |service: &ServiceStatus| service.replicas.iter().map(|r| u64::from(r.usage.cpu.0)).sum::<u64>();
    services.sort_by_key(|service| std::cmp::Reverse((cpu(service), service.recent.requests)));
    let heads = ["", "ready", "cpu", "memory", "req/s", "p99", "5xx", "in flight"];
    let mut rows = vec![heads.map(|head| Text::of(Ink::Dim, head)).to_vec()];
    rows.extend(services.into_iter().map(|service| {
        let (ink, symbol, _) = state(service.state);
        let memory = orca_cluster::resource::Memory(service.replicas.iter().map(|r| r.usage.memory.0).sum());
        let in_flight: u64 =
            service.replicas.iter().map(|r| u64::from(r.in_flight.requests) + u64::from(r.in_flight.upgraded)).sum();
        let errors = if service.recent.errors > 0 { Ink::Red } else { Ink::Plain };
        vec![
            Text::of(ink, symbol).and(Ink::Plain, format!(" {}", service.name)),
            Text::plain(format!("{}/{}", service.ready, service.wanted)),
            Text::plain(format!("{:.2}", cpu(service) as f64 / 1000.0)),
            Text::plain(memory.to_string()),
            Text::plain(rate(&service.recent)),
            Text::plain(service.recent.p99_us.map(latency).unwrap_or_else(|| "-".to_owned())),
            Text::of(errors, grouped(service.recent.errors)),
            Text::plain(grouped(in_flight)),
        ]
    }));
    lines.extend(table(2, &[Left, Right, Right, Right, Right, Right, Right, Right], rows));
    lines
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::sample::{self, at, screen, show};
    use super::*;
    use expect_test::expect;
    use orca_cluster::id::{ReplicaId, Revision};
    use orca_cluster::replica::Pulling;
    use orca_cluster::resource::Memory;
    use orca_cluster::route::RouteKey;
    use orca_cluster::waiting::NoRoom;

    #[test]
    fn the_whole_cluster_fits_on_one_screen_with_causes_and_fixes() {
        expect![[r#"
            cluster main  1 node, 3 services, index 4182
              n1  alive  127.0.0.1:6880  4 replicas  8 CPU  9Gi of 16Gi free  disk 120Gi free  Docker 29.1

            blog
              ● web  running  1/1  ./web.wasm v1

            shop
              ● api     running        3/3  myorg/api:1.4.3 v5  12.4/s  p99 41 ms  2 5xx  http://shop.example.com:8080/api +1   2h
              ✖ worker  crash-looping  0/1  myorg/worker:2 v2                                                                  12s
                worker: it exits with code 1 after 0.3 s, 4 times in a row (crash-looping)
                  fix the reason is in its last lines; more with `orca logs shop/worker`
        "#]].assert_eq(&show(&cluster(&screen(), &sample::status())));
    }

    #[test]
    fn one_service_says_what_runs_and_what_is_wrong() {
        let nodes = [sample::node()];
        expect![[r#"
            shop/worker  ✖ crash-looping  0/1 ready
              image    myorg/worker:2
              revision v2, rolling

              why   it exits with code 1 after 0.3 s, 4 times in a row (crash-looping)
              logs  no DATABASE_URL
              fix   the reason is in its last lines; more with `orca logs shop/worker`

              r9  n1  v2  backing off  4 restarts, last exit 1  12s
        "#]]
        .assert_eq(&show(&service(&screen(), &nodes, &sample::worker(), &[])));
    }

    #[test]
    fn a_schedule_says_how_it_went_and_when_it_is_next() {
        let due = at(60);
        let failed = RunEnding::Failed { reason: "exit code 1".to_owned() };
        let last = |ending| Some(LastRun { due, replica: Some(ReplicaId(1)), ending });
        let record = ScheduleRecord { next: Some(sample::NOW), ..ScheduleRecord::default() };
        let run = Some(Run { due, replica: ReplicaId(1) });
        let records = [
            record.clone(),
            ScheduleRecord { run, ..record.clone() },
            ScheduleRecord { last: last(RunEnding::Done), ..record.clone() },
            ScheduleRecord { last: last(failed), ..record },
        ];
        let lines: Vec<Text> = records.iter().map(|record| schedule(&screen(), "* * * * *", record)).collect();
        expect![[r#"
            * * * * *, next 2026-01-31 14:02:11
            * * * * *, next 2026-01-31 14:02:11, that of 2026-01-31 14:01:11 is on r1
            * * * * *, next 2026-01-31 14:02:11, that of 2026-01-31 14:01:11 done
            * * * * *, next 2026-01-31 14:02:11, that of 2026-01-31 14:01:11 failed: exit code 1
        "#]]
        .assert_eq(&show(&lines));
    }

    #[test]
    fn a_replica_is_listed_with_what_is_known_of_it() {
        let mut api = sample::status().services.remove(1);
        api.replicas[0].phase = Phase::Unknown;
        api.replicas[1].phase = Phase::Pulling;
        api.replicas[1].pulling = Some(Pulling { bytes: 12_400_000, total: Some(80_100_000) });
        expect![[r#"
            shop/api  r1  n1  v5  unknown, its node is silent  172.18.0.4:8080  0.12 CPU, 48Mi  1s
            shop/api  r2  n1  v5  pulling 12.4 of 80.1 MB      172.18.0.4:8080  0.12 CPU, 48Mi  1s
            shop/api  r3  n1  v5  ready                        172.18.0.4:8080  0.12 CPU, 48Mi  1s
        "#]]
        .assert_eq(&show(&replicas(&screen(), &[api], true)));
    }

    #[test]
    fn replicas_are_listed_one_by_one() {
        expect![[r#"
              shop/api     r1  n1  v5  ready        172.18.0.4:8080  0.12 CPU, 48Mi                            1s
              shop/api     r2  n1  v5  ready        172.18.0.4:8080  0.12 CPU, 48Mi                            1s
              shop/api     r3  n1  v5  ready        172.18.0.4:8080  0.12 CPU, 48Mi                            1s
              shop/worker  r9  n1  v2  backing off                                   4 restarts, last exit 1  12s
        "#]]
        .assert_eq(&show(&replicas(&screen(), &sample::status().services, true)));
    }

    #[test]
    fn top_shows_the_busiest_first() {
        expect![[r#"
            cluster main  14:02:11
              n1  alive  127.0.0.1:6880  4 replicas  8 CPU  9Gi of 16Gi free  disk 120Gi free  Docker 29.1

                             ready   cpu  memory  req/s    p99  5xx  in flight
              ● shop/api       3/3  0.36   144Mi   12.4  41 ms    2          0
              ● blog/web       1/1  0.00      0B    0.0      -    0          0
              ✖ shop/worker    0/1  0.00      0B    0.0      -    0          0
        "#]]
        .assert_eq(&show(&top(&screen(), &sample::status())));
    }

    #[test]
    fn every_reason_to_wait_is_a_sentence() {
        let room = NoRoom::Memory { wanted: Memory(1 << 30), free: Memory(256 << 20), total: Memory(2 << 30) };
        let measured = |until, requests| {
            let (revision, weight, requests_min) = (Revision(5), 20, 20);
            Waiting::ForMeasurement { revision, weight, until, requests, requests_min }
        };
        let reasons = [
            Waiting::ForReady { replica: ReplicaId(7), since: at(12), trouble: None },
            Waiting::ForRoom { refused: BTreeMap::from([(NodeId(1), room)]) },
            Waiting::ForRoom { refused: BTreeMap::new() },
            Waiting::ForNode { node: NodeId(2), last_heard: Some(at(90)) },
            Waiting::ForDependency { service: Label::new("db").unwrap() },
            Waiting::ForDrain { replica: ReplicaId(3), in_flight: 31, until: sample::NOW + Duration::from_secs(20) },
            Waiting::ForStop { replica: ReplicaId(3) },
            Waiting::ForProxies,
            Waiting::ForTaker {
                route: RouteKey::try_from("shop.example.com/cart".to_owned()).unwrap(),
                service: "shop/cart".parse().unwrap(),
            },
            Waiting::ForPromotion { revision: Revision(5), weight: 20 },
            measured(sample::NOW + Duration::from_secs(250), 1_200),
            measured(sample::NOW, 7),
        ];
        let nodes = [sample::node()];
        let text: Vec<String> = reasons.iter().map(|reason| waiting(&screen(), &nodes, reason)).collect();
        expect![[r#"
            for r7 to get ready, 12s so far
            for room on a node (n1: memory: 1Gi wanted, 256Mi of 2Gi not set aside)
            for a node it could run on; there is none
            for node n2, not heard for 1m 30s; what it holds is not given to another
            for `db`, on which it depends, to get ready
            for r3 to finish 31 connections, at most 20s more
            for r3 to stop
            for the proxies to take over the new routes
            for shop/cart to get ready, which is to answer shop.example.com/cart/*
            for a person: v5 gets 20% of the requests; `orca promote` or `orca rollback`
            for v5, which gets 20% of the requests, to be judged in 250s; 1,200 requests so far
            for v5, which gets 20% of the requests, to be judged when it has answered 20; 7 requests so far"#]]
        .assert_eq(&text.join("\n"));
    }
}
