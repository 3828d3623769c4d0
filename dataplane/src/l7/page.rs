//! What we answer ourselves. Each page says which part failed and what that means for whoever reads it: text for a
//! terminal, HTML for a browser, JSON for a program that asks for it. What went wrong in detail is in the log, under
//! the request's id; a page is read by strangers.

use std::time::Duration;

use http::header::{self, HeaderValue};
use http::{Method, Response, StatusCode};
use orca_cluster::id::ServiceName;
use orca_cluster::route::Absence;

use super::framing::Violation;
use super::header::X_REQUEST_ID;
use crate::ModuleError;
use crate::body::Body;

/// Why a request is not answered by a replica.
#[derive(Debug)]
pub enum Refusal {
    /// No `Host`, more than one, or none that can be.
    Host,
    /// `CONNECT`: this is no forward proxy.
    Method,
    NoRoute,
    /// The request's body ended before its end.
    Incomplete,
    /// The service has no replica to send requests to.
    Absent(Absence),
    /// It has, and none takes a connection.
    Refusing,
    /// The connection broke before a response came, or what came was no valid response.
    Broken,
    /// No response began within this time.
    Late(Duration),
    Module(ModuleError),
}

impl Refusal {
    pub fn status(&self) -> StatusCode {
        match self {
            Refusal::Host | Refusal::Incomplete => StatusCode::BAD_REQUEST,
            Refusal::Method => StatusCode::METHOD_NOT_ALLOWED,
            Refusal::NoRoute => StatusCode::NOT_FOUND,
            Refusal::Absent(_) | Refusal::Refusing => StatusCode::SERVICE_UNAVAILABLE,
            Refusal::Broken => StatusCode::BAD_GATEWAY,
            Refusal::Late(_) => StatusCode::GATEWAY_TIMEOUT,
            Refusal::Module(ModuleError::Trapped) => StatusCode::INTERNAL_SERVER_ERROR,
            Refusal::Module(ModuleError::TooMuchMemory) => StatusCode::INTERNAL_SERVER_ERROR,
            Refusal::Module(ModuleError::TimedOut) => StatusCode::GATEWAY_TIMEOUT,
            Refusal::Module(ModuleError::Busy | ModuleError::Unavailable) => StatusCode::SERVICE_UNAVAILABLE,
        }
    }

    /// A word for programs.
    fn reason(&self) -> &'static str {
        match self {
            Refusal::Host => "bad_host",
            Refusal::Method => "method_not_allowed",
            Refusal::NoRoute => "no_route",
            Refusal::Incomplete => "incomplete_request",
            Refusal::Absent(Absence::Starting) => "service_starting",
            Refusal::Absent(Absence::Stopped) => "service_stopped",
            Refusal::Absent(Absence::ScaledToZero) => "service_scaled_to_zero",
            Refusal::Absent(Absence::Failing) => "service_failing",
            Refusal::Refusing => "replica_refuses",
            Refusal::Broken => "replica_broke_off",
            Refusal::Late(_) => "replica_timed_out",
            Refusal::Module(ModuleError::Trapped) => "module_trapped",
            Refusal::Module(ModuleError::TooMuchMemory) => "module_out_of_memory",
            Refusal::Module(ModuleError::TimedOut) => "module_timed_out",
            Refusal::Module(ModuleError::Busy) => "module_busy",
            Refusal::Module(ModuleError::Unavailable) => "module_unavailable",
        }
    }

    fn message(&self, service: Option<&ServiceName>) -> String {
        let service = service.map_or_else(|| "the service".to_owned(), |name| format!("the service {name}"));
        match self {
            Refusal::Host => "the request does not name one valid host".to_owned(),
            Refusal::Method => "this server does not tunnel: CONNECT is not available".to_owned(),
            Refusal::NoRoute => "no service is routed at this host and path".to_owned(),
            Refusal::Incomplete => "the request ended inside its body".to_owned(),
            Refusal::Absent(Absence::Starting) => format!("{service} is starting and not ready yet; try again soon"),
            Refusal::Absent(Absence::Stopped) => format!("{service} was stopped by its operator"),
            Refusal::Absent(Absence::ScaledToZero) => format!("{service} has no replicas: it is scaled to 0"),
            Refusal::Absent(Absence::Failing) => format!("{service} has no replica that is ready"),
            Refusal::Refusing => format!("{service} accepts no connections at the moment; try again soon"),
            Refusal::Broken => format!("{service} broke off before it answered"),
            Refusal::Late(limit) => {
                format!("{service} did not begin to answer within {} s (`response_timeout_secs`)", limit.as_secs_f64())
            }
            Refusal::Module(ModuleError::Trapped) => format!("{service} failed while it handled the request"),
            Refusal::Module(ModuleError::TooMuchMemory) => format!("{service} needed more memory than it may use"),
            Refusal::Module(ModuleError::TimedOut) => {
                format!("{service} did not finish in time (`timeout_secs` of its module)")
            }
            Refusal::Module(ModuleError::Busy) => format!("{service} is busy with other requests; try again soon"),
            Refusal::Module(ModuleError::Unavailable) => {
                format!("{service} is not loaded at the moment; try again soon")
            }
        }
    }

    /// Whether trying again soon is a good idea.
    fn is_momentary(&self) -> bool {
        let is_lasting = matches!(self, Refusal::Absent(absence) if !absence.may_end_soon());
        self.status() == StatusCode::SERVICE_UNAVAILABLE && !is_lasting
    }
}

