//! Having an image on this node. What is here already is used, unless the goal says to ask the registry; a digest, once
//! known, decides which bytes run.

use std::collections::HashMap;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use bollard::auth::DockerCredentials;
use bollard::models::ImageInspect;
use bollard::query_parameters::CreateImageOptionsBuilder;
use futures_util::StreamExt as _;
use http::{HeaderValue, Request};
use orca_cluster::goal::{Container, ReplicaGoal};
use orca_cluster::node::Finished;
use orca_cluster::replica::{Cause, Pulled, Pulling};
use tokio::time::timeout;

use super::create::container;
use super::secrets::{Open, resolve};
use super::{Docker, error};

/// The name of Docker's own registry in credentials.
const REGISTRY_DEFAULT: &str = "https://index.docker.io/v1/";
/// Between two signs of life in a pull, however long the whole takes. Unpacking a large layer on a slow disk shows none
/// for a while; a registry that has accepted the connection and says nothing shows none for ever.
const SILENCE_MAX: Duration = Duration::from_secs(120);

impl Docker {
    /// Has the goal's image on this node. `progress` hears of a pull as it goes on.
    pub async fn fetch(
        &self,
        goal: &ReplicaGoal,
        open: Open<'_>,
        mut progress: impl FnMut(Pulling) + Send,
    ) -> Finished {
        self.try_fetch(goal, open, &mut progress).await.unwrap_or_else(Finished::Failed)
    }

    async fn try_fetch(
        &self,
        goal: &ReplicaGoal,
        open: Open<'_>,
        progress: &mut (dyn FnMut(Pulling) + Send),
    ) -> Result<Finished, Cause> {
        let container = container(goal)?;
        let reference = Reference::parse(&container.image);
        let wanted = match &container.digest {
            Some(digest) => reference.pinned(digest),
            None => reference.whole(),
        };
        // A digest names the same bytes for ever: there is nothing newer to ask for.
        let ask_registry = container.pull && container.digest.is_none();
        let mut pulled = None;
        let mut found = if ask_registry { None } else { self.local(container, &wanted).await? };
        if found.is_none() {
            pulled = match self.pull(goal, container, &reference, open, progress).await {
                Ok(pulled) => Some(pulled),
                // What is here was not looked for; that it was not to be used does not make it absent.
                Err(cause) if ask_registry => {
                    let is_here = matches!(self.local(container, &wanted).await, Ok(Some(_)));
                    return Err(with_presence(cause, is_here));
                }
                Err(cause) => return Err(cause),
            };
            found = self.local(container, &wanted).await?;
        }
        let Some(image) = found else { return Err(missing(container.image.clone())) };
        self.check_architecture(container, &image).await?;
        let id = image.id.clone().unwrap_or_default();
        let digest = container.digest.clone().or_else(|| reference.digest_of(&image)).unwrap_or_else(|| id.clone());
        Ok(Finished::Fetched { image: id, digest: Some(digest), pulled })
    }

    /// The image if it is here: under the name it is wanted by, or, for one that never came from a registry, with the
    /// digest as its id.
    async fn local(&self, container: &Container, wanted: &str) -> Result<Option<ImageInspect>, Cause> {
        let client = self.client()?;
        for name in std::iter::once(wanted).chain(container.digest.as_deref()) {
            match client.inspect_image(name).await {
                Ok(image) => return Ok(Some(image)),
                Err(error) if error::status(&error) == Some(404) => {}
                Err(error) if error::status(&error) == Some(400) => {
                    let reason = format!("`{}` is no image: {}", container.image, error::message(&error));
                    return Err(Cause::Refused { reason });
                }
                Err(error) => return Err(self.cause(error)),
            }
        }
        Ok(None)
    }

