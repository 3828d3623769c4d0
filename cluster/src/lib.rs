//! Every decision Orca makes, and no I/O.
//!
//! ```text
//!   TOML ──spec──▶ Command ──apply──▶ State ──┐
//!                                             ├──▶ Leader ──plan──▶ Command, Goal
//!   reports of nodes ──▶ Inventory ───────────┘                         │
//!                                                                       ▼
//!   runtimes, probes ◀──Action── Reconciler (one on each node) ◀────────┘
//! ```

pub mod id;
pub mod resource;
pub mod time;

pub mod spec;

pub mod command;
pub mod event;
pub mod limit;
pub mod rotation;
pub mod secret;
pub mod state;

pub mod replica;
pub mod route;
pub mod traffic;

pub mod inventory;
pub mod view;
pub mod waiting;

pub mod doctor;
pub mod leader;
pub mod plan;
pub mod status;
pub mod why;

pub mod goal;
pub mod node;
