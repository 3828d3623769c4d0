
pub mod raft;
pub mod store;
pub mod vault;
