//! `cluster.toml`: what holds for the whole cluster.

use super::table::{Item, Table};
use crate::id::Label;
use crate::spec::template::Template;
use crate::spec::{Host, Settings, check};

pub(super) fn read(root: &mut Table<'_>) -> Settings {
    let mut settings = root.table("cluster", |cluster| {
        for key in ["acme_email", "acme_directory"] {
            if let Some(item) = cluster.get(key)
                && item.string().is_some()
            {
                item.unsupported_key("certificates by ACME", "leave it out; for now put a proxy with TLS in front, and name it with `orca server --trusted-proxy`");
            }
        }
        // That none of them has an effect yet is for `check` to say.
        let log_level = cluster.get("log_level").and_then(|item| item.word(&check::LOG_LEVELS));
        Settings {
            name: cluster.get("name").and_then(|item| item.parse(Label::new, Some("such as \"prod\""))),
            domain: cluster.get("domain").and_then(|item| domain(&item)),
            log_level: log_level.map(|level| level.to_owned()),
            allow_host: Default::default(),
        }
    });
    settings.allow_host = root.table("policy", |policy| {
        let entries = policy.get("allow_host");
        entries.iter().flat_map(Item::strings).map(|(_, text)| text.to_owned().into()).collect()
    });
    later(root);
    settings
}

fn domain(item: &Item<'_>) -> Option<String> {
    let hint = Some("such as \"example.com\"");
    match item.parse(str::parse::<Host>, hint)? {
        Host::Exact(name) => Some(name),
        Host::Wildcard(_) | Host::Any => {
            item.wrong("the cluster's domain is a plain one: every service gets a name below it", hint);
            None
        }
    }
}

/// Sections whose effect comes with a later version: their form is checked, so that what is refused today is what will
/// work then.
fn later(root: &mut Table<'_>) {
    section(root, "network", "leave it out: addresses are chosen by Docker", |network| {
        network.get("service_cidr").map(|item| item.parse(cidr, Some("such as \"10.90.0.0/16\"")));
        network.string("node_interface");
    });
    section(root, "observability", "leave it out; metrics are at `/metrics` of the API", |observability| {
        for key in ["otlp_endpoint", "loki_endpoint"] {
            observability.get(key).map(|item| item.parse(address, Some("such as \"http://10.0.0.5:4318\"")));
        }
    });
    if let Some(item) = root.get("notify") {
        root.tables("notify", |notify| {
            for key in ["webhook", "slack"] {
                notify.get(key).map(|item| item.parse(str::parse::<Template>, None));
            }
            notify.string("email");
            notify.get("events").map(|item| item.strings());
        });
        item.unsupported_key("`notify`", "leave it out, and follow `orca events -f`");
    }
    section(root, "backup", "leave it out, and back up volumes with tools of your own", |backup| {
        backup.get("schedule").map(|item| item.parse(check::cron, Some("such as \"0 3 * * *\"")));
        backup.get("target").map(|item| item.parse(str::parse::<Template>, None));
        backup.get("retention").map(|item| item.count());
        backup.get("exclude").map(|item| item.strings());
    });
    section(root, "ai", "leave it out: `orca why` needs no model", |ai| {
        ai.get("endpoint").map(|item| item.parse(address, Some("such as \"https://models.example.com/v1\"")));
        ai.string("model");
        if let Some(item) = ai.get("key")
            && let Some(key) = item.parse(str::parse::<Template>, None)
            && key.secrets().next().is_none()
        {
            item.wrong("a key is a reference to a secret, never the key itself", Some("write \"${secrets.AI_KEY}\""));
        }
        ai.table("auto_remediate", |remediate| {
            remediate.flag("enabled");
        });
    });
    section(root, "gitops", "leave it out, and run `orca deploy --prune`", |gitops| {
        gitops.flag("prune");
    });
}

fn section(root: &mut Table<'_>, key: &'static str, meanwhile: &str, read: impl FnOnce(&mut Table<'_>)) {
    if let Some(item) = root.get(key)
        && item.table().is_some()
    {
        root.table(key, read);
        item.unsupported_key(&format!("`{key}`"), meanwhile);
    }
}

fn cidr(text: &str) -> Result<(), &'static str> {
    let parsed = text.split_once('/').and_then(|(address, bits)| {
        let address: std::net::Ipv4Addr = address.parse().ok()?;
        let bits: u32 = bits.parse().ok().filter(|bits| (8..=30).contains(bits))?;
        Some(address.to_bits() & (u32::MAX >> bits) == 0)
    });
    match parsed {
        Some(true) => Ok(()),
        Some(false) => Err("the address has bits below the prefix"),
        None => Err("this is no range of IPv4 addresses with a prefix of 8 to 30 bits"),
    }
}

/// Whether this is an address of an HTTP server.
fn address(text: &str) -> Result<(), &'static str> {
    let rest = text.strip_prefix("https://").or_else(|| text.strip_prefix("http://"));
    let host = rest.map(|rest| rest.split(['/', ':']).next().unwrap_or_default());
    match host.map(str::parse::<Host>) {
        Some(Ok(Host::Exact(_))) if !text.contains(char::is_whitespace) => Ok(()),
        _ => Err("this is no http:// or https:// address"),
    }
}
