//! One `[[service]]`: from the keys people write to a [`Service`].

use std::collections::{BTreeMap, BTreeSet};

use ::toml::de::DeValue;

use super::table::{Item, Table};
use crate::id::Label;
use crate::resource::{Cpu, Memory, Resources};
use crate::spec::check::{self, Place};
use crate::spec::template::Template;
use crate::spec::{
    AutoPromote, Check, Deploy, Host, HostAccess, Module, ModuleLimits, Placement, Probe, Registry, Route, Schedule,
    SecretsAs, Service, Source, Strategy, Volume, VolumeSource, path_prefix,
};

/// A service as far as it could be read.
pub(super) struct Draft {
    pub service: Service,
    pub name: Name,
    pub place: Place,
    /// Its hosts and its routes, and what in the file each of them came from.
    pub hosts: Vec<(Host, Place)>,
    pub claims: Vec<(Route, Place)>,
}

/// Whether the name in a [`Draft`] is the one that was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Name {
    Right,
    Wrong,
    Absent,
}

pub(super) fn read(table: &mut Table<'_>) -> Draft {
    let (name, is_right) = name(table);
    let (source, mut limits) = source(table, &name);
    let env = env(table);
    let secrets_as = match table.get("secrets_as").and_then(|item| item.word(&["env", "files"])) {
        Some("files") => SecretsAs::Files,
        Some(_) | None => SecretsAs::Env,
    };
    let resources = resources(table);
    if let Some(memory) = resources.memory {
        limits.memory = memory;
    }
    let (liveness, readiness) = probes(table);
    let volumes = volumes(table);
    let is_module = matches!(source, Source::Module(_));
    let Requests { hosts, claims, schedules } = requests(table, is_module);
    let mut service = Service {
        name,
        source,
        command: strings(table, "command"),
        port: port(table),
        replicas: replicas(table),
        routes: claims.iter().map(|(route, _)| route.clone()).collect(),
        env,
        secrets_as,
        resources,
        liveness,
        readiness,
        depends_on: depends_on(table),
        deploy: Deploy {
            strategy: Strategy::Rolling,
            max_unavailable: 0,
            max_surge: 1,
            ready_timeout: Deploy::READY_TIMEOUT,
            drain_timeout: Deploy::DRAIN_TIMEOUT,
            stop_grace: Deploy::STOP_GRACE,
            auto_promote: None,
        },
        placement: placement(table),
        volumes,
        schedules,
        limits,
        registry: registry(table),
        host: host_access(table),
        response_timeout: table.seconds("response_timeout_secs"),
    };
    service.deploy = deploy(table, service.is_exclusive());
    later(table);
    for fault in check::service(&service) {
        table.report.fault(&table.place, &fault);
    }
    Draft { service, name: is_right, place: table.place.clone(), hosts, claims }
}

fn name(table: &mut Table<'_>) -> (Label, Name) {
    // Stands in for what could not be read, as in `source`.
    let unnamed = || Label::new("service").expect("that is a label");
    let Some(item) = table.get("name") else {
        table.missing("name", "this service has no `name`", "add `name = \"…\"`: other services call it by that");
        return (unnamed(), Name::Absent);
    };
    match item.parse(Label::new, Some("such as \"api\": it is also the host name of the service")) {
        Some(name) => (name, Name::Right),
        None => (unnamed(), Name::Wrong),
    }
}

/// What runs: exactly one of four keys.
fn source(table: &mut Table<'_>, name: &Label) -> (Source, ModuleLimits) {
    const ONE: &str = "a service has exactly one of `image`, `module`, `build` and `template`";
    let mut source = None;
    let mut limits = ModuleLimits::default();
    let mut first = None;
    for key in ["image", "module", "build", "template"] {
        let Some(item) = table.get(key) else { continue };
        if let Some(first) = first {
            item.conflict(format!("`{name}` has `{first}` and `{key}`"), ONE);
        }
        first = first.or(Some(key));
        match key {
            "image" => source = source.or(item.string().map(|text| Source::Image(text.to_owned()))),
            "module" => {
                let (path, read) = module(table, &item);
                limits = read;
                source = source.or(path.map(|path| Source::Module(Module { path, digest: None })));
            }
            "build" => build(table, &item),
            _ => {
                if item.string().is_some() {
                    item.unsupported(
                        "`template`",
                        "write the `image` and what it needs; `orca init` prints such files",
                    );
                }
            }
        }
    }
    if first.is_none() {
        table.missing(
            "image",
            &format!("`{name}` has nothing to run"),
            "add `image = \"…\"` or `module = \"./….wasm\"`",
        );
    }
    // Stands in for what could not be read; never leaves this module, because that has been reported.
    let unknown = || match first {
        Some("module") => Source::Module(Module { path: "unknown.wasm".to_owned(), digest: None }),
        Some(_) | None => Source::Image("unknown".to_owned()),
    };
    (source.unwrap_or_else(unknown), limits)
}