/// What of a request decides the form of a page.
#[derive(Debug)]
pub struct Asked {
    pub accept: Option<HeaderValue>,
    pub method: Method,
}

/// The page for a refusal.
pub fn page(refusal: &Refusal, service: Option<&ServiceName>, id: &HeaderValue, asked: &Asked) -> Response<Body> {
    let status = refusal.status();
    let title = status.canonical_reason().unwrap_or("error");
    let message = refusal.message(service);
    let id_text = id.to_str().unwrap_or_default();
    let accept = asked.accept.as_ref().and_then(|accept| accept.to_str().ok()).unwrap_or_default();
    let (kind, text) = if accept.contains("text/html") {
        let html = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>{code} {title}</title>\n\
             <style>body{{font:16px/1.5 system-ui,sans-serif;margin:15vh auto;max-width:36em;padding:0 1em;\
             color:#222;background:#fff}}h1{{font-size:1.4em}}small{{color:#767676}}</style></head>\n\
             <body><h1>{code} {title}</h1><p>{message}.</p><p><small>request {id_text}</small></p></body></html>\n",
            code = status.as_u16(),
        );
        ("text/html; charset=utf-8", html)
    } else if accept.contains("json") {
        let json = serde_json::json!({
            "status": status.as_u16(),
            "reason": refusal.reason(),
            "message": message,
            "service": service.map(ToString::to_string),
            "request": id_text,
        });
        ("application/json", format!("{json}\n"))
    } else {
        let code = status.as_u16();
        ("text/plain; charset=utf-8", format!("{code} {title}: {message}\nrequest {id_text}\n"))
    };
    let mut response = Response::new(Body::empty());
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(kind));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from(text.len()));
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(X_REQUEST_ID, id.clone());
    if refusal.is_momentary() {
        headers.insert(header::RETRY_AFTER, HeaderValue::from_static("1"));
    }
    if asked.method != Method::HEAD {
        *response.body_mut() = Body::whole(text);
    }
    response
}

/// The whole answer, as bytes, to what never became a request.
pub fn violation(violation: Violation) -> Vec<u8> {
    bare(violation.status(), &violation.to_string())
}

/// The same for a head that did not end in time.
pub fn timed_out() -> Vec<u8> {
    bare(StatusCode::REQUEST_TIMEOUT, "the request's head did not end in time")
}

fn bare(status: StatusCode, message: &str) -> Vec<u8> {
    let title = status.canonical_reason().unwrap_or("error");
    let code = status.as_u16();
    let text = format!("{code} {title}: {message}\n");
    format!(
        "HTTP/1.1 {code} {title}\r\nconnection: close\r\ncontent-type: text/plain; charset=utf-8\r\n\
         content-length: {length}\r\n\r\n{text}",
        length = text.len()
    )
    .into_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(accept: Option<&'static str>) -> String {
        let asked = Asked { accept: accept.map(HeaderValue::from_static), method: Method::GET };
        let page = page(&Refusal::Broken, None, &HeaderValue::from_static("7"), &asked);
        page.headers()[header::CONTENT_TYPE].to_str().expect("text").to_owned()
    }

    #[test]
    fn each_reader_gets_its_form() {
        assert_eq!(kind(None), "text/plain; charset=utf-8");
        assert_eq!(kind(Some("*/*")), "text/plain; charset=utf-8");
        assert_eq!(kind(Some("text/html,application/xhtml+xml,*/*;q=0.8")), "text/html; charset=utf-8");
        assert_eq!(kind(Some("application/json")), "application/json");
    }
}
