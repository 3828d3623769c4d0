//! The HTTP proxy: one [`worker`] for each core, and in it
//!
//! ```text
//!   listener ──▶ connection (framing below, hyper within) ──▶ forward ──▶ upstream (upload, response, pool) ──▶ replica
//!                    ▲                                         │  ▲             │
//!                    │                        route, balance ──┘  └── upgrade, exchange, page
//!                    └── splice: large bodies, past our memory ◀────────────────┘
//! ```
//!
//! `route`, `balance`, `framing` and `response` decide and do nothing else.

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
pub mod response;
pub mod route;
pub mod splice;
pub mod table;
pub mod upgrade;
pub mod upload;
pub mod upstream;
pub mod websocket;
pub mod worker;
