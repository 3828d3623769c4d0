//! One of each value as it is on disk and on the wire. A file here that no longer decodes is a store that no
//! longer opens. After an intended change of format: `ORCA_GOLDEN=write cargo nextest run -p orca-control golden`.

use std::fs;
use std::path::PathBuf;

use orca_cluster::command::put::PutServices;
use orca_cluster::command::{Announcement, Applied, Command};
use orca_cluster::event::{Actor, Kind as EventKind};
use orca_cluster::limit::Limits;
use orca_cluster::secret::{Ciphertext, DataKeyId, Opaque, Scope, SealedDataKey, SealedValue, SecretName};
use orca_cluster::spec::toml::{self, SourceFile};
use orca_cluster::spec::{Project, Settings, Source, check};
use orca_cluster::time::Timestamp;
use proptest::prelude::*;

use super::*;

const AT: LogId = LogId { term: 3, index: 7 };
const VOTE: Vote = Vote { term: 3, node: RaftId(2), committed: true };

fn membership() -> Membership {
    let peer = |id| Peer { name: format!("n{id}"), address: format!("10.0.0.{id}:6880") };
    let ids = [RaftId(2), RaftId(5), RaftId(9)];
    Membership {
        voters: vec![BTreeSet::from([RaftId(2)]), BTreeSet::from([RaftId(2), RaftId(5)])],
        nodes: ids.into_iter().map(|id| (id, peer(id.0))).collect(),
    }
}

fn change() -> command::Entry {
    let announcement =
        Announcement { kind: EventKind::ScheduleRan, service: None, replica: None, text: "it ran".into() };
    command::Entry {
        at: Timestamp(1_700_000_000_000),
        actor: Actor::Orca,
        source: None,
        command: Command::Announce(vec![announcement]),
    }
}

/// Commands that came after the first version: one of each, with a secret's ciphertext in it.
fn later_changes() -> Vec<(&'static str, command::Entry)> {
    let ciphertext = || Ciphertext { nonce: Opaque(vec![1, 2]), bytes: Opaque(vec![3, 4]) };
    let key = DataKeyId { scope: Scope::Global, version: 2 };
    let name: SecretName = "shop/A".parse().unwrap();
    let value = SealedValue { key: key.clone(), version: 3, value: ciphertext() };
    let made = SealedDataKey { id: key.clone(), root: 1, created: Timestamp(5), key: ciphertext() };
    let set = Command::SetSecret { name: name.clone(), version: 3, value: value.clone() };
    let commands = [
        ("entry-limited", Limits { tokens: 9, ..Limits::default() }.hold(set)),
        ("entry-new-data-key", Command::NewDataKey { key: made, rotates: true }),
        ("entry-reseal-secrets", Command::ResealSecrets { key: key.clone(), values: BTreeMap::from([(name, value)]) }),
        ("entry-finish-rotation", Command::FinishRotation { key }),
        ("entry-put-services", Command::PutServices(services())),
    ];
    commands.into_iter().map(|(name, command)| (name, command::Entry { command, ..change() })).collect()
}

/// One that says nothing but what it must, as the first version wrote it, and one that says what has come since.
fn services() -> PutServices {
    let text = "[[service]]\nname = \"old\"\nimage = \"a\"\nport = 80\n\
                [[service]]\nname = \"web\"\nimage = \"a\"\nport = 80\nresponse_timeout_secs = 90\n";
    let file = SourceFile { name: "service.toml".to_owned(), text: text.to_owned() };
    let Project { name: project, services } = toml::project(&file, &"shop".parse().unwrap()).unwrap();
    PutServices { project, services, prune: false, replace: false, if_generation: None, settings: None, recalls: false }
}

fn entry(payload: Payload) -> Entry {
    Entry { term: AT.term, index: AT.index, payload }
}

fn snapshot() -> Snapshot {
    let mut state = State::default();
    state.apply(AT.index, change());
    Snapshot { last: Some(AT), membership_at: Some(LogId { term: 1, index: 0 }), membership: membership(), state }
}

fn ballot() -> Ballot {
    Ballot { vote: Vote { committed: false, ..VOTE }, last: Some(AT), transfer: true }
}

fn request(ask: Ask) -> Request {
    Request { to: RaftId(5), ask }
}