    async fn pull(
        &self,
        goal: &ReplicaGoal,
        container: &Container,
        reference: &Reference<'_>,
        open: Open<'_>,
        progress: &mut (dyn FnMut(Pulling) + Send),
    ) -> Result<Pulled, Cause> {
        let credentials = match &container.registry {
            None => None,
            Some(registry) => Some(DockerCredentials {
                username: Some(resolve(&registry.username, goal, open)?.to_string()),
                password: Some(resolve(&registry.password, goal, open)?.to_string()),
                serveraddress: Some(reference.registry().unwrap_or(REGISTRY_DEFAULT).to_owned()),
                ..Default::default()
            }),
        };
        let known = credentials.is_some();
        // Without a tag the engine would pull every one there is.
        let tag = container.digest.as_deref().or(reference.digest).or(reference.tag).unwrap_or("latest");
        let options = CreateImageOptionsBuilder::default().from_image(reference.name).tag(tag).build();
        let begun = Instant::now();
        let mut layers = Layers::default();
        let client = self.client()?;
        let mut stream = std::pin::pin!(client.create_image(Some(options), None, credentials));
        loop {
            let step = match timeout(SILENCE_MAX, stream.next()).await {
                Ok(Some(Ok(step))) => step,
                Ok(None) => break,
                // The engine fetches a few layers at a time, of all images together: ours may wait for another's.
                Err(_) if layers.are_waiting() && self.pulls_moved_within(SILENCE_MAX) => continue,
                // The engine begins to answer with the registry's first word.
                Err(_) | Ok(Some(Err(bollard::errors::Error::RequestTimeoutError))) => {
                    let seconds = SILENCE_MAX.as_secs();
                    let reason = format!("nothing came from the registry for {seconds} s; see whether it is reachable");
                    let image = container.image.clone();
                    return Err(Cause::PullFailed { image, reason, present: false });
                }
                Ok(Some(Err(error))) => return Err(self.pull_cause(error, container, known)),
            };
            *self.inner.pulls_moved.lock().unwrap_or_else(PoisonError::into_inner) = tokio::time::Instant::now();
            let (Some(layer), Some(status)) = (step.id, step.status) else { continue };
            let detail = step.progress_detail.unwrap_or_default();
            let count = |count: Option<i64>| count.and_then(|count| u64::try_from(count).ok());
            if layers.take(layer, &status, count(detail.current), count(detail.total)) {
                progress(layers.pulling());
            }
        }
        let millis = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Pulled { bytes: layers.pulling().bytes, millis })
    }

    fn pulls_moved_within(&self, span: Duration) -> bool {
        self.inner.pulls_moved.lock().unwrap_or_else(PoisonError::into_inner).elapsed() < span
    }

    fn pull_cause(&self, error: bollard::errors::Error, container: &Container, had_credentials: bool) -> Cause {
        let image = container.image.clone();
        match (self.cause(error), container) {
            (Cause::Refused { reason }, _) => pull_cause(image, reason, had_credentials),
            (known, _) => known,
        }
    }

    async fn check_architecture(&self, container: &Container, image: &ImageInspect) -> Result<(), Cause> {
        let version = self.client()?.version().await.map_err(|error| self.cause(error))?;
        match (&image.architecture, &version.arch) {
            (Some(has), Some(needs)) if !has.is_empty() && has != needs => {
                Err(Cause::WrongArchitecture { image: container.image.clone(), has: has.clone(), needs: needs.clone() })
            }
            _ => Ok(()),
        }
    }
}

/// What the engine has said of each layer of an image.
#[derive(Debug, Default)]
struct Layers(HashMap<String, Layer>);

#[derive(Debug, Default)]
struct Layer {
    bytes: u64,
    total: Option<u64>,
}

impl Layers {
    /// Takes in what is new of one. True if that may be progress.
    fn take(&mut self, id: String, status: &str, current: Option<u64>, total: Option<u64>) -> bool {
        match status {
            // The engine fetches a few at a time, and tells a layer's size when its turn has come.
            "Pulling fs layer" => {
                self.0.entry(id).or_default();
            }
            "Downloading" => {
                let layer = self.0.entry(id).or_default();
                layer.bytes = layer.bytes.max(current.unwrap_or_default());
                layer.total = total.filter(|total| *total > 0).or(layer.total);
            }
            // Of a small one nothing else may ever be said.
            "Verifying Checksum" | "Download complete" | "Extracting" | "Pull complete" => {
                let layer = self.0.entry(id).or_default();
                layer.bytes = layer.total.unwrap_or(layer.bytes);
                layer.total = Some(layer.bytes);
            }
            _ => return false,
        }
        true
    }