/// `module = "./api.wasm"`, or a table with the path and limits.
fn module(table: &mut Table<'_>, item: &Item<'_>) -> (Option<String>, ModuleLimits) {
    let defaults = ModuleLimits::default();
    if !item.value.is_table() {
        return (module_path(item), defaults);
    }
    table.table("module", |module| {
        let path = match module.get("path") {
            Some(item) => module_path(&item),
            None => {
                module.missing("path", "this module has no `path`", "add `path = \"./….wasm\"`");
                None
            }
        };
        let limits = ModuleLimits {
            memory: defaults.memory,
            timeout: module.seconds("timeout_secs").unwrap_or(defaults.timeout),
            concurrency: module.count("max_concurrent").unwrap_or(defaults.concurrency),
            outbound: strings(module, "outbound").into_iter().collect(),
        };
        (path, limits)
    })
}

fn module_path(item: &Item<'_>) -> Option<String> {
    let text = item.string()?;
    let is_path = text.ends_with(".wasm") || ["./", "../", "/"].iter().any(|start| text.starts_with(start));
    if !is_path && !text.is_empty() {
        let meanwhile = "download the component, and name its file: `module = \"./api.wasm\"`";
        item.unsupported("a module from a registry", meanwhile);
        return None;
    }
    Some(text.to_owned())
}

fn build(table: &mut Table<'_>, item: &Item<'_>) {
    if item.table().is_none() {
        return;
    }
    table.table("build", |build| {
        let [repo, path, branch, _dockerfile] = ["repo", "path", "branch", "dockerfile"].map(|key| {
            build.string(key);
            build.get(key)
        });
        match (&repo, &path) {
            (Some(_), Some(path)) => path.conflict("a build has `repo` or `path`, not both", "keep one of them"),
            (None, None) => build.missing("repo", "this build has no source", "add `repo = \"…\"` or `path = \".\"`"),
            _ => {}
        }
        if let (None, Some(branch)) = (&repo, &branch) {
            branch.conflict("only a `repo` has a `branch`", "leave it out");
        }
    });
    item.unsupported_key("`build`", "build the image yourself, `docker build -t NAME .`, and write `image = \"NAME\"`");
}

fn env(table: &mut Table<'_>) -> BTreeMap<String, Template> {
    /// Keys of a service that end up below `[service.env]` when someone adds a line at the end.
    const OUTER: [&str; 8] = ["image", "port", "replicas", "domain", "routes", "command", "depends_on", "health"];
    table.table("env", |env| {
        let mut values = BTreeMap::new();
        for (name, item) in env.entries() {
            let hint = match item.value {
                DeValue::String(_) => None,
                _ if OUTER.contains(&name) => {
                    Some(format!("the service's own `{name}` goes above the line `[service.env]`"))
                }
                _ => None,
            };
            if hint.is_some() {
                item.mistyped("a text", hint);
            } else if let Some(value) = item.parse(str::parse::<Template>, None) {
                values.insert(name.to_owned(), value);
            }
        }
        values
    })
}

fn resources(table: &mut Table<'_>) -> Resources {
    table.table("resources", |resources| {
        let memory = resources.get("memory").and_then(|item| amount(&item));
        let cpu = resources.get("cpu").and_then(|item| cpu(&item));
        if let Some(gpu) = resources.get("gpu")
            && gpu.table().is_some()
        {
            resources.table("gpu", |gpu| {
                gpu.count("count");
                gpu.get("vendor").map(|item| item.word(&["nvidia", "amd", "intel"]));
                gpu.get("vram_min").map(|item| amount(&item));
            });
            gpu.unsupported_key("`gpu`", "leave it out: no container is given a GPU yet");
        }
        Resources { memory, cpu }
    })
}

fn amount(item: &Item<'_>) -> Option<Memory> {
    if let DeValue::Integer(number) = item.value {
        item.mistyped("an amount of memory", Some(format!("write it with a unit: \"{}Mi\"", number.as_str())));
        return None;
    }
    item.parse(str::parse, memory_hint(item.string()?).as_deref())
}

