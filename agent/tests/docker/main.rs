//! The agent's Docker half against a real engine. `cargo xtask test` starts one and builds the images.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod bed;
mod engine;
mod image;
mod life;
mod talk;
