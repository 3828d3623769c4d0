//! The agent's Docker half against a real engine. `cargo xtask test` starts one and builds the images.

mod bed;
mod engine;
mod image;
mod life;
mod talk;
