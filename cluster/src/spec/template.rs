//! Text with references to secrets: `postgres://app:${secrets.DB_PASSWORD}@db/app`. Only the reference is ever
//! stored, compared or shown; a value appears when a node creates the replica.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Template {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Text(String),
    Secret(String),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("`${{` is never closed; write `$${{` for the characters themselves")]
    Unclosed,
    #[error("`${{{0}}}` is not known; only ${{secrets.NAME}} is")]
    Unknown(String),
    #[error("`{0}` is not a secret's name: letters, digits and underscores, not starting with a digit")]
    Name(String),
}

/// Most characters of a secret's name.
pub const SECRET_NAME_LENGTH_MAX: usize = 128;

/// Whether this can be a secret's name: `[A-Za-z_][A-Za-z0-9_]*`, at most [`SECRET_NAME_LENGTH_MAX`] characters.
pub fn is_secret_name(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphabetic() || c == '_')
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '_')
        && text.len() <= SECRET_NAME_LENGTH_MAX
}

impl Template {
    /// The secrets it names, in order of appearance.
    pub fn secrets(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Secret(name) => Some(name.as_str()),
            Part::Text(_) => None,
        })
    }

    /// The text with every reference replaced by what `value` gives for it, or the first name it has nothing for.
    pub fn resolve(&self, mut value: impl FnMut(&str) -> Option<String>) -> Result<String, &str> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Text(literal) => text.push_str(literal),
                Part::Secret(name) => text.push_str(&value(name).ok_or(name.as_str())?),
            }
        }
        Ok(text)
    }
}

impl FromStr for Template {
    type Err = TemplateError;
    fn from_str(text: &str) -> Result<Template, TemplateError> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = text;
        while let Some(at) = rest.find("${") {
            if rest[..at].ends_with('$') {
                literal.push_str(&rest[..at]);
                literal.push('{');
                rest = &rest[at + 2..];
                continue;
            }
            literal.push_str(&rest[..at]);
            let inner = &rest[at + 2..];
            let end = inner.find('}').ok_or(TemplateError::Unclosed)?;
            let name =
                inner[..end].strip_prefix("secrets.").ok_or_else(|| TemplateError::Unknown(inner[..end].to_owned()))?;
            if !is_secret_name(name) {
                return Err(TemplateError::Name(name.to_owned()));
            }
            if !literal.is_empty() {
                parts.push(Part::Text(std::mem::take(&mut literal)));
            }
            parts.push(Part::Secret(name.to_owned()));
            rest = &inner[end + 1..];
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Text(literal));
        }
        Ok(Template { parts })
    }
}

impl TryFrom<String> for Template {
    type Error = TemplateError;
    fn try_from(text: String) -> Result<Template, TemplateError> {
        text.parse()
    }
}

impl From<Template> for String {
    fn from(template: Template) -> String {
        template.to_string()
    }
}

impl fmt::Display for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in &self.parts {
            match part {
                Part::Text(literal) => f.write_str(&literal.replace("${", "$${"))?,
                Part::Secret(name) => write!(f, "${{secrets.{name}}}")?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for Template {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str, expect: &str) {
        let parsed: Result<Template, _> = text.parse();
        let got = match &parsed {
            Ok(t) => t.resolve(|name| Some(format!("<{name}>"))).unwrap_or_default(),
            Err(e) => format!("error: {e}"),
        };
        assert_eq!(got, expect);
        if let Ok(t) = parsed {
            assert_eq!(t.to_string().parse::<Template>().as_ref(), Ok(&t));
        }
    }

    #[test]
    fn references_are_found_and_everything_else_is_text() {
        check("", "");
        check("plain $HOME $ {x}", "plain $HOME $ {x}");
        check("${secrets.A}", "<A>");
        check("a:${secrets.A_1}@${secrets.B}/", "a:<A_1>@<B>/");
        check("literal $${secrets.A}", "literal ${secrets.A}");
    }

    #[test]
    fn a_reference_that_is_not_one_is_an_error() {
        check("${secrets.A", "error: `${` is never closed; write `$${` for the characters themselves");
        check("${env.A}", "error: `${env.A}` is not known; only ${secrets.NAME} is");
        check(
            "${secrets.9}",
            "error: `9` is not a secret's name: letters, digits and underscores, not starting with a digit",
        );
    }
}
