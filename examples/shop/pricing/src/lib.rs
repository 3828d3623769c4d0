//! What things cost today: the catalog's price, less the more one takes.
//!
//! `GET /price/kelp?count=6` asks `catalog` by its name, over HTTP, as any service would. Nothing is kept between
//! two requests; the rules come from the environment, so changing them is a deploy.

use wasip2::cli::environment::get_environment;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::outgoing_handler;
use wasip2::http::types::{
    Fields, IncomingBody, IncomingRequest, OutgoingBody, OutgoingRequest, OutgoingResponse, ResponseOutparam, Scheme,
};

struct Pricing;

wasip2::http::proxy::export!(Pricing);

impl Guest for Pricing {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let target = request.path_with_query().unwrap_or_default();
        match quote(&target) {
            Ok(quote) => respond(out, 200, &quote),
            Err((status, problem)) => respond(out, status, &format!(r#"{{"error":"{problem}"}}"#)),
        }
    }
}

/// A price, or a status and what is wrong.
fn quote(target: &str) -> Result<String, (u16, String)> {
    let env = get_environment();
    let var = |name: &str| env.iter().find(|(key, _)| key == name).map_or("", |(_, value)| value.as_str());

    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let key = path.trim_start_matches("/price/");
    if key.is_empty() || !key.bytes().all(|byte| byte.is_ascii_lowercase()) {
        return Err((404, "not for sale".to_owned()));
    }
    let count: u64 = query.strip_prefix("count=").and_then(|count| count.parse().ok()).unwrap_or(1);
    if !(1..=1_000).contains(&count) {
        return Err((422, "between 1 and 1000, please".to_owned()));
    }

    let good = fetch(var("CATALOG"), &format!("/api/goods/{key}"))?;
    // {"name":"Kelp crisps","cents":350}
    let cents = good.split_once("\"cents\":").map(|(_, rest)| rest.trim_end_matches(['}', '\n']));
    let cents: u64 =
        cents.and_then(|cents| cents.parse().ok()).ok_or((502, "the catalog names no price".to_owned()))?;
    let percent = percent_off(var("DISCOUNTS"), count);
    let total = (cents * count * (100 - percent)).div_ceil(100);
    Ok(format!(r#"{{"key":"{key}","count":{count},"cents":{total},"percent_off":{percent}}}"#))
}

/// From `3:5 12:20`: 5 percent from 3 pieces on, 20 from 12.
fn percent_off(rules: &str, count: u64) -> u64 {
    let rule = |rule: &str| {
        let (from, percent) = rule.split_once(':')?;
        Some((from.parse::<u64>().ok()?, percent.parse::<u64>().ok()?))
    };
    let reached = rules.split_whitespace().filter_map(rule).filter(|(from, _)| *from <= count);
    reached.map(|(_, percent)| percent.min(100)).max().unwrap_or(0)
}

fn fetch(authority: &str, path: &str) -> Result<String, (u16, String)> {
    let failed = |what: &str| (502, format!("the catalog does not answer: {what}"));
    let request = OutgoingRequest::new(Fields::new());
    let built = request
        .set_scheme(Some(&Scheme::Http))
        .and_then(|()| request.set_authority(Some(authority)))
        .and_then(|()| request.set_path_with_query(Some(path)));
    built.map_err(|()| failed("CATALOG is no address"))?;

    let pending = outgoing_handler::handle(request, None).map_err(|code| failed(&format!("{code:?}")))?;
    pending.subscribe().block();
    let response = pending.get().expect("it is ready").expect("it is taken once").map_err(|code| failed(&format!("{code:?}")))?;
    match response.status() {
        200 => {}
        404 => return Err((404, "not for sale".to_owned())),
        status => return Err(failed(&status.to_string())),
    }
    let body = response.consume().expect("a body is consumed once");
    let stream = body.stream().expect("a stream is taken once");
    let mut text = Vec::new();
    while let Ok(part) = stream.blocking_read(4096) {
        text.extend(part);
    }
    drop(stream);
    IncomingBody::finish(body);
    String::from_utf8(text).map_err(|_| failed("not UTF-8"))
}

fn respond(out: ResponseOutparam, status: u16, text: &str) {
    let headers = Fields::new();
    headers.set("content-type", &[b"application/json".to_vec()]).expect("a content type is an ordinary header");
    let response = OutgoingResponse::new(headers);
    response.set_status_code(status).expect("a status is three digits");
    let body = response.body().expect("a body is taken once");
    ResponseOutparam::set(out, Ok(response));
    let stream = body.write().expect("a stream is taken once");
    // A visitor may leave before the end; then there is nobody left to tell.
    if stream.blocking_write_and_flush(text.as_bytes()).is_ok() {
        drop(stream);
        let _ = OutgoingBody::finish(body, None);
    }
}
