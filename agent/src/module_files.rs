//! What a node keeps of modules on disk, one file for each: their bytes, and what they compile to. Those that the goal
//! names are needed to start without asking anyone, and stay. Of the others the most recently needed stay, as many as
//! fit: a rollback needs one of them soon or not at all, and what is not here is fetched and compiled again.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::path::Path;
use std::time::{Duration, SystemTime};

use orca_cluster::goal::{Goal, Workload};

/// Most bytes that one directory keeps of modules no goal names: some earlier revisions of tens of modules.
const UNNAMED_BYTES_MAX: u64 = 512 << 20;
/// A file that is not a module's is one being written, or was left by a process that was killed; after this long it is
/// the latter.
const WRITING_MAX: Duration = Duration::from_secs(60 * 60);

/// The digests of all modules that a goal names.
pub fn named(goal: &Goal) -> BTreeSet<String> {
    let modules = goal.replicas.values().filter_map(|replica| match &replica.workload {
        Workload::Module(module) => Some(module.digest.clone()),
        Workload::Container(_) => None,
    });
    modules.collect()
}

/// Removes what is neither named nor among the last needed. A module's file is its digest and `suffix`.
pub fn sweep(directory: &Path, suffix: &str, named: &BTreeSet<String>) -> io::Result<()> {
    let now = SystemTime::now();
    let mut unnamed = Vec::new();
    let entries = match fs::read_dir(directory) {
        // Nothing was ever kept.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let (entry, name) = entry.map(|entry| (entry.path(), entry.file_name()))?;
        let metadata = match fs::metadata(&entry) {
            // Taken away meanwhile, or renamed to what it was to be.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            metadata => metadata?,
        };
        let needed = metadata.modified()?;
        match name.to_str().and_then(|name| name.strip_suffix(suffix)) {
            // Needed now: should it be named no more, that is what counts from then on. Best effort, as this is.
            Some(digest) if named.contains(digest) => drop(File::open(&entry).and_then(|file| file.set_modified(now))),
            Some(_) => unnamed.push((needed, metadata.len(), entry)),
            None if now.duration_since(needed).is_ok_and(|age| age > WRITING_MAX) => remove(&entry)?,
            None => {}
        }
    }
    unnamed.sort();
    let mut kept = 0;
    for (_, bytes, path) in unnamed.into_iter().rev() {
        if kept + bytes > UNNAMED_BYTES_MAX {
            remove(&path)?;
        } else {
            kept += bytes;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_goal_names_stays_and_of_the_rest_what_was_needed_last() {
        let directory = tempfile::tempdir().unwrap();
        let now = SystemTime::now();
        // Sparse: their length is all that matters.
        let write = |name: &str, mib: u64, minutes_ago: u64| {
            let file = File::create(directory.path().join(name)).unwrap();
            file.set_len(mib << 20).unwrap();
            file.set_modified(now - Duration::from_secs(60 * minutes_ago)).unwrap();
        };
        let there = || {
            let names = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name());
            names.map(|name| name.into_string().unwrap()).collect::<BTreeSet<_>>()
        };
        for (name, mib, minutes_ago) in [
            ("named.wasm", 100, 1_000),
            ("new.wasm", 300, 1),
            ("older.wasm", 200, 2),
            ("oldest.wasm", 20, 3),
            ("other.wasm.77.new", 1, 59),
            ("other.wasm.78.new", 1, 61),
        ] {
            write(name, mib, minutes_ago);
        }
        sweep(directory.path(), ".wasm", &BTreeSet::from(["named".to_owned()])).unwrap();
        let kept = ["named.wasm", "new.wasm", "older.wasm", "other.wasm.77.new"];
        assert_eq!(there(), kept.map(str::to_owned).into());
        // It was needed until now, so it is not the first to go.
        sweep(directory.path(), ".wasm", &BTreeSet::new()).unwrap();
        assert_eq!(there(), ["named.wasm", "new.wasm", "other.wasm.77.new"].map(str::to_owned).into());
        sweep(&directory.path().join("none"), ".wasm", &BTreeSet::new()).unwrap();
    }
}
