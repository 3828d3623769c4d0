//! The agreement, from outside: real stores, real elections, and disks and processes that fail.

mod cluster;
mod kill;
mod one;
mod power;
mod support;
