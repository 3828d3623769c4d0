//! Runs the [`Leader`] while this node leads: the only place where its orders become real. One loop, one term at a
//! time; what comes in between two decisions is taken in together.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use orca_cluster::command::Entry;
use orca_cluster::event::Actor;
use orca_cluster::goal::Goal;
use orca_cluster::id::{ClusterId, Generation, GoalNumber, NodeId, ServiceName};
use orca_cluster::inventory::Inventory;
use orca_cluster::leader::{Leader, Order};
use orca_cluster::secret::{Sealed, SecretName};
use orca_cluster::state::{State, Window};
use orca_cluster::time::Timestamp;
use orca_cluster::view::View;
use orca_cluster::waiting::Waiting;
use orca_wire::cause::chain;
use orca_wire::identity::{goal_context, seal};
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, error, info, warn};

use crate::clock::now;
use crate::inbox::{Held, Inbox};
use crate::raft::{Committed, ProposeError, Raft, Term};
use crate::session::Sessions;
use crate::vault::{Place, Vault};

/// After a proposal that failed, before the brain hears of it and proposes again: a few heartbeats, so that a
/// lasting fault is not a busy loop.
const PROPOSAL_PAUSE: Duration = Duration::from_millis(300);

/// What is known at one moment, for everyone who reads. Replaced as a whole at every decision.
#[derive(Debug, Clone)]
pub struct Overview {
    /// The term in which this node leads; without it the rest, beside the state, is empty.
    pub term: Option<Term>,
    pub at: Timestamp,
    pub state: Arc<State>,
    pub inventory: Arc<Inventory>,
    pub waiting: Arc<BTreeMap<ServiceName, Vec<Waiting>>>,
    pub sent: Arc<BTreeMap<NodeId, (GoalNumber, Generation)>>,
    /// Each service's traffic in the last minute.
    pub recent: Arc<BTreeMap<ServiceName, Window>>,
}

impl Overview {
    fn empty(state: Arc<State>) -> Overview {
        Overview {
            term: None,
            at: now(),
            state,
            inventory: Arc::new(Inventory::new(now())),
            waiting: Arc::default(),
            sent: Arc::default(),
            recent: Arc::default(),
        }
    }

    fn of(term: Term, brain: &Leader) -> Overview {
        Overview {
            term: Some(term),
            at: now(),
            state: brain.state().clone(),
            inventory: Arc::new(brain.inventory().clone()),
            waiting: Arc::new(brain.waiting().clone()),
            sent: Arc::new(brain.sent().clone()),
            recent: Arc::new(brain.recent()),
        }
    }

    pub fn view(&self, now: Timestamp) -> View<'_> {
        View { state: &self.state, inventory: &self.inventory, sent: &self.sent, recent: &self.recent, now }
    }
}

/// Everything a leader needs to carry out what its brain orders.
#[derive(Debug)]
pub struct Driver {
    pub raft: Raft,
    pub vault: Arc<Vault>,
    pub cluster: ClusterId,
    pub inbox: Arc<Inbox>,
    pub sessions: Sessions,
    pub published: watch::Sender<Arc<Overview>>,
}

impl Driver {
    /// A first overview, and whoever waits for the next.
    pub fn overview(raft: &Raft) -> watch::Sender<Arc<Overview>> {
        watch::Sender::new(Arc::new(Overview::empty(raft.state())))
    }

    /// Leads whenever this node is the leader, until it is dropped.
    pub async fn run(self) {
        let mut leadership = self.raft.leadership();
        let mut states = self.raft.watch();
        loop {
            let Some(term) = *leadership.borrow_and_update() else {
                // Somebody else decides; what the state says can be read here all the same.
                self.published.send_replace(Arc::new(Overview::empty(states.borrow_and_update().clone())));
                let over = tokio::select! {
                    changed = leadership.changed() => changed.is_err(),
                    changed = states.changed() => changed.is_err(),
                };
                if over {
                    return;
                }
                continue;
            };
            info!(term = term.0, "leading");
            tokio::select! {
                () = self.lead(term) => return,
                changed = leadership.changed() => {
                    info!(term = term.0, "leading no more");
                    if changed.is_err() {
                        return;
                    }
                }
            }
        }
    }

