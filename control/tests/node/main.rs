//! A whole control node: a real store in a directory, real QUIC and HTTP on loopback, and an agent that speaks the
//! real protocol and runs nothing.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod authorise;
mod deploy;
mod http;
mod restart;
mod secret;
mod support;
