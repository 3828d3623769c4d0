//! What of a message's header is for the next hop, and what we add. Fields that concern one connection end with
//! it; what a client claims about where it comes from is replaced by what we saw.

use http::HeaderMap;
use http::header::{self, HeaderName, HeaderValue};

pub const X_FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
pub const X_FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
pub const X_FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
pub const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const X_REAL_IP: HeaderName = HeaderName::from_static("x-real-ip");
const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");
const HTTP2_SETTINGS: HeaderName = HeaderName::from_static("http2-settings");

/// Fields that never pass, whoever sent them.
const OF_ONE_HOP: [HeaderName; 8] = [
    header::CONNECTION,
    KEEP_ALIVE,
    PROXY_CONNECTION,
    header::TE,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    header::PROXY_AUTHORIZATION,
    HTTP2_SETTINGS,
];
/// What only a proxy that is trusted may say about a client.
const CLAIMS: [HeaderName; 2] = [header::FORWARDED, X_REAL_IP];

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
    let mut hop = Hop::default();
    if let Some(te) = headers.get(header::TE) {
        hop.trailers = has_token(te, "trailers");
    }
    if headers.contains_key(header::UPGRADE)
        && headers.get_all(header::CONNECTION).iter().any(|v| has_token(v, "upgrade"))
    {
        // HTTP/2 without TLS would carry requests past our eyes on a connection we take for one request.
        let mut protocols = headers.get_all(header::UPGRADE).iter();
        hop.upgrade = match (protocols.next(), protocols.next()) {
            (Some(protocol), None) if !has_token(protocol, "h2c") => Some(protocol.clone()),
            _ => None,
        };
    }
    strip(headers);
    for name in CLAIMS {
        headers.remove(name);
    }
    hop
}

/// Takes out of any message the fields of one hop and those that its `Connection` lists.
pub fn strip(headers: &mut HeaderMap) {
    if headers.contains_key(header::CONNECTION) {
        let listed: Vec<HeaderName> = headers
            .get_all(header::CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|token| token.trim().parse().ok())
            // Without these two the message would mean something else.
            .filter(|name| *name != header::HOST && *name != header::CONTENT_LENGTH)
            .collect();
        for name in listed {
            headers.remove(name);
        }
    }
    // Most messages have none of these left, and looking through their names once is cheaper than eight look-ups.
    let mut found = 0_u32;
    for name in headers.keys() {
        if let Some(index) = OF_ONE_HOP.iter().position(|of_one_hop| of_one_hop == name) {
            found |= 1 << index;
        }
    }
    for (index, name) in OF_ONE_HOP.iter().enumerate() {
        if found & (1 << index) != 0 {
            headers.remove(name);
        }
    }
}

fn has_token(value: &HeaderValue, token: &str) -> bool {
    value.to_str().is_ok_and(|value| value.split(',').any(|part| part.trim().eq_ignore_ascii_case(token)))
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn an_upgrade_to_http2_is_not_passed_on() {
        let mut websocket = headers(&[("connection", "keep-alive, Upgrade"), ("upgrade", "websocket")]);
        assert!(strip_request(&mut websocket).upgrade.is_some());
        let mut h2c =
            headers(&[("connection", "Upgrade, HTTP2-Settings"), ("upgrade", "h2c"), ("http2-settings", "x")]);
        assert!(strip_request(&mut h2c).upgrade.is_none());
        assert!(h2c.is_empty());
    }
}