/// What someone meant who wrote "512mb", "512 MB" or "1.5Gi".
fn memory_hint(text: &str) -> Option<String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Some("such as \"512Mi\"".to_owned());
    }
    let unit = match unit.trim().to_ascii_lowercase().as_str() {
        "k" | "kb" | "kib" | "ki" => "Ki",
        "" | "m" | "mb" | "mib" | "mi" => "Mi",
        "g" | "gb" | "gib" | "gi" => "Gi",
        "t" | "tb" | "tib" | "ti" => "Ti",
        fraction if fraction.starts_with('.') => {
            return Some("use a smaller unit: \"1536Mi\"".to_owned());
        }
        _ => return None,
    };
    Some(format!("write \"{number}{unit}\""))
}

/// In CPUs, to the thousandth.
fn cpu(item: &Item<'_>) -> Option<Cpu> {
    if let Some(text) = item.value.as_str() {
        let millis = text.strip_suffix('m').and_then(|number| number.parse::<u32>().ok());
        let number = millis.map(|millis| f64::from(millis) / 1000.0).or_else(|| text.parse().ok());
        item.mistyped("a number of CPUs", number.map(|number| format!("write {number:?}")));
        return None;
    }
    let thousandths = (item.number()? * 1000.0).round();
    // Saturates; the range is checked with everything else.
    Some(Cpu(thousandths as u32))
}

fn probes(table: &mut Table<'_>) -> (Option<Probe>, Option<Probe>) {
    let health = table.get("health").and_then(|item| {
        let path = item.string()?;
        item.parse(check::request_path, Some("such as \"/healthz\""));
        Some(path)
    });
    let mut probe = |key, interval| {
        let is_given = table.get(key).is_some();
        table.table(key, |probe| {
            let check = check_of(probe, key, health, is_given)?;
            Some(Probe {
                check,
                interval: probe.seconds("interval_secs").unwrap_or(interval),
                timeout: probe.seconds("timeout_secs").unwrap_or(Probe::TIMEOUT),
                failure_threshold: probe.count("failure_threshold").unwrap_or(Probe::FAILURE_THRESHOLD),
                success_threshold: probe.count("success_threshold").unwrap_or(Probe::SUCCESS_THRESHOLD),
                initial_delay: probe.seconds("initial_delay_secs").unwrap_or_default(),
            })
        })
    };
    (probe("liveness", Probe::LIVENESS_INTERVAL), probe("readiness", Probe::READINESS_INTERVAL))
}

/// What a probe does: exactly one of four keys, or what `health` says.
fn check_of(probe: &mut Table<'_>, name: &'static str, health: Option<&str>, is_given: bool) -> Option<Check> {
    const ONE: &str = "a probe has exactly one of `path`, `tcp`, `exec` and `grpc`";
    let mut check = None;
    let mut first = None;
    for key in ["path", "tcp", "exec", "grpc"] {
        let Some(item) = probe.get(key) else { continue };
        if let Some(first) = first {
            item.conflict(format!("this probe has `{first}` and `{key}`"), ONE);
        }
        first = first.or(Some(key));
        let read = match key {
            "path" => item.string().map(|path| Check::Http(path.to_owned())),
            "exec" => Some(Check::Exec(item.strings().into_iter().map(|(_, text)| text.to_owned()).collect())),
            flag => match item.flag() {
                Some(true) => Some(if flag == "tcp" { Check::Tcp } else { Check::Grpc }),
                Some(false) => {
                    item.wrong(format!("`{flag} = false` is no check"), Some(ONE));
                    None
                }
                None => None,
            },
        };
        check = check.or(read);
    }
    if first.is_none() {
        if let Some(path) = health {
            check = Some(Check::Http(path.to_owned()));
        } else if is_given {
            probe.missing("path", &format!("`{name}` does not say what to check"), ONE);
        }
    }
    // Known even when there is nothing to check.
    for key in ["interval_secs", "timeout_secs", "failure_threshold", "success_threshold", "initial_delay_secs"] {
        if check.is_none() {
            probe.get(key);
        }
    }
    check
}

