//! Which service a request belongs to. First the host: an exact name beats a wildcard, a longer wildcard beats a
//! shorter one, and a route without a domain takes the hosts that nothing else claims. Then, among the routes of
//! that one host, the longest path prefix on whole segments. A claimed host whose paths do not match is a 404:
//! it never falls through to a stranger's catch-all.

use std::borrow::Cow;
use std::collections::HashMap;

use orca_cluster::route::RouteKey;
use orca_cluster::spec::Host;

/// Routes of one set of tables, arranged for looking up. `T` is what a route leads to.
#[derive(Debug)]
pub struct Routes<T> {
    exact: HashMap<Box<str>, Paths<T>>,
    /// By the name behind `*.`.
    wildcard: HashMap<Box<str>, Paths<T>>,
    any: Paths<T>,
}

/// Prefixes of one host, the longest first.
#[derive(Debug)]
struct Paths<T>(Vec<(Box<str>, T)>);

impl<T> Default for Paths<T> {
    fn default() -> Paths<T> {
        Paths(Vec::new())
    }
}

impl<T> Routes<T> {
    pub fn new<'a>(routes: impl IntoIterator<Item = (&'a RouteKey, T)>) -> Routes<T> {
        let mut all = Routes { exact: HashMap::new(), wildcard: HashMap::new(), any: Paths::default() };
        for (RouteKey(route), target) in routes {
            let paths = match &route.host {
                Host::Exact(name) => all.exact.entry(name.as_str().into()).or_default(),
                Host::Wildcard(name) => all.wildcard.entry(name.as_str().into()).or_default(),
                Host::Any => &mut all.any,
            };
            paths.0.push((route.path.as_str().into(), target));
        }
        let hosts = all.exact.values_mut().chain(all.wildcard.values_mut());
        for paths in hosts.chain(std::iter::once(&mut all.any)) {
            paths.0.sort_by_key(|(prefix, _)| std::cmp::Reverse(prefix.len()));
        }
        all
    }

    /// `host` as [`host_name`] gives it; without one only routes for any host match.
    pub fn find(&self, host: Option<&str>, path: &str) -> Option<&T> {
        self.paths(host).find(path)
    }

    fn paths(&self, host: Option<&str>) -> &Paths<T> {
        let Some(host) = host else { return &self.any };
        if let Some(paths) = self.exact.get(host) {
            return paths;
        }
        if !self.wildcard.is_empty() {
            let mut rest = host;
            while let Some((_, parent)) = rest.split_once('.') {
                if let Some(paths) = self.wildcard.get(parent) {
                    return paths;
                }
                rest = parent;
            }
        }
        &self.any
    }
}

impl<T> Paths<T> {
    fn find(&self, path: &str) -> Option<&T> {
        self.0.iter().find(|(prefix, _)| covers(prefix, path)).map(|(_, target)| target)
    }
}

/// Whether a prefix matches whole segments of a path: `/api` covers `/api` and `/api/x`, not `/apix`.
fn covers(prefix: &str, path: &str) -> bool {
    let prefix = prefix.strip_suffix('/').unwrap_or(prefix);
    path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// The name in a `Host` header or an authority: without port and trailing dot, lower case. Nothing for what can be
/// no host name; an IPv6 address keeps its brackets.
pub fn host_name(authority: &str) -> Option<Cow<'_, str>> {
    let name = if authority.starts_with('[') {
        let end = authority.find(']')?;
        let (address, port) = authority.split_at(end + 1);
        if !is_port(port) {
            return None;
        }
        address
    } else {
        match authority.split_once(':') {
            Some((name, port)) if is_digits(port) => name,
            Some(_) => return None,
            None => authority,
        }
    };
    let name = name.strip_suffix('.').unwrap_or(name);
    let mut upper = false;
    for byte in name.bytes() {
        match byte {
            b'A'..=b'Z' => upper = true,
            b'a'..=b'z' | b'0'..=b'9' | b'-' | b'.' | b'_' | b'[' | b']' | b':' => {}
            _ => return None,
        }
    }
    match name {
        "" => None,
        _ if upper => Some(Cow::Owned(name.to_ascii_lowercase())),
        _ => Some(Cow::Borrowed(name)),
    }
}

