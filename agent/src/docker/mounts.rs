//! What of the host a container may never mount, whoever asks: whatever would hand it the host itself or Orca's
//! secrets. A path that leads through a link is none: what a policy allows is the path as it is written, and a link may
//! be put there by whoever may write above it, a container among them.

use std::fs;
use std::path::{Path, PathBuf};

use orca_cluster::goal::Container;
use orca_cluster::replica::Cause;
use orca_cluster::spec::VolumeSource;

use super::Docker;

/// These, everything below them, and whatever has one of them in it. The last ones are ways to root by themselves:
/// containers are made through containerd's socket as well, and processes started through systemd's.
const FORBIDDEN: [&str; 9] = [
    "/proc",
    "/sys",
    "/etc",
    "/boot",
    "/var/lib/docker",
    "/var/lib/containerd",
    "/run/containerd",
    "/run/systemd",
    "/run/dbus",
];

impl Docker {
    /// Whether all that a container has of the host may be mounted. Asked before each start: it may be another place by
    /// then.
    pub(super) fn check_mounts(&self, container: &Container) -> Result<(), Cause> {
        container.volumes.iter().try_for_each(|volume| match &volume.source {
            VolumeSource::Host(path) => check(path, &self.config().socket, &self.guarded()),
            VolumeSource::Named(_) => Ok(()),
        })
    }
}

fn check(path: &str, socket: &Path, state: &[PathBuf]) -> Result<(), Cause> {
    let refuse = |reason: String| Err(Cause::Refused { reason });
    let real = match fs::canonicalize(path) {
        Ok(real) => real,
        Err(error) => return refuse(format!("the host path {path} cannot be mounted: {error}; create it first")),
    };
    if let Some(with) = conflict(&real, socket, state) {
        return refuse(format!("the host path {path} may not be mounted: {with}"));
    }
    if real != Path::new(path) {
        let real = real.display();
        return refuse(format!("the host path {path} leads to {real}; if that is meant, write {real}"));
    }
    Ok(())
}

fn conflict(real: &Path, socket: &Path, state: &[PathBuf]) -> Option<String> {
    if real == Path::new("/") {
        return Some("it is the whole host".to_owned());
    }
    let met = |forbidden: &&&str| real.starts_with(forbidden) || Path::new(forbidden).starts_with(real);
    if let Some(forbidden) = FORBIDDEN.iter().find(met) {
        return Some(format!("{forbidden} would be open to it"));
    }
    let resolve = |path: &Path| fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    // A directory that has the socket in it gives the engine away as well.
    if resolve(socket).starts_with(real) {
        return Some("the Docker engine's socket is in it".to_owned());
    }
    let mut state = state.iter().map(|path| resolve(path));
    let met = state.find(|state| real.starts_with(state) || state.starts_with(real))?;
    Some(format!("{} holds Orca's own state", met.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn what_would_give_the_host_away_is_refused_under_any_name() {
        let place = tempfile::tempdir().unwrap();
        let path = |name: &str| place.path().join(name);
        for directory in ["ok", "state/db", "sockets"] {
            fs::create_dir_all(path(directory)).unwrap();
        }
        fs::write(path("sockets/docker.sock"), "").unwrap();
        for (link, to) in [("to-etc", "/etc"), ("to-root", "/"), ("to-state", "state"), ("to-ok", "ok")] {
            symlink(if to.starts_with('/') { to.into() } else { path(to) }, path(link)).unwrap();
        }
        let check = |asked: &Path| {
            let socket = path("sockets/docker.sock");
            check(asked.to_str().unwrap(), &socket, &[path("state")])
        };
        assert_eq!(check(&path("ok")), Ok(()));
        let Err(Cause::Refused { reason }) = check(&path("to-ok")) else { panic!("a link was mounted") };
        assert!(reason.ends_with(&format!("write {}", path("ok").display())), "{reason}");
        for bad in [
            "to-etc",
            "to-root",
            "to-state",
            "ok/../ok",
            "state",
            "state/db",
            "sockets",
            "sockets/docker.sock",
            ".",
            "absent",
        ] {
            assert!(check(&path(bad)).is_err(), "{bad}");
        }
        for bad in ["/", "/proc", "/proc/self", "/sys/fs", "/etc/passwd", "/usr/../etc", "/var", "/var/lib", "/run"] {
            assert!(check(Path::new(bad)).is_err(), "{bad}");
        }
    }
}
