//! The one binary. Parses, sets up the log, runs one command, and says how it ended.

mod cli;
mod cmd;
mod context;
mod exit;
mod files;
mod log;
mod moment;
mod output;
mod session;

use std::process::ExitCode;

use clap::FromArgMatches as _;
use cli::{Cli, Command};
use exit::{Exit, Failure};
use output::Output;

fn main() -> ExitCode {
    let matches = cli::command().get_matches();
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    let output = Output::new(&cli.global);
    let ended = if cli.global.json && !cli.command.prints_data() {
        Err(Failure::input("this command prints no data").fix("leave out --json"))
    } else {
        run(cli, &output)
    };
    match ended {
        Ok(code) => code,
        Err(failure) => {
            output.fail(&failure);
            failure.exit.into()
        }
    }
}

fn run(cli: Cli, output: &Output) -> Result<ExitCode, Failure> {
    let command = match cli.command {
        Command::Server(command) => return cmd::serve(command, &cli.global, output),
        Command::Client(command) => command,
    };
    log::init_for_command(output.verbose);
    // One thread does: a client waits for one answer at a time, and starts sooner.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|error| Failure::from_error(Exit::General, &error))?;
    let ended = runtime.block_on(cmd::run(command, &cli.global, output));
    // A thread may be reading the terminal, and nobody can tell it to stop.
    runtime.shutdown_background();
    ended
}
