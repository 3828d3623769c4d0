//! What the engine answers, as causes that someone can act on. The engine has one status for many troubles, so some
//! are told apart by its words; each set of words was seen from a real engine or registry.

use std::error::Error as _;
use std::io;
use std::path::Path;

use bollard::errors::Error as EngineError;
use orca_cluster::id::ReplicaId;
use orca_cluster::replica::Cause;

/// Why something someone asked of a running replica cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("{0} has no container on this node")]
    NoReplica(ReplicaId),
    #[error("{0} is not running")]
    NotRunning(ReplicaId),
    #[error("no Docker engine: {0}")]
    NoEngine(String),
    #[error("the Docker engine refused: {0}")]
    Refused(String),
}

impl From<Cause> for Error {
    fn from(cause: Cause) -> Error {
        match cause {
            Cause::NoEngine { reason } => Error::NoEngine(reason),
            other => Error::Refused(words(&other)),
        }
    }
}

/// The HTTP status of an answer that was one.
pub fn status(error: &EngineError) -> Option<u16> {
    match error {
        EngineError::DockerResponseServerError { status_code, .. } => Some(*status_code),
        _ => None,
    }
}

/// The engine's own words.
pub fn message(error: &EngineError) -> String {
    match error {
        EngineError::DockerResponseServerError { message, .. } => message.trim().to_owned(),
        EngineError::DockerStreamError { error } => error.trim().to_owned(),
        other => {
            let mut text = other.to_string();
            let mut source = other.source();
            while let Some(error) = source {
                let more = error.to_string();
                if !text.contains(&more) {
                    text.push_str(": ");
                    text.push_str(&more);
                }
                source = error.source();
            }
            text
        }
    }
}

/// A cause that no caller knows more about: the engine is not there, its disk is full, or it refused.
pub fn cause(error: EngineError, socket: &Path) -> Cause {
    if let Some(reason) = unreachable(&error, socket) {
        return Cause::NoEngine { reason };
    }
    let reason = message(&error);
    if reason.contains("no space left on device") {
        return Cause::DiskFull {
            reason: format!("{reason}; free some space: docker image prune --all, or a larger disk"),
        };
    }
    Cause::Refused { reason }
}

/// The words of a cause that [`cause`] makes.
pub fn words(cause: &Cause) -> String {
    match cause {
        Cause::NoEngine { reason } | Cause::DiskFull { reason } | Cause::Refused { reason } => reason.clone(),
        other => format!("{other:?}"),
    }
}

/// Why no engine answered, and what to do about it; [`None`] if one did.
fn unreachable(error: &EngineError, socket: &Path) -> Option<String> {
    let socket = socket.display();
    let kind = match error {
        EngineError::DockerResponseServerError { .. } | EngineError::DockerStreamError { .. } => return None,
        EngineError::SocketNotFoundError(_) => io::ErrorKind::NotFound,
        EngineError::RequestTimeoutError => io::ErrorKind::TimedOut,
        EngineError::IOError { err } => err.kind(),
        other => io_kind(other)?,
    };
    Some(match kind {
        io::ErrorKind::NotFound => format!(
            "{socket} does not exist; install an engine (sudo apt-get install docker.io), start it (sudo systemctl \
             start docker), or name its socket in DOCKER_HOST"
        ),
        io::ErrorKind::PermissionDenied => format!(
            "permission denied on {socket}; add the user Orca runs as to the group docker (sudo usermod -aG docker \
             USER) and log in again"
        ),
        io::ErrorKind::ConnectionRefused => {
            format!("nothing listens on {socket}; start the engine: sudo systemctl start docker")
        }
        io::ErrorKind::TimedOut => {
            format!("the engine on {socket} does not answer; see journalctl --unit docker, or restart it")
        }
        other => format!("the connection to {socket} broke: {other}"),
    })
}

/// The I/O error at the bottom of it, or that the engine hung up in the middle.
fn io_kind(error: &EngineError) -> Option<io::ErrorKind> {
    let mut next = Some(error as &(dyn std::error::Error + 'static));
    while let Some(error) = next {
        if let Some(error) = error.downcast_ref::<io::Error>() {
            return Some(error.kind());
        }
        if error.downcast_ref::<hyper::Error>().is_some_and(|e| e.is_incomplete_message() || e.is_closed()) {
            return Some(io::ErrorKind::ConnectionReset);
        }
        next = error.source();
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(message: &str) -> EngineError {
        EngineError::DockerResponseServerError { status_code: 500, message: message.to_owned() }
    }

    #[test]
    fn a_full_disk_says_what_to_do() {
        let cause = cause(refusal("write /var/lib/docker/x: no space left on device"), Path::new("/s"));
        assert!(matches!(cause, Cause::DiskFull { reason } if reason.contains("docker image prune")));
    }

    #[test]
    fn an_engine_that_is_not_there_says_what_to_do() {
        let of = |kind: io::ErrorKind| match cause(EngineError::IOError { err: kind.into() }, Path::new("/s")) {
            Cause::NoEngine { reason } => reason,
            other => panic!("{other:?}"),
        };
        assert!(of(io::ErrorKind::NotFound).contains("apt-get install docker.io"));
        assert!(of(io::ErrorKind::PermissionDenied).contains("group docker"));
        assert!(of(io::ErrorKind::ConnectionRefused).contains("systemctl start docker"));
        let missing = EngineError::SocketNotFoundError("/s".to_owned());
        assert!(
            matches!(cause(missing, Path::new("/s")), Cause::NoEngine { reason } if reason.starts_with("/s does not"))
        );
    }

    #[test]
    fn a_refusal_is_the_engines_own_words() {
        assert_eq!(cause(refusal("no\n"), Path::new("/s")), Cause::Refused { reason: "no".to_owned() });
    }
}