/// Name, bytes as written now, and how to read and write them again.
type Sample = (&'static str, Vec<u8>, fn(&[u8]) -> Result<Vec<u8>, CodecError>);

fn sample<T: Framed + Serialize + DeserializeOwned>(name: &'static str, value: T) -> Sample {
    (name, encode(&value), |bytes| decode::<T>(bytes).map(|value| encode(&value)))
}

fn samples() -> Vec<Sample> {
    let later = later_changes().into_iter().map(|(name, change)| sample(name, entry(Payload::Change(change))));
    let first = vec![
        sample("entry-blank", entry(Payload::Blank)),
        sample("entry-change", entry(Payload::Change(change()))),
        sample("entry-membership", entry(Payload::Membership(membership()))),
        sample("vote", VOTE),
        sample("committed", Committed(Some(AT))),
        sample("purged", Purged(AT)),
        sample("snapshot", snapshot()),
        sample("identity", Identity { cluster: "c1".into(), id: RaftId(2) }),
        sample(
            "request-append",
            request(Ask::Append {
                vote: VOTE,
                previous: Some(LogId { term: 3, index: 6 }),
                committed: None,
                entries: vec![entry(Payload::Change(change()))],
            }),
        ),
        sample("request-pre-vote", request(Ask::PreVote(ballot()))),
        sample("request-vote", request(Ask::Vote(ballot()))),
        sample("request-snapshot", request(Ask::Snapshot { vote: VOTE, snapshot: Box::new(snapshot()) })),
        sample("request-transfer", request(Ask::Transfer { from: VOTE, to: RaftId(5), last: Some(AT) })),
        sample("response-append-all", Response::Append(Appended::All)),
        sample("response-append-upto", Response::Append(Appended::Upto(Some(AT)))),
        sample("response-append-conflict", Response::Append(Appended::Conflict)),
        sample("response-append-higher-vote", Response::Append(Appended::HigherVote(VOTE))),
        sample("response-vote", Response::Vote { vote: VOTE, granted: true, last: Some(AT) }),
        sample("response-snapshot", Response::Snapshot { vote: VOTE }),
        sample("response-transferred", Response::Transferred { accepted: true }),
        sample("response-refused", Response::Refused("this is another node".into())),
    ];
    first.into_iter().chain(later).collect()
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(format!("{name}.v{}", frame::VERSION))
}

#[test]
fn golden_files_are_read_and_written_as_ever() {
    for (name, written, again) in samples() {
        if std::env::var_os("ORCA_GOLDEN").is_some_and(|how| how == "write") {
            fs::write(path(name), &written).unwrap();
        }
        let golden = fs::read(path(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
        let read = again(&golden).unwrap_or_else(|error| panic!("{name}: {error}"));
        assert_eq!(String::from_utf8_lossy(&golden), String::from_utf8_lossy(&read), "{name} read");
        assert_eq!(String::from_utf8_lossy(&golden), String::from_utf8_lossy(&written), "{name} written");
    }
}

#[test]
fn a_specification_of_before_there_was_a_key_means_its_default() {
    let golden = fs::read(path("entry-put-services")).unwrap();
    let Payload::Change(entry) = decode::<Entry>(&golden).unwrap().payload else { panic!("it is a change") };
    let Command::PutServices(PutServices { services, .. }) = entry.command else { panic!("it is a deploy") };
    let seconds: Vec<u64> = services.values().map(|service| service.response_timeout().as_secs()).collect();
    assert_eq!(seconds, [60, 90]);
}

#[test]
fn what_openraft_gets_back_is_what_it_gave() {
    for payload in [Payload::Blank, Payload::Change(change()), Payload::Membership(membership())] {
        let raft = RaftEntry::try_from(entry(payload)).unwrap();
        let there = encode(&Entry::from(raft.clone()));
        let back = RaftEntry::try_from(decode::<Entry>(&there).unwrap()).unwrap();
        assert_eq!(raft, back);
    }
    let (meta, state) = snapshot().open().unwrap();
    let (again, same) = Snapshot::new(&meta, state.clone()).open().unwrap();
    assert_eq!((meta, state), (again, same));
    assert_eq!(Vote::from(&RaftVote::from(VOTE)), VOTE);
}

/// What was accepted by an earlier version must be read by every later one, whatever it would refuse today.
#[test]
fn a_rule_that_has_become_stricter_does_not_keep_the_store_from_opening() {
    let file =
        SourceFile { name: "service.toml".to_owned(), text: "[[service]]\nname = \"web\"\nimage = \"a\"\n".into() };
    let Project { name, mut services } = toml::project(&file, &"shop".parse().unwrap()).unwrap();
    for service in services.values_mut() {
        service.replicas = u32::MAX;
        service.source = Source::Image("NOT/an image".to_owned());
    }
    let project = Project { name: name.clone(), services: services.clone() };
    let sent = serde_json::to_string(&project).unwrap();
    assert!(serde_json::from_str::<Project>(&sent).is_err(), "from people and programs it is refused");
    let settings = Settings { domain: Some("NOT a domain".to_owned()), ..Settings::default() };
    assert!(!check::settings(&settings).is_empty());

    let put = PutServices {
        project: name,
        services,
        prune: false,
        replace: false,
        if_generation: None,
        settings: None,
        recalls: false,
    };
    let mut state = State::default();
    for (index, command) in (1..).zip([Command::PutServices(put), Command::SetSettings(settings)]) {
        let entry = command::Entry { command, ..change() };
        let stored = encode(&Entry { term: 1, index, payload: Payload::Change(entry) });
        let Payload::Change(entry) = decode::<Entry>(&stored).unwrap().payload else { panic!("it was a change") };
        assert!(matches!(state.apply(index, entry), Applied::Done { .. }));
    }
    let snapshot = Snapshot { state: state.clone(), ..snapshot() };
    assert_eq!(decode::<Snapshot>(&encode(&snapshot)).unwrap().state, state);
}

#[test]
fn a_membership_nobody_could_agree_on_is_refused() {
    let mut stranger = membership();
    stranger.voters[0].insert(RaftId(77));
    let refused = RaftMembership::try_from(stranger).unwrap_err();
    assert!(matches!(refused, CodecError::Contradiction { what: "membership", .. }), "{refused}");
}

fn change_bytes(bytes: &mut Vec<u8>, damage: &[(usize, u8, u8)]) {
    for (at, how, byte) in damage {
        let at = at % (bytes.len() + 1);
        match how % 4 {
            0 => bytes.truncate(at),
            1 => bytes.insert(at, *byte),
            2 if at < bytes.len() => drop(bytes.remove(at)),
            _ if at < bytes.len() => bytes[at] ^= byte,
            _ => {}
        }
    }
}

proptest! {
    #[test]
    fn damaged_bytes_are_refused_and_never_panic(
        which in 0..25_usize,
        damage in prop::collection::vec((0..100_000_usize, 0..4_u8, 1..=255_u8), 1..4),
    ) {
        let (name, whole, again) = samples().swap_remove(which);
        let mut damaged = whole.clone();
        change_bytes(&mut damaged, &damage);
        match again(&damaged) {
            // Cut off and put back: it can happen.
            Ok(_) => prop_assert!(damaged == whole, "{name} was damaged unnoticed"),
            Err(CodecError::Damaged { .. }) => {}
            Err(other) => prop_assert!(false, "{name}: {other}"),
        }
    }

    /// As a peer of another version, or one gone mad, might send: whole, and nonsense.
    #[test]
    fn nonsense_under_a_right_checksum_is_refused_and_never_panics(
        which in 0..25_usize,
        damage in prop::collection::vec((0..100_000_usize, 0..4_u8, 1..=255_u8), 1..4),
    ) {
        let (_, whole, again) = samples().swap_remove(which);
        let mut payload = whole[6..].to_vec();
        change_bytes(&mut payload, &damage);
        for kind in [Kind::Entry, Kind::Vote, Kind::Snapshot, Kind::Request, Kind::Response] {
            let sealed = frame::seal(kind, &payload);
            let _ = again(&sealed);
            if let Ok(entry) = decode::<Entry>(&sealed) {
                let _ = RaftEntry::try_from(entry);
            }
            if let Ok(snapshot) = decode::<Snapshot>(&sealed) {
                let _ = snapshot.open();
            }
        }
    }
}
