//! What a difference between two specifications of a service means. Templates are compared as they are written, so a
//! rotated secret is no difference. Both sides are taken apart without `..`: a new field does not compile until someone
//! has said here what changing it asks for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Display;

use serde::{Deserialize, Serialize};

use super::{
    AutoPromote, Check, Deploy, HostAccess, Label, Module, ModuleLimits, Placement, Probe, Registry, SecretsAs,
    Service, Settings, Source, Strategy, Volume, VolumeSource,
};
use crate::resource::Resources;

/// How far a difference reaches, from nothing that is running to everything.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// Nothing now: it is looked up when the time comes (time-outs of the next deploy, the order of starting).
    Remember,
    /// More or fewer replicas of the same kind.
    Rescale,
    /// Other tables for the proxies.
    Reroute,
    /// Other times at which it runs.
    Reschedule,
    /// Other questions to the same replicas.
    Reprobe,
    /// What runs is different: new replicas take the place of the old ones.
    Replace,
}

/// One difference, as a person would say it. Values of variables are never part of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Difference {
    pub effect: Effect,
    pub what: String,
}

/// What is different between two settings of the cluster, each as a person would say it.
pub fn settings(old: &Settings, new: &Settings) -> Vec<String> {
    let Settings { name, domain, log_level, allow_host } = new;
    let mut change = Change::default();
    let or_none = |text: Option<&str>| text.unwrap_or("none").to_owned();
    let of_label = |name: &Option<Label>| or_none(name.as_ref().map(Label::as_str));
    change.compare(Effect::Remember, "name", &old.name, name, of_label);
    change.compare(Effect::Remember, "domain", &old.domain, domain, |domain| or_none(domain.as_deref()));
    change.compare(Effect::Remember, "log level", &old.log_level, log_level, |level| or_none(level.as_deref()));
    change.compare_sets(Effect::Remember, "allow_host", &old.allow_host, allow_host);
    change.describe()
}

/// All differences between two specifications of one service.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Change {
    pub differences: Vec<Difference>,
}

impl Change {
    pub fn is_nothing(&self) -> bool {
        self.differences.is_empty()
    }

    pub fn has(&self, effect: Effect) -> bool {
        self.differences.iter().any(|difference| difference.effect == effect)
    }

    /// Whether the old replicas cannot go on as replicas of the new specification.
    pub fn needs_new_replicas(&self) -> bool {
        self.has(Effect::Replace)
    }

    /// Each difference as a person would say it.
    pub fn describe(&self) -> Vec<String> {
        self.differences.iter().map(|difference| difference.what.clone()).collect()
    }

    fn note(&mut self, effect: Effect, what: impl Into<String>) {
        self.differences.push(Difference { effect, what: what.into() });
    }

    /// Notes `name old -> new` if they differ.
    fn compare<T: PartialEq>(&mut self, effect: Effect, name: &str, old: &T, new: &T, show: impl Fn(&T) -> String) {
        if old != new {
            self.note(effect, format!("{name} {} -> {}", show(old), show(new)));
        }
    }

    /// Notes each key that was added, removed or got another value.
    fn compare_maps<K: Ord + Display, V: PartialEq>(
        &mut self,
        effect: Effect,
        name: &str,
        old: &BTreeMap<K, V>,
        new: &BTreeMap<K, V>,
    ) {
        for key in old.keys().chain(new.keys()).collect::<BTreeSet<_>>() {
            let verb = match (old.get(key), new.get(key)) {
                (None, Some(_)) => "added",
                (Some(_), None) => "removed",
                (old, new) if old != new => "changed",
                _ => continue,
            };
            self.note(effect, format!("{name} {key} {verb}"));
        }
    }

    fn compare_sets<T: Ord + Display>(&mut self, effect: Effect, name: &str, old: &BTreeSet<T>, new: &BTreeSet<T>) {
        let of = |set: &BTreeSet<T>| set.iter().map(|element| (element.to_string(), ())).collect();
        let (old, new): (BTreeMap<String, ()>, BTreeMap<String, ()>) = (of(old), of(new));
        self.compare_maps(effect, name, &old, &new);
    }
}

