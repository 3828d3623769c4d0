//! The command tree. Every leaf has a sentence, examples and its exit codes in `--help`; the examples are data, so a
//! test can parse each of them.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{ArgAction, Args, CommandFactory as _, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;
use orca_cluster::id::{Generation, Label, ReplicaId, Revision, ServiceName};
use orca_cluster::secret::TokenId;
use orca_cluster::spec::check::node_label;
use orca_cluster::state::Role;

use crate::exit::Exit;
use crate::moment;

#[derive(Debug, Parser)]
#[command(
    name = "orca",
    version,
    about = "Runs containers and Wasm services on your own servers",
    arg_required_else_help = true,
    disable_help_subcommand = true,
    max_term_width = 100
)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Clone, Default, Args)]
#[command(next_help_heading = "General options")]
pub struct Global {
    /// Which cluster, by the name of its context
    #[arg(long, global = true, value_name = "NAME")]
    pub context: Option<String>,
    /// Print JSON, with the version of its schema
    #[arg(long, global = true)]
    pub json: bool,
    /// Print results and errors only
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Say more (-vv: what goes over the network)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
    /// Answer every question with yes
    #[arg(short, long, global = true)]
    pub yes: bool,
    /// How long to wait at most: 30s, 10m
    #[arg(long, global = true, value_name = "SPAN", value_parser = moment::parse_span)]
    pub timeout: Option<Duration>,
}

// No doc comment on these three: it would become the first line of `orca --help`.
#[derive(Debug, Subcommand)]
pub enum Command {
    #[command(flatten)]
    Server(ServerCommand),
    #[command(flatten)]
    Client(ClientCommand),
}

// A server runs in the process.
#[derive(Debug, Subcommand)]
pub enum ServerCommand {
    /// Run a server: control plane, agent and proxy of this machine
    Server(ServerArgs),
    /// Start a server if none runs, deploy a project, print its URLs and follow it
    Up(UpArgs),
}

// It asks a server, or nobody.
#[derive(Debug, Subcommand)]
pub enum ClientCommand {
    /// Write a starter service.toml
    Init(InitArgs),
    /// Make the cluster run what the files say
    Deploy(DeployArgs),
    /// Show what a deploy would do, without doing it
    Plan(PlanArgs),
    /// Pull the image again and replace all replicas
    Redeploy(ChangeArgs),
    /// Show how everything is, and why
    Status(StatusArgs),
    /// List replicas
    Ps(PsArgs),
    /// Show what replicas wrote
    Logs(LogsArgs),
    /// Run a command in a running replica
    Exec(ExecArgs),
    /// Change the number of replicas
    Scale(ScaleArgs),
    /// Stop a service and keep its specification
    Stop(ChangeArgs),
    /// Start a stopped service
    Start(ChangeArgs),
    /// Replace all replicas, a few at a time
    Restart(ChangeArgs),
    /// Remove a service
    Rm(RmArgs),
    /// Let the canary take over
    Promote(ChangeArgs),
    /// Go back to an earlier revision
    Rollback(RollbackArgs),
    /// List a service's revisions and what their rollouts cost
    History(ServiceArgs),
    /// Set and list secrets; their values are never shown
    Secrets {
        #[command(subcommand)]
        command: Secrets,
    },
    /// Create and revoke tokens of people and programs
    Token {
        #[command(subcommand)]
        command: Tokens,
    },
    /// Show what happened, and who did it
    Events(EventsArgs),
    /// List nodes
    Nodes,
    /// Show usage and traffic as they change
    Top(TopArgs),
    /// Say what is wrong with a service, and what to do about it
    Why(ServiceArgs),
    /// Check this machine and the cluster
    Doctor(DoctorArgs),
    /// Choose which cluster commands go to
    Context {
        #[command(subcommand)]
        command: Contexts,
    },
    /// Print completions for a shell
    Completions(CompletionsArgs),
    /// Print versions
    Version,
}

