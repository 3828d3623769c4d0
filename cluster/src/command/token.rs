//! Commands about tokens.

use super::{Change, Detail, Refusal};
use crate::event::Kind;
use crate::secret::TokenId;
use crate::state::{Role, Token};

impl Change<'_> {
    pub(super) fn create_token(&mut self, id: TokenId, token: Token) -> Result<Option<Detail>, Refusal> {
        let text = format!("token {id} created for {} ({:?})", token.name, token.role).to_lowercase();
        self.say(Kind::TokenCreated, None, text);
        self.state.tokens.insert(id, token);
        Ok(Some(Detail::None))
    }

    pub(super) fn revoke(&mut self, id: &TokenId) -> Result<Option<Detail>, Refusal> {
        let Some(token) = self.state.tokens.get(id) else {
            return Err(Refusal::NoToken(id.clone()));
        };
        let is_lasting_admin = |t: &Token| t.role == Role::Admin && t.project.is_none() && t.expires.is_none();
        let admins = self.state.tokens.values().filter(|t| is_lasting_admin(t)).count();
        if is_lasting_admin(token) && admins == 1 {
            return Err(Refusal::LastAdmin);
        }
        let name = token.name.clone();
        self.state.tokens.remove(id);
        self.say(Kind::TokenRevoked, None, format!("token {id} of {name} revoked"));
        Ok(Some(Detail::None))
    }
}
