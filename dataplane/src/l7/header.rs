//! What of a message's header is for the next hop, and what we add. Fields that concern one connection end with
//! it; what a client claims about where it comes from is replaced by what we saw.

use http::HeaderMap;
use http::header::{self, HeaderName, HeaderValue};

pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");

/// Fields that are not for the next hop, as bits. Most messages have few of them or none, and looking at each name
/// once is cheaper than asking for every field by its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Found(u16);

/// Fields that never pass, whoever sent them, then those that only a proxy that is trusted may say about a client.
static NOT_PASSED: [HeaderName; 10] = [
    header::CONNECTION,
    header::TE,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    header::TRANSFER_ENCODING,
    header::PROXY_AUTHORIZATION,
    HeaderName::from_static("http2-settings"),
    header::FORWARDED,
    HeaderName::from_static("x-real-ip"),
];

impl Found {
    const CONNECTION: Found = Found(1);
    const TE: Found = Found(1 << 1);
    const UPGRADE: Found = Found(1 << 2);
    const OF_ONE_HOP: Found = Found((1 << 8) - 1);
    const ANY: Found = Found((1 << 10) - 1);

    /// In the order of [`NOT_PASSED`].
    fn of(headers: &HeaderMap) -> Found {
        Found(headers.keys().fold(0, |found, name| {
            found
                | match name.as_str() {
                    "connection" => 1,
                    "te" => 1 << 1,
                    "upgrade" => 1 << 2,
                    "keep-alive" => 1 << 3,
                    "proxy-connection" => 1 << 4,
                    "transfer-encoding" => 1 << 5,
                    "proxy-authorization" => 1 << 6,
                    "http2-settings" => 1 << 7,
                    "forwarded" => 1 << 8,
                    "x-real-ip" => 1 << 9,
                    _ => 0,
                }
        }))
    }

    fn has(self, other: Found) -> bool {
        self.0 & other.0 != 0
    }

    /// Takes out those that are among `which`.
    fn remove(self, which: Found, headers: &mut HeaderMap) {
        let mut left = self.0 & which.0;
        while left != 0 {
            headers.remove(&NOT_PASSED[left.trailing_zeros() as usize]);
            left &= left - 1;
        }
    }
}

/// What a request's header says about its connection and not about its message.
#[derive(Debug, Default)]
pub struct Hop {
    /// The protocol the client asks to change to.
    pub upgrade: Option<HeaderValue>,
    /// The client can take trailers.
    pub trailers: bool,
}

/// Takes out of a request what is not for the next hop.
pub fn strip_request(headers: &mut HeaderMap) -> Hop {
    let found = Found::of(headers);
    let mut hop = Hop::default();
    if found.has(Found::TE)
        && let Some(te) = headers.get(header::TE)
    {
        hop.trailers = has_token(te, "trailers");
    }
    if found.has(Found::UPGRADE) && headers.get_all(header::CONNECTION).iter().any(|v| has_token(v, "upgrade")) {
        // HTTP/2 without TLS would carry requests past our eyes on a connection we take for one request.
        let mut protocols = headers.get_all(header::UPGRADE).iter();
        hop.upgrade = match (protocols.next(), protocols.next()) {
            (Some(protocol), None) if !has_token(protocol, "h2c") => Some(protocol.clone()),
            _ => None,
        };
    }
    take_out(headers, found, Found::ANY);
    hop
}

/// Takes out of any message the fields of one hop and those that its `Connection` lists.
pub fn strip(headers: &mut HeaderMap) {
    let found = Found::of(headers);
    take_out(headers, found, Found::OF_ONE_HOP);
}

fn take_out(headers: &mut HeaderMap, found: Found, which: Found) {
    if found.has(Found::CONNECTION) {
        let listed: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .map(str::trim)
            // What it mostly says; neither is a field that would be passed.
            .filter(|token| !token.eq_ignore_ascii_case("keep-alive") && !token.eq_ignore_ascii_case("close"))
            .filter_map(|token| token.parse().ok())
            // Without these two the message would mean something else.
            .filter(|name| *name != header::HOST && *name != header::CONTENT_LENGTH)
            .collect();
        for name in listed {
            headers.remove(name);
        }
    }
    found.remove(which, headers);
}

