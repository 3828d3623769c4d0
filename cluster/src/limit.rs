//! Limits: how much of each thing one cluster holds. The log, its snapshots and the one message in which a node is told
//! its goal are finite; whoever comes to an end of them is told so when asking for more, and not by a goal that cannot
//! be sent.
//!
//! The limits that a change must keep come with it, in its entry ([`Limited`](crate::command::Command::Limited)): an
//! entry from before there was a limit, or from when it was another, does the same for ever. What is past a limit
//! already stays and may become less.

mod goal;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use crate::id::{LABEL_LENGTH_MAX, Label};
use crate::resource::Memory;
use crate::secret::{Scope, SecretName};
use crate::spec::template::SECRET_NAME_LENGTH_MAX;
use crate::state::State;
use goal::goal_bytes;

/// Largest module, in bytes: what the largest components with an interpreter in them come to, twice. Whoever takes one
/// in refuses a larger one: the command line before it is sent, the control node, the node that runs it.
pub const MODULE_BYTES_MAX: u64 = 64 << 20;

/// How much there may be; see [`Limits::OURS`]. What an entry does not name is not limited by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Names under which there are services or secrets.
    pub projects: u64,
    /// Services of all projects.
    pub services: u64,
    pub tokens: u64,
    /// Secrets of all projects, and those that every project may read.
    pub secrets: u64,
    /// Bytes of their values, as they are sealed.
    pub secret_bytes: u64,
    /// Secrets of one project, or those that every project may read.
    pub scope_secrets: u64,
    pub scope_secret_bytes: u64,
    /// Bytes that a node would be told if every replica of every service were on it, without the secrets.
    pub goal_bytes: u64,
}

impl Default for Limits {
    fn default() -> Limits {
        let none = u64::MAX;
        Limits {
            projects: none,
            services: none,
            tokens: none,
            secrets: none,
            secret_bytes: none,
            scope_secrets: none,
            scope_secret_bytes: none,
            goal_bytes: none,
        }
    }
}

impl Limits {
    /// What this version asks of new changes. Far above what 20 servers run, and so that the last three together fit
    /// into one message: any service may use any secrets, and any node may be left with every replica.
    pub const OURS: Limits = Limits {
        projects: 500,
        services: 2_000,
        tokens: 1_000,
        secrets: 2_000,
        secret_bytes: 5 << 20,
        scope_secrets: 500,
        scope_secret_bytes: 2 << 20,
        goal_bytes: 8 << 20,
    };

    /// The same as it is written into entries. How long a goal is depends on how a version writes it, and an entry means
    /// the same to every version: that limit is looked at before an entry is made.
    pub const IN_ENTRIES: Limits = Limits { goal_bytes: u64::MAX, ..Limits::OURS };

    /// The longest message, in JSON, that a goal within these limits comes to.
    pub const fn message_bytes(&self) -> u64 {
        // Base64 has four characters for three bytes.
        let values = (self.secret_bytes + self.secrets * SEAL_BYTES) / 3 * 4;
        ENVELOPE_BYTES + self.goal_bytes + values + self.secrets * SECRET_NAME_BYTES
    }

    /// Whether one may come from `before` to `after`: nothing that is past its limit may have become more.
    pub(crate) fn check(&self, before: &State, after: &State) -> Result<(), Excess> {
        let now = self.usage(after);
        if now.excess(self, &Usage::default()).is_none() {
            return Ok(());
        }
        now.excess(self, &self.usage(before)).map_or(Ok(()), Err)
    }

    /// Of goals only where they are limited: every replica is written out for that.
    fn usage(&self, state: &State) -> Usage {
        if self.goal_bytes == u64::MAX { Usage::without_goals(state) } else { Usage::of(state) }
    }
}

/// The `{"goal": …}` around it, its numbers, and the names of its fields.
const ENVELOPE_BYTES: u64 = 1 << 10;
/// What sealing a value to a node adds to it, and filling up to whole groups of Base64.
const SEAL_BYTES: u64 = 32 + 16 + 3;
/// The name of a secret in a goal, with its project and what JSON puts around the two.
const SECRET_NAME_BYTES: u64 = (LABEL_LENGTH_MAX + 1 + SECRET_NAME_LENGTH_MAX + 6) as u64;

/// One limit that a change would break.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Excess {
    pub what: Limit,
    pub limit: u64,
    /// How much it would be.
    pub wanted: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Limit {
    Projects,
    Services,
    Tokens,
    Secrets,
    SecretBytes,
    ScopeSecrets(Scope),
    ScopeSecretBytes(Scope),
    GoalBytes,
}

