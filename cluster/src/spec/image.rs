//! The form of an image's name, `[registry[:port]/]path[:tag][@sha256:…]`, by the grammar of the distribution
//! specification. Refused here is what every registry would refuse later, on every node, with a poorer message.

/// Most characters of the name without tag and digest (distribution specification).
pub const NAME_LENGTH_MAX: usize = 255;
/// Most characters of a tag.
pub const TAG_LENGTH_MAX: usize = 128;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    #[error("an image needs a name")]
    Empty,
    #[error("an image is named without `{0}`")]
    Scheme(String),
    #[error("an image's name may not contain white space")]
    Space,
    #[error("an image's name has at most {NAME_LENGTH_MAX} characters, this one has {0}")]
    TooLong(usize),
    #[error("an image's name is written in lower case, not `{0}`")]
    UpperCase(String),
    #[error("`{0}` is no part of an image's name: a-z and 0-9, with `.`, `_`, `__` or hyphens in between")]
    Component(String),
    #[error("`{0}` is no registry: a host name, perhaps with a port")]
    Registry(String),
    #[error(
        "`{0}` is no tag: letters, digits, `_`, `.` and `-`, at most {TAG_LENGTH_MAX}, not starting with `.` or `-`"
    )]
    Tag(String),
    #[error("`{0}` is no digest: `sha256:` and 64 characters 0-9 and a-f")]
    Digest(String),
}

/// Whether this can be the name of an image.
pub fn check(text: &str) -> Result<(), ImageError> {
    if text.is_empty() {
        return Err(ImageError::Empty);
    }
    if text.contains(char::is_whitespace) {
        return Err(ImageError::Space);
    }
    if let Some((scheme, _)) = text.split_once("://") {
        return Err(ImageError::Scheme(format!("{scheme}://")));
    }
    let (text, digest) = match text.split_once('@') {
        Some((text, digest)) => (text, Some(digest)),
        None => (text, None),
    };
    if let Some(digest) = digest
        && !digest.strip_prefix("sha256:").is_some_and(is_sha256)
    {
        return Err(ImageError::Digest(digest.to_owned()));
    }
    // A colon after the last slash begins a tag; one before it, a registry's port.
    let (name, tag) = match text.rsplit_once(':') {
        Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
        _ => (text, None),
    };
    if let Some(tag) = tag
        && !is_tag(tag)
    {
        return Err(ImageError::Tag(tag.to_owned()));
    }
    if name.is_empty() {
        return Err(ImageError::Empty);
    }
    if name.len() > NAME_LENGTH_MAX {
        return Err(ImageError::TooLong(name.len()));
    }
    let path = match name.split_once('/') {
        Some((first, rest)) if first.contains(['.', ':']) || first == "localhost" => {
            if !is_registry(first) {
                return Err(ImageError::Registry(first.to_owned()));
            }
            rest
        }
        _ => name,
    };
    for component in path.split('/') {
        if component.contains(|c: char| c.is_ascii_uppercase()) {
            return Err(ImageError::UpperCase(component.to_owned()));
        }
        if !is_component(component) {
            return Err(ImageError::Component(component.to_owned()));
        }
    }
    Ok(())
}

/// Whether this is a SHA-256 in lower-case hex.
pub fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

fn is_tag(text: &str) -> bool {
    text.len() <= TAG_LENGTH_MAX
        && text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_')
        && text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

fn is_registry(text: &str) -> bool {
    let (host, port) = match text.split_once(':') {
        Some((host, port)) => (host, Some(port)),
        None => (text, None),
    };
    port.is_none_or(|port| port.parse::<u16>().is_ok_and(|port| port != 0)) && super::host_name(host).is_ok()
}

/// Runs of `[a-z0-9]` with one separator between each two: `.`, `_`, `__` or any number of hyphens.
fn is_component(text: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let is_separator = |s: &str| matches!(s, "." | "_" | "__") || s.bytes().all(|b| b == b'-');
    text.starts_with(is_letter)
        && text.ends_with(is_letter)
        && text.split(is_letter).filter(|between| !between.is_empty()).all(is_separator)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_registries_accept_is_accepted() {
        let digest = "a".repeat(64);
        for name in [
            "redis",
            "redis:7",
            "redis:7.2-alpine",
            "myorg/api:latest",
            "ghcr.io/org/app",
            "ghcr.io/org/team/app_1__x.y--z:v1",
            "localhost/app",
            "localhost:5000/app:1",
            "10.0.0.7:5000/app",
            "registry.example.com:5000/a/b/c",
            &format!("redis@sha256:{digest}"),
            &format!("ghcr.io/org/app:1@sha256:{digest}"),
        ] {
            assert_eq!(check(name), Ok(()), "{name}");
        }
    }

    #[test]
    fn what_registries_refuse_is_refused() {
        for name in [
            "",
            ":7",
            "redis:",
            "redis:-7",
            "Redis",
            "my org/api",
            "https://ghcr.io/org/app",
            "a//b",
            "/a",
            "a/",
            "-a",
            "a-",
            "a..b",
            "a___b",
            "ghcr.io:99999/a",
            "ghcr.io:0/a",
            "redis@sha256:abc",
            "redis@",
            "a\u{0}b",
            "é",
        ] {
            assert!(check(name).is_err(), "{name}");
        }
        assert!(check(&"a".repeat(256)).is_err());
        assert!(check(&format!("a:{}", "t".repeat(129))).is_err());
    }
}
