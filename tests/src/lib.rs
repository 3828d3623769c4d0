//! The whole system under test. The library is the simulator, which knows only `orca-cluster`; the tests of real
//! processes are in `it/`.

pub mod docker;
pub mod script;
pub mod sim;