#[derive(Debug, Clone, Args)]
pub struct ServerArgs {
    /// Where everything is kept [default: /var/lib/orca as root, else ~/.local/share/orca]
    #[arg(long, value_name = "DIR")]
    pub data_dir: Option<PathBuf>,
    /// This node's name, given to it when the cluster is founded [default: the host's]
    #[arg(long)]
    pub name: Option<String>,
    /// What [service.placement] `labels` can ask for, such as zone=eu-1; may be given several times
    #[arg(long = "label", value_name = "KEY=VALUE", value_parser = node_label)]
    pub labels: Vec<(String, String)>,
    /// Where the proxy listens [default: port 80 if that is allowed, else 8080]
    #[arg(long, value_name = "ADDR:PORT")]
    pub http: Option<SocketAddr>,
    /// A load balancer or TLS proxy in front, whose X-Forwarded-For, -Proto and -Host are passed on; may be given several
    /// times. Those of anybody else are replaced
    #[arg(long = "trusted-proxy", value_name = "CIDR", value_parser = network)]
    pub trusted_proxies: Vec<IpNet>,
    /// Where the CLI and other nodes are served (QUIC, over UDP); the HTTP API gets the TCP port of the same number, on
    /// loopback only, as it has no TLS yet
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:6880")]
    pub listen: SocketAddr,
    /// The address others reach this node at [default: that of --listen]
    #[arg(long, value_name = "HOST:PORT")]
    pub advertise: Option<String>,
    /// The key that opens this cluster's secrets; made on the first start, and never inside the data directory
    #[arg(long, value_name = "FILE")]
    pub unseal_key: Option<PathBuf>,
    /// Take over from the server that runs on the same data directory, without refusing a connection
    #[arg(long)]
    pub take_over: bool,
    /// Write a line for each request to this file; to rotate it, rename it (logrotate with `delaycompress`, no signal)
    #[arg(long, value_name = "FILE")]
    pub access_log: Option<PathBuf>,
    /// How to write the log
    #[arg(long, value_name = "FORMAT", default_value = "text")]
    pub log_format: LogFormat,
}

/// A network, or one address.
fn network(text: &str) -> Result<IpNet, String> {
    let network = text.parse().or_else(|_| text.parse::<IpAddr>().map(IpNet::from));
    network.map_err(|_| format!("`{text}` is no network; write such as 10.0.0.0/8 or 10.0.0.5"))
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Clone, Args)]
pub struct UpArgs {
    /// The project's directory
    #[arg(default_value = ".", value_name = "DIR")]
    pub dir: PathBuf,
    #[command(flatten)]
    pub server: ServerArgs,
    /// Set a random value for each secret that the project names and that is not set yet
    #[arg(long)]
    pub generate_secrets: bool,
    /// Do not go on showing the status once it runs; it is not shown with --json either
    #[arg(long)]
    pub no_follow: bool,
}

#[derive(Debug, Clone, Args)]
pub struct InitArgs {
    /// What to start from; without it, they are listed
    pub template: Option<Template>,
    /// Where to write
    #[arg(short, long, value_name = "FILE", default_value = "service.toml")]
    pub file: PathBuf,
    /// Replace the file if it exists
    #[arg(long)]
    pub force: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Template {
    Web,
    Wasm,
    Static,
    Postgres,
    Redis,
    Worker,
    Wordpress,
    N8n,
}

/// Where the files are.
#[derive(Debug, Clone, Default, Args)]
pub struct Files {
    /// A service.toml, or a directory [default: ./service.toml and ./services/*/service.toml]
    #[arg(short, long = "file", value_name = "PATH")]
    pub files: Vec<PathBuf>,
    /// Remove services of these projects that are not in the files
    #[arg(long)]
    pub prune: bool,
    /// Only if the cluster's state is still at this index, as `orca plan` printed it
    #[arg(long, value_name = "N")]
    pub if_index: Option<Generation>,
    /// Take the place of a deploy of the same service that runs
    #[arg(long)]
    pub replace: bool,
}

#[derive(Debug, Clone, Copy, Default, Args)]
pub struct Wait {
    /// Wait until it has settled (the default)
    #[arg(long, conflicts_with = "detach")]
    pub wait: bool,
    /// Return at once; the cluster goes on
    #[arg(long)]
    pub detach: bool,
}

#[derive(Debug, Clone, Default, Args)]
pub struct DeployArgs {
    /// Only these services [default: all in the files]
    #[arg(value_name = "SERVICE")]
    pub services: Vec<ServiceArg>,
    #[command(flatten)]
    pub files: Files,
    #[command(flatten)]
    pub wait: Wait,
    /// Show the plan and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Clone, Args)]
pub struct PlanArgs {
    /// Only these services [default: all in the files]
    #[arg(value_name = "SERVICE")]
    pub services: Vec<ServiceArg>,
    #[command(flatten)]
    pub files: Files,
    /// Exit with 3 if anything would change
    #[arg(long)]
    pub exit_code: bool,
}

#[derive(Debug, Clone, Args)]
pub struct ServiceArgs {
    /// `service`, or `project/service`
    pub service: ServiceArg,
}

#[derive(Debug, Clone, Args)]
pub struct ChangeArgs {
    /// `service`, or `project/service`
    pub service: ServiceArg,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Clone, Args)]
pub struct ScaleArgs {
    /// `service`, or `project/service`
    pub service: ServiceArg,
    /// How many
    pub replicas: u32,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Clone, Args)]
