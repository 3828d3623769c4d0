//! `secrets`: values go in and never come out.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read as _};
use std::path::Path;
use std::process::ExitCode;

use orca_cluster::command::Refusal;
use orca_cluster::id::Label;
use orca_cluster::secret::SecretName;
use orca_wire::message::client::{Request, Response, SecretInfo, SetSecret};
use serde::Serialize;
use zeroize::Zeroizing;

use super::{done, session, terminal};
use crate::cli::{Global, ProjectArgs, SecretImportArgs, SecretRmArgs, SecretSetArgs, Secrets};
use crate::exit::{Exit, Failure};
use crate::moment;
use crate::output::text::{Ink, Side, Text, table};
use crate::output::{Output, Screen, count};
use crate::session::{Session, unexpected};

/// Largest .env file that is read.
const FILE_BYTES_MAX: u64 = 1 << 20;

pub async fn run(command: Secrets, global: &Global, output: &Output) -> Result<ExitCode, Failure> {
    match command {
        Secrets::Set(SecretSetArgs { name, scope }) => {
            let name = secret_name(scope.project, &name)?;
            let value = terminal::secret(&format!("Value of {name}"))?;
            let session = session(global).await?;
            set(&session, output, vec![(name, value)]).await
        }
        Secrets::Import(SecretImportArgs { file, scope }) => {
            let secrets = import(&file, scope.project.as_ref())?;
            let session = session(global).await?;
            set(&session, output, secrets).await
        }
        Secrets::List(ProjectArgs { project }) => list(&session(global).await?, output, project).await,
        Secrets::Rm(SecretRmArgs { name, scope }) => {
            let name = secret_name(scope.project, &name)?;
            let session = session(global).await?;
            // Nobody is asked about what the cluster will refuse.
            removable(&session, &name).await?;
            output.confirm(&format!("Remove secret {name}?"))?;
            changed(
                output,
                session.ask(&Request::RemoveSecret { name: name.clone() }).await?,
                &format!("Removed {name}"),
            )
        }
        Secrets::Rotate(ProjectArgs { project }) => rotate(&session(global).await?, output, project).await,
    }
}

fn secret_name(project: Option<Label>, text: &str) -> Result<SecretName, Failure> {
    let name = match project {
        Some(project) => SecretName::new(Some(project), text),
        // `shop/DB_URL` says the project itself.
        None => text.parse(),
    };
    name.map_err(|error| Failure::input(error.to_string()))
}

/// One scope after the other: of one project, or all that there are and the caller may change.
async fn rotate(session: &Session, output: &Output, project: Option<Label>) -> Result<ExitCode, Failure> {
    let scopes = match project {
        Some(project) => BTreeSet::from([Some(project)]),
        None => scopes(session).await?,
    };
    let mut done: Vec<String> = Vec::new();
    let mut last = None;
    for project in scopes {
        let which = project.as_ref().map_or_else(|| "global ones".to_owned(), |project| format!("those of {project}"));
        last = Some(session.ask(&Request::RotateSecrets { project }).await.map_err(|failure| {
            let failure = failure.why(format!("secrets were being sealed anew: {which}"));
            if done.is_empty() { failure } else { failure.why(format!("this is done: {}", done.join(", "))) }
        })?);
        done.push(which);
    }
    let last = last.expect("there is one scope at least");
    changed(output, last, &format!("Secrets are sealed under new keys: {}", done.join(", ")))
}

/// A project's name, or none for what every project may read.
async fn scopes(session: &Session) -> Result<BTreeSet<Option<Label>>, Failure> {
    let own = match session.ask(&Request::Whoami).await? {
        Response::Whoami { project, .. } => project,
        other => return Err(unexpected(&other)),
    };
    // Who acts for one project sees the global secrets too, and may not change them.
    if own.is_some() {
        return Ok(BTreeSet::from([own]));
    }
    let all = known(session, None).await?;
    Ok(all.iter().map(|secret| secret.name.project().cloned()).chain([None]).collect())
}

async fn set(
    session: &Session,
    output: &Output,
    secrets: Vec<(SecretName, Zeroizing<String>)>,
) -> Result<ExitCode, Failure> {
    let what = match secrets.as_slice() {
        [(name, _)] => format!("Set {name}"),
        several => format!("Set {}", count(several.len() as u64, "secret")),
    };
    let is_global = secrets.iter().any(|(name, _)| name.project().is_none());
    let whose = if is_global { ", for every project to read" } else { "" };
    let secrets = secrets.into_iter().map(|(name, value)| SetSecret { name, value: value.to_string() }).collect();
    let response = session.ask(&Request::SetSecrets { secrets }).await?;
    changed(output, response, &format!("{what}{whose}. What runs keeps the old value until `orca restart`"))
}

/// The answer to a change that is not waited for.
pub fn changed(output: &Output, response: Response, text: &str) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Changed {
        index: orca_cluster::id::Generation,
        changed: bool,
    }
    let (index, changed) = match response {
        Response::Done { generation } => (generation, true),
        Response::Unchanged { generation } => (generation, false),
        other => return Err(unexpected(&other)),
    };
    if output.json {
        output.object("change", &Changed { index, changed });
    } else if changed {
        output.print(&format!("{text}.\n"));
    } else {
        output.print(&format!("Nothing to change (index {index})\n"));
    }
    done()
}

async fn removable(session: &Session, name: &SecretName) -> Result<(), Failure> {
    let secrets = known(session, name.project().cloned()).await?;
    match secrets.into_iter().find(|secret| secret.name == *name) {
        None => Err(Failure::new(Exit::NotFound, Refusal::NoSecret(name.clone()).to_string())
            .fix("`orca secrets list` lists what there is")),
        Some(SecretInfo { used_by, .. }) if used_by.is_empty() => Ok(()),
        Some(SecretInfo { name, used_by: by, .. }) => {
            Err(Failure::new(Exit::Conflict, Refusal::SecretInUse { name, by }.to_string()))
        }
    }
}