    /// Whether some have not begun to come.
    fn are_waiting(&self) -> bool {
        self.0.values().any(|layer| layer.total.is_none())
    }

    fn pulling(&self) -> Pulling {
        let bytes = self.0.values().map(|layer| layer.bytes).sum();
        Pulling { bytes, total: self.0.values().map(|layer| layer.total).sum() }
    }
}

/// What the engine's words on a failed pull mean.
fn pull_cause(image: String, reason: String, had_credentials: bool) -> Cause {
    let says = |words: &[&str]| words.iter().any(|words| reason.contains(words));
    if let Some(rest) = reason.split("no matching manifest for ").nth(1) {
        let needs = rest.split(' ').next().unwrap_or_default().trim_start_matches("linux/").to_owned();
        return Cause::WrongArchitecture { image, has: "other architectures".to_owned(), needs };
    }
    // A registry does not tell strangers whether an image exists; whom it knows, it denies.
    if says(&["pull access denied"]) && !had_credentials {
        return missing(image);
    }
    if says(&["unauthorized", "denied", "no basic auth credentials", "authentication required"]) {
        return Cause::ImageDenied { image };
    }
    if says(&["manifest unknown", "name unknown", "repository name not known"])
        || (reason.starts_with("manifest for") && says(&["not found"]))
    {
        return missing(image);
    }
    Cause::PullFailed { image, reason, present: false }
}

fn missing(image: String) -> Cause {
    Cause::ImageMissing { image, present: false }
}

/// The same cause, of an image of which the node has a copy or not.
fn with_presence(mut cause: Cause, is_here: bool) -> Cause {
    if let Cause::ImageMissing { present, .. } | Cause::PullFailed { present, .. } = &mut cause {
        *present = is_here;
    }
    cause
}

/// The engine reads credentials in base64's URL-safe alphabet and ignores what it cannot read, so that some passwords
/// would never arrive; bollard writes the plain one.
pub(super) fn url_safe_credentials<B>(mut request: Request<B>) -> Request<B> {
    if let Some(value) = request.headers_mut().get_mut("x-registry-auth") {
        let safe = value.as_bytes().iter().map(|byte| match byte {
            b'+' => b'-',
            b'/' => b'_',
            other => *other,
        });
        *value = HeaderValue::from_bytes(&safe.collect::<Vec<u8>>()).expect("base64 can be a header's value");
        value.set_sensitive(true);
    }
    request
}

/// An image's name taken apart: `registry/path/name:tag@digest`.
#[derive(Debug, PartialEq, Eq)]
struct Reference<'a> {
    name: &'a str,
    tag: Option<&'a str>,
    digest: Option<&'a str>,
}

impl<'a> Reference<'a> {
    fn parse(text: &'a str) -> Reference<'a> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest)),
            None => (text, None),
        };
        // A colon before the last slash is a registry's port.
        let (name, tag) = match rest.rsplit_once(':') {
            Some((name, tag)) if !tag.contains('/') => (name, Some(tag)),
            _ => (rest, None),
        };
        Reference { name, tag, digest }
    }

    fn whole(&self) -> String {
        match (self.digest, self.tag) {
            (Some(digest), _) => self.pinned(digest),
            (None, tag) => format!("{}:{}", self.name, tag.unwrap_or("latest")),
        }
    }

    fn pinned(&self, digest: &str) -> String {
        format!("{}@{digest}", self.name)
    }

    /// The host of the registry, if the name has one.
    fn registry(&self) -> Option<&'a str> {
        let (first, _) = self.name.split_once('/')?;
        (first.contains(['.', ':']) || first == "localhost").then_some(first)
    }

    /// What the registry calls these bytes; an image may have come from several.
    fn digest_of(&self, image: &ImageInspect) -> Option<String> {
        let known = image.repo_digests.as_ref()?;
        let mut pairs = known.iter().filter_map(|known| known.split_once('@'));
        let (_, digest) = pairs.find(|(name, _)| familiar(name) == familiar(self.name))?;
        Some(digest.to_owned())
    }
}

