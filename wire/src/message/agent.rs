//! The agent plane: a node and the control node that leads.
//!
//! The agent opens one stream with [`Attach`] and keeps it: [`ToAgent`] comes down, [`FromAgent`] goes up. What a
//! person waits for (logs, exec) runs on streams of its own, which the control node opens with [`Errand`].

use orca_cluster::goal::Goal;
use orca_cluster::id::{NodeId, ReplicaId, ServiceName};
use orca_cluster::replica::Observed;
use orca_cluster::secret::Opaque;
use orca_cluster::time::Timestamp;
use serde::{Deserialize, Serialize};

/// The first message of an agent. Which node it is, its certificate says.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Attach {
    pub version: String,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToAgent {
    Goal(Box<Goal>),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromAgent {
    Report(Box<Observed>),
}

/// What an agent asks of a control node, one stream each.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentRequest {
    Attach(Attach),
    /// The bytes of a module, by hex SHA-256. Answered by [`Blob`], then that many raw bytes.
    Module {
        digest: String,
    },
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Blob {
    Here { size: u64 },
    Missing,
}

/// What a control node asks of an agent on behalf of a person, one stream each.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Errand {
    /// Answered by [`LogRead`]s until there are no more, or, following, for ever.
    Logs(LogsErrand),
    /// Answered by [`ExecOutput`]s, the last of which is its exit; [`ExecInput`]s go the other way.
    Exec(ExecErrand),
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct LogsErrand {
    pub replica: ReplicaId,
    pub service: ServiceName,
    pub module: bool,
    pub since: Option<Timestamp>,
    /// The last so many lines; absent means all there are.
    pub tail: Option<u32>,
    pub follow: bool,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ExecErrand {
    pub replica: ReplicaId,
    pub command: Vec<String>,
    pub terminal: Option<Size>,
    /// Whether anything will be typed.
    pub stdin: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    pub columns: u16,
    pub rows: u16,
}

/// One line that a replica wrote.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    pub at: Timestamp,
    pub replica: ReplicaId,
    pub node: NodeId,
    pub stream: LogStream,
    pub text: String,
}

/// What comes of a replica's log. An agent of before there was anything but lines sends those just the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum LogRead {
    Line(LogLine),
    /// The last: there is more, and this is why it cannot be had.
    Failed {
        failed: String,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogStream {
    Stdout,
    Stderr,
}

/// What is typed, and the window's size.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecInput {
    Bytes(Opaque),
    Resize(Size),
    End,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExecOutput {
    Stdout(Opaque),
    Stderr(Opaque),
    Exit { code: i64 },
    Failed { reason: String },
}
