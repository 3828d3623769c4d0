//! Tokens: made, listed, revoked. The text of one is shown when it is made and never again.

use std::sync::Arc;

use orca_cluster::command::Command;
use orca_cluster::secret::TokenId;
use orca_cluster::state::Token as TokenRecord;
use orca_wire::identity::Token;
use orca_wire::message::client::{CreateToken, Response, TokenInfo};

use super::{Answer, Core, invalid, refused};
use crate::auth::{Caller, Object, Verb};
use crate::clock::now;

/// Longest name of a token; it is shown in every event.
const NAME_LENGTH_MAX: usize = 100;

pub async fn create(core: &Core, caller: &Caller, create: CreateToken) -> Answer {
    let CreateToken { name, role, project, expires } = create;
    core.authorise(caller, Verb::ChangeTokens, Object::from(project.as_ref()))?;
    let now = now();
    if name.is_empty() || name.chars().count() > NAME_LENGTH_MAX || name.chars().any(char::is_control) {
        let message = format!("a token's name has 1 to {NAME_LENGTH_MAX} characters, all of them visible");
        return Err(invalid(message, Some("name the person or pipeline that will hold it")));
    }
    if expires.is_some_and(|expires| expires <= now) {
        return Err(invalid("the token would have expired before it is made".to_owned(), None));
    }
    let token = Token::create(core.authority);
    let record = TokenRecord { name, hash: token.secret.hash(), role, project, created: now, expires };
    core.propose(caller, Command::CreateToken { id: token.id.clone(), token: record }).await?;
    Ok(Response::Token { id: token.id.clone(), text: token.reveal().to_string() })
}

pub async fn list(core: &Core, caller: &Caller) -> Answer {
    core.authorise(caller, Verb::ListTokens, caller.project.as_ref().into())?;
    let state = core.read().await?;
    let visible = state.tokens.iter().filter(|(_, token)| match &caller.project {
        None => true,
        Some(own) => token.project.as_ref() == Some(own),
    });
    let tokens = visible.map(|(id, token)| TokenInfo {
        id: id.clone(),
        name: token.name.clone(),
        role: token.role,
        project: token.project.clone(),
        created: token.created,
        expires: token.expires,
    });
    Ok(Response::Tokens { tokens: tokens.collect() })
}

pub async fn revoke(core: &Core, caller: &Caller, id: TokenId) -> Answer {
    let state = core.read().await?;
    let project = state.tokens.get(&id).and_then(|token| token.project.as_ref());
    core.authorise(caller, Verb::ChangeTokens, Object::from(project))?;
    if !state.tokens.contains_key(&id) {
        return Err(refused(orca_cluster::command::Refusal::NoToken(id)));
    }
    Ok(core.propose(caller, Command::RevokeToken { id }).await?.response())
}

pub fn whoami(core: &Arc<Core>, caller: &Caller) -> Answer {
    core.authorise(caller, Verb::Whoami, Object::Cluster)?;
    let state = core.raft.state();
    Ok(Response::Whoami {
        name: caller.name.clone(),
        role: caller.role,
        project: caller.project.clone(),
        cluster: state.cluster.as_ref().map(|cluster| cluster.name.to_string()).unwrap_or_default(),
        cluster_id: core.cluster.to_string(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
    })
}