/// `docker.io/library/redis` is how `redis` is written in full.
fn familiar(name: &str) -> &str {
    let name = name.strip_prefix("index.").unwrap_or(name);
    let name = name.strip_prefix("docker.io/").unwrap_or(name);
    name.strip_prefix("library/").unwrap_or(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_taken_apart() {
        let check = |text: &'static str, whole: &str, registry: Option<&str>| {
            let reference = Reference::parse(text);
            assert_eq!(reference.whole(), whole);
            assert_eq!(reference.registry(), registry);
        };
        check("redis", "redis:latest", None);
        check("redis:7", "redis:7", None);
        check("org/app:1", "org/app:1", None);
        check("localhost/app", "localhost/app:latest", Some("localhost"));
        check("localhost:5000/org/app", "localhost:5000/org/app:latest", Some("localhost:5000"));
        check("ghcr.io/org/app:1@sha256:ab", "ghcr.io/org/app@sha256:ab", Some("ghcr.io"));
    }

    #[test]
    fn the_digest_is_that_of_the_registry_asked_for() {
        let known = ["other.io/redis@sha256:1", "redis@sha256:2"].map(str::to_owned);
        let image = ImageInspect { repo_digests: Some(known.to_vec()), ..Default::default() };
        let digest = |text| Reference::parse(text).digest_of(&image);
        assert_eq!(digest("docker.io/library/redis:7").as_deref(), Some("sha256:2"));
        assert_eq!(digest("other.io/redis").as_deref(), Some("sha256:1"));
        assert_eq!(digest("elsewhere.io/redis"), None);
    }

    #[test]
    fn the_size_of_an_image_is_known_when_that_of_each_layer_is() {
        let mut layers = Layers::default();
        let mut take = |id: &str, status, current, total| {
            layers.take(id.to_owned(), status, current, total);
            let Pulling { bytes, total } = layers.pulling();
            (bytes, total)
        };
        take("a", "Pulling fs layer", None, None);
        take("c", "Already exists", None, None);
        assert_eq!(take("b", "Pulling fs layer", None, None), (0, None));
        assert_eq!(take("a", "Downloading", Some(10), Some(100)), (10, None));
        assert_eq!(take("b", "Downloading", Some(1), Some(50)), (11, Some(150)));
        assert_eq!(take("a", "Download complete", None, None), (101, Some(150)));
        // In other units, with the engine's newer way of keeping images.
        assert_eq!(take("a", "Extracting", Some(3), None), (101, Some(150)));
        assert_eq!(take("d", "Download complete", None, None), (101, Some(150)));
        assert_eq!(take("b", "Pull complete", None, None), (150, Some(150)));
    }

    #[test]
    fn what_registries_say_is_understood() {
        let check = |reason: &str, had_credentials, expect: fn(String) -> Cause| {
            assert_eq!(
                pull_cause("i".to_owned(), reason.to_owned(), had_credentials),
                expect("i".to_owned()),
                "{reason}"
            );
        };
        let denied = |image| Cause::ImageDenied { image };
        let docker_hub = "pull access denied for nobody/nothing, repository does not exist or may require 'docker login': \
                          denied: requested access to the resource is denied";
        check(docker_hub, false, missing);
        check(docker_hub, true, denied);
        check("manifest for localhost:5000/a:1 not found: manifest unknown: manifest unknown", false, missing);
        check("Head \"http://localhost:5000/v2/a/manifests/1\": no basic auth credentials", false, denied);
        check("unauthorized: authentication required", true, denied);
        check("no matching manifest for linux/amd64 in the manifest list entries", false, |image| {
            Cause::WrongArchitecture { image, has: "other architectures".to_owned(), needs: "amd64".to_owned() }
        });
        check("dial tcp: lookup registry.example: no such host", false, |image| Cause::PullFailed {
            image,
            reason: "dial tcp: lookup registry.example: no such host".to_owned(),
            present: false,
        });
    }
}