impl fmt::Display for Excess {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Excess { what, limit, wanted } = self;
        // Rounded up, so that it is never the same as the limit.
        let (kib, max) = (wanted.div_ceil(1 << 10), Memory(*limit));
        match what {
            Limit::Projects => write!(
                f,
                "there would be {wanted} projects, and a cluster has at most {limit}; remove the services and secrets \
                 of one that is not needed"
            ),
            Limit::Services => write!(
                f,
                "there would be {wanted} services, and a cluster has at most {limit}; remove some with `orca rm`"
            ),
            Limit::Tokens => write!(
                f,
                "there would be {wanted} tokens, and a cluster has at most {limit}; revoke some with `orca token revoke`"
            ),
            Limit::Secrets => write!(
                f,
                "there would be {wanted} secrets, and a cluster has at most {limit}; remove some with `orca secrets rm`"
            ),
            Limit::SecretBytes => write!(
                f,
                "the secrets of all projects would be {kib} KiB together, and {max} is the most; remove some with \
                 `orca secrets rm`, and keep large files in a volume"
            ),
            Limit::ScopeSecrets(scope) => write!(
                f,
                "{} would have {wanted} secrets, and {limit} is the most; remove some with `orca secrets rm`",
                Owner(scope)
            ),
            Limit::ScopeSecretBytes(scope) => write!(
                f,
                "the secrets of {} would be {kib} KiB together, and {max} is the most; remove some with \
                 `orca secrets rm`, and keep large files in a volume",
                Owner(scope)
            ),
            Limit::GoalBytes => write!(
                f,
                "what a node is told of all services would be {kib} KiB, and {max} is the most; use fewer replicas, \
                 smaller environments and commands, or fewer routes"
            ),
        }
    }
}

struct Owner<'a>(&'a Scope);

impl fmt::Display for Owner<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Scope::Project(project) => write!(f, "project {project}"),
            Scope::Global => f.write_str("the global scope"),
            Scope::Cluster => f.write_str("the cluster itself"),
        }
    }
}

/// How much there is.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Usage {
    pub projects: u64,
    pub services: u64,
    pub tokens: u64,
    /// Number and bytes, by whose they are.
    pub secrets: BTreeMap<Scope, (u64, u64)>,
    /// As of [`Limits::goal_bytes`].
    pub goal_bytes: u64,
}

impl Usage {
    pub fn of(state: &State) -> Usage {
        Usage { goal_bytes: goal_bytes(state), ..Usage::without_goals(state) }
    }

    fn without_goals(state: &State) -> Usage {
        let mut usage =
            Usage { services: state.services.len() as u64, tokens: state.tokens.len() as u64, ..Usage::default() };
        for (name, record) in &state.secrets {
            let (count, bytes) = usage.secrets.entry(name.scope()).or_default();
            *count += 1;
            *bytes += record.value.value.bytes.0.len() as u64;
        }
        let served = state.services.keys().map(|name| &name.project);
        let projects: BTreeSet<&Label> = served.chain(state.secrets.keys().filter_map(SecretName::project)).collect();
        usage.projects = projects.len() as u64;
        usage
    }

    fn all_secrets(&self) -> (u64, u64) {
        self.secrets.values().fold((0, 0), |(count, bytes), (more, theirs)| (count + more, bytes + theirs))
    }

    /// The first limit that this is past, by more than it was before.
    fn excess(&self, limits: &Limits, before: &Usage) -> Option<Excess> {
        let &Limits {
            projects,
            services,
            tokens,
            secrets,
            secret_bytes,
            scope_secrets,
            scope_secret_bytes,
            goal_bytes,
        } = limits;
        let mut found = None;
        let mut look = |what: Limit, limit: u64, wanted: u64, was: u64| {
            if wanted > limit && wanted > was && found.is_none() {
                found = Some(Excess { what, limit, wanted });
            }
        };
        look(Limit::Projects, projects, self.projects, before.projects);
        look(Limit::Services, services, self.services, before.services);
        look(Limit::Tokens, tokens, self.tokens, before.tokens);
        for (scope, (count, bytes)) in &self.secrets {
            let (count_before, bytes_before) = before.secrets.get(scope).copied().unwrap_or_default();
            look(Limit::ScopeSecrets(scope.clone()), scope_secrets, *count, count_before);
            look(Limit::ScopeSecretBytes(scope.clone()), scope_secret_bytes, *bytes, bytes_before);
        }
        let ((count, bytes), (count_before, bytes_before)) = (self.all_secrets(), before.all_secrets());
        look(Limit::Secrets, secrets, count, count_before);
        look(Limit::SecretBytes, secret_bytes, bytes, bytes_before);
        look(Limit::GoalBytes, goal_bytes, self.goal_bytes, before.goal_bytes);
        found
    }
}

