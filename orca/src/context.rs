//! Which cluster a command goes to, and as whom. A TOML file lists clusters; what proves who we are lies beside it in
//! files of its own, for their owner only. The environment and `--context` come first, so that a pipeline needs no file.
//!
//! ```text
//!   ~/.config/orca/contexts.toml              or $ORCA_CONTEXT
//!   ~/.config/orca/identities/prod/token      or identity.pem
//! ```

use std::collections::BTreeMap;
use std::env;
use std::fmt;
use std::path::{Path, PathBuf};

use orca_wire::Access;
use orca_wire::identity::file::{self, PrivateFileError};
use orca_wire::identity::{Identity, Token};
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure};
use crate::moment;

/// Where a server of this machine listens unless told otherwise.
pub const LOCAL: &str = "127.0.0.1:6880";
const TOKEN_FILE: &str = "token";

#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Contexts {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub current: Option<String>,
    #[serde(default)]
    pub contexts: BTreeMap<String, Entry>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// `host:port` of some of its nodes.
    pub addresses: Vec<String>,
    /// The fingerprint of the cluster's certificate authority.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub authority: Option<String>,
    /// Where the token or the identity is; relative to the directory of this file.
    pub identity: PathBuf,
}

/// What proves who somebody is.
#[derive(Debug, Clone, Copy)]
pub enum Credential<'a> {
    Token(&'a Token),
    Identity(&'a Identity),
}

/// What has said which cluster is meant, as messages call it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    Context(String),
    /// A variable of the environment.
    Variable(&'static str),
    /// Whatever server works on this data directory.
    Data(PathBuf),
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Origin::Context(name) => write!(f, "context `{name}`"),
            Origin::Variable(name) => write!(f, "${name}"),
            Origin::Data(directory) => write!(f, "the server of {}", directory.display()),
        }
    }
}

/// The cluster a command goes to.
#[derive(Debug)]
pub struct Chosen {
    pub origin: Origin,
    pub addresses: Vec<String>,
    pub access: Access,
}

/// The file that lists the clusters, and the directory of identities beside it.
#[derive(Debug, Clone)]
pub struct ContextFile {
    path: PathBuf,
}

/// What the environment says; taken as a value so that tests need not change it.
#[derive(Debug, Clone, Default)]
pub struct Surroundings {
    pub file: Option<PathBuf>,
    pub home: Option<PathBuf>,
    pub config_home: Option<PathBuf>,
    pub address: Option<String>,
    pub token: Option<String>,
}

impl Surroundings {
    pub fn read() -> Surroundings {
        let text = |name| env::var(name).ok().filter(|value| !value.is_empty());
        Surroundings {
            file: text("ORCA_CONTEXT").map(PathBuf::from),
            home: text("HOME").map(PathBuf::from),
            config_home: text("XDG_CONFIG_HOME").map(PathBuf::from),
            address: text("ORCA_ADDRESS"),
            token: text("ORCA_TOKEN"),
        }
    }

    pub fn file(&self) -> Result<ContextFile, Failure> {
        if let Some(path) = &self.file {
            return Ok(ContextFile { path: path.clone() });
        }
        let home = self.config_home.clone().or_else(|| self.home.as_ref().map(|home| home.join(".config")));
        match home {
            Some(home) => Ok(ContextFile { path: home.join("orca").join("contexts.toml") }),
            None => Err(Failure::input("there is no home directory to look for contexts in")
                .fix("set HOME, or ORCA_CONTEXT to a file")),
        }
    }
}

/// Writes the context of a cluster that was founded on this machine, and makes it the current one: whoever starts a
/// server means to use it.
pub fn write_founded(name: &str, addresses: Vec<String>, credential: Credential<'_>) -> Result<PathBuf, Failure> {
    let file = Surroundings::read().file()?;
    let contexts = file.load()?.contexts;
    // Another cluster may have had this host's name: its access is not to be written over.
    let numbered = (2..).map(|number| format!("{name}-{number}"));
    let free = std::iter::once(name.to_owned()).chain(numbered).find(|name| !contexts.contains_key(name));
    file.add(&free.expect("there is always another number"), addresses, credential, true)?;
    Ok(file.path)
}

/// The cluster to talk to.
pub fn choose(wanted: Option<&str>, around: &Surroundings) -> Result<Chosen, Failure> {
    let from_environment = wanted.is_none();
    let token = around.token.as_deref().filter(|_| from_environment).map(parse_token).transpose()?;
    let address = around.address.clone().filter(|_| from_environment);
    let addresses: Option<Vec<String>> = address.map(|list| list.split(',').map(|one| with_port(one.trim())).collect());
    match (addresses, token) {
        (Some(addresses), Some(token)) => {
            Ok(Chosen { origin: Origin::Variable("ORCA_ADDRESS"), addresses, access: Access::Token(token) })
        }
        (None, Some(token)) => {
            // A pipeline on the machine itself needs the token only.
            let known = around.file().and_then(|file| file.load()).ok().and_then(|contexts| contexts.current_entry());
            let addresses = known.map_or_else(|| vec![LOCAL.to_owned()], |(_, entry)| entry.addresses);
            Ok(Chosen { origin: Origin::Variable("ORCA_TOKEN"), addresses, access: Access::Token(token) })
        }
        (addresses, None) => {
            let file = around.file()?;
            let contexts = file.load()?;
            let (name, entry) = match wanted {
                Some(name) => contexts.entry(name)?,
                None => contexts.current_entry().ok_or_else(|| nothing_known(&file.path))?,
            };
            let access = file.access(&name, &entry)?;
            let origin = Origin::Context(name);
            Ok(Chosen { origin, addresses: addresses.unwrap_or(entry.addresses), access })
        }
    }
}

