//! What is logged, on standard error. `ORCA_LOG` says which part says how much: `debug`, or
//! `info,orca_control=trace,quinn=debug`.

use std::io::{self, IsTerminal as _};

use tracing::Level;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::{Layer, SubscriberExt as _};
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{Registry, fmt};

use crate::cli::LogFormat;

/// What libraries and the connection have to say, for who runs a command.
pub fn init_for_command(verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::ERROR,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    init(fmt::layer().with_writer(io::stderr).with_target(false).boxed(), level, |asked| asked);
}

pub fn init_for_server(format: LogFormat, level: Level) {
    let lines = fmt::layer().with_ansi(io::stderr().is_terminal()).with_writer(io::stderr);
    let layer = match format {
        LogFormat::Text => lines.with_target(false).boxed(),
        LogFormat::Json => lines.json().boxed(),
    };
    // Whatever is asked for: bollard writes what it sends to the engine, secrets included.
    let quiet = ["bollard", "hyper", "wasmtime", "cranelift", "openraft"].map(|library| (library, LevelFilter::WARN));
    init(layer, level.into(), |asked| asked.with_targets(quiet));
}

fn init(layer: Box<dyn Layer<Registry> + Send + Sync>, level: LevelFilter, limit: impl FnOnce(Targets) -> Targets) {
    let asked = std::env::var("ORCA_LOG").ok().map(|asked| asked.parse::<Targets>());
    let everything = Targets::new().with_default(level);
    let (filter, problem) = match asked {
        None => (everything, None),
        Some(Ok(filter)) => (filter, None),
        Some(Err(problem)) => (everything, Some(problem)),
    };
    tracing_subscriber::registry().with(layer.with_filter(limit(filter))).init();
    if let Some(problem) = problem {
        tracing::error!(%problem, "ORCA_LOG is not understood, as in `debug` or `info,orca_control=trace`");
    }
}
