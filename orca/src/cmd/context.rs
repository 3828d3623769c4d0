//! `context`: which cluster commands go to.

use std::process::ExitCode;

use orca_wire::Access;
use orca_wire::identity::Identity;
use orca_wire::message::client::{Request, Response};
use serde::Serialize;

use super::{done, terminal};
use crate::cli::{ContextAddArgs, ContextUseArgs, Contexts};
use crate::context::{Chosen, Credential, Origin, Surroundings, parse_token, with_port};
use crate::exit::{Exit, Failure};
use crate::moment;
use crate::output::Output;
use crate::output::text::{Ink, Side, Text, table};
use crate::session::Session;

pub async fn run(command: Contexts, output: &Output) -> Result<ExitCode, Failure> {
    match command {
        Contexts::Add(args) => add(args, output).await,
        Contexts::Use(ContextUseArgs { name }) => {
            Surroundings::read().file()?.make_current(&name)?;
            said(output, &name, "Commands go there from now on")
        }
        Contexts::List => list(output),
    }
}

async fn add(args: ContextAddArgs, output: &Output) -> Result<ExitCode, Failure> {
    let ContextAddArgs { name, addresses, identity, keep_current, replace } = args;
    let addresses: Vec<String> = addresses.iter().map(|address| with_port(address)).collect();
    let around = Surroundings::read();
    let file = around.file()?;
    if !replace && file.load()?.contexts.contains_key(&name) {
        return Err(Failure::new(Exit::Conflict, format!("there is a context `{name}` already"))
            .fix("add this one under another name, or in its place with --replace"));
    }
    let access = match identity {
        Some(directory) => {
            let identity = Identity::load(&directory, None, moment::now())
                .map_err(|error| Failure::from_error(Exit::Unauthorised, &error))?;
            Access::Certificate(identity)
        }
        None => {
            let text = match around.token {
                Some(token) => token.into(),
                None => terminal::secret("Token")?,
            };
            Access::Token(parse_token(&text)?)
        }
    };
    let origin = Origin::Context(name.clone());
    let chosen = Chosen { origin, addresses: addresses.clone(), access: access.clone() };
    let answer = async { Session::open(chosen, None).await?.ask(&Request::Whoami).await }.await;
    let answer = match answer {
        // The server may be down, and up tomorrow. That it is another one, or lets nobody in with this, will not pass.
        Err(failure) if failure.exit != Exit::Unreachable || failure.stranger => {
            return Err(failure.why(format!("so `{name}` was not added")));
        }
        answer => answer,
    };
    let credential = match &access {
        Access::Certificate(identity) => Credential::Identity(identity),
        Access::Token(token) => Credential::Token(token),
    };
    file.add(&name, addresses, credential, answer.is_ok() && !keep_current)?;
    match answer {
        Ok(Response::Whoami { cluster, role, .. }) => {
            let role = format!("{role:?}").to_lowercase();
            said(output, &name, &format!("Added: cluster {cluster}, as {role}"))
        }
        Ok(_) => said(output, &name, "Added"),
        Err(failure) => {
            let when = format!("when it answers, use it: orca context use {name}");
            output.warn(&format!("`{name}` is added, but {}; {when}", failure.message));
            done()
        }
    }
}

fn said(output: &Output, name: &str, text: &str) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Changed<'a> {
        context: &'a str,
    }
    if output.json {
        output.object("context", &Changed { context: name });
    } else {
        output.print(&format!("{name}: {text}.\n"));
    }
    done()
}

fn list(output: &Output) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Listed {
        contexts: Vec<Row>,
    }
    #[derive(Serialize)]
    struct Row {
        name: String,
        current: bool,
        addresses: Vec<String>,
        #[serde(skip_serializing_if = "Option::is_none")]
        authority: Option<String>,
    }
    let file = Surroundings::read().file()?;
    let contexts = file.load()?;
    let rows = contexts.contexts.into_iter().map(|(name, entry)| Row {
        current: contexts.current.as_ref() == Some(&name),
        name,
        addresses: entry.addresses,
        authority: entry.authority,
    });
    let rows: Vec<Row> = rows.collect();
    if output.json {
        output.object("contexts", &Listed { contexts: rows });
        return done();
    }
    if rows.is_empty() {
        output.notice(&Text::plain(format!("No cluster is known in {}", file.path().display())));
    }
    let rows = rows.into_iter().map(|row| {
        let mark = if row.current { Text::of(Ink::Green, "●") } else { Text::plain(" ") };
        vec![mark.and(Ink::Plain, format!(" {}", row.name)), Text::of(Ink::Dim, row.addresses.join(", "))]
    });
    output.lines(&table(0, &[Side::Left, Side::Left], rows.collect()));
    done()
}
