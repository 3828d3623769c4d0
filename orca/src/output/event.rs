//! Events and log lines, one line each.

use orca_cluster::event::{Event, Kind};
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
        .and(Ink::Dim, format!("  ({})", event.actor))
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
