//! A node: does what it is told, and says what it sees. Decisions are [`orca_cluster::node`]'s; here are its hands.
//!
//! ```text
//!   control node ──goal──▶ session ──▶ driver ──▶ Reconciler ──action──▶ hands ──▶ docker, wasm, probe, data plane
//!                ◀─report─         ◀──         ◀──  finished, seen  ──
//! ```

pub mod clock;
pub mod config;

pub mod driver;
pub mod hands;
pub mod ledger;

pub mod errand;
pub mod session;

pub mod docker;
pub mod facts;
pub mod probe;

pub mod module_files;
pub mod module_log;
pub mod wasm;

#[cfg(test)]
mod testing;

pub use config::{Agent, AgentEnded, Config, StartError};
