//! Having an image: from here, from a registry, or not at all.

use std::time::Duration;

use orca_cluster::goal::{ReplicaGoal, Workload};
use orca_cluster::node::Finished;
use orca_cluster::replica::{Cause, Pulling};
use orca_cluster::spec::Registry as Credentials;
use tokio::sync::Notify;
use tokio::time::Instant;

use super::bed::{Bed, Registry, open, run};

/// Of `p?>~~~???w`: in plain base64 the credentials have `+` and `/`, which the engine does not read.
const PASSWORD_HASH: &str = "$2b$05$abcdefghijklmnopqrstuufNWTq9mSgOPNieerXLd5jRtarfgMCU2";

fn of_image(bed: &Bed, image: &str, digest: Option<&str>) -> ReplicaGoal {
    bed.goal_with(|goal, _| {
        let Workload::Container(container) = &mut goal.workload else { unreachable!("the tests' goal is a container") };
        container.image = image.to_owned();
        container.digest = digest.map(str::to_owned);
    })
}

#[tokio::test]
async fn an_image_that_is_here_is_used_and_known_by_its_id() {
    requires_docker!();
    let bed = Bed::new("local");
    let id = run("docker", &["image", "inspect", "--format", "{{.Id}}", "orca-test/app:1"]).unwrap();
    let id = id.trim();
    let here = Ok((id.to_owned(), Some(id.to_owned()), false));
    assert_eq!(bed.fetch(&of_image(&bed, "orca-test/app:1", None)).await, here);
    // What the name means now no longer matters.
    assert_eq!(bed.fetch(&of_image(&bed, "orca-test/app:2", Some(id))).await, here);
}

#[tokio::test]
async fn an_image_for_another_architecture_is_refused() {
    requires_docker!();
    let bed = Bed::new("arch");
    let wrong = bed.fetch(&of_image(&bed, "orca-test/app:wrongarch", None)).await;
    assert!(matches!(&wrong, Err(Cause::WrongArchitecture { has, needs, .. }) if has != needs), "{wrong:?}");
}

#[tokio::test]
async fn an_image_is_pulled_by_name_then_by_digest() {
    requires_docker!();
    let bed = Bed::new("pull");
    let storage = tempfile::tempdir().unwrap();
    let registry = Registry::start(storage.path(), None).await;
    let name = format!("{}/org/app", registry.address);
    let tag = format!("{name}:1");
    run("docker", &["tag", "orca-test/app:1", &tag]).unwrap();
    run("docker", &["push", &tag]).unwrap();
    run("docker", &["rmi", &tag]).unwrap();

    let missing = Cause::ImageMissing { image: format!("{name}:2"), present: false };
    assert_eq!(bed.fetch(&of_image(&bed, &format!("{name}:2"), None)).await, Err(missing));

    let (id, digest, pulled) = bed.fetch(&of_image(&bed, &tag, None)).await.unwrap();
    let digest = digest.unwrap();
    assert!(pulled && digest.starts_with("sha256:") && digest != id);
    let (_, again, pulled) = bed.fetch(&of_image(&bed, &tag, None)).await.unwrap();
    assert_eq!((again.as_ref(), pulled), (Some(&digest), false));

    // The name moves on; the digest does not.
    run("docker", &["rmi", &tag]).unwrap();
    run("docker", &["tag", "orca-test/app:2", &tag]).unwrap();
    run("docker", &["push", &tag]).unwrap();
    run("docker", &["rmi", &tag]).unwrap();
    let (pinned, _, _) = bed.fetch(&of_image(&bed, &tag, Some(&digest))).await.unwrap();
    assert_eq!(pinned, id);

    // With the older one here by that name, only `pull` asks whether there is a newer.
    run("docker", &["tag", &id, &tag]).unwrap();
    let mut goal = of_image(&bed, &tag, None);
    assert_eq!(bed.fetch(&goal).await.unwrap().0, id);
    if let Workload::Container(container) = &mut goal.workload {
        container.pull = true;
    }
    let (newer, newer_digest, pulled) = bed.fetch(&goal).await.unwrap();
    assert!(pulled && newer != id && newer_digest.is_some_and(|newer| newer != digest));
    for image in [&tag, &format!("{name}@{digest}")] {
        let _ = run("docker", &["rmi", image]);
    }

    let address = registry.address.clone();
    drop(registry);
    let unreachable = bed.fetch(&of_image(&bed, &format!("{address}/org/other:1"), None)).await;
    assert!(
        matches!(&unreachable, Err(Cause::PullFailed { reason, .. }) if reason.contains("refused")),
        "{unreachable:?}"
    );
}

