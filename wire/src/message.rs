//! Everything two Orca processes say to each other. Messages are enums in one place; a variant or field that the
//! other side does not know is a clean error or is passed over, never a guess.

pub mod agent;
pub mod client;
