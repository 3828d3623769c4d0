//! The proxy from outside: real sockets, real servers behind it, and a client that sees every byte.

#![allow(clippy::unwrap_used, reason = "a test may")]

mod bodies;
mod change;
mod forward;
mod framing;
mod limits;
mod module;
mod services;
mod upgrade;
mod world;