#[tokio::test]
async fn a_pull_that_falls_silent_fails_and_says_so() {
    requires_docker!();
    let bed = Bed::new("silent");
    let step = "{\"status\":\"Downloading\",\"id\":\"a\",\"progressDetail\":{\"current\":5,\"total\":10}}\r\n";
    let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
    let begin = format!("{head}{:x}\r\n{step}\r\n", step.len());
    let (docker, _relay) = bed.relayed(move |request| request.contains("/images/create?").then(|| begin.clone()));
    let goal = of_image(&bed, "127.0.0.1:1/silent:1", None);
    let begun = Notify::new();
    let fetching = docker.fetch(&goal, &open, |pulled| {
        assert_eq!(pulled, Pulling { bytes: 5, total: Some(10) });
        begun.notify_one();
    });
    let silence = async {
        begun.notified().await;
        // From here on nothing but time passes, and that at once.
        tokio::time::pause();
        std::future::pending::<()>().await;
    };
    let failed = tokio::select! {
        failed = fetching => failed,
        () = silence => unreachable!("it is for ever"),
    };
    let Finished::Failed(Cause::PullFailed { image, reason, .. }) = failed else { panic!("{failed:?}") };
    assert_eq!(image, "127.0.0.1:1/silent:1");
    assert!(reason.contains("nothing came from the registry"), "{reason}");
}

#[tokio::test]
async fn a_registry_lets_in_who_has_the_password() {
    requires_docker!();
    let bed = Bed::new("denied");
    let storage = tempfile::tempdir().unwrap();
    let open_registry = Registry::start(storage.path(), None).await;
    let pushed = format!("{}/private:1", open_registry.address);
    run("docker", &["tag", "orca-test/app:1", &pushed]).unwrap();
    run("docker", &["push", &pushed]).unwrap();
    run("docker", &["rmi", &pushed]).unwrap();
    drop(open_registry);

    let registry = Registry::start(storage.path(), Some(PASSWORD_HASH)).await;
    let image = format!("{}/private:1", registry.address);
    let mut goal = of_image(&bed, &image, None);
    let denied = Finished::Failed(Cause::ImageDenied { image: image.clone() });
    assert_eq!(bed.docker.fetch(&goal, &open, |_| {}).await, denied);

    let mut with = |password: &str| {
        let Workload::Container(container) = &mut goal.workload else { unreachable!("the tests' goal is a container") };
        let (username, password) = ("reader".parse().unwrap(), password.parse().unwrap());
        container.registry = Some(Credentials { username, password });
        goal.secrets = [("REGISTRY_PASSWORD".to_owned(), "REGISTRY_PASSWORD".parse().unwrap())].into();
        goal.clone()
    };
    assert_eq!(bed.docker.fetch(&with("wrong"), &open, |_| {}).await, denied);
    let fetched = bed.docker.fetch(&with("${secrets.REGISTRY_PASSWORD}"), &open, |_| {}).await;
    assert!(matches!(fetched, Finished::Fetched { pulled: Some(_), .. }), "{fetched:?}");
    let _ = run("docker", &["rmi", &image]);
}

#[tokio::test]
async fn a_pull_whose_layers_wait_for_those_of_another_is_not_silent() {
    requires_docker!();
    let bed = Bed::new("queue");
    let answer = |step: &str| {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n";
        format!("{head}{:x}\r\n{step}\r\n\r\n", step.len() + 2)
    };
    let waits = answer("{\"status\":\"Pulling fs layer\",\"id\":\"a\",\"progressDetail\":{}}");
    let comes = answer("{\"status\":\"Downloading\",\"id\":\"b\",\"progressDetail\":{\"current\":5,\"total\":10}}");
    let (docker, _relay) = bed.relayed(move |request| {
        let pulls = request.contains("/images/create?");
        pulls.then(|| if request.contains("waits") { waits.clone() } else { comes.clone() })
    });
    let [waiting, coming] = ["127.0.0.1:1/waits:1", "127.0.0.1:1/comes:1"].map(|image| of_image(&bed, image, None));
    let (begun, queued) = (Instant::now(), Notify::new());
    let waiting = async {
        docker.fetch(&waiting, &open, |_| queued.notify_one()).await;
        begun.elapsed().as_secs()
    };
    let coming = async {
        queued.notified().await;
        tokio::time::pause();
        tokio::time::advance(Duration::from_secs(60)).await;
        tokio::time::resume();
        // From its first step on nothing but time passes, and that at once.
        docker.fetch(&coming, &open, |_| tokio::time::pause()).await;
        begun.elapsed().as_secs()
    };
    let (waited, came) = tokio::join!(waiting, coming);
    assert!((180..190).contains(&came), "{came}");
    assert!((240..250).contains(&waited), "for its own two minutes, or for ever: {waited}");
}

#[tokio::test]
async fn a_name_that_is_none_is_refused() {
    requires_docker!();
    let bed = Bed::new("name");
    for bad in ["Not A Name", "UPPER/case:1"] {
        let refused = bed.fetch(&of_image(&bed, bad, None)).await;
        assert!(matches!(&refused, Err(Cause::Refused { reason }) if reason.contains(bad)), "{refused:?}");
    }
}