/// What has to happen when `old` is to become `new`. Both are the same service.
pub fn change(old: &Service, new: &Service) -> Change {
    debug_assert_eq!(old.name, new.name, "two services are not two versions of one");
    let Service {
        name: _,
        source,
        command,
        port,
        replicas,
        routes,
        env,
        secrets_as,
        resources,
        liveness,
        readiness,
        depends_on,
        deploy,
        placement,
        volumes,
        schedules,
        limits,
        registry,
        host,
        // Compared as what it comes to, with the limit of a module in it.
        response_timeout: _,
    } = new;
    let mut change = Change::default();
    source_change(&mut change, &old.source, source);
    change.compare(Effect::Replace, "command", &old.command, command, |command| match command.as_slice() {
        [] => "the image's own".to_owned(),
        words => words.join(" "),
    });
    change.compare(Effect::Replace, "port", &old.port, port, or_none);
    change.compare(Effect::Rescale, "replicas", &old.replicas, replicas, u32::to_string);
    change.compare_sets(Effect::Reroute, "route", &old.routes, routes);
    if !(old.is_module() || new.is_module()) {
        let [old, new] = [old, new].map(Service::response_timeout);
        change.compare(Effect::Reroute, "response_timeout", &old, &new, |span| format!("{span:?}"));
    }
    change.compare_maps(Effect::Replace, "env", &old.env, env);
    change.compare(Effect::Replace, "secrets as", &old.secrets_as, secrets_as, |way| match way {
        SecretsAs::Env => "env".to_owned(),
        SecretsAs::Files => "files".to_owned(),
    });
    let Resources { memory, cpu } = resources;
    // The memory of a module is one of its limits; what is set aside for it is not seen by what runs.
    let effect = if new.is_module() { Effect::Remember } else { Effect::Replace };
    change.compare(effect, "memory", &old.resources.memory, memory, or_none);
    change.compare(Effect::Replace, "cpu", &old.resources.cpu, cpu, or_none);
    probe_change(&mut change, "liveness", old.liveness.as_ref(), liveness.as_ref());
    probe_change(&mut change, "readiness", old.readiness.as_ref(), readiness.as_ref());
    change.compare_sets(Effect::Remember, "depends_on", &old.depends_on, depends_on);
    deploy_change(&mut change, &old.deploy, deploy);
    let Placement { node, labels, spread } = placement;
    change.compare(Effect::Replace, "node", &old.placement.node, node, or_none);
    change.compare_maps(Effect::Replace, "node label", &old.placement.labels, labels);
    change.compare(Effect::Replace, "spread", &old.placement.spread, spread, or_none);
    volumes_change(&mut change, &old.volumes, volumes);
    let crons = |schedules: &[super::Schedule]| schedules.iter().map(|schedule| schedule.cron.clone()).collect();
    let (old_crons, new_crons): (BTreeSet<String>, BTreeSet<String>) = (crons(&old.schedules), crons(schedules));
    change.compare_sets(Effect::Reschedule, "schedule", &old_crons, &new_crons);
    limits_change(&mut change, old, limits);
    registry_change(&mut change, old.registry.as_ref(), registry.as_ref());
    let HostAccess { privileged, network } = host;
    change.compare(Effect::Replace, "privileged", &old.host.privileged, privileged, bool::to_string);
    change.compare(Effect::Replace, "network of the host", &old.host.network, network, bool::to_string);
    change
}

fn source_change(change: &mut Change, old: &Source, new: &Source) {
    match (old, new) {
        (Source::Image(old), Source::Image(new)) => {
            change.compare(Effect::Replace, "image", old, new, String::clone);
        }
        (Source::Module(old), Source::Module(new)) => {
            let Module { path, digest } = new;
            if old.digest != *digest {
                change.note(Effect::Replace, format!("module {path} has other content"));
            }
            // The same bytes from another place are the same module.
            change.compare(Effect::Remember, "module", &old.path, path, String::clone);
        }
        (Source::Image(image), Source::Module(module)) => {
            change.note(Effect::Replace, format!("image {image} -> module {}", module.path));
        }
        (Source::Module(module), Source::Image(image)) => {
            change.note(Effect::Replace, format!("module {} -> image {image}", module.path));
        }
    }
}