    /// One term. Ends by being dropped, or when Raft is over.
    async fn lead(&self, term: Term) {
        let mut states = self.raft.watch();
        let mut brain = Leader::new(term.0, states.borrow_and_update().clone(), now());
        let mut proposals = JoinSet::new();
        // Nodes that reported before the term began, and are still connected, need not say it again.
        self.take_in(&mut brain);
        brain.handle_timeout(now());
        loop {
            while let Some(order) = brain.poll_order() {
                match order {
                    Order::Propose(command) => {
                        let entry = Entry { at: now(), actor: Actor::Orca, source: None, command };
                        proposals.spawn(propose(self.raft.clone(), entry));
                    }
                    Order::SendGoal(node, goal) => {
                        let goal = self.with_secrets(brain.state(), node, *goal);
                        self.sessions.send_goal(node, goal);
                    }
                }
            }
            self.published.send_replace(Arc::new(Overview::of(term, &brain)));

            let timeout = brain.poll_timeout(now()).map(|(at, why)| (Instant::now() + at.since(now()), why));
            tokio::select! {
                changed = states.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    brain.handle_state(states.borrow_and_update().clone(), now());
                }
                () = self.inbox.filled() => self.take_in(&mut brain),
                Some(ended) = proposals.join_next() => {
                    ended.expect("a proposal neither panics nor is cancelled");
                    // The brain must see what was applied before it hears that it was.
                    brain.handle_state(states.borrow_and_update().clone(), now());
                    brain.handle_proposed(now());
                }
                () = at(timeout) => brain.handle_timeout(now()),
            }
        }
    }

    fn take_in(&self, brain: &mut Leader) {
        let Held { reports, connected } = self.inbox.take();
        for node in connected {
            brain.handle_connected(node);
        }
        for (node, observed) in reports {
            brain.handle_report(node, observed, now());
        }
    }

    /// The goal with every secret that its replicas refer to, sealed to the node.
    fn with_secrets(&self, state: &State, node: NodeId, mut goal: Goal) -> Goal {
        let names: BTreeSet<&SecretName> =
            goal.replicas.values().flat_map(|replica| replica.secrets.values()).collect();
        let sealed = names.into_iter().filter_map(|name| match self.sealed(state, node, name) {
            Ok(sealed) => Some((name.clone(), sealed)),
            Err(why) => {
                // Left out, so that the node reports it missing and `orca why` names it.
                error!(%node, secret = %name, why, "a secret cannot be given to its replicas");
                None
            }
        });
        goal.secrets = sealed.collect();
        goal
    }

    fn sealed(&self, state: &State, node: NodeId, name: &SecretName) -> Result<Sealed, String> {
        let record = state.secrets.get(name).ok_or("it is gone")?;
        let key = state.data_keys.get(&record.value.key).ok_or("its data key is gone")?;
        let to = state.nodes.get(&node).ok_or("the node is gone")?;
        let place = Place::secret(name, record.version);
        let secret = self.vault.open_value(&key.key, &place, &record.value).map_err(|error| chain(&error))?;
        let context = goal_context(self.cluster, node, name);
        seal(&to.sealing_key, context.as_bytes(), secret.expose()).map_err(|error| chain(&error))
    }
}

async fn at(timeout: Option<(Instant, &'static str)>) {
    match timeout {
        Some((at, why)) => {
            sleep_until(at).await;
            debug!(why, "a moment has come");
        }
        None => std::future::pending().await,
    }
}

/// Returns when the outcome is known, or when it is time to look again.
async fn propose(raft: Raft, entry: Entry) {
    match raft.propose(entry).await {
        Ok(Committed { index, applied }) => debug!(index, ?applied, "decided"),
        Err(error @ (ProposeError::NotLeader { .. } | ProposeError::NoQuorum | ProposeError::Unknown(_))) => {
            warn!(error = chain(&error), "a decision could not be written");
            sleep(PROPOSAL_PAUSE).await;
        }
        Err(error @ (ProposeError::TooLarge { .. } | ProposeError::Fatal(_))) => {
            error!(error = chain(&error), "a decision could not be written");
            sleep(PROPOSAL_PAUSE).await;
        }
    }
}
