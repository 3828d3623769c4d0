//! `version`: ours, and the server's if there is one.

use std::process::ExitCode;

use orca_wire::message::client::{Request, Response};
use serde::Serialize;

use super::{done, session};
use crate::cli::Global;
use crate::exit::Failure;
use crate::output::Output;
use crate::output::text::{Ink, Text};

pub async fn run(global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Versions<'a> {
        client: &'a str,
        server: Option<&'a str>,
        cluster: Option<&'a str>,
    }
    let client = env!("CARGO_PKG_VERSION");
    let answer = async { session(global).await?.ask(&Request::Whoami).await }.await;
    let server = match &answer {
        Ok(Response::Whoami { version, cluster, .. }) => Some((version.as_str(), cluster.as_str())),
        Ok(_) | Err(_) => None,
    };
    if output.json {
        let (server, cluster) = server.unzip();
        output.object("version", &Versions { client, server, cluster });
        return done();
    }
    output.print(&format!("orca {client}\n"));
    match (server, &answer) {
        (Some((server, cluster)), _) => output.print(&format!("server {server} (cluster {cluster})\n")),
        // That there is none is no failure of this command.
        (None, Err(failure)) => output.notice(&Text::of(Ink::Dim, format!("server: {failure}"))),
        (None, Ok(_)) => {}
    }
    done()
}