fn volumes(table: &mut Table<'_>) -> Vec<Volume> {
    table
        .tables("volume", |volume| {
            let name = volume.get("name");
            let host = volume.get("host");
            if let Some(size) = volume.get("size")
                && amount(&size).is_some()
            {
                size.unsupported("`size` of a volume", "leave it out: a volume may grow as large as its disk");
            }
            let source = match (&name, &host) {
                (Some(_), Some(host)) => {
                    host.conflict(
                        "a volume has `name` or `host`, not both",
                        "`host` mounts a path of the server itself",
                    );
                    None
                }
                (Some(name), None) => name.parse(Label::new, None).map(VolumeSource::Named),
                (None, Some(host)) => host.string().map(|path| VolumeSource::Host(path.to_owned())),
                (None, None) => {
                    volume.missing("name", "this volume has no `name`", "add `name = \"data\"`");
                    None
                }
            };
            let path = match volume.get("path") {
                Some(item) => item.string().map(|path| match path.strip_suffix('/') {
                    Some(without) if !without.is_empty() => without.to_owned(),
                    _ => path.to_owned(),
                }),
                None => {
                    volume.missing(
                        "path",
                        "this volume has no `path`",
                        "add `path = \"/data\"`: where the container sees it",
                    );
                    None
                }
            };
            let read_only = volume.flag("read_only").unwrap_or_default();
            Some(Volume { source: source?, path: path?, read_only })
        })
        .into_iter()
        .flatten()
        .collect()
}

/// Where a service's requests come from, with the line each route is due to, and when it runs by itself.
#[derive(Default)]
struct Requests {
    hosts: Vec<(Host, Place)>,
    claims: Vec<(Route, Place)>,
    schedules: Vec<Schedule>,
}

fn requests(table: &mut Table<'_>, is_module: bool) -> Requests {
    let domain = table.get("domain");
    let domains = table.get("domains");
    if let (Some(_), Some(domains)) = (&domain, &domains) {
        domains.conflict("a service has `domain` or `domains`, not both", "write all of them into `domains = [\"…\"]`");
    }
    let mut written: Vec<Item<'_>> = Vec::new();
    written.extend(domain);
    written.extend(domains.iter().flat_map(Item::items));
    let says_where = !written.is_empty();
    let mut hosts: Vec<(Host, Place)> = Vec::new();
    for item in written {
        let Some(host) = host(&item) else { continue };
        if hosts.len() == check::ROUTES_MAX {
            item.wrong(format!("a service has at most {} domains", check::ROUTES_MAX), None);
            break;
        }
        if hosts.iter().any(|(other, _)| *other == host) {
            item.wrong(format!("`{host}` is already given"), Some("leave it out here"));
        } else {
            hosts.push((host, item.place));
        }
    }

    let mut paths: Vec<(String, Place)> = Vec::new();
    let mut add_path = |item: Item<'_>, text: &str, hint: &str| match path_prefix(text) {
        Err(error) => item.wrong(error.to_string(), Some(hint)),
        Ok(_) if paths.len() == check::ROUTES_MAX => {
            item.wrong(format!("a service has at most {} paths", check::ROUTES_MAX), None);
        }
        Ok(path) if paths.iter().any(|(other, _)| *other == path) => {
            item.wrong(format!("`{path}` and what is below it is already given"), Some("leave it out here"));
        }
        Ok(path) => paths.push((path, item.place)),
    };
    let routes = table.get("routes");
    let triggers = table.get("triggers");
    let mut says_path = routes.is_some();
    for list in domains.iter().chain(&routes).chain(&triggers) {
        if list.value.as_array().is_some_and(|array| array.is_empty()) {
            list.wrong("the list is empty", Some("leave it out"));
        }
    }
    for (item, text) in routes.iter().flat_map(Item::strings) {
        add_path(item, text, "such as \"/*\" or \"/api/*\"");
    }
    let mut schedules = Vec::new();
    if let (Some(triggers), false) = (&triggers, is_module) {
        let hint = "requests reach a container by `domain` and `routes`";
        triggers.conflict("only a module has `triggers`", hint);
    }
    for (item, text) in triggers.iter().flat_map(Item::strings) {
        match text.split_once(':') {
            Some(("http", path)) => {
                says_path = true;
                add_path(item, path, "such as \"http:/api/*\"");
            }
            Some(("cron", cron)) => match check::cron(cron.trim()) {
                Ok(()) => schedules.push(Schedule { cron: cron.trim().to_owned() }),
                Err(error) => {
                    item.wrong(error, Some("such as \"cron:0 9 * * 1-5\": at 9:00 UTC from Monday to Friday"))
                }
            },
            Some((kind @ ("queue" | "event"), name)) if !name.is_empty() => {
                item.unsupported(&format!("a trigger `{kind}:`"), "use `http:` or `cron:`");
            }
            _ => item.wrong(format!("`{text}` is no trigger"), Some("such as \"http:/api/*\" or \"cron:0 9 * * *\"")),
        }
    }

    // A module that nothing else starts is there to be called.
    let is_called = says_where || says_path || (is_module && triggers.is_none());
    if !is_called {
        return Requests { schedules, ..Requests::default() };
    }
    if !says_where {
        hosts.push((Host::Any, table.place.clone()));
    }
    if !says_path {
        paths.push(("/".to_owned(), table.place.clone()));
    }
    let claims = hosts.iter().flat_map(|(host, host_place)| {
        paths.iter().map(move |(path, path_place)| {
            // A conflict is about what is written: the path if there is one, else the domain.
            let place = if says_path { path_place } else { host_place };
            (Route { host: host.clone(), path: path.clone() }, place.clone())
        })
    });
    // One more than there may be is enough to be refused, and what two lists multiply to is not bounded by the file.
    let claims = claims.take(check::ROUTES_MAX + 1).collect();
    Requests { hosts, claims, schedules }
}

