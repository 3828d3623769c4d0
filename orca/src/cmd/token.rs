//! `token`: who else may ask, and for what.

use std::process::ExitCode;

use orca_cluster::secret::TokenId;
use orca_cluster::state::Role;
use orca_wire::message::client::{CreateToken, Request, Response, TokenInfo};
use serde::Serialize;

use super::secrets::changed;
use super::{done, session};
use crate::cli::{Global, TokenCreateArgs, Tokens};
use crate::exit::Failure;
use crate::moment;
use crate::output::text::{Ink, Side, Text, table};
use crate::output::{Output, Screen};
use crate::session::unexpected;

pub async fn run(command: Tokens, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    let session = session(global).await?;
    match command {
        Tokens::Create(TokenCreateArgs { name, role, project, expires }) => {
            let expires = expires.map(|span| moment::now() + span);
            let request = CreateToken { name, role: role.into(), project, expires };
            match session.ask(&Request::CreateToken(request)).await? {
                Response::Token { id, text } => created(output, &id, &text),
                other => Err(unexpected(&other)),
            }
        }
        Tokens::List => match session.ask(&Request::ListTokens).await? {
            Response::Tokens { tokens } => list(output, tokens),
            other => Err(unexpected(&other)),
        },
        Tokens::Revoke(args) => {
            let response = session.ask(&Request::RevokeToken { id: args.id.clone() }).await?;
            changed(output, response, &format!("Revoked {}", args.id))
        }
    }
}

fn created(output: &Output, id: &TokenId, text: &str) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Created<'a> {
        id: &'a TokenId,
        token: &'a str,
    }
    if output.json {
        output.object("token", &Created { id, token: text });
    } else {
        output.print(&format!("{text}\n"));
        output.notice(&Text::of(Ink::Dim, format!("Shown this once. Revoke it with: orca token revoke {id}")));
    }
    done()
}

fn list(output: &Output, tokens: Vec<TokenInfo>) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Listed {
        tokens: Vec<TokenInfo>,
    }
    if output.json {
        output.object("tokens", &Listed { tokens });
    } else {
        output.lines(&rows(&output.screen(moment::now()), &tokens));
    }
    done()
}

fn rows(screen: &Screen, tokens: &[TokenInfo]) -> Vec<Text> {
    let rows = tokens.iter().map(|token| {
        let role = match token.role {
            Role::Viewer => "viewer",
            Role::Deployer => "deployer",
            Role::Admin => "admin",
        };
        let project = token.project.as_ref().map_or_else(|| "all projects".to_owned(), ToString::to_string);
        let expires = match token.expires {
            None => Text::of(Ink::Dim, "does not expire"),
            Some(at) if at <= screen.now => Text::of(Ink::Red, "expired"),
            Some(at) => Text::plain(format!("expires in {}", moment::age(at.since(screen.now)))),
        };
        vec![
            Text::plain(token.id.to_string()),
            Text::plain(token.name.clone()),
            Text::plain(role),
            Text::plain(project),
            Text::of(Ink::Dim, format!("created {} ago", screen.ago(token.created))),
            expires,
        ]
    });
    table(0, &[Side::Left; 6], rows.collect())
}