pub struct RmArgs {
    /// `service`, or `project/service`
    pub service: ServiceArg,
    /// Its volumes too, with all that is in them
    #[arg(long)]
    pub volumes: bool,
    #[command(flatten)]
    pub wait: Wait,
    /// Say what would be removed and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

#[derive(Debug, Clone, Args)]
pub struct RollbackArgs {
    /// `service`, or `project/service`
    pub service: ServiceArg,
    /// The revision to go back to [default: the one before]
    #[arg(long, value_name = "REVISION")]
    pub to: Option<Revision>,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Clone, Args)]
pub struct StatusArgs {
    /// `service`, or `project/service`
    pub service: Option<ServiceArg>,
    /// Show it again whenever it changes
    #[arg(short, long)]
    pub follow: bool,
}

#[derive(Debug, Clone, Args)]
pub struct PsArgs {
    /// Only this service's
    pub service: Option<ServiceArg>,
}

#[derive(Debug, Clone, Args)]
pub struct LogsArgs {
    /// `service`, `project/service`, or with a replica: `service/r12`
    pub service: ServiceArg,
    /// Go on with what is written from now on
    #[arg(short, long)]
    pub follow: bool,
    /// From then on: 10m, 2h, 2026-01-31T14:00:00Z
    #[arg(long, value_name = "WHEN")]
    pub since: Option<String>,
    /// The last so many lines [default: 100 when following, else all]
    #[arg(short = 'n', long, value_name = "LINES")]
    pub tail: Option<u32>,
    /// Only this replica's: r12
    #[arg(long, value_name = "REPLICA")]
    pub replica: Option<ReplicaId>,
    /// Only lines that contain this
    #[arg(long, value_name = "TEXT")]
    pub grep: Option<String>,
    /// Put the time in front of each line
    #[arg(short, long)]
    pub timestamps: bool,
}

#[derive(Debug, Clone, Args)]
pub struct ExecArgs {
    /// `service`, `project/service`, or with a replica: `service/r12`
    pub service: ServiceArg,
    /// In this replica: r12 [default: one that is ready]
    #[arg(long, value_name = "REPLICA")]
    pub replica: Option<ReplicaId>,
    /// Give it no terminal even if there is one
    #[arg(short = 'T', long)]
    pub no_tty: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<String>,
}

#[derive(Debug, Subcommand)]
pub enum Secrets {
    /// Set a secret, from standard input or a prompt
    Set(SecretSetArgs),
    /// List names, versions and who uses them; never values
    List(ProjectArgs),
    /// Remove a secret
    Rm(SecretRmArgs),
    /// Set every NAME=value of a file
    Import(SecretImportArgs),
    /// Seal secrets anew under new data keys; restarts nothing
    Rotate(ProjectArgs),
}

#[derive(Debug, Clone, Args)]
pub struct ProjectArgs {
    /// Of this project [default: those every project may read; `list` and `rotate`: all]
    #[arg(short, long)]
    pub project: Option<Label>,
}