/// The length of a value as it is sent, without making that text.
pub fn json_bytes(value: &impl Serialize) -> u64 {
    struct Count(u64);
    impl io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0 += bytes.len() as u64;
            Ok(bytes.len())
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    serde_json::to_writer(&mut count, value).expect("our types have string keys and no fallible serialisers");
    count.0
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;
    use crate::command::put::tests::put;
    use crate::command::put::{Reach, preview_within};
    use crate::command::{Applied, Command, Entry, NewNode, Refusal};
    use crate::event::Actor;
    use crate::goal::Duty;
    use crate::id::{NodeId, Revision, ServiceName};
    use crate::leader::{Leader, Order};
    use crate::replica::{Observed, Phase, ReplicaReport};
    use crate::secret::{Ciphertext, DataKeyId, Opaque, SealedDataKey, SealedValue, SealingPublicKey, TokenId};
    use crate::state::{Role, Token};
    use crate::time::Timestamp;

    const NODE: NodeId = NodeId(1);

    fn label(text: &str) -> Label {
        Label::new(text).unwrap()
    }

    fn data_key(scope: Scope) -> SealedDataKey {
        let key = Ciphertext { nonce: Opaque(vec![]), bytes: Opaque(vec![]) };
        SealedDataKey { id: DataKeyId { scope, version: 1 }, root: 1, created: Timestamp(1), key }
    }

    fn secret(name: &str, version: u32, length: usize) -> Command {
        let name: SecretName = name.parse().unwrap();
        let value = Ciphertext { nonce: Opaque(vec![]), bytes: Opaque(vec![0; length]) };
        let value = SealedValue { key: DataKeyId { scope: name.scope(), version: 1 }, version, value };
        Command::SetSecret { name, version, value }
    }

    /// One node, and everything that happens to it at once: the least and the most that a goal can be.
    struct World {
        state: State,
        index: u64,
        limits: Limits,
    }

    impl World {
        fn new(limits: Limits) -> World {
            let mut world = World { state: State::default(), index: 0, limits };
            let sealing_key = SealingPublicKey(Opaque(vec![]));
            let node = NewNode { name: "one".into(), address: "one:1".into(), sealing_key };
            world.apply(Command::Admit(node)).unwrap();
            for scope in [Scope::Global, Scope::Project(label("shop")), Scope::Project(label("blog"))] {
                world.apply(Command::NewDataKey { key: data_key(scope), rotates: false }).unwrap();
            }
            world
        }

        fn apply(&mut self, command: Command) -> Result<(), Refusal> {
            self.index += 1;
            let command = self.limits.hold(command);
            let entry = Entry { at: Timestamp(self.index), actor: Actor::Orca, source: None, command };
            let before = self.state.clone();
            match self.state.apply(self.index, entry) {
                Applied::Done { .. } | Applied::Unchanged { .. } => Ok(()),
                Applied::Refused(refusal) => {
                    assert!(self.state == before, "a refused command changed something");
                    Err(refusal)
                }
            }
        }

        fn is_too_much(&mut self, command: Command, what: &Limit) {
            match self.apply(command) {
                Err(Refusal::TooMuch(excess)) => assert_eq!(excess.what, *what, "{excess}"),
                other => panic!("{other:?}"),
            }
        }

        /// Until nothing happens any more; every goal on the way must fit into what was counted before it was sent.
        fn settle(&mut self) -> u64 {
            let mut now = Timestamp(1_000_000 * (self.index + 1));
            let mut leader = Leader::new(self.index, Arc::new(self.state.clone()), now);
            let (mut seen, mut longest) = (Observed::default(), 0);
            for _ in 0..2_000 {
                now = now + Duration::from_millis(500);
                seen.at = now;
                leader.handle_report(NODE, seen.clone(), now);
                leader.handle_timeout(now);
                while let Some(order) = leader.poll_order() {
                    match order {
                        Order::Propose(command) => {
                            self.apply(command).unwrap();
                            leader.handle_state(Arc::new(self.state.clone()), now);
                            leader.handle_proposed(now);
                        }
                        Order::SendGoal(_, goal) => {
                            let counted = Usage::of(&self.state).goal_bytes + ENVELOPE_BYTES;
                            let length = json_bytes(&goal);
                            assert!(length <= counted, "{length} bytes, and {counted} were counted");
                            longest = length.max(longest);
                            seen = observed(&goal, now);
                        }
                    }
                }
            }
            assert!(self.state.services.values().all(|deployed| deployed.rollout.is_none()), "it does not settle");
            longest
        }
    }

    fn observed(goal: &crate::goal::Goal, now: Timestamp) -> Observed {
        let replicas = goal.replicas.iter().map(|(id, replica)| {
            let report = ReplicaReport {
                service: replica.service.clone(),
                revision: replica.revision,
                phase: if replica.duty == Duty::Run { Phase::Ready } else { Phase::Gone },
                since: now,
                address: Some("[2001:db8:1111:2222:3333:4444:5555:6666]:65535".parse().unwrap()),
                digest: Some(format!("sha256:{}", "a".repeat(64))),
                restarts: 0,
                failures: 0,
                last_exit: None,
                trouble: None,
                usage: Default::default(),
                pulled: None,
                pulling: None,
                ready_after_ms: Some(1),
                on_trial: false,
                runs: Default::default(),
            };
            (*id, report)
        });
        let acknowledged = (goal.tables.number, goal.tables.generation);
        Observed { at: now, replicas: replicas.collect(), acknowledged, ..Observed::default() }
    }

    const SHOP: &str = "[[service]]\nname = \"web\"\nimage = \"web:1\"\nport = 8080\nreplicas = 7\n\
        domain = \"shop.test\"\nroutes = [\"/*\", \"/api/*\"]\n\
        [service.env]\nTEXT = \"quoted \\\" \\\\ and \\u0001 and ü\"\nKEY = \"${secrets.KEY}\"\n\
        [[service]]\nname = \"db\"\nimage = \"db:1\"\n[[service.volume]]\nname = \"data\"\npath = \"/data\"\n";

    #[test]
    fn a_goal_is_never_longer_than_was_counted() {
        let mut world = World::new(Limits::OURS);
        world.apply(secret("KEY", 1, 10)).unwrap();
        world.apply(Command::PutServices(put("shop", SHOP))).unwrap();
        let first = world.settle();
        let counted = Usage::of(&world.state).goal_bytes;
        assert!(first * 3 / 2 > counted, "{first} bytes, and {counted} are counted: that is far too careful");
        // A secret that comes to have the longer name, new replicas of a longer specification, fewer of them, and back.
        world.apply(secret("shop/KEY", 1, 10)).unwrap();
        let longer = SHOP.replace("web:1", &format!("web:{}", "2".repeat(100))).replace("/api/*", "/another/*");
        world.apply(Command::PutServices(put("shop", &longer))).unwrap();
        world.settle();
        let web: ServiceName = "shop/web".parse().unwrap();
        for replicas in [1, 9] {
            world.apply(Command::Scale { service: web.clone(), replicas }).unwrap();
            world.settle();
        }
        world.apply(Command::Restart { service: web.clone(), pull: true }).unwrap();
        world.settle();
        world.apply(Command::Rollback { service: web, to: Some(Revision(1)) }).unwrap();
        world.settle();
    }

    #[test]
    fn what_is_at_its_limit_stays_and_may_become_less_and_not_more() {
        let all = Limits::default();
        let scope = Scope::Project(label("shop"));
        let one = |name: &str| put(name, "[[service]]\nname = \"web\"\nimage = \"web:1\"\n");
        let token = |name: &str| {
            let id: TokenId = format!("{name}aaaaaaa").parse().unwrap();
            let token = Token {
                name: name.to_owned(),
                hash: crate::secret::TokenHash(Opaque(vec![])),
                role: Role::Viewer,
                project: None,
                created: Timestamp(1),
                expires: None,
            };
            Command::CreateToken { id, token }
        };

        let mut world = World::new(Limits { tokens: 1, ..all });
        world.apply(token("a")).unwrap();
        world.is_too_much(token("b"), &Limit::Tokens);

        let mut world = World::new(Limits { projects: 2, services: 2, ..all });
        world.apply(secret("shop/A", 1, 1)).unwrap();
        world.apply(Command::PutServices(one("blog"))).unwrap();
        world.apply(Command::PutServices(one("shop"))).unwrap();
        world.is_too_much(Command::PutServices(one("wiki")), &Limit::Projects);
        let two = put("blog", "[[service]]\nname = \"api\"\nimage = \"web:1\"\n");
        world.is_too_much(Command::PutServices(two), &Limit::Services);

        let mut world =
            World::new(Limits { secrets: 3, scope_secrets: 2, secret_bytes: 300, scope_secret_bytes: 200, ..all });
        world.apply(secret("shop/A", 1, 100)).unwrap();
        world.is_too_much(secret("shop/B", 1, 101), &Limit::ScopeSecretBytes(scope.clone()));
        world.apply(secret("shop/B", 1, 100)).unwrap();
        world.is_too_much(secret("shop/C", 1, 0), &Limit::ScopeSecrets(scope));
        world.is_too_much(secret("blog/A", 1, 101), &Limit::SecretBytes);
        world.apply(secret("blog/A", 1, 100)).unwrap();
        world.is_too_much(secret("A", 1, 0), &Limit::Secrets);
        // As after an upgrade to a version that allows less.
        world.limits = Limits { secrets: 1, scope_secrets: 1, secret_bytes: 1, scope_secret_bytes: 1, ..all };
        world.apply(secret("shop/A", 2, 100)).unwrap();
        world.apply(secret("shop/A", 3, 50)).unwrap();
        world.apply(Command::PutServices(one("blog"))).unwrap();
        assert!(world.apply(secret("shop/A", 4, 51)).is_err());
        world.apply(Command::RemoveSecret { name: "shop/A".parse().unwrap(), if_unused: false }).unwrap();
    }

    #[test]
    fn a_service_that_no_goal_could_hold_is_refused_by_plan_and_by_deploy_with_what_to_do() {
        let mut world = World::new(Limits::OURS);
        let text = |replicas: u32| {
            let values: String = (0..30).map(|at| format!("V{at} = \"{}\"\n", "x".repeat(4_000))).collect();
            format!("[[service]]\nname = \"web\"\nimage = \"web:1\"\nreplicas = {replicas}\n[service.env]\n{values}")
        };
        let large = put("shop", &text(100));
        let Err(planned) = preview_within(&world.state, &large, Reach::Cluster, &Limits::OURS) else {
            panic!("it is accepted")
        };
        assert_eq!(world.apply(Command::PutServices(large)), Err(planned.clone()));
        let expected = "use fewer replicas, smaller environments and commands, or fewer routes";
        assert!(planned.to_string().contains(expected) && planned.to_string().contains("8Mi"), "{planned}");
        world.apply(Command::PutServices(put("shop", &text(10)))).unwrap();
        let service: ServiceName = "shop/web".parse().unwrap();
        world.is_too_much(Command::Scale { service, replicas: 100 }, &Limit::GoalBytes);
    }

    #[test]
    fn secrets_of_the_greatest_length_are_refused_before_they_fill_a_goal() {
        let mut world = World::new(Limits::OURS);
        let mut set = 0;
        let refused = loop {
            match world.apply(secret(&format!("shop/S{set}"), 1, 64 << 10)) {
                Ok(()) => set += 1,
                Err(refusal) => break refusal,
            }
        };
        assert_eq!(set, 32);
        assert_eq!(
            refused.to_string(),
            "the secrets of project shop would be 2112 KiB together, and 2Mi is the most; remove some with \
             `orca secrets rm`, and keep large files in a volume"
        );
    }

    #[test]
    fn an_entry_without_limits_does_what_it_always_did() {
        let text = r#"{"at":1,"actor":"orca","source":null,"command":{"limited":{"limits":{"tokens":1},"command":
            {"announce":[]}}}}"#;
        let entry: Entry = serde_json::from_str(text).unwrap();
        let Command::Limited { limits, .. } = &entry.command else { panic!("{entry:?}") };
        assert_eq!(*limits, Limits { tokens: 1, ..Limits::default() });

        let mut world = World::new(Limits::default());
        let Command::SetSecret { name, version, value } = secret("shop/A", 1, 8 << 20) else { unreachable!() };
        let entry = Entry {
            at: Timestamp(1),
            actor: Actor::Orca,
            source: None,
            command: Command::SetSecret { name, version, value },
        };
        assert!(matches!(world.state.apply(99, entry), Applied::Done { .. }));
    }
}
