//! The environment of a replica with its secrets in place: as variables, or as files on tmpfs that the container
//! mounts. Docker keeps variables in its own configuration on disk and shows them in `inspect`; files it never sees.
//!
//! The files lie in a directory of the host, one for each replica, because a tmpfs of the container's own is empty
//! until it runs. The directory above lets only its owner in; below it everyone may read, since the process in the
//! container may be any user. Nothing is ever written to a disk: where there is no tmpfs, it is refused. Which tmpfs
//! it is depends on who we are: `/run` is root's, and an ordinary user has one of its own or shares memory with all.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use orca_cluster::goal::{Container, ReplicaGoal};
use orca_cluster::id::ReplicaId;
use orca_cluster::replica::Cause;
use orca_cluster::secret::SecretName;
use orca_cluster::spec::SecretsAs;
use orca_cluster::spec::template::Template;
use zeroize::Zeroizing;

use super::Docker;

/// Where the container finds them.
pub const SECRETS_PATH: &str = "/run/secrets";

/// `TMPFS_MAGIC` and `RAMFS_MAGIC` of statfs(2).
const MEMORY_FILE_SYSTEMS: [i64; 2] = [0x0102_1994, 0x8584_58f6];

/// Opens one sealed secret of the goal.
pub type Open<'a> = &'a (dyn Fn(&SecretName) -> Result<Zeroizing<String>, Unopened> + Send + Sync);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unopened {
    #[error("it is not in the goal")]
    Absent,
    #[error("{0}")]
    Damaged(String),
}

/// What a container is given: `NAME=value` each, and the files that hold the rest.
pub struct Environment {
    pub variables: Vec<Zeroizing<String>>,
    pub files: Vec<(String, Zeroizing<String>)>,
}

impl Environment {
    pub fn of(goal: &ReplicaGoal, container: &Container, open: Open<'_>) -> Result<Environment, Cause> {
        let mut environment = Environment { variables: Vec::new(), files: Vec::new() };
        for (name, template) in &goal.env {
            let value = resolve(template, goal, open)?;
            let is_secret = template.secrets().next().is_some();
            if is_secret && container.secrets_as == SecretsAs::Files {
                if name.contains('/') || name.starts_with('.') {
                    return Err(Cause::Refused { reason: format!("`{name}` cannot be the name of a secret's file") });
                }
                let pointer = format!("{name}_FILE={SECRETS_PATH}/{name}");
                environment.variables.push(pointer.into());
                environment.files.push((name.clone(), value));
            } else {
                environment.variables.push(format!("{name}={}", *value).into());
            }
        }
        Ok(environment)
    }
}

/// The text of a template with every secret in its place.
pub fn resolve(template: &Template, goal: &ReplicaGoal, open: Open<'_>) -> Result<Zeroizing<String>, Cause> {
    let mut damaged = None;
    let resolved = template.resolve(|name| match open(goal.secrets.get(name)?) {
        // The copy is wiped with the whole text; this one by its own type.
        Ok(value) => Some(value.as_str().to_owned()),
        Err(Unopened::Absent) => None,
        Err(Unopened::Damaged(reason)) => {
            damaged = Some(format!("secret `{name}` does not open: {reason}"));
            None
        }
    });
    match (resolved, damaged) {
        (Ok(text), _) => Ok(text.into()),
        (Err(_), Some(reason)) => Err(Cause::Refused { reason }),
        (Err(name), None) => Err(Cause::SecretMissing { name: name.to_owned() }),
    }
}

impl Docker {
    /// Writes the files of a replica, and gives the directory to mount.
    pub(super) fn write_secrets(&self, replica: ReplicaId, environment: &Environment) -> Result<PathBuf, Cause> {
        let refused =
            |error: io::Error| Cause::Refused { reason: format!("cannot write the files of secrets: {error}") };
        let all = self.secrets_below(&self.own_memory()?);
        create_directory(&all, 0o700).map_err(refused)?;
        let directory = all.join(replica.to_string());
        create_directory(&directory, 0o755).map_err(refused)?;
        for (name, value) in &environment.files {
            write_whole(&directory, name, value.as_bytes()).map_err(refused)?;
        }
        Ok(directory)
    }

