//! Every test of the whole system, in one binary.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod cli;
mod crash;
mod deploy;
mod engine;
mod pull;
mod scenarios;
mod secrets;
mod simulation;
mod support;
mod why;
