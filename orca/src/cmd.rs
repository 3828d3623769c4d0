//! What each command does: parse is over, the cluster is known, the screen is somebody else's.

pub mod change;
pub mod complete;
pub mod context;
pub mod deploy;
pub mod doctor;
pub mod exec;
pub mod handover;
pub mod init;
pub mod logs;
pub mod secrets;
pub mod server;
pub mod settle;
pub mod status;
pub mod terminal;
pub mod token;
pub mod up;
pub mod version;

use std::process::ExitCode;

use crate::cli::{Cli, Command, Global};
use crate::context::{Surroundings, choose};
use crate::exit::{Exit, Failure};
use crate::output::Output;
use crate::session::Session;

pub async fn run(cli: Cli, output: &Output) -> Result<ExitCode, Failure> {
    let global = &cli.global;
    match cli.command {
        Command::Server(_) | Command::Up(_) => unreachable!("a server runs on its own runtime"),
        Command::Init(args) => init::run(&args, output),
        Command::Deploy(args) => deploy::run(args, global, output).await,
        Command::Plan(args) => deploy::plan(args, global, output).await,
        Command::Redeploy(args) => change::redeploy(args, global, output).await,
        Command::Scale(args) => change::scale(args, global, output).await,
        Command::Stop(args) => change::stop(args, global, output).await,
        Command::Start(args) => change::start(args, global, output).await,
        Command::Restart(args) => change::restart(args, global, output).await,
        Command::Rm(args) => change::remove(args, global, output).await,
        Command::Promote(args) => change::promote(args, global, output).await,
        Command::Rollback(args) => change::rollback(args, global, output).await,
        Command::Status(args) => status::status(args, global, output).await,
        Command::Ps(args) => status::ps(args, global, output).await,
        Command::Nodes => status::nodes(global, output).await,
        Command::Top(args) => status::top(args, global, output).await,
        Command::Why(args) => status::why(args, global, output).await,
        Command::History(args) => status::history(args, global, output).await,
        Command::Logs(args) => logs::logs(args, global, output).await,
        Command::Events(args) => logs::events(args, global, output).await,
        Command::Exec(args) => exec::run(args, global).await,
        Command::Secrets { command } => secrets::run(command, global, output).await,
        Command::Token { command } => token::run(command, global, output).await,
        Command::Doctor(args) => doctor::run(args, global, output).await,
        Command::Context { command } => context::run(command, output).await,
        Command::Completions(args) => complete::run(&args, output),
        Command::Version => version::run(global, output).await,
    }
}

/// For commands whose `--timeout` is about one answer.
async fn session(global: &Global) -> Result<Session, Failure> {
    Session::open(choose(global.context.as_deref(), &Surroundings::read())?, global.timeout).await
}

/// For commands whose `--timeout` is about waiting for the cluster to settle.
async fn patient_session(global: &Global) -> Result<Session, Failure> {
    Session::open(choose(global.context.as_deref(), &Surroundings::read())?, None).await
}

fn done() -> Result<ExitCode, Failure> {
    Ok(Exit::Done.into())
}