fn host(item: &Item<'_>) -> Option<Host> {
    let text = item.string()?;
    let only_the_name = text.split_once("://").map_or(text, |(_, rest)| rest);
    let only_the_name = only_the_name.split(['/', ':']).next().unwrap_or_default().trim_end_matches('.');
    let hint = if text == "*" {
        Some("leave `domain` out to serve every host".to_owned())
    } else if !text.is_ascii() {
        Some("write it as it is in the DNS: \"xn--…\"".to_owned())
    } else if only_the_name != text && only_the_name.parse::<Host>().is_ok() {
        Some(format!("write \"{only_the_name}\"; a path goes into `routes`"))
    } else {
        Some("such as \"api.example.com\" or \"*.example.com\"".to_owned())
    };
    item.parse(str::parse, hint.as_deref())
}

fn port(table: &mut Table<'_>) -> Option<u16> {
    let item = table.get("port")?;
    let number = item.count()?;
    match u16::try_from(number) {
        Ok(number) => Some(number),
        Err(_) => {
            item.wrong("a port is a number from 1 to 65535", None);
            None
        }
    }
}

fn replicas(table: &mut Table<'_>) -> u32 {
    let count = table.get("replicas").and_then(|item| {
        if item.value.as_str() == Some("auto") {
            item.unsupported("replicas = \"auto\"", "write a number; `orca scale` changes it at any time");
            return None;
        }
        item.count()
    });
    count.unwrap_or(1)
}

fn depends_on(table: &mut Table<'_>) -> BTreeSet<Label> {
    let mut names = BTreeSet::new();
    for (item, text) in table.get("depends_on").iter().flat_map(Item::strings) {
        let Ok(name) = Label::new(text) else {
            item.wrong(format!("`{text}` is no name of a service"), None);
            continue;
        };
        if !names.insert(name) {
            item.wrong(format!("`{text}` is already given"), Some("leave it out here"));
        }
    }
    names
}

fn deploy(table: &mut Table<'_>, is_exclusive: bool) -> Deploy {
    table.table("deploy", |deploy| {
        let strategy = deploy.get("strategy");
        let word = strategy.as_ref().and_then(|item| item.word(&["rolling", "canary", "blue-green", "recreate"]));
        let weight = deploy.get("canary_weight");
        let canary = weight.as_ref().map(Item::count);
        let strategy = match word {
            Some("canary") => Strategy::Canary {
                weight: canary
                    .flatten()
                    .map_or(Deploy::CANARY_WEIGHT, |weight| u8::try_from(weight).unwrap_or(u8::MAX)),
            },
            Some("blue-green") => Strategy::BlueGreen,
            Some("recreate") => Strategy::Recreate,
            None if strategy.is_none() && is_exclusive => Strategy::Recreate,
            Some(_) | None => Strategy::Rolling,
        };
        if let (Some(weight), false) = (&weight, matches!(word, Some("canary"))) {
            weight
                .conflict("`canary_weight` needs strategy \"canary\"", "add `strategy = \"canary\"`, or leave it out");
        }
        let promote = deploy.get("auto_promote");
        let auto_promote = promote.as_ref().filter(|item| item.table().is_some()).map(|_| {
            let AutoPromote { after, success_per_10_000 } = Deploy::AUTO_PROMOTE;
            deploy.table("auto_promote", |promote| {
                let rate = promote.get("success_rate").and_then(|item| item.number());
                AutoPromote {
                    after: promote.seconds("after_secs").unwrap_or(after),
                    // Out of range if it is: that is found where ranges are checked.
                    success_per_10_000: rate.map_or(success_per_10_000, |rate| (rate * 100.0).round() as u32),
                }
            })
        });
        Deploy {
            strategy,
            max_unavailable: deploy.count("max_unavailable").unwrap_or(0),
            max_surge: deploy.count("max_surge").unwrap_or(1),
            ready_timeout: deploy.seconds("ready_timeout_secs").unwrap_or(Deploy::READY_TIMEOUT),
            drain_timeout: deploy.seconds("drain_timeout_secs").unwrap_or(Deploy::DRAIN_TIMEOUT),
            stop_grace: deploy.seconds("stop_grace_secs").unwrap_or(Deploy::STOP_GRACE),
            auto_promote,
        }
    })
}