fn nothing_known(path: &Path) -> Failure {
    Failure::new(Exit::Unreachable, "no cluster is known here")
        .why(format!("{} does not name one", path.display()))
        .fix("start one on this machine: orca up DIR")
        .fix("or add one: orca context add NAME --address HOST:6880")
}

pub fn parse_token(text: &str) -> Result<Token, Failure> {
    text.parse().map_err(|error| Failure::new(Exit::Unauthorised, "the token cannot be used").why(format!("{error}")))
}

/// With the port everybody uses, if it has none.
pub fn with_port(address: &str) -> String {
    let has_port = address.rsplit_once(':').is_some_and(|(host, port)| {
        let is_bare_v6 = host.contains(':') && !host.ends_with(']');
        !is_bare_v6 && port.parse::<u16>().is_ok()
    });
    match (has_port, address.contains(':') && !address.contains('[')) {
        (true, _) => address.to_owned(),
        (false, true) => format!("[{address}]:6880"),
        (false, false) => format!("{address}:6880"),
    }
}

impl Contexts {
    fn entry(&self, name: &str) -> Result<(String, Entry), Failure> {
        match self.contexts.get(name) {
            Some(entry) => Ok((name.to_owned(), entry.clone())),
            None => {
                let known = self.contexts.keys().map(String::as_str);
                let hint = orca_cluster::spec::toml::suggestion(name, known);
                Err(Failure::new(Exit::NotFound, format!("there is no context `{name}`"))
                    .fix(hint.unwrap_or_else(|| "`orca context list` lists them".to_owned())))
            }
        }
    }

    fn current_entry(&self) -> Option<(String, Entry)> {
        let only = || (self.contexts.len() == 1).then(|| self.contexts.keys().next().cloned()).flatten();
        let name = self.current.clone().or_else(only)?;
        let entry = self.contexts.get(&name)?.clone();
        Some((name, entry))
    }
}

impl ContextFile {
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn directory(&self) -> &Path {
        self.path.parent().filter(|parent| *parent != Path::new("")).unwrap_or(Path::new("."))
    }

    /// No file is no contexts.
    pub fn load(&self) -> Result<Contexts, Failure> {
        let text = match std::fs::read_to_string(&self.path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Contexts::default()),
            Err(error) => {
                return Err(Failure::input(format!("{} cannot be read", self.path.display())).why(error.to_string()));
            }
        };
        toml::from_str(&text).map_err(|error| {
            let failure = Failure::input(format!("{} is not a list of contexts", self.path.display()));
            let failure = error.to_string().trim_end().lines().fold(failure, |failure, line| failure.why(line));
            failure.fix("correct it, or remove it and add the contexts again")
        })
    }

    fn save(&self, contexts: &Contexts) -> Result<(), Failure> {
        let text = toml::to_string(contexts).expect("names, addresses and paths can be written as TOML");
        file::replace(&self.path, text.as_bytes()).map_err(not_written)
    }

    pub fn add(
        &self,
        name: &str,
        addresses: Vec<String>,
        credential: Credential<'_>,
        make_current: bool,
    ) -> Result<(), Failure> {
        if !is_name(name) {
            return Err(Failure::input(format!("`{name}` is no name for a context"))
                .fix("use letters, digits, hyphens, dots and underscores"));
        }
        let mut contexts = self.load()?;
        let identity = Path::new("identities").join(name);
        let directory = self.directory().join(&identity);
        let authority = match credential {
            Credential::Token(token) => {
                file::replace(&directory.join(TOKEN_FILE), token.reveal().as_bytes()).map_err(not_written)?;
                Some(token.authority.to_string())
            }
            Credential::Identity(identity) => {
                identity.save(&directory).map_err(|error| Failure::from_error(Exit::General, &error))?;
                // A token left from before would be taken instead.
                match std::fs::remove_file(directory.join(TOKEN_FILE)) {
                    Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                        return Err(Failure::general("an old token cannot be removed").why(error.to_string()));
                    }
                    _ => None,
                }
            }
        };
        contexts.contexts.insert(name.to_owned(), Entry { addresses, authority, identity });
        if make_current || contexts.current.is_none() {
            contexts.current = Some(name.to_owned());
        }
        self.save(&contexts)
    }

    pub fn make_current(&self, name: &str) -> Result<(), Failure> {
        let mut contexts = self.load()?;
        let (name, _) = contexts.entry(name)?;
        contexts.current = Some(name);
        self.save(&contexts)
    }

    fn access(&self, name: &str, entry: &Entry) -> Result<Access, Failure> {
        let directory = self.directory().join(&entry.identity);
        let again =
            || format!("add it again: orca context add {name} --address {}", entry.addresses.join(" --address "));
        match file::read(&directory.join(TOKEN_FILE)) {
            Ok(bytes) => {
                let token = parse_token(&String::from_utf8_lossy(&bytes)).map_err(|failure| failure.fix(again()))?;
                if entry.authority.as_ref().is_some_and(|authority| *authority != token.authority.to_string()) {
                    return Err(Failure::new(
                        Exit::Unauthorised,
                        format!("the token of context `{name}` is of another cluster"),
                    )
                    .fix(again()));
                }
                Ok(Access::Token(token))
            }
            Err(PrivateFileError::Missing { .. }) => match Identity::load(&directory, None, moment::now()) {
                Ok(identity) => Ok(Access::Certificate(identity)),
                Err(error) => {
                    Err(Failure::new(Exit::Unauthorised, format!("context `{name}` has no identity that can be used"))
                        .why(error.to_string())
                        .fix(again()))
                }
            },
            Err(error) => Err(Failure::from_error(Exit::Unauthorised, &error)),
        }
    }
}

