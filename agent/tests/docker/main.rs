//! The agent's Docker half against a real engine. `cargo xtask test` starts one and builds the images.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

/// Ends the calling test, having said why, where `cargo xtask test` found that there can be no Docker engine.
macro_rules! requires_docker {
    () => {
        if orca_tests::docker::is_skipped() {
            return;
        }
    };
}

mod bed;
mod engine;
mod image;
mod life;
mod talk;
