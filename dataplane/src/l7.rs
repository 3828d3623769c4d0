//! The HTTP proxy: one [`worker`] for each core, and in it
//!
//! ```text
//!   listener ──▶ connection (framing below, hyper within) ──▶ forward ──▶ pool ──▶ replica
//!                                                              │  ▲
//!                                             route, balance ──┘  └── upgrade, exchange, page
//! ```
//!
//! `route`, `balance` and `framing` decide and do nothing else.

pub mod access_log;
pub mod balance;
pub mod connection;
pub mod count;
pub mod exchange;
pub mod forward;
pub mod framing;
pub mod header;
pub mod listen;
pub mod page;
pub mod pool;
pub mod route;
pub mod table;
pub mod upgrade;
pub mod websocket;
pub mod worker;
