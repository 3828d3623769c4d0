//! What must hold, one property in a file; the numbers are those of ARCHITECTURE.md.
//!
//! | property | file |
//! |---|---|
//! | 1 the same log gives the same state | [`same_log`] |
//! | 2 no node acts on a smaller goal after a larger | [`generation`] |
//! | 3 a rollout never makes ready replicas fewer than promised | [`availability`] |
//! | 4 two live replicas never hold one exclusive volume | [`exclusive_volume`] |
//! | 5 tables name only replicas last reported ready, on nodes not suspect | [`tables`] |
//! | 8 when faults stop, the world settles as asked, and nobody emits anything | [`settled`] |
//! | 11 a replica is stopped only when its requests have ended or its drain time is over | [`drained`] |

pub mod availability;
pub mod drained;
pub mod exclusive_volume;
pub mod generation;
pub mod same_log;
pub mod settled;
pub mod tables;

use std::collections::BTreeMap;

use orca_cluster::id::ReplicaId;
use orca_cluster::state::{PlacementState, State};
use orca_cluster::time::Timestamp;

/// What has to be remembered to check them.
#[derive(Debug, Default)]
pub struct Ledger {
    /// When each replica was told to drain.
    pub drains: BTreeMap<ReplicaId, Timestamp>,
}

impl Ledger {
    pub fn note_drains(&mut self, state: &State, now: Timestamp) {
        for (id, placement) in &state.placements {
            if let PlacementState::Drain { .. } = placement.state {
                self.drains.entry(*id).or_insert(now);
            }
        }
    }
}