    /// Takes the files of a replica away.
    pub(super) fn remove_secrets(&self, replica: ReplicaId) -> Result<(), Cause> {
        // Another start of Orca may have chosen another place. In one that is not ours we have written nothing.
        for root in self.places().filter(|place| is_ours(place)) {
            match fs::remove_dir_all(self.secrets_below(&root).join(replica.to_string())) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(Cause::Refused { reason: format!("cannot remove the files of secrets: {error}") });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The first place that is in memory and that we can have for ourselves.
    fn own_memory(&self) -> Result<PathBuf, Cause> {
        let mut problems = Vec::new();
        for place in self.places().filter(|place| is_memory(place)) {
            match own(&place) {
                Ok(()) => return Ok(place),
                Err(error) => problems.push(format!("{}: {error}", place.display())),
            }
        }
        let reason = if problems.is_empty() {
            "secrets as files need a tmpfs, and neither the runtime directory nor /dev/shm is one; mount a tmpfs on \
             /run, or set secrets_as = \"env\""
                .to_owned()
        } else {
            format!("no place for the files of secrets can be made ours: {}", problems.join("; "))
        };
        Err(Cause::Refused { reason })
    }

    /// Where the files of secrets may be: the runtime directory, the user's, or shared memory.
    fn places(&self) -> impl Iterator<Item = PathBuf> + use<> {
        let configured = self.config().runtime_directory.clone();
        let of_user = std::env::var_os("XDG_RUNTIME_DIR").map(|directory| PathBuf::from(directory).join("orca"));
        let shared = PathBuf::from(format!("/dev/shm/orca-{}", rustix::process::getuid().as_raw()));
        [Some(configured), of_user, Some(shared)].into_iter().flatten()
    }

    /// What no container may mount: Orca's state, and the files of other replicas' secrets.
    pub(super) fn guarded(&self) -> Vec<PathBuf> {
        let state = self.config().state_directories.iter().cloned();
        // The place that is used from now on, also if nothing is there yet, and those of other starts.
        let places = self.own_memory().ok().into_iter().chain(self.places().filter(|place| is_ours(place)));
        state.chain(places.map(|root| self.secrets_below(&root))).collect()
    }

    fn secrets_below(&self, root: &Path) -> PathBuf {
        root.join(&self.config().cluster).join("secrets")
    }
}

/// Whether a path, or the nearest directory above it that exists, is in memory.
fn is_memory(path: &Path) -> bool {
    let existing = path.ancestors().find(|path| path.exists());
    let kind = existing.and_then(|path| rustix::fs::statfs(path).ok());
    kind.is_some_and(|kind| MEMORY_FILE_SYSTEMS.contains(&kind.f_type))
}

/// In shared memory anyone can make a directory of any name: it must be ours alone.
fn own(root: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(root)?;
    if is_ours(root) { Ok(()) } else { Err(io::Error::other("it belongs to another user")) }
}

/// Whether a directory is there and belongs to us; not by way of a link, which anyone may have put there.
fn is_ours(root: &Path) -> bool {
    fs::symlink_metadata(root).is_ok_and(|found| found.is_dir() && found.uid() == rustix::process::getuid().as_raw())
}

/// With this mode, whatever the umask.
fn create_directory(path: &Path, mode: u32) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode))
}

/// A file appears with all of its content or not at all, also when an earlier one is there.
fn write_whole(directory: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let temporary = directory.join(format!(".{name}.new"));
    match fs::remove_file(&temporary) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o400).open(&temporary)?;
    file.write_all(content)?;
    file.set_permissions(fs::Permissions::from_mode(0o444))?;
    fs::rename(&temporary, directory.join(name))
}