/// Whether a field may come behind a body (RFC 9110, section 6.5.1): not one that is needed before.
pub fn may_be_trailer(name: &HeaderName) -> bool {
    let is_needed_before = [header::HOST, header::CONTENT_LENGTH, header::TRAILER].contains(name);
    !is_needed_before && !NOT_PASSED.contains(name)
}

fn has_token(value: &HeaderValue, token: &str) -> bool {
    value.to_str().is_ok_and(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn headers(fields: &[(&str, &str)]) -> HeaderMap {
        let parse = |&(name, value): &(&str, &str)| {
            (name.parse::<HeaderName>().expect("a name"), value.parse::<HeaderValue>().expect("a value"))
        };
        fields.iter().map(parse).collect()
    }

    fn names(headers: &HeaderMap) -> BTreeSet<&str> {
        headers.keys().map(HeaderName::as_str).collect()
    }

    #[test]
    fn fields_of_one_hop_and_listed_ones_end_here() {
        let mut all = headers(&[
            ("connection", "close, X-Private ,content-length, host"),
            ("x-private", "1"),
            ("keep-alive", "timeout=5"),
            ("te", "trailers"),
            ("transfer-encoding", "chunked"),
            ("proxy-connection", "close"),
            ("upgrade", "websocket"),
            ("host", "a"),
            ("content-length", "3"),
            ("x-real-ip", "1.2.3.4"),
            ("forwarded", "for=1.2.3.4"),
        ]);
        let hop = strip_request(&mut all);
        assert!(hop.trailers && hop.upgrade.is_none(), "not asked to upgrade by `Connection`");
        assert_eq!(names(&all), BTreeSet::from(["content-length", "host"]));
    }

    #[test]
    fn each_field_that_is_not_passed_is_found_at_its_place() {
        for (index, name) in NOT_PASSED.iter().enumerate() {
            assert_eq!(Found::of(&headers(&[(name.as_str(), "x")])), Found(1 << index), "{name}");
        }
        assert_eq!(Found::of(&headers(&[("accept", "x"), ("connectiom", "x")])), Found(0));
    }

    #[test]
    fn an_upgrade_to_http2_is_not_passed_on() {
        let mut websocket = headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert!(strip_request(&mut websocket).upgrade.is_some());
        let mut h2c =
            headers(&[("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "x")]);
        assert!(strip_request(&mut h2c).upgrade.is_none());
        assert!(h2c.is_empty());
    }

    /// Names of fields, and what is none.
    fn token() -> impl Strategy<Value = String> {
        let names = ["host", "content-length", "x-a", "X-B", "close", "keep-alive", "upgrade", "te", "x-real-ip"];
        prop_oneof![proptest::sample::select(names.to_vec()).prop_map(str::to_owned), "[ -~\t]{0,6}"]
    }

    proptest! {
        #[test]
        fn what_connection_lists_ends_here_however_it_is_written(
            fields in proptest::collection::vec(token(), 0..8),
            lists in proptest::collection::vec(proptest::collection::vec((token(), "[ \t]{0,2}"), 0..5), 0..3),
        ) {
            let mut all = HeaderMap::new();
            // `close` is an option of `Connection` and names no field.
            for name in fields.iter().filter(|field| *field != "close").filter_map(|field| field.parse::<HeaderName>().ok()) {
                all.append(name, HeaderValue::from_static("trailers, websocket"));
            }
            for list in &lists {
                let list: Vec<String> = list.iter().map(|(token, space)| format!("{space}{token}{space}")).collect();
                all.append(header::CONNECTION, list.join(",").parse().expect("visible ASCII, spaces and tabs"));
            }
            let before = all.clone();
            strip_request(&mut all);
            let listed: Vec<String> = before.get_all(header::CONNECTION).iter()
                .flat_map(|list| list.to_str().expect("ASCII").split(','))
                .map(|token| token.trim().to_ascii_lowercase())
                .collect();
            for name in before.keys() {
                let is_needed = *name == header::HOST || *name == header::CONTENT_LENGTH;
                let ends_here = NOT_PASSED.contains(name) || listed.iter().any(|token| token == name.as_str());
                prop_assert_eq!(all.contains_key(name), is_needed || !ends_here, "{} in {:?}", name, before);
            }
        }
    }
}
