//! Every test of the whole system, in one binary.

mod cli;
mod crash;
mod deploy;
mod scenarios;
mod secrets;
mod simulation;
mod support;