#[derive(Debug, Clone, Args)]
pub struct SecretSetArgs {
    /// Letters, digits and underscores
    pub name: String,
    #[command(flatten)]
    pub scope: ProjectArgs,
}

#[derive(Debug, Clone, Args)]
pub struct SecretRmArgs {
    pub name: String,
    #[command(flatten)]
    pub scope: ProjectArgs,
}

#[derive(Debug, Clone, Args)]
pub struct SecretImportArgs {
    /// A .env file; `-` is standard input
    #[arg(default_value = "-")]
    pub file: PathBuf,
    #[command(flatten)]
    pub scope: ProjectArgs,
}

#[derive(Debug, Subcommand)]
pub enum Tokens {
    /// Create a token; it is shown once
    Create(TokenCreateArgs),
    /// List tokens; never their secrets
    List,
    /// Revoke a token
    Revoke(TokenRevokeArgs),
}

#[derive(Debug, Clone, Args)]
pub struct TokenCreateArgs {
    /// Whom or what it is for
    pub name: String,
    /// What it allows
    #[arg(long, value_enum)]
    pub role: RoleArg,
    /// Only for this project
    #[arg(short, long)]
    pub project: Option<Label>,
    /// Good for so long: 24h, 90d [default: until it is revoked]
    #[arg(long, value_name = "SPAN", value_parser = moment::parse_span)]
    pub expires: Option<Duration>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum RoleArg {
    /// Sees everything but secrets
    Viewer,
    /// Changes services and secrets
    Deployer,
    /// Everything
    Admin,
}

impl From<RoleArg> for Role {
    fn from(role: RoleArg) -> Role {
        match role {
            RoleArg::Viewer => Role::Viewer,
            RoleArg::Deployer => Role::Deployer,
            RoleArg::Admin => Role::Admin,
        }
    }
}

#[derive(Debug, Clone, Args)]
pub struct TokenRevokeArgs {
    /// Its id, as `orca token list` shows it
    pub id: TokenId,
}

#[derive(Debug, Clone, Args)]
pub struct EventsArgs {
    /// Only of this service
    pub service: Option<ServiceArg>,
    /// Only of this project
    #[arg(short, long)]
    pub project: Option<Label>,
    /// From then on: 10m, 2h, 2026-01-31T14:00:00Z
    #[arg(long, value_name = "WHEN")]
    pub since: Option<String>,
    /// The last so many
    #[arg(short = 'n', long, value_name = "COUNT", default_value_t = 50)]
    pub last: u32,
    /// Go on with what happens from now on
    #[arg(short, long)]
    pub follow: bool,
}

#[derive(Debug, Clone, Args)]
pub struct TopArgs {
    /// Only this service
    pub service: Option<ServiceArg>,
    /// Once, and end
    #[arg(long)]
    pub once: bool,
}

#[derive(Debug, Clone, Args)]
pub struct DoctorArgs {
    /// The key file of a server on this machine, to check it too
    #[arg(long, value_name = "FILE")]
    pub unseal_key: Option<PathBuf>,
}

#[derive(Debug, Subcommand)]
pub enum Contexts {
    /// Add a cluster; its token comes from standard input, a prompt or $ORCA_TOKEN
    Add(ContextAddArgs),
    /// Use this one from now on
    Use(ContextUseArgs),
    /// List them
    List,
}

#[derive(Debug, Clone, Args)]
pub struct ContextAddArgs {
    pub name: String,
    /// Of any of its nodes; can be given several times
    #[arg(short, long = "address", value_name = "HOST:PORT", required = true)]
    pub addresses: Vec<String>,
    /// A directory with an identity instead of a token
    #[arg(long, value_name = "DIR")]
    pub identity: Option<PathBuf>,
    /// Do not use it from now on
    #[arg(long)]
    pub keep_current: bool,
    /// Take the place of a context of that name
    #[arg(long)]
    pub replace: bool,
}

#[derive(Debug, Clone, Args)]
pub struct ContextUseArgs {
    pub name: String,
}

#[derive(Debug, Clone, Args)]
pub struct CompletionsArgs {
    pub shell: clap_complete::Shell,
}

/// A service as people name it: alone, with its project, or with a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ServiceArg {
    Bare(Label),
    Full(ServiceName),
    Replica { project: Option<Label>, service: Label, replica: ReplicaId },
}