fn placement(table: &mut Table<'_>) -> Placement {
    table.table("placement", |placement| {
        if let Some(spread) = placement.get("spread")
            && spread.string().is_some()
        {
            spread.unsupported("`spread`", "use `labels` or `node` to say where replicas go");
        }
        Placement {
            node: placement.string("node").map(str::to_owned),
            labels: placement.table("labels", |labels| {
                let texts = labels.entries().into_iter();
                texts.filter_map(|(key, item)| Some((key.to_owned(), item.string()?.to_owned()))).collect()
            }),
            spread: None,
        }
    })
}

fn registry(table: &mut Table<'_>) -> Option<Registry> {
    table.table("registry", |registry| {
        if !registry.is_present() {
            return None;
        }
        let mut template = |key: &'static str, hint: &str| match registry.get(key) {
            Some(item) => item.parse(str::parse::<Template>, None),
            None => {
                registry.missing(key, &format!("the registry's `{key}` is missing"), hint);
                None
            }
        };
        let username = template("username", "add `username = \"…\"`");
        let password = template("password", "add `password = \"${secrets.REGISTRY_PASSWORD}\"`");
        Some(Registry { username: username?, password: password? })
    })
}

fn host_access(table: &mut Table<'_>) -> HostAccess {
    HostAccess {
        privileged: table.flag("privileged").unwrap_or_default(),
        network: table.get("network").is_some_and(|item| item.word(&["host"]).is_some()),
    }
}

/// Keys whose effect comes with a later version: their form is checked, so that what is refused today is what will
/// work then.
fn later(table: &mut Table<'_>) {
    if let Some(item) = table.get("internal")
        && item.flag() == Some(true)
    {
        item.unsupported("`internal = true`", "services reach each other within a project: put both into one");
    }
    if let Some(item) = table.get("sticky")
        && item.word(&["off", "cookie", "source-ip"]).is_some_and(|word| word != "off")
    {
        item.unsupported("sticky sessions", "leave it out, and keep sessions in a database that all replicas share");
    }
    if let Some(item) = table.get("expose") {
        let mut all_right = item.value.is_array();
        for (item, text) in item.strings() {
            let (port, protocol) = text.split_once('/').unwrap_or((text, ""));
            if !port.parse::<u16>().is_ok_and(|port| port != 0) || !matches!(protocol, "tcp" | "udp") {
                item.wrong(format!("`{text}` is no port to expose"), Some("such as \"5432/tcp\" or \"53/udp\""));
                all_right = false;
            }
        }
        if all_right {
            item.unsupported_key("`expose`", "HTTP is served by `domain` and `routes`; leave it out for anything else");
        }
    }
    if let Some(item) = table.get("rate_limit")
        && item.table().is_some()
    {
        table.table("rate_limit", |limit| {
            for key in ["requests_per_second", "burst", "packets_per_second", "connections_per_second"] {
                limit.count(key);
            }
        });
        item.unsupported_key("`rate_limit`", "leave it out, and limit requests in the service itself");
    }
    if let Some(item) = table.get("autoscale")
        && item.table().is_some()
    {
        table.table("autoscale", |scale| {
            for key in ["min", "max", "cpu", "requests_per_second"] {
                scale.count(key);
            }
        });
        item.unsupported_key(
            "`autoscale`",
            "leave it out and write `replicas = 3`; `orca scale` changes it at any time",
        );
    }
}

fn strings(table: &mut Table<'_>, key: &'static str) -> Vec<String> {
    table.get(key).iter().flat_map(Item::strings).map(|(_, text)| text.to_owned()).collect()
}
