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

use crate::cli::{ClientCommand, Global, ServerCommand};
use crate::context::{Surroundings, choose};
use crate::exit::{Exit, Failure};
use crate::output::Output;
use crate::session::Session;

/// On a runtime of its own.
pub fn serve(command: ServerCommand, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    match command {
        ServerCommand::Server(args) => server::run(&args, output),
        ServerCommand::Up(args) => up::run(args, global, output),
    }
}

pub async fn run(command: ClientCommand, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    match command {
        ClientCommand::Init(args) => init::run(&args, output),
        ClientCommand::Deploy(args) => deploy::run(args, global, output).await,
        ClientCommand::Plan(args) => deploy::plan(args, global, output).await,
        ClientCommand::Redeploy(args) => change::redeploy(args, global, output).await,
        ClientCommand::Scale(args) => change::scale(args, global, output).await,
        ClientCommand::Stop(args) => change::stop(args, global, output).await,
        ClientCommand::Start(args) => change::start(args, global, output).await,
        ClientCommand::Restart(args) => change::restart(args, global, output).await,
        ClientCommand::Rm(args) => change::remove(args, global, output).await,
        ClientCommand::Promote(args) => change::promote(args, global, output).await,
        ClientCommand::Rollback(args) => change::rollback(args, global, output).await,
        ClientCommand::Status(args) => status::status(args, global, output).await,
        ClientCommand::Ps(args) => status::ps(args, global, output).await,
        ClientCommand::Nodes => status::nodes(global, output).await,
        ClientCommand::Top(args) => status::top(args, global, output).await,
        ClientCommand::Why(args) => status::why(args, global, output).await,
        ClientCommand::History(args) => status::history(args, global, output).await,
        ClientCommand::Logs(args) => logs::logs(args, global, output).await,
        ClientCommand::Events(args) => logs::events(args, global, output).await,
        ClientCommand::Exec(args) => exec::run(args, global).await,
        ClientCommand::Secrets { command } => secrets::run(command, global, output).await,
        ClientCommand::Token { command } => token::run(command, global, output).await,
        ClientCommand::Doctor(args) => doctor::run(args, global, output).await,
        ClientCommand::Context { command } => context::run(command, output).await,
        ClientCommand::Completions(args) => complete::run(&args, output),
        ClientCommand::Version => version::run(global, output).await,
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
