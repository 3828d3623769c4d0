//! The rules of this repository that no compiler knows. Every finding names a place and what is wrong there.

mod circles;
mod edges;
mod licences;
mod map;
mod source;

use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

/// Something that is against a rule.
#[derive(Debug)]
struct Finding {
    file: PathBuf,
    /// From 1; 0 for the whole file.
    line: usize,
    why: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Finding { file, line, why } = self;
        match line {
            0 => write!(f, "{}: {why}", file.display()),
            _ => write!(f, "{}:{line}: {why}", file.display()),
        }
    }
}

pub fn run(root: &Path) -> Result<()> {
    let files = files(root)?;
    let mut findings = edges::check(root)?;
    findings.extend(circles::check(root, &files)?);
    findings.extend(source::check(root, &files)?);
    findings.extend(map::check(root, &files));
    for finding in &findings {
        eprintln!("{finding}");
    }
    licences::check(root)?;
    match findings.len() {
        0 => Ok(()),
        1 => bail!("1 place is against the rules of this repository"),
        count => bail!("{count} places are against the rules of this repository"),
    }
}

/// What is, or would be, committed; from the root.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut git = Command::new("git");
    git.current_dir(root).args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]);
    let output = git.output().context("cannot run git")?;
    ensure!(output.status.success(), "git ls-files failed: {}", String::from_utf8_lossy(&output.stderr).trim());
    let text = String::from_utf8(output.stdout).context("a file's name is not UTF-8")?;
    let mut files: Vec<PathBuf> = text.split_terminator('\0').map(PathBuf::from).collect();
    // One that was deleted and not yet committed is still listed.
    files.retain(|file| root.join(file).is_file());
    files.sort();
    Ok(files)
}