impl FromStr for ServiceArg {
    type Err = String;
    fn from_str(text: &str) -> Result<ServiceArg, String> {
        let label = |part: &str| Label::new(part).map_err(|error| error.to_string());
        let replica = |part: &str| {
            let digits = part.strip_prefix('r')?;
            digits.parse().ok().filter(|_| !digits.starts_with('+')).map(ReplicaId)
        };
        let parts: Vec<&str> = text.split('/').collect();
        match parts.as_slice() {
            [service] => Ok(ServiceArg::Bare(label(service)?)),
            [first, second] => match replica(second) {
                Some(replica) => Ok(ServiceArg::Replica { project: None, service: label(first)?, replica }),
                None => Ok(ServiceArg::Full(ServiceName::new(label(first)?, label(second)?))),
            },
            [project, service, last] => match replica(last) {
                Some(replica) => {
                    Ok(ServiceArg::Replica { project: Some(label(project)?), service: label(service)?, replica })
                }
                None => Err(format!("`{last}` is not a replica, such as r12")),
            },
            _ => Err("write `service`, `project/service` or `project/service/r12`".to_owned()),
        }
    }
}

impl fmt::Display for ServiceArg {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ServiceArg::Bare(service) => write!(f, "{service}"),
            ServiceArg::Full(name) => write!(f, "{name}"),
            ServiceArg::Replica { project: Some(project), service, replica } => {
                write!(f, "{project}/{service}/{replica}")
            }
            ServiceArg::Replica { project: None, service, replica } => write!(f, "{service}/{replica}"),
        }
    }
}

impl Command {
    /// Whether it prints data, so that `--json` means something.
    pub fn prints_data(&self) -> bool {
        let command = match self {
            Command::Server(ServerCommand::Server(_)) => return false,
            Command::Server(ServerCommand::Up(_)) => return true,
            Command::Client(command) => command,
        };
        match command {
            ClientCommand::Exec(_) | ClientCommand::Completions(_) => false,
            ClientCommand::Init(_)
            | ClientCommand::Deploy(_)
            | ClientCommand::Plan(_)
            | ClientCommand::Redeploy(_)
            | ClientCommand::Status(_)
            | ClientCommand::Ps(_)
            | ClientCommand::Logs(_)
            | ClientCommand::Scale(_)
            | ClientCommand::Stop(_)
            | ClientCommand::Start(_)
            | ClientCommand::Restart(_)
            | ClientCommand::Rm(_)
            | ClientCommand::Promote(_)
            | ClientCommand::Rollback(_)
            | ClientCommand::History(_)
            | ClientCommand::Secrets { .. }
            | ClientCommand::Token { .. }
            | ClientCommand::Events(_)
            | ClientCommand::Nodes
            | ClientCommand::Top(_)
            | ClientCommand::Why(_)
            | ClientCommand::Doctor(_)
            | ClientCommand::Context { .. }
            | ClientCommand::Version => true,
        }
    }
}

/// Commands that print no data: `--json` is refused, and not in their help.
const WITHOUT_DATA: [&str; 3] = ["server", "exec", "completions"];