fn not_written(error: PrivateFileError) -> Failure {
    Failure::from_error(Exit::General, &error).fix("choose another file with ORCA_CONTEXT")
}

/// It becomes a directory's name.
fn is_name(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with('.')
        && name.len() <= 63
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use orca_wire::identity::Fingerprint;
    use std::os::unix::fs::PermissionsExt as _;

    fn around(directory: &Path) -> Surroundings {
        Surroundings { file: Some(directory.join("contexts.toml")), ..Surroundings::default() }
    }

    fn token() -> Token {
        Token::create(Fingerprint([7; 32]))
    }

    #[test]
    fn a_context_is_written_chosen_and_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let around = around(directory.path());
        let none = choose(None, &around).unwrap_err();
        assert_eq!((none.exit, none.message.as_str()), (Exit::Unreachable, "no cluster is known here"));

        let file = around.file().unwrap();
        file.add("prod", vec!["10.0.0.5:6880".to_owned()], Credential::Token(&token()), true).unwrap();
        file.add("test", vec!["10.0.1.5:6880".to_owned()], Credential::Token(&token()), false).unwrap();
        let name = || choose(None, &around).unwrap().origin.to_string();
        assert_eq!(name(), "context `prod`");
        assert_eq!(choose(Some("test"), &around).unwrap().addresses, ["10.0.1.5:6880"]);
        file.make_current("test").unwrap();
        assert_eq!(name(), "context `test`");
        let unknown = choose(Some("tets"), &around).unwrap_err();
        assert_eq!((unknown.exit, unknown.fix[0].as_str()), (Exit::NotFound, "did you mean `test`?"));

        let secret = directory.path().join("identities/test/token");
        assert_eq!(std::fs::metadata(&secret).unwrap().permissions().mode() & 0o777, 0o600);
        std::fs::set_permissions(&secret, std::fs::Permissions::from_mode(0o644)).unwrap();
        let open = choose(None, &around).unwrap_err();
        assert_eq!(open.exit, Exit::Unauthorised);
        assert!(open.message.contains("chmod 600"), "{}", open.message);
    }

    #[test]
    fn the_environment_comes_before_the_file_and_the_flag_before_both() {
        let directory = tempfile::tempdir().unwrap();
        let mut around = around(directory.path());
        around
            .file()
            .unwrap()
            .add("prod", vec!["10.0.0.5:6880".to_owned()], Credential::Token(&token()), true)
            .unwrap();
        around.token = Some(token().reveal().to_string());
        assert_eq!(choose(None, &around).unwrap().addresses, ["10.0.0.5:6880"]);
        around.address = Some("a, 10.0.0.9:7000".to_owned());
        assert_eq!(choose(None, &around).unwrap().addresses, ["a:6880", "10.0.0.9:7000"]);
        assert_eq!(choose(Some("prod"), &around).unwrap().addresses, ["10.0.0.5:6880"]);
        around.token = Some("orca1.nonsense".to_owned());
        assert_eq!(choose(None, &around).unwrap_err().exit, Exit::Unauthorised);
    }

    #[test]
    fn an_address_gets_the_usual_port() {
        let shown = ["host", "host:1", "10.0.0.1", "::1", "[::1]", "[::1]:7"].map(with_port);
        assert_eq!(shown, ["host:6880", "host:1", "10.0.0.1:6880", "[::1]:6880", "[::1]:6880", "[::1]:7"]);
    }

    #[test]
    fn a_damaged_file_is_named() {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("contexts.toml"), "current = 3\n").unwrap();
        let failure = choose(None, &around(directory.path())).unwrap_err();
        assert_eq!(failure.exit, Exit::Input);
        assert!(failure.message.contains("contexts.toml"), "{}", failure.message);
        assert!(failure.why.len() > 1 && failure.why[0].contains("line 1"), "line by line: {:?}", failure.why);
    }
}
