//! Every test of the whole system, in one binary.

mod scenarios;
mod simulation;
