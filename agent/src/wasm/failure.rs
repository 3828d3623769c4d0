//! Why a call came to nothing. Each reason is one that somebody treats differently: the proxy by its status, a
//! person reading the log by its text.

use std::time::Duration;

use orca_cluster::resource::Memory;
use wasmtime::{Trap, WasmBacktrace};
use wasmtime_wasi::I32Exit;
use wasmtime_wasi_http::p2::bindings::http::types::ErrorCode;

/// Frames of the module that a reason names.
const FRAMES_MAX: usize = 3;
/// Longest name of a function that is shown: generic Rust has names of kilobytes.
const FUNCTION_NAME_MAX: usize = 120;

#[derive(Debug, Clone, thiserror::Error)]
pub enum CallError {
    #[error("all {concurrency} instances of the module are busy; raise `max_concurrent` or `replicas`")]
    Busy { concurrency: u32 },
    #[error("the node has no room for another instance of any module")]
    NodeBusy,
    #[error("the replica is stopping")]
    Stopped,
    #[error("the module took longer than {limit:?}{}", at(.place))]
    TimedOut { limit: Duration, place: Option<String> },
    #[error("the module needed more than {limit} of memory{}", at(.place))]
    OutOfMemory { limit: Memory, place: Option<String> },
    #[error("trap: {trap}{}", at(.place))]
    Trapped { trap: String, place: Option<String> },
    #[error("the module ended without an answer")]
    NoAnswer,
    #[error("the module answered with an error: {code}")]
    Refused { code: String },
    #[error("the module ended with exit code {code}")]
    Exited { code: i32 },
    #[error("the module does not export {wanted}")]
    NotExported { wanted: &'static str },
    #[error("the runtime failed: {problem}")]
    Runtime { problem: String },
}

fn at(place: &Option<String>) -> String {
    place.as_ref().map(|place| format!(" at {place}")).unwrap_or_default()
}

/// What the callback that looks at the clock raises inside a running module.
#[derive(Debug, thiserror::Error)]
#[error("out of time")]
pub(super) struct OutOfTime;

/// What of a call's circumstances decides how its error is read.
pub(super) struct Circumstances {
    pub(super) timeout: Duration,
    pub(super) memory: Memory,
    /// Whether it was refused memory at any time.
    pub(super) memory_denied: bool,
}

impl CallError {
    pub(super) fn of(error: &wasmtime::Error, circumstances: &Circumstances) -> CallError {
        let place = place(error);
        if error.downcast_ref::<OutOfTime>().is_some() {
            return CallError::TimedOut { limit: circumstances.timeout, place };
        }
        if let Some(exit) = error.downcast_ref::<I32Exit>() {
            return CallError::Exited { code: exit.0 };
        }
        if error.downcast_ref::<wasmtime::PoolConcurrencyLimitError>().is_some() {
            return CallError::NodeBusy;
        }
        // A module that is refused memory mostly gives up with whatever its language does then: abort, panic, null.
        if circumstances.memory_denied {
            return CallError::OutOfMemory { limit: circumstances.memory, place };
        }
        let trap = match error.downcast_ref::<Trap>() {
            Some(trap) => trap.to_string(),
            None => error.root_cause().to_string(),
        };
        CallError::Trapped { trap, place }
    }

    pub(super) fn refused(code: &ErrorCode) -> CallError {
        CallError::Refused { code: format!("{code:?}") }
    }
}

/// The innermost functions of the module itself, innermost first: what stands above them is how its language
/// panics.
fn place(error: &wasmtime::Error) -> Option<String> {
    let backtrace = error.downcast_ref::<WasmBacktrace>()?;
    let names: Vec<String> = backtrace
        .frames()
        .iter()
        .map(|frame| match frame.func_name() {
            Some(name) => function_name(name),
            None => format!("function {}", frame.func_index()),
        })
        .collect();
    let own = names.iter().position(|name| !is_machinery(name)).unwrap_or(0);
    let shown: Vec<&str> = names[own..].iter().take(FRAMES_MAX).map(String::as_str).collect();
    (!shown.is_empty()).then(|| shown.join(" < "))
}

fn function_name(mangled: &str) -> String {
    let name = format!("{:#}", rustc_demangle::demangle(mangled));
    match name.char_indices().nth(FUNCTION_NAME_MAX) {
        Some((end, _)) => format!("{}…", &name[..end]),
        None => name,
    }
}

fn is_machinery(name: &str) -> bool {
    let name = name.trim_start_matches(['<', '&']);
    ["std::", "core::", "alloc::", "__rust", "rust_", "__rdl", "__rg", "abort"]
        .iter()
        .any(|start| name.starts_with(start))
}

impl CallError {
    /// Whether it is certain that nothing of the module has run.
    pub fn precedes_run(&self) -> bool {
        matches!(self, CallError::Busy { .. } | CallError::NodeBusy)
    }
}

impl From<&CallError> for orca_dataplane::ModuleError {
    fn from(error: &CallError) -> orca_dataplane::ModuleError {
        use orca_dataplane::ModuleError;
        match error {
            CallError::Busy { .. } | CallError::NodeBusy => ModuleError::Busy,
            CallError::Stopped | CallError::NotExported { .. } => ModuleError::Unavailable,
            CallError::TimedOut { .. } => ModuleError::TimedOut,
            CallError::OutOfMemory { .. } => ModuleError::TooMuchMemory,
            CallError::Trapped { .. }
            | CallError::NoAnswer
            | CallError::Refused { .. }
            | CallError::Exited { .. }
            | CallError::Runtime { .. } => ModuleError::Trapped,
        }
    }
}
