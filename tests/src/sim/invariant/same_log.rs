use orca_cluster::state::State;

use crate::sim::World;

/// (1) Applying the log again gives the state there is, also by way of its stored form half way.
pub fn check(world: &World) {
    let mut state = State::default();
    let half = world.log.len() / 2;
    for (at, entry) in world.log.iter().enumerate() {
        state.apply(at as u64 + 1, entry.clone());
        if at == half {
            let stored = serde_json::to_vec(&state).expect("states can be stored");
            let back: State = serde_json::from_slice(&stored).expect("stored states can be read");
            assert!(back == state, "the state changes by being stored (seed {:#x})", world.seed);
            state = back;
        }
    }
    if state != *world.state {
        world.broken("the same log gave another state");
    }
}
