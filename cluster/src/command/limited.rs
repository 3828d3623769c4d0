//! Commands within limits: which are held to them, how that is tried, and how it is asked before it is proposed.

use super::{Applied, Change, Command, Detail, Entry, Refusal};
use crate::event::Actor;
use crate::limit::Limits;
use crate::state::State;
use crate::time::Timestamp;

impl Limits {
    /// The command as people's changes are proposed: within these limits, if it can make anything more.
    pub fn hold(&self, command: Command) -> Command {
        match command {
            Command::PutServices(_)
            | Command::Scale { .. }
            | Command::Restart { .. }
            | Command::Rollback { .. }
            | Command::SetSecret { .. }
            | Command::CreateToken { .. } => Command::Limited { limits: *self, command: Box::new(command) },
            Command::Found(_)
            | Command::Admit(_)
            | Command::SetSettings(_)
            | Command::Stop { .. }
            | Command::Start { .. }
            | Command::Remove { .. }
            | Command::Promote { .. }
            | Command::Adopt { .. }
            | Command::AddDataKey(_)
            | Command::NewDataKey { .. }
            | Command::RemoveSecret { .. }
            | Command::RotateDataKey { .. }
            | Command::ResealSecrets { .. }
            | Command::FinishRotation { .. }
            | Command::RevokeToken { .. }
            | Command::Announce(_)
            | Command::Limited { .. } => command,
        }
    }

    /// What people's change would be refused for, if it is more than may be; tried on a copy.
    pub fn refuses(&self, state: &State, command: &Command) -> Option<Refusal> {
        let command = self.hold(command.clone());
        if !matches!(command, Command::Limited { .. }) {
            return None;
        }
        let entry = Entry { at: Timestamp::default(), actor: Actor::Orca, source: None, command };
        match state.clone().apply(0, entry) {
            Applied::Refused(refusal) => Some(refusal),
            Applied::Done { .. } | Applied::Unchanged { .. } => None,
        }
    }
}

impl Change<'_> {
    /// On a copy, which takes the place of the state if it is within the limits.
    pub(super) fn carry_out_within(&mut self, limits: &Limits, command: Command) -> Result<Option<Detail>, Refusal> {
        let mut tried = self.state.clone();
        let mut change = Change {
            state: &mut tried,
            index: self.index,
            at: self.at,
            actor: self.actor.clone(),
            source: self.source.clone(),
            events: self.events,
        };
        let detail = change.carry_out(command)?;
        let events = change.events;
        limits.check(self.state, &tried).map_err(Refusal::TooMuch)?;
        (*self.state, self.events) = (tried, events);
        Ok(detail)
    }
}
