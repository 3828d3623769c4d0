//! What must hold, one property in a file; the numbers are those of ARCHITECTURE.md.
//!
//! | property | file |
//! |---|---|
//! | 1 the same log gives the same state | [`same_log`] |
//! | 2 no node acts on a smaller goal after a larger | [`generation`] |
//! | 3 a rollout never makes ready replicas fewer than promised | [`availability`] |
//! | 4 two live replicas never hold one exclusive volume | [`exclusive_volume`] |
//! | 5 tables name only replicas last reported ready, on nodes not suspect | [`tables`] |
//! | 6 what is unchanged causes no action | [`unchanged`] |
//! | 7 a term's first judgement comes when every node was heard or had the time to be | [`first_judgement`] |
//! | 8 when faults stop, the world settles as asked, and nobody emits anything | [`settled`] |
//! | 11 a replica is stopped only when its requests have ended or its drain time, without new ones, is over | [`drained`] |
//! | 12 a due time is begun at most once, and never what was skipped | [`schedule`] |
//! | 13 a route that was served stays served as long as a replica of its service can | [`served`] |
//! | nobody is woken for what is past or repeats at once what fails | [`busy`] |

pub mod availability;
pub mod busy;
pub mod drained;
pub mod exclusive_volume;
pub mod first_judgement;
pub mod generation;
pub mod same_log;
pub mod schedule;
pub mod served;
pub mod settled;
pub mod tables;
pub mod unchanged;

use std::collections::{BTreeMap, BTreeSet};

use orca_cluster::id::{NodeId, ReplicaId, ServiceName};
use orca_cluster::route::RouteKey;
use orca_cluster::time::Timestamp;

/// What has to be remembered to check them.
#[derive(Debug, Default)]
pub struct Ledger {
    /// When a proxy could last give a new request to each replica that leaves.
    pub drains: BTreeMap<ReplicaId, Timestamp>,
    /// Replicas that leave and whose node was given up meanwhile: nobody waits for those.
    pub lost: BTreeSet<ReplicaId>,
    /// When a node was last not there, or not heard.
    pub away: Timestamp,
    /// Which service had a ready replica for each route, by the newest tables.
    pub served: BTreeMap<RouteKey, ServiceName>,
    /// The second in which each node last did something, and how much.
    pub actions: BTreeMap<NodeId, (u64, usize)>,
    /// Which replica began each scheduled run, by service, schedule and due time.
    pub runs: BTreeMap<(ServiceName, String, Timestamp), ReplicaId>,
}