async fn known(session: &Session, project: Option<Label>) -> Result<Vec<SecretInfo>, Failure> {
    match session.ask(&Request::ListSecrets { project }).await? {
        Response::Secrets { secrets } => Ok(secrets),
        other => Err(unexpected(&other)),
    }
}

async fn list(session: &Session, output: &Output, project: Option<Label>) -> Result<ExitCode, Failure> {
    #[derive(Serialize)]
    struct Listed {
        secrets: Vec<SecretInfo>,
    }
    let secrets = known(session, project).await?;
    if output.json {
        output.object("secrets", &Listed { secrets });
    } else {
        if secrets.is_empty() {
            output.notice(&Text::of(Ink::Dim, "No secrets are set."));
        }
        output.lines(&rows(&output.screen(moment::now()), &secrets));
    }
    done()
}

fn rows(screen: &Screen, secrets: &[SecretInfo]) -> Vec<Text> {
    let rows = secrets.iter().map(|secret| {
        let used: Vec<String> = secret.used_by.iter().map(ToString::to_string).collect();
        let used = if used.is_empty() { Text::of(Ink::Dim, "unused") } else { Text::plain(used.join(", ")) };
        vec![
            Text::plain(secret.name.to_string()),
            Text::of(Ink::Dim, format!("version {}", secret.version)),
            Text::of(Ink::Dim, format!("{} ago by {}", screen.ago(secret.at), secret.by)),
            used,
        ]
    });
    table(0, &[Side::Left; 4], rows.collect())
}

fn import(path: &Path, project: Option<&Label>) -> Result<Vec<(SecretName, Zeroizing<String>)>, Failure> {
    let place = if path == Path::new("-") { "standard input".to_owned() } else { path.display().to_string() };
    let failed = |error: io::Error| Failure::input(format!("{place} cannot be read")).why(error.to_string());
    let mut text = Zeroizing::new(String::new());
    match path == Path::new("-") {
        true => io::stdin().lock().take(FILE_BYTES_MAX + 1).read_to_string(&mut text),
        false => fs::File::open(path).map_err(failed)?.take(FILE_BYTES_MAX + 1).read_to_string(&mut text),
    }
    .map_err(failed)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        // What was read may end in the middle of a value.
        return Err(Failure::input(format!("{place} has more than {} KiB", FILE_BYTES_MAX >> 10))
            .why("nothing was set")
            .fix("split it into several files"));
    }
    let pairs = assignments(&text).map_err(|line| {
        // Never the line itself: it may hold the secret.
        Failure::new(Exit::Input, format!("{place}:{line}: this is not NAME=value")).why("nothing was set")
    })?;
    if pairs.is_empty() {
        return Err(Failure::input(format!("{place} sets nothing")));
    }
    let named = |(name, value): (&str, Zeroizing<String>)| Ok((secret_name(project.cloned(), name)?, value));
    pairs.into_iter().map(named).collect()
}

/// `NAME=value` lines as shells and Compose read them: comments, `export`, single and double quotes. An error is the
/// number of the line.
fn assignments(text: &str) -> Result<Vec<(&str, Zeroizing<String>)>, usize> {
    let mut pairs = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let line = line.strip_prefix("export ").unwrap_or(line);
        let (name, value) = line.split_once('=').ok_or(at + 1)?;
        let value = value.trim();
        let quoted = |quote: char| value.strip_prefix(quote).map(|rest| rest.strip_suffix(quote));
        let value = match (quoted('"'), quoted('\'')) {
            (Some(inner), _) => unescape(inner.ok_or(at + 1)?),
            (None, Some(inner)) => inner.ok_or(at + 1)?.to_owned(),
            (None, None) => value.split(" #").next().unwrap_or_default().trim_end().to_owned(),
        };
        pairs.push((name.trim(), Zeroizing::new(value)));
    }
    Ok(pairs)
}

fn unescape(text: &str) -> String {
    let mut out = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => match chars.next() {
                Some('n') => out.push('\n'),
                Some('t') => out.push('\t'),
                Some(other) => out.push(other),
                None => out.push('\\'),
            },
            (c, false) => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_env_file_is_read_as_shells_read_it() {
        let text = "# comment\n\nA=1\nexport B = two words # why\nC=\"x\\n\\\"y\\\"\"\nD='$raw #1'\nE=\nF=a=b#c\n";
        let pairs: Vec<(&str, String)> =
            assignments(text).unwrap().into_iter().map(|(name, value)| (name, value.to_string())).collect();
        let expect = [("A", "1"), ("B", "two words"), ("C", "x\n\"y\""), ("D", "$raw #1"), ("E", ""), ("F", "a=b#c")];
        assert_eq!(pairs, expect.map(|(name, value)| (name, value.to_owned())));
        assert_eq!(assignments("A=1\nnonsense\n").unwrap_err(), 2);
        assert_eq!(assignments("A=\"open\nB=1").unwrap_err(), 1);
    }

    #[test]
    fn a_file_that_is_too_long_sets_nothing_instead_of_half_a_value() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let longest = format!("A={}", "x".repeat(usize::try_from(FILE_BYTES_MAX).unwrap() - 2));
        fs::write(file.path(), &longest).unwrap();
        assert_eq!(import(file.path(), None).unwrap()[0].1.len(), longest.len() - 2);
        fs::write(file.path(), longest + "x").unwrap();
        let failure = import(file.path(), None).unwrap_err();
        assert!(failure.message.contains("more than 1024 KiB"), "{}", failure.message);
    }
}
