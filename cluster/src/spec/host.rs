//! What of a service reaches into the machine it runs on, and how much of that a cluster allows.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::check::{file_path, is_within};
use super::{Service, Settings, VolumeSource};

/// What reaches out of the container into the host. Anything but the default needs `admin` and `[policy] allow_host`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct HostAccess {
    pub privileged: bool,
    pub network: bool,
}

/// One thing that a service wants of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HostDemand<'a> {
    Privileged,
    Network,
    Path(&'a str),
}

/// What an `admin` may let a service have of the host: one entry of `[policy] allow_host`. Whether somebody can mean it
/// is for [`check::settings`](super::check::settings) to say, so that whatever was stored can be read.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(from = "String", into = "String")]
pub enum Allowance {
    // In the order of their texts, which is the one they have always been stored in.
    /// This path of the host and all below it.
    Below(String),
    Network,
    Privileged,
}

impl Service {
    /// What of this service reaches into the host, as an operator would say it; empty for nearly all.
    pub fn host_demands(&self) -> Vec<HostDemand<'_>> {
        let mut demands = Vec::new();
        if self.host.privileged {
            demands.push(HostDemand::Privileged);
        }
        if self.host.network {
            demands.push(HostDemand::Network);
        }
        for volume in &self.volumes {
            if let VolumeSource::Host(path) = &volume.source {
                demands.push(HostDemand::Path(path));
            }
        }
        demands
    }
}

impl Settings {
    /// The first thing that a service wants of the host and may not have.
    pub fn forbids<'a>(&self, service: &'a Service) -> Option<HostDemand<'a>> {
        let is_allowed = |demand| self.allow_host.iter().any(|allowance| allowance.allows(demand));
        service.host_demands().into_iter().find(|demand| !is_allowed(*demand))
    }
}

impl Allowance {
    fn allows(&self, demand: HostDemand<'_>) -> bool {
        match (self, demand) {
            // By whole parts, so that `/data` does not allow `/database`, and of paths that have no second spelling, so
            // that it does not allow `/data/../etc` either.
            (Allowance::Below(directory), HostDemand::Path(path)) => {
                file_path(directory).is_ok() && file_path(path).is_ok() && is_within(path, directory)
            }
            (Allowance::Network, HostDemand::Network) | (Allowance::Privileged, HostDemand::Privileged) => true,
            (Allowance::Below(_), HostDemand::Network | HostDemand::Privileged)
            | (Allowance::Network, HostDemand::Path(_) | HostDemand::Privileged)
            | (Allowance::Privileged, HostDemand::Path(_) | HostDemand::Network) => false,
        }
    }

    pub fn as_str(&self) -> &str {
        match self {
            Allowance::Below(path) => path,
            Allowance::Network => "network",
            Allowance::Privileged => "privileged",
        }
    }
}

/// The least that allows it.
impl From<HostDemand<'_>> for Allowance {
    fn from(demand: HostDemand<'_>) -> Allowance {
        match demand {
            HostDemand::Privileged => Allowance::Privileged,
            HostDemand::Network => Allowance::Network,
            HostDemand::Path(path) => Allowance::Below(path.to_owned()),
        }
    }
}

impl From<String> for Allowance {
    fn from(text: String) -> Allowance {
        match text.as_str() {
            "network" => Allowance::Network,
            "privileged" => Allowance::Privileged,
            _ => Allowance::Below(text),
        }
    }
}

impl From<Allowance> for String {
    fn from(allowance: Allowance) -> String {
        allowance.as_str().to_owned()
    }
}

impl fmt::Display for Allowance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl fmt::Debug for Allowance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Volume, toml};

    fn service(change: impl FnOnce(&mut Service)) -> Service {
        let text = "[[service]]\nname = \"web\"\nimage = \"a\"\n".to_owned();
        let file = toml::SourceFile { name: "service.toml".to_owned(), text };
        let project = toml::project(&file, &"shop".parse().unwrap()).unwrap();
        let mut service = project.services.into_values().next().unwrap();
        change(&mut service);
        service
    }

    fn mounts(path: &str) -> Service {
        let source = VolumeSource::Host(path.to_owned());
        service(|service| service.volumes.push(Volume { source, path: "/data".to_owned(), read_only: true }))
    }

    fn settings(allowed: &[&str]) -> Settings {
        let allow_host = allowed.iter().map(|text| Allowance::from((*text).to_owned())).collect();
        Settings { allow_host, ..Settings::default() }
    }

    #[test]
    fn a_service_may_have_of_the_host_what_is_allowed_and_what_is_below_it() {
        for (allowed, path, may) in [
            ("/srv", "/srv", true),
            ("/srv", "/srv/data", true),
            ("/srv/data", "/srv", false),
            ("/srv/dat", "/srv/data", false),
            ("/srv", "/srv/../etc", false),
            ("/srv/..", "/srv/../etc", false),
            ("", "/srv", false),
            ("srv", "/srv", false),
            ("network", "/network", false),
        ] {
            let service = mounts(path);
            let forbidden = settings(&[allowed]).forbids(&service);
            assert_eq!(forbidden, (!may).then_some(HostDemand::Path(path)), "{allowed} {path}");
        }
        let privileged = service(|service| service.host.privileged = true);
        let both = service(|service| service.host = HostAccess { privileged: true, network: true });
        assert_eq!(settings(&["/", "network"]).forbids(&privileged), Some(HostDemand::Privileged));
        assert_eq!(settings(&["privileged"]).forbids(&privileged), None);
        assert_eq!(settings(&["privileged"]).forbids(&both), Some(HostDemand::Network));
        assert_eq!(settings(&["privileged", "network"]).forbids(&both), None);
        assert_eq!(settings(&[]).forbids(&service(|_| {})), None);
    }

    #[test]
    fn what_is_allowed_is_stored_as_the_texts_people_write_in_the_order_of_texts() {
        let text = r#"["","/","/srv","network","privileged"]"#;
        let allowed: std::collections::BTreeSet<Allowance> = serde_json::from_str(text).unwrap();
        assert_eq!(serde_json::to_string(&allowed).unwrap(), text);
        assert_eq!(allowed.iter().nth(2), Some(&Allowance::from(HostDemand::Path("/srv"))));
    }
}
