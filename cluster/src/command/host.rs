//! Whose a host is. Routes alone do not say it: the proxy takes a request to the most particular host that names it,
//! and to no other, so a name below somebody's wildcard, or a longer path of somebody's host, takes requests away.

use super::Refusal;
use crate::id::ServiceName;
use crate::spec::{Host, Service};
use crate::state::{Deployed, State};

/// Whether a service may have its hosts, as one that only its project is answerable for: none that belongs to a service
/// of another project. Routes that the project has already stay as they are.
pub fn check(state: &State, service: &ServiceName, spec: &Service) -> Result<(), Refusal> {
    let ours = |name: &ServiceName| name.project == service.project;
    let there = || state.services.iter().filter(|(_, deployed)| deployed.removal.is_none());
    for route in &spec.routes {
        if there().any(|(name, deployed)| ours(name) && deployed.spec().routes.contains(route)) {
            continue;
        }
        for held in covering(&route.host) {
            let mut holders = there().filter(|(_, deployed)| has(deployed, &held)).map(|(name, _)| name).peekable();
            if holders.peek().is_none() {
                continue;
            }
            if let Some(owner) = holders.find(|name| !ours(name)) {
                let (host, held) = (Box::new(route.host.clone()), Box::new(held));
                let (service, owner) = (service.clone(), owner.clone());
                return Err(Refusal::HostTaken { service, host, owner, held });
            }
            // Its requests are the project's own now, whoever has a wildcard above.
            break;
        }
    }
    Ok(())
}

/// Why `service` may not have `host`, for its refusal.
pub(super) fn taken(service: &ServiceName, host: &Host, owner: &ServiceName, held: &Host) -> String {
    let limited = format!("a token limited to {} cannot take", service.project);
    match host {
        Host::Any => format!(
            "{service} has no domain, and requests to any host are those of {owner}; {limited} them: give {service} a domain"
        ),
        Host::Exact(_) | Host::Wildcard(_) => {
            format!("{host} is a host of {owner}, which has {held}; {limited} it: give {service} another domain")
        }
    }
}

/// The hosts that requests to this one go to, the one the proxy prefers first. What has no name is nobody's but whose
/// has no name either.
fn covering(host: &Host) -> Vec<Host> {
    let (mut hosts, mut rest) = match host {
        Host::Exact(name) | Host::Wildcard(name) => (vec![host.clone()], name.as_str()),
        Host::Any => return vec![Host::Any],
    };
    while let Some((_, parent)) = rest.split_once('.') {
        hosts.push(Host::Wildcard(parent.to_owned()));
        rest = parent;
    }
    hosts
}

/// Whether requests to this host are the service's: now, or again if its rollout fails.
fn has(deployed: &Deployed, host: &Host) -> bool {
    deployed.records_at_stake().any(|record| record.spec.routes.iter().any(|route| route.host == *host))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::put::tests::put;
    use crate::command::put::{Reach, preview};
    use crate::command::service::tests::{deploy, web};

    #[test]
    fn whoever_is_limited_to_a_project_takes_no_host_of_another() {
        let text = |domain: &str, route: &str| {
            format!(
                "[[service]]\nname = \"web\"\nimage = \"web:1\"\nport = 80\ndomain = \"{domain}\"\n\
                 routes = [\"{route}\"]\n"
            )
        };
        let mut state = State::default();
        deploy(&mut state, "shop", &text("*.a.test", "/*"));
        deploy(&mut state, "blog", &text("blog.test", "/*"));
        let asked = |project: &str, domain: &str, route: &str| put(project, &text(domain, route));
        for (domain, route, taken) in [
            ("www.a.test", "/x", true),
            ("*.a.test", "/x", true),
            ("*.b.a.test", "/*", true),
            ("a.test", "/*", false),
            ("blog.test", "/x", false),
            ("www.blog.test", "/*", false),
        ] {
            let put = asked("blog", domain, route);
            let refused = matches!(
                preview(&state, &put, Reach::Project),
                Err(Refusal::HostTaken { owner, .. }) if owner == web()
            );
            assert_eq!(refused, taken, "{domain}{route}");
            assert!(preview(&state, &put, Reach::Cluster).is_ok(), "{domain}{route}");
        }
        assert!(preview(&state, &asked("shop", "www.a.test", "/*"), Reach::Project).is_ok(), "its own");
        // A longer path of what has no name takes requests from it just so; a name of one's own does not.
        let nameless = |route: &str| {
            format!("[[service]]\nname = \"web\"\nimage = \"web:1\"\nport = 80\nroutes = [\"{route}\"]\n")
        };
        deploy(&mut state, "hello", &nameless("/*"));
        let refused = preview(&state, &put("blog", &nameless("/login/*")), Reach::Project).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "blog/web has no domain, and requests to any host are those of hello/web; a token limited to blog cannot take \
             them: give blog/web a domain"
        );
        assert!(preview(&state, &asked("blog", "login.test", "/*"), Reach::Project).is_ok());
        // What somebody who may has given the project stays its own, and no more than that.
        deploy(&mut state, "blog", &text("www.a.test", "/blog"));
        assert!(preview(&state, &asked("blog", "www.a.test", "/blog"), Reach::Project).is_ok());
    }
}
