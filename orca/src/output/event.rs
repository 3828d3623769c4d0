//! Events and log lines, one line each.

use std::net::SocketAddr;

use orca_cluster::event::{Actor, Event, Kind};
use orca_cluster::id::ReplicaId;
use orca_wire::message::agent::{LogLine, LogStream};

use super::Screen;
use super::text::{Ink, Text};
use crate::moment;

pub fn event(screen: &Screen, event: &Event) -> Text {
    let ink = match event.kind {
        Kind::NodeDead | Kind::RolloutFailed | Kind::ReplicaExited | Kind::ScheduleFailed | Kind::Refused => Ink::Red,
        Kind::RolledBack | Kind::ServiceRemoved | Kind::ScheduleSkipped => Ink::Yellow,
        Kind::NodeAlive | Kind::RolloutDone | Kind::ReplicaRecovered => Ink::Green,
        Kind::ClusterFounded
        | Kind::NodeAdmitted
        | Kind::SettingsChanged
        | Kind::Deployed
        | Kind::Scaled
        | Kind::Stopped
        | Kind::Started
        | Kind::Restarted
        | Kind::Promoted
        | Kind::RolloutStarted
        | Kind::RolloutStep
        | Kind::ScheduleRan
        | Kind::Executed
        | Kind::SecretSet
        | Kind::SecretRemoved
        | Kind::SecretsRotated
        | Kind::DataKeyMade
        | Kind::TokenCreated
        | Kind::TokenRevoked => Ink::Plain,
    };
    let service = event.service.as_ref().map(|service| format!("{service}: ")).unwrap_or_default();
    Text::of(Ink::Dim, moment::date(event.at, &screen.zone))
        .and(ink, format!("  {:<18}", event.kind.to_string()))
        .and(Ink::Bold, service)
        .and(Ink::Plain, event.text.clone())
        .and(Ink::Dim, format!("  ({})", author(event)))
}

/// `by alice from 10.0.0.7`. What nobody's token stands behind and has an address anyway is a stranger's.
fn author(event: &Event) -> String {
    // The port is another for each connection, and says nothing.
    let from = |source: &str| source.parse().map_or_else(|_| source.to_owned(), |at: SocketAddr| at.ip().to_string());
    match (&event.actor, event.source.as_deref().map(from)) {
        (actor @ Actor::Token { .. }, Some(from)) => format!("by {actor} from {from}"),
        (Actor::Orca, Some(from)) => format!("from {from}"),
        (actor @ (Actor::Token { .. } | Actor::Orca), None) => format!("by {actor}"),
    }
}

/// A line of a replica. Its text goes through as it was written: colours are the application's business.
pub fn log(screen: &Screen, line: &LogLine, prefix: bool, timestamps: bool) -> String {
    let mut front = Text::new();
    if timestamps {
        front = front.and(Ink::Dim, format!("{} ", moment::precise(line.at)));
    }
    if prefix {
        front = front.and(replica_ink(line.replica), format!("{} ", line.replica));
        let bar = match line.stream {
            LogStream::Stdout => (Ink::Dim, "| "),
            LogStream::Stderr => (Ink::Red, "| "),
        };
        front = front.and(bar.0, bar.1);
    }
    format!("{}{}\n", front.render(screen.colour), line.text.trim_end_matches('\n'))
}

/// The same one for a replica's whole life.
fn replica_ink(replica: ReplicaId) -> Ink {
    const INKS: [Ink; 5] = [Ink::Cyan, Ink::Green, Ink::Yellow, Ink::Magenta, Ink::Blue];
    INKS[usize::try_from(replica.0 % INKS.len() as u64).unwrap_or(0)]
}

#[cfg(test)]
mod tests {
    use super::super::sample::{at, name, screen, show};
    use super::*;
    use expect_test::expect;

    #[test]
    fn an_event_says_who_did_it_and_from_where() {
        let of = |actor: Actor, source: Option<&str>, kind: Kind, text: &str| {
            let service = (kind == Kind::Deployed).then(|| name("shop/api"));
            let (source, text) = (source.map(str::to_owned), text.to_owned());
            event(&screen(), &Event { index: (1, 0), at: at(9), actor, source, kind, service, replica: None, text })
        };
        let alice = || Actor::Token { id: "abcd2345".to_owned(), name: "alice".to_owned() };
        expect![[r#"
            2026-01-31 14:02:02  deployed          shop/api: created as v1  (by alice from 10.0.0.7)
            2026-01-31 14:02:02  token-created     token ci made  (by alice from fd00::7)
            2026-01-31 14:02:02  cluster-founded   main  (by alice)
            2026-01-31 14:02:02  rollout-done      v1 serves  (by orca)
            2026-01-31 14:02:02  refused           a token that is not valid was shown  (from 10.0.0.9)
        "#]]
        .assert_eq(&show(&[
            of(alice(), Some("10.0.0.7:51234"), Kind::Deployed, "created as v1"),
            of(alice(), Some("[fd00::7]:51234"), Kind::TokenCreated, "token ci made"),
            of(alice(), None, Kind::ClusterFounded, "main"),
            of(Actor::Orca, None, Kind::RolloutDone, "v1 serves"),
            of(Actor::Orca, Some("10.0.0.9:4"), Kind::Refused, "a token that is not valid was shown"),
        ]));
    }
}