/// What people type, by command.
const EXAMPLES: &[(&str, &[&str])] = &[
    ("server", &["orca server", "orca server --data-dir /srv/orca --http 0.0.0.0:80 --listen 10.0.0.5:6880"]),
    ("up", &["orca up examples/hello", "orca up --no-follow"]),
    ("init", &["orca init", "orca init web", "orca init postgres --file services/db/service.toml"]),
    ("deploy", &["orca deploy", "orca deploy api -f services/shop", "orca deploy --prune -y --if-index 4182"]),
    ("plan", &["orca plan", "orca plan --exit-code --json"]),
    ("redeploy", &["orca redeploy api"]),
    ("status", &["orca status", "orca status shop/api", "orca status -f"]),
    ("ps", &["orca ps", "orca ps api --json"]),
    ("logs", &["orca logs api -f", "orca logs api --since 10m --grep timeout", "orca logs api/r12 -n 100"]),
    ("exec", &["orca exec api -- sh", "orca exec shop/db/r3 -- pg_dump shop"]),
    ("scale", &["orca scale api 5"]),
    ("stop", &["orca stop api"]),
    ("start", &["orca start api"]),
    ("restart", &["orca restart api", "orca restart api --detach"]),
    ("rm", &["orca rm api", "orca rm db --volumes -y"]),
    ("promote", &["orca promote api"]),
    ("rollback", &["orca rollback api", "orca rollback api --to v3"]),
    ("history", &["orca history api"]),
    ("secrets set", &["orca secrets set DB_URL --project shop", "orca secrets set API_KEY"]),
    ("secrets list", &["orca secrets list", "orca secrets list --project shop"]),
    ("secrets rm", &["orca secrets rm DB_URL --project shop"]),
    ("secrets import", &["orca secrets import .env --project shop"]),
    ("secrets rotate", &["orca secrets rotate", "orca secrets rotate --project shop"]),
    ("token create", &["orca token create ci --role deployer --project shop --expires 90d"]),
    ("token list", &["orca token list"]),
    ("token revoke", &["orca token revoke abcd2345"]),
    ("events", &["orca events", "orca events api --since 1h -f"]),
    ("nodes", &["orca nodes"]),
    ("top", &["orca top", "orca top --once --json"]),
    ("why", &["orca why api"]),
    ("doctor", &["orca doctor"]),
    ("context add", &["orca context add prod --address 10.0.0.5:6880 --address 10.0.0.6:6880"]),
    ("context use", &["orca context use prod"]),
    ("context list", &["orca context list"]),
    ("completions", &["orca completions bash"]),
    ("version", &["orca version"]),
];

/// How a command can end, besides what every command can.
fn exits(path: &str) -> Vec<Exit> {
    let mut exits = vec![Exit::Done, Exit::General, Exit::Input];
    let asks = [Exit::Unauthorised, Exit::Unreachable];
    let names = [Exit::NotFound];
    let changes = [Exit::Conflict, Exit::TimedOut, Exit::NoQuorum];
    let rolls = [Exit::RolledBack, Exit::Degraded];
    match path {
        "init" | "completions" | "version" | "server" | "doctor" => {}
        "context add" => exits.extend(asks.into_iter().chain([Exit::Conflict])),
        "context use" | "context list" => exits.extend(names),
        "plan" => exits.extend(asks.iter().chain(&names).copied().chain([Exit::Changes, Exit::Conflict])),
        "deploy" | "up" | "redeploy" | "restart" | "scale" | "rollback" | "promote" | "start" => {
            exits.extend(asks.iter().chain(&names).chain(&changes).chain(&rolls).copied());
        }
        "stop" | "rm" | "secrets set" | "secrets rm" | "secrets import" | "secrets rotate" | "token create"
        | "token revoke" => exits.extend(asks.iter().chain(&names).chain(&changes).copied()),
        _ => exits.extend(asks.iter().chain(&names).copied()),
    }
    exits.push(Exit::Interrupted);
    exits.sort();
    exits
}

/// The tree, with examples and exit codes under the help of every leaf.
pub fn command() -> clap::Command {
    complete_help(Cli::command().after_help(ENVIRONMENT), "")
}

const ENVIRONMENT: &str = "\
Environment:
  ORCA_CONTEXT     the file with the contexts, instead of ~/.config/orca/contexts.toml
  ORCA_ADDRESS     HOST:PORT of a server, instead of a context's
  ORCA_TOKEN       a token, instead of a context's
  ORCA_UNSEAL_KEY  for a server: the unseal key, instead of a file
  ORCA_LOG         what is logged, such as debug or info,orca_control=trace
  DOCKER_HOST      the Docker engine's socket, unix:///var/run/docker.sock unless it is set
  NO_COLOR         no colours";

