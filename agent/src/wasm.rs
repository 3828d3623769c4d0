//! Wasm services: components that answer requests, inside this process, without a socket in between.
//!
//! A component is compiled once and kept on disk as machine code. Each request gets an instance of its own, made from a
//! pool in microseconds (of a quick module before the request comes: [`spare`]) and thrown away after; so a module cannot
//! leak from one request into the next, and one that loops, traps or eats memory spoils its own request and no other.
//! Three things hold that up:
//!
//! - **Time.** A ticker raises the engine's epoch every 2 ms. A running instance that notices lets others have a
//!   turn, and ends when its time is up. Waits end at the same deadline. Guest code runs on a runtime of its own
//!   ([`runtime`]). Only of a module that has been quick ([`pace`]) the first turn is taken by whoever calls it, which
//!   is a thread of the proxy; what is not through then moves.
//! - **Memory.** Every byte of linear memory is counted against the service's limit, all memories together.
//! - **Reach.** What an instance can see is what [`guest`] hands it; whom it can call is decided in [`outbound`].
//!
//! Not here: who starts and stops replicas (the driver), and what to do with a failed call (the proxy).

mod cache;
mod engine;
mod failure;
mod guest;
mod outbound;
mod pace;
mod replica;
mod replicas;
mod spare;

use std::io;

pub use cache::module_digest;
pub use engine::{Component, Engine, EngineError, LoadError};
pub use failure::CallError;
pub use replica::{Module, Start};
pub use replicas::Replicas;

/// A runtime for modules: a thread for each core, which looks for news between any two turns of the instances.
pub fn runtime() -> io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .thread_name("module")
        // Turns are up to a tick long. At tokio's usual 61 turns between two looks at timers and sockets, a few
        // looping instances would keep the others waiting for most of a second.
        .event_interval(1)
        .global_queue_interval(1)
        .enable_all()
        .build()
}

#[cfg(test)]
mod tests;
