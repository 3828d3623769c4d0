//! A service that says hello: a page for browsers, plain text for everyone else.
//!
//! Orca makes a fresh instance for every request, so there is nothing here to lock, leak or reset. What a
//! request may use (memory, time, whom it may call) is written in `service.toml`, not here.

use wasip2::cli::environment::get_environment;
use wasip2::exports::http::incoming_handler::Guest;
use wasip2::http::types::{Fields, IncomingRequest, OutgoingBody, OutgoingResponse, ResponseOutparam};

struct Hello;

wasip2::http::proxy::export!(Hello);

impl Guest for Hello {
    fn handle(request: IncomingRequest, out: ResponseOutparam) {
        let env = get_environment();
        let var = |name: &str| env.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
        let visit = Visit {
            greeting: var("GREETING").unwrap_or("Hello"),
            service: var("ORCA_SERVICE").unwrap_or("hello"),
            replica: var("ORCA_REPLICA").unwrap_or("the only one"),
            path: &request.path_with_query().unwrap_or_else(|| "/".to_owned()),
        };
        let accept = request.headers().get("accept").concat();
        if accept.windows(9).any(|part| part == b"text/html") {
            respond(out, "text/html; charset=utf-8", &visit.page());
        } else {
            respond(out, "text/plain; charset=utf-8", &visit.text());
        }
    }
}

struct Visit<'a> {
    greeting: &'a str,
    service: &'a str,
    replica: &'a str,
    path: &'a str,
}

impl Visit<'_> {
    fn text(&self) -> String {
        let Visit { greeting, service, replica, path } = self;
        format!("{greeting}\n\npath     {path}\nservice  {service}\nreplica  {replica}\n")
    }

    fn page(&self) -> String {
        include_str!("page.html")
            .replace("{greeting}", &escape(self.greeting))
            .replace("{service}", &escape(self.service))
            .replace("{replica}", &escape(self.replica))
            // Last: what a stranger wrote is never searched for the names above.
            .replace("{path}", &escape(self.path))
    }
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn respond(out: ResponseOutparam, kind: &str, text: &str) {
    let headers = Fields::new();
    headers.set("content-type", &[kind.into()]).expect("a content type is an ordinary header");
    headers.set("content-length", &[text.len().to_string().into()]).expect("so is a length");
    let response = OutgoingResponse::new(headers);
    let body = response.body().expect("a body is taken once");
    ResponseOutparam::set(out, Ok(response));

    let stream = body.write().expect("a stream is taken once");
    // A visitor may leave before the end; then there is nobody left to tell.
    for part in text.as_bytes().chunks(4096) {
        if stream.blocking_write_and_flush(part).is_err() {
            return;
        }
    }
    drop(stream);
    let _ = OutgoingBody::finish(body, None);
}