fn is_port(text: &str) -> bool {
    text.is_empty() || text.strip_prefix(':').is_some_and(is_digits)
}

fn is_digits(text: &str) -> bool {
    text.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;
    use orca_cluster::spec::Route;
    use proptest::prelude::*;

    fn routes(keys: &[&str]) -> Vec<RouteKey> {
        keys.iter().map(|key| RouteKey::try_from((*key).to_owned()).expect("a route")).collect()
    }

    fn find<'a>(keys: &'a [RouteKey], host: &str, path: &str) -> Option<String> {
        let routes = Routes::new(keys.iter().map(|key| (key, key)));
        routes.find(host_name(host).as_deref(), path).map(|key: &&'a RouteKey| String::from((*key).clone()))
    }

    #[test]
    fn the_most_particular_host_then_the_longest_path_wins() {
        let keys = routes(&["a.example.com/", "a.example.com/api", "*.example.com/", "*.eu.example.com/", "*/", "*/x"]);
        let check = |host, path, expected: &str| assert_eq!(find(&keys, host, path).as_deref(), Some(expected));
        check("a.example.com", "/", "a.example.com/");
        check("A.Example.COM.:8080", "/api/v1", "a.example.com/api");
        check("a.example.com", "/apix", "a.example.com/");
        check("b.example.com", "/api", "*.example.com/");
        check("b.c.example.com", "/api", "*.example.com/");
        check("b.eu.example.com", "/api", "*.eu.example.com/");
        check("example.com", "/", "*/");
        check("[::1]:80", "/x/y", "*/x");
    }

    #[test]
    fn a_claimed_host_never_falls_through_to_the_catch_all() {
        let keys = routes(&["a.example.com/api", "*/"]);
        assert_eq!(find(&keys, "a.example.com", "/other"), None);
    }

    #[test]
    fn what_is_no_host_name_is_none() {
        for bad in ["", ".", "a b", "a/b", "a:b", "[::1", "[::1]x", "a@b", "a\0b", "ä"] {
            assert_eq!(host_name(bad), None, "{bad}");
        }
    }

    fn segments() -> impl Strategy<Value = String> {
        proptest::collection::vec("[ab]{1,2}", 0..4).prop_map(|parts| format!("/{}", parts.join("/")))
    }

    fn hosts() -> impl Strategy<Value = Host> {
        let name = || "[ab](\\.[ab]){0,2}";
        prop_oneof![name().prop_map(Host::Exact), name().prop_map(Host::Wildcard), Just(Host::Any)]
    }

    /// The rule said without an index: compare every route that matches.
    fn by_the_rule<'a>(keys: &'a [RouteKey], host: &str, path: &str) -> Option<&'a RouteKey> {
        let rank = |key: &RouteKey| match &key.0.host {
            Host::Exact(name) if name == host => Some((2, 0)),
            Host::Wildcard(name) if host.ends_with(&format!(".{name}")) => Some((1, name.len())),
            Host::Any => Some((0, 0)),
            Host::Exact(_) | Host::Wildcard(_) => None,
        };
        let claimed = keys.iter().filter_map(rank).max()?;
        let of_host = keys.iter().filter(|key| rank(key) == Some(claimed));
        let is_prefix = |key: &&RouteKey| {
            let wanted: Vec<&str> = key.0.path.split('/').filter(|part| !part.is_empty()).collect();
            let given: Vec<&str> = path.split('/').skip(1).collect();
            given.starts_with(&wanted)
        };
        of_host.filter(is_prefix).max_by_key(|key| key.0.path.len())
    }

    proptest! {
        #[test]
        fn looking_up_agrees_with_comparing_all(
            keys in proptest::collection::btree_set((hosts(), segments()), 0..12),
            host in "[ab](\\.[ab]){0,3}",
            path in segments(),
        ) {
            let keys: Vec<RouteKey> =
                keys.into_iter().map(|(host, path)| RouteKey(Route { host, path })).collect();
            let routes = Routes::new(keys.iter().map(|key| (key, key)));
            prop_assert_eq!(routes.find(Some(&host), &path).copied(), by_the_rule(&keys, &host, &path));
        }

        #[test]
        fn no_host_header_panics(text in "\\PC*") {
            let _ = host_name(&text);
        }
    }
}