/// All of it says how replicas come and go the next time they do.
fn deploy_change(change: &mut Change, old: &Deploy, new: &Deploy) {
    let Deploy { strategy, max_unavailable, max_surge, ready_timeout, drain_timeout, stop_grace, auto_promote } = new;
    change.compare(Effect::Remember, "strategy", &old.strategy, strategy, |strategy| match strategy {
        Strategy::Rolling => "rolling".to_owned(),
        Strategy::Recreate => "recreate".to_owned(),
        Strategy::BlueGreen => "blue-green".to_owned(),
        Strategy::Canary { weight } => format!("canary {weight}%"),
    });
    change.compare(Effect::Remember, "auto_promote", &old.auto_promote, auto_promote, |auto| match auto {
        Some(AutoPromote { after, success_per_10_000 }) => {
            format!("at {}% after {after:?}", f64::from(*success_per_10_000) / 100.0)
        }
        None => "none".to_owned(),
    });
    change.compare(Effect::Remember, "max_unavailable", &old.max_unavailable, max_unavailable, u32::to_string);
    change.compare(Effect::Remember, "max_surge", &old.max_surge, max_surge, u32::to_string);
    for (name, old, new) in [
        ("ready_timeout", old.ready_timeout, *ready_timeout),
        ("drain_timeout", old.drain_timeout, *drain_timeout),
        ("stop_grace", old.stop_grace, *stop_grace),
    ] {
        change.compare(Effect::Remember, name, &old, &new, |span| format!("{span:?}"));
    }
}

fn volumes_change(change: &mut Change, old: &[Volume], new: &[Volume]) {
    let by_path = |volumes: &[Volume]| -> BTreeMap<String, Volume> {
        volumes.iter().map(|volume| (volume.path.clone(), volume.clone())).collect()
    };
    let named = |volumes: BTreeMap<String, Volume>| -> BTreeMap<String, Volume> {
        let name = |volume: &Volume| {
            let Volume { source, path, read_only: _ } = volume;
            match source {
                VolumeSource::Named(name) => format!("{name} at {path}"),
                VolumeSource::Host(host) => format!("of the host, {host}, at {path}"),
            }
        };
        volumes.into_values().map(|volume| (name(&volume), volume)).collect()
    };
    change.compare_maps(Effect::Replace, "volume", &named(by_path(old)), &named(by_path(new)));
}

/// A container has no instances to bound.
fn limits_change(change: &mut Change, old: &Service, new: &ModuleLimits) {
    if !old.is_module() {
        return;
    }
    let ModuleLimits { memory, timeout, concurrency, outbound } = new;
    change.compare(Effect::Replace, "memory of an instance", &old.limits.memory, memory, ToString::to_string);
    change.compare(Effect::Replace, "time of a request", &old.limits.timeout, timeout, |span| format!("{span:?}"));
    change.compare(Effect::Replace, "requests at once", &old.limits.concurrency, concurrency, u32::to_string);
    change.compare_sets(Effect::Replace, "outbound host", &old.limits.outbound, outbound);
}

/// Credentials are for the next pull; what has been pulled runs on.
fn registry_change(change: &mut Change, old: Option<&Registry>, new: Option<&Registry>) {
    match (old, new) {
        (None, None) => {}
        (None, Some(Registry { username: _, password: _ })) => change.note(Effect::Remember, "registry login added"),
        (Some(_), None) => change.note(Effect::Remember, "registry login removed"),
        (Some(old), Some(new)) if old != new => change.note(Effect::Remember, "registry login changed"),
        (Some(_), Some(_)) => {}
    }
}

fn or_none<T: Display>(value: &Option<T>) -> String {
    value.as_ref().map_or_else(|| "none".to_owned(), T::to_string)
}

fn probe_change(change: &mut Change, name: &str, old: Option<&Probe>, new: Option<&Probe>) {
    let (old, new) = match (old, new) {
        (None, None) => return,
        (None, Some(new)) => {
            return change.note(Effect::Reprobe, format!("{name} added: {}", check_text(&new.check)));
        }
        (Some(_), None) => return change.note(Effect::Reprobe, format!("{name} removed")),
        (Some(old), Some(new)) => (old, new),
    };
    let Probe { check, interval, timeout, failure_threshold, success_threshold, initial_delay } = new;
    change.compare(Effect::Reprobe, name, &old.check, check, check_text);
    for (what, old, new) in [
        ("interval", old.interval, *interval),
        ("timeout", old.timeout, *timeout),
        ("initial_delay", old.initial_delay, *initial_delay),
    ] {
        change.compare(Effect::Reprobe, &format!("{name} {what}"), &old, &new, |span| format!("{span:?}"));
    }
    for (what, old, new) in [
        ("failure_threshold", old.failure_threshold, *failure_threshold),
        ("success_threshold", old.success_threshold, *success_threshold),
    ] {
        change.compare(Effect::Reprobe, &format!("{name} {what}"), &old, &new, u32::to_string);
    }
}

fn check_text(check: &Check) -> String {
    match check {
        Check::Http(path) => format!("GET {path}"),
        Check::Tcp => "tcp".to_owned(),
        Check::Exec(command) => format!("exec {}", command.join(" ")),
        Check::Grpc => "grpc".to_owned(),
    }
}