fn complete_help(command: clap::Command, path: &str) -> clap::Command {
    let names: Vec<String> = command.get_subcommands().map(|leaf| leaf.get_name().to_owned()).collect();
    if names.is_empty() {
        let command = command.after_help(after_help(path));
        return if WITHOUT_DATA.contains(&path) { hide_json(command) } else { command };
    }
    names.into_iter().fold(command, |command, name| {
        let below = if path.is_empty() { name.clone() } else { format!("{path} {name}") };
        command.mut_subcommand(name, |leaf| complete_help(leaf, &below))
    })
}

/// An argument of its own in the place of the one that every command inherits, which cannot be hidden for one of them.
fn hide_json(command: clap::Command) -> clap::Command {
    let refused =
        clap::Arg::new("json").long("json").action(ArgAction::SetTrue).help("Refused: there is no data to print");
    command.arg(refused.hide(true))
}

fn after_help(path: &str) -> String {
    let mut text = String::from("Examples:\n");
    for example in examples(path) {
        text.push_str(&format!("  {example}\n"));
    }
    text.push_str("\nExit codes:\n");
    for exit in exits(path) {
        text.push_str(&format!("  {:>3}  {}\n", exit.code(), exit.meaning()));
    }
    if path == "exec" {
        text.push_str("  else the command's own\n");
    }
    text
}

fn examples(path: &str) -> &'static [&'static str] {
    EXAMPLES.iter().find(|(command, _)| *command == path).map_or(&[], |(_, examples)| examples)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::FromArgMatches as _;

    fn leaves(command: &clap::Command, path: &str, found: &mut Vec<(String, clap::Command)>) {
        if command.get_subcommands().next().is_none() {
            found.push((path.to_owned(), command.clone()));
        }
        for below in command.get_subcommands() {
            let path =
                if path.is_empty() { below.get_name().to_owned() } else { format!("{path} {}", below.get_name()) };
            leaves(below, &path, found);
        }
    }

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        let matches = command().try_get_matches_from(line.split_whitespace())?;
        Cli::from_arg_matches(&matches)
    }

    #[test]
    fn every_leaf_has_a_sentence_examples_that_parse_its_exit_codes_and_json_where_it_prints_data() {
        let mut tree = command();
        tree.build();
        let mut found = Vec::new();
        leaves(&tree, "", &mut found);
        assert!(found.len() >= EXAMPLES.len());
        for (path, mut leaf) in found {
            assert!(leaf.get_about().is_some(), "{path} has no sentence");
            let help = leaf.render_long_help().to_string();
            assert!(help.contains("Exit codes:") && help.contains("    0  done"), "{path} does not say its exit codes");
            assert_eq!(help.contains("--json"), !WITHOUT_DATA.contains(&path.as_str()), "{path}: {help}");
            assert!(!examples(&path).is_empty(), "{path} has no example");
            for example in examples(&path) {
                let parsed = parse(example).unwrap_or_else(|error| panic!("{example}: {error}"));
                let with_json = match example.split_once(" -- ") {
                    Some((before, after)) => format!("{before} --json -- {after}"),
                    None if example.contains("--json") => (*example).to_owned(),
                    None => format!("{example} --json"),
                };
                assert!(parse(&with_json).is_ok_and(|cli| cli.global.json), "{path} does not know --json");
                assert_eq!(parsed.command.prints_data(), !WITHOUT_DATA.contains(&path.as_str()), "{path}");
            }
            for argument in leaf.get_arguments().filter(|argument| !argument.is_positional()) {
                assert!(argument.get_help().is_some(), "{path} {} has no help", argument.get_id());
            }
        }
    }

    #[test]
    fn the_tree_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn services_are_named_alone_with_their_project_or_with_a_replica() {
        let named = |text: &str| text.parse::<ServiceArg>().map(|arg| arg.to_string());
        for text in ["api", "shop/api", "api/r12", "shop/api/r12"] {
            assert_eq!(named(text).as_deref(), Ok(text));
        }
        assert!(matches!("api/r12".parse(), Ok(ServiceArg::Replica { project: None, .. })));
        assert!(matches!("shop/rest".parse(), Ok(ServiceArg::Full(_))));
        for text in ["", "/", "a/b/c", "a/b/c/d", "Api", "a/"] {
            assert!(text.parse::<ServiceArg>().is_err(), "{text}");
        }
    }
}
