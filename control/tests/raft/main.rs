//! The agreement, from outside: real stores, real elections, and disks and processes that fail.

#![expect(clippy::unwrap_used, reason = "a test ends where something is not as it should be")]

mod cluster;
mod kill;
mod one;
mod power;
mod support;
