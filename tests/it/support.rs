//! Whole clusters for the tests: a real `orca server` in a directory of its own, the real command line, the real
//! engine, and a load generator whose counts can be compared with the proxy's to the request. How to use it:
//!
//! ```text
//! #[test]
//! fn a_claim() {
//!     requires_docker!();                        // only if it runs containers
//!     let mut node = Node::start();              // founded, answers; `Node::with(Setup { .. })` for more
//!     node.deploy(&container("web", "1", "")).succeeded();
//!     let load = Load::start(node.target("web"), Rates::default());
//!     let deployed = node.deploy(&container("web", "2", ""));
//!     let tally = load.stop();
//!     assert_eq!(deployed.code, 0, "{deployed}");
//!     assert_eq!(tally.failed(), 0, "{tally}");
//! }                                              // all processes, containers, networks and volumes are gone
//! ```
//!
//! Every node has an address of its own in 127.0.0.0/8 (so the usual ports are free) and a project name of its own
//! (Docker's names carry no cluster): a service file without `project = …` gets that one; a test that needs another
//! begins its name with that, or its containers stay behind. Nothing here sleeps but [`wait_until`] and [`wait_for`], which poll a
//! condition and fail at their deadline, naming what was waited for. When a test fails, the logs of its servers are
//! printed.

mod docker;
mod engine;
mod load;
mod node;
mod ran;
mod registry;
mod wait;

pub use docker::{container_ids, docker, started_at};
pub use engine::Engine;
pub use load::{Kind, Load, Rates, Tally};
pub use node::{Node, Setup, container, module, orca_binary, probe, request, signal};
pub use ran::{Ran, Running};
pub use registry::{PASSWORD_HASH, Registry};
pub use wait::{PATIENCE, wait_for, wait_until};

/// Ends the calling test, having said why, where `cargo xtask test` found that there can be no Docker engine.
macro_rules! requires_docker {
    () => {
        if orca_tests::docker::is_skipped() {
            return;
        }
    };
}
pub(crate) use requires_docker;
