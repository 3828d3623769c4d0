//! A container's life: created, started, killed, stopped, removed, found again.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use orca_agent::docker::{Docker, Notice};
use orca_agent::probe::probe;
use orca_cluster::goal::Workload;
use orca_cluster::id::{Label, ReplicaId};
use orca_cluster::node::{Condition, Exited, Finished, Seen};
use orca_cluster::replica::{Cause, Engine, Saw};
use orca_cluster::resource::{Cpu, Memory};
use orca_cluster::spec::{Check, SecretsAs, Volume, VolumeSource};

use super::bed::{Bed, eventually, get, open, run, wait, wait_seen};

const R1: ReplicaId = ReplicaId(1);
const GRACE: Duration = Duration::from_secs(10);

fn container(goal: &mut orca_cluster::goal::ReplicaGoal) -> &mut orca_cluster::goal::Container {
    match &mut goal.workload {
        Workload::Container(container) => container,
        Workload::Module(_) => unreachable!("the tests' goal is a container"),
    }
}

#[tokio::test]
async fn a_replica_is_created_started_stopped_and_removed_and_each_twice_is_once() {
    requires_docker!();
    let bed = Bed::new("life");
    let goal = bed.goal();
    let mut events = bed.docker.events();
    wait(&mut events, |notice| (matches!(notice, Notice::Engine(Engine::Ready { .. }))).then_some(())).await;
    assert_eq!(wait_seen(&mut events, |_| true).await, Seen::All(vec![]));

    for _ in 0..2 {
        assert_eq!(bed.create(R1, &goal).await, Finished::Created);
    }
    let first = bed.start(R1, &goal).await;
    assert_eq!(bed.start(R1, &goal).await, first);
    let Finished::Started { address: Some(address) } = first else { panic!("{first:?}") };
    let running = wait_seen(&mut events, |seen| matches!(seen, Seen::Running { .. })).await;
    assert_eq!(running, Seen::Running { replica: R1, address: Some(address) });
    assert_eq!(eventually(async || get(address, "/version").await).await, "1\n");

    let begun = Instant::now();
    for _ in 0..2 {
        assert_eq!(bed.docker.stop(R1, GRACE).await, Finished::Stopped);
    }
    assert!(begun.elapsed() < GRACE, "it ends on SIGTERM");
    let exited = wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
    let Seen::Exited { exited: Exited { code: 0, out_of_memory: false, last_lines }, .. } = exited else {
        panic!("{exited:?}")
    };
    assert_eq!(last_lines.last().map(String::as_str), Some("stopped, 0 connections unfinished"));

    for _ in 0..2 {
        assert_eq!(bed.docker.remove(R1, &goal, false).await, Finished::Removed);
    }
    wait_seen(&mut events, |seen| *seen == Seen::Vanished { replica: R1 }).await;
    assert!(!bed.network_exists());
    assert_eq!(bed.docker.stop(R1, GRACE).await, Finished::Stopped);
}

#[tokio::test]
async fn what_ignores_sigterm_is_killed_after_its_grace() {
    requires_docker!();
    let bed = Bed::new("grace");
    let goal = bed.goal_with(|_, env| env.extend([("IGNORE_SIGTERM", "1")]));
    let address = bed.up(R1, &goal).await;
    eventually(async || get(address, "/healthz").await).await;
    let mut events = bed.docker.events();
    let begun = Instant::now();
    assert_eq!(bed.docker.stop(R1, Duration::from_secs(1)).await, Finished::Stopped);
    assert!(begun.elapsed() >= Duration::from_secs(1));
    let exited = wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
    let Seen::Exited { exited, .. } = exited else { panic!("{exited:?}") };
    assert_eq!((exited.code, exited.out_of_memory), (137, false));
}

#[tokio::test]
async fn a_container_killed_from_outside_is_seen_with_its_last_lines() {
    requires_docker!();
    let bed = Bed::new("killed");
    let goal = bed.goal();
    let address = bed.up(R1, &goal).await;
    eventually(async || get(address, "/healthz").await).await;
    let mut events = bed.docker.events();
    wait_seen(&mut events, |seen| matches!(seen, Seen::All(_))).await;

    run("docker", &["kill", &bed.container(R1)]).unwrap();
    let exited = wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
    let last_lines = vec!["version 1 listening on http://0.0.0.0:8080".to_owned()];
    let killed = Exited { code: 137, out_of_memory: false, last_lines };
    assert_eq!(exited, Seen::Exited { replica: R1, exited: killed });

    // And it is started again, with the same logs to come and none of the old ones told again.
    assert!(matches!(bed.start(R1, &goal).await, Finished::Started { address: Some(_) }));
    run("docker", &["rm", "--force", &bed.container(R1)]).unwrap();
    wait_seen(&mut events, |seen| *seen == Seen::Vanished { replica: R1 }).await;
}

#[tokio::test]
async fn memory_over_the_limit_is_seen_as_that() {
    requires_docker!();
    let bed = Bed::new("oom");
    let goal = bed.goal_with(|goal, _| goal.resources.memory = Some(Memory(32 << 20)));
    let address = bed.up(R1, &goal).await;
    let mut events = bed.docker.events();
    eventually(async || get(address, "/healthz").await).await;
    let _cut_off = get(address, "/eat").await;
    let exited = wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
    let Seen::Exited { exited: Exited { code: 137, out_of_memory: true, last_lines }, .. } = exited else {
        panic!("{exited:?}")
    };
    assert_eq!(last_lines.last().map(String::as_str), Some("told to eat memory"));
}

#[tokio::test]
async fn what_exits_at_once_shows_its_code_and_last_words_of_this_start_only() {
    requires_docker!();
    let bed = Bed::new("exits");
    let goal = bed.goal_with(|_, env| env.extend([("EXIT_AT_START", "3")]));
    assert_eq!(bed.create(R1, &goal).await, Finished::Created);
    let mut events = bed.docker.events();
    for _ in 0..3 {
        let started = bed.start(R1, &goal).await;
        assert!(matches!(started, Finished::Started { .. } | Finished::Failed(Cause::Exited)), "{started:?}");
        let exited = wait_seen(&mut events, |seen| matches!(seen, Seen::Exited { .. })).await;
        let Seen::Exited { exited, .. } = exited else { panic!("{exited:?}") };
        assert_eq!((exited.code, exited.last_lines), (3, vec!["fatal: told to exit with 3 at start".to_owned()]));
    }
}

#[tokio::test]
async fn a_new_handle_finds_everything_again() {
    requires_docker!();
    let bed = Bed::new("adopt");
    let goal = bed.goal();
    let exits = bed.goal_with(|_, env| env.extend([("EXIT_AT_START", "4")]));
    let (r2, r3) = (ReplicaId(2), ReplicaId(3));
    let address = bed.up(R1, &goal).await;
    assert_eq!(bed.create(r2, &exits).await, Finished::Created);
    bed.start(r2, &exits).await;
    assert_eq!(bed.create(r3, &goal).await, Finished::Created);
    run("docker", &["wait", &bed.container(r2)]).unwrap();

    let again = Docker::new(bed.config.clone());
    let mut events = again.events();
    let Seen::All(mut found) = wait_seen(&mut events, |_| true).await else { panic!("the list comes first") };
    found.sort_by_key(|found| found.replica);
    let (_, digest, _) = bed.fetch(&goal).await.unwrap();
    for found in &found {
        assert_eq!((&found.service, found.revision), (&goal.service, goal.revision));
        assert_eq!(found.digest, digest);
    }
    let [one, two, three] = &found[..] else { panic!("{found:?}") };
    assert!(matches!(one.condition, Condition::Running { address: Some(at), since } if at == address && since.0 > 0));
    let last_lines = vec!["fatal: told to exit with 4 at start".to_owned()];
    assert_eq!(two.condition, Condition::Exited(Exited { code: 4, out_of_memory: false, last_lines }));
    assert_eq!(three.condition, Condition::Created);

    // The exit was in the list: it is not told a second time by the events from just before it.
    run("docker", &["kill", &bed.container(R1)]).unwrap();
    let next = wait_seen(&mut events, |seen| !matches!(seen, Seen::Running { .. })).await;
    assert!(matches!(next, Seen::Exited { replica: R1, .. }), "{next:?}");
}

#[tokio::test]
async fn limits_and_confinement_are_what_the_goal_and_the_house_say() {
    requires_docker!();
    let bed = Bed::new("limits");
    let goal = bed.goal_with(|goal, _| {
        goal.resources.memory = Some(Memory(64 << 20));
        goal.resources.cpu = Some(Cpu(500));
    });
    let hosts = [("db".to_owned(), "10.1.2.3".parse().unwrap())];
    let (image, _, _) = bed.fetch(&goal).await.unwrap();
    assert_eq!(bed.docker.create(R1, &goal, &image, &hosts, &open).await, Finished::Created);
    let inspected = bed.inspect(R1).replace(char::is_whitespace, "");
    for expect in [
        "\"Memory\":67108864",
        "\"NanoCpus\":500000000",
        "\"PidsLimit\":4096",
        "\"CapDrop\":[\"NET_RAW\"]",
        "\"SecurityOpt\":[\"no-new-privileges:true\"]",
        "\"RestartPolicy\":{\"Name\":\"no\"",
        "\"max-size\":\"10m\"",
        "\"Init\":true",
        "\"Privileged\":false",
        "\"ExtraHosts\":[\"db:10.1.2.3\"]",
    ] {
        assert!(inspected.contains(expect), "{expect} is not in {inspected}");
    }
}

#[tokio::test]
async fn services_of_a_project_find_each_other_by_name() {
    requires_docker!();
    let bed = Bed::new("names");
    let goal = bed.goal();
    bed.up(R1, &goal).await;
    let other = bed.goal_with(|goal, _| goal.service.service = Label::new("other").unwrap());
    bed.up(ReplicaId(2), &other).await;
    // Docker's resolver answers for aliases; the test program's own look-up goes through it.
    let argv = ["/orca-test-app", "fetch", "web:8080", "/version"].map(str::to_owned);
    let ended = eventually(async || {
        let ended = bed.docker.run(ReplicaId(2), &argv, GRACE).await.unwrap();
        if ended.code == 0 { Ok(ended) } else { Err(ended) }
    });
    assert_eq!(ended.await.output, "1");
}

#[tokio::test]
async fn a_network_that_someone_pruned_is_made_again() {
    requires_docker!();
    let bed = Bed::new("pruned");
    let goal = bed.goal();
    bed.up(R1, &goal).await;
    bed.docker.stop(R1, GRACE).await;
    run("docker", &["network", "rm", &format!("orca-{}", bed.project)]).unwrap();
    assert!(matches!(bed.start(R1, &goal).await, Finished::Started { address: Some(_) }));
}

#[tokio::test]
async fn on_the_hosts_network_it_is_reached_on_the_host() {
    requires_docker!();
    let bed = Bed::new("host");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let text = port.to_string();
    let goal = bed.goal_with(|goal, env| {
        container(goal).host.network = true;
        goal.port = Some(port);
        env.extend([("PORT", text.as_str()), ("BIND", "127.0.0.1")]);
    });
    let address = bed.up(R1, &goal).await;
    assert_eq!(address, SocketAddr::from(([127, 0, 0, 1], port)));
    assert_eq!(eventually(async || get(address, "/version").await).await, "1\n");
    assert_eq!(bed.docker.listening(R1).await, None, "those are everybody's");
    assert!(!bed.network_exists());
}

#[tokio::test]
async fn secrets_as_files_are_in_memory_and_nowhere_in_docker() {
    requires_docker!();
    let bed = Bed::new("files");
    let mut goal = bed.goal_with(|goal, env| {
        container(goal).secrets_as = SecretsAs::Files;
        goal.secrets = [("PASSWORD", "PASSWORD")].map(|(a, b)| (a.to_owned(), b.parse().unwrap())).into();
        env.insert("DATABASE", "postgres://app:${secrets.PASSWORD}@db/app");
        env.insert("PLAIN", "shown");
    });
    let address = bed.up(R1, &goal).await;
    let text = eventually(async || get(address, "/file?/run/secrets/DATABASE").await).await;
    assert_eq!(text, "postgres://app:ORCA-CANARY-PASSWORD@db/app");
    assert_eq!(get(address, "/env?DATABASE_FILE").await.unwrap(), "/run/secrets/DATABASE");
    assert_eq!(get(address, "/env?PLAIN").await.unwrap(), "shown");
    assert_eq!(get(address, "/env?DATABASE").await.unwrap(), "absent\n");
    let inspected = bed.inspect(R1);
    assert!(!inspected.contains("ORCA-CANARY"));

    let source = inspected.lines().find_map(|line| line.trim().strip_prefix("\"Source\": \"")).unwrap();
    let source = source.trim_end_matches(['"', ',']).to_owned();
    let kind = run("stat", &["--file-system", "--format", "%T", &source]).unwrap();
    assert_eq!(kind.trim(), "tmpfs");

    // After a reboot the files are gone, and a start brings them back.
    bed.docker.stop(R1, GRACE).await;
    std::fs::remove_dir_all(&source).unwrap();
    assert!(matches!(bed.start(R1, &goal).await, Finished::Started { .. }));
    assert!(std::fs::read_to_string(format!("{source}/DATABASE")).unwrap().contains("ORCA-CANARY"));
    assert_eq!(bed.docker.remove(R1, &goal, false).await, Finished::Removed);
    assert!(!std::path::Path::new(&source).exists());

    for (name, expect) in [
        ("ABSENT", Cause::SecretMissing { name: "ABSENT".to_owned() }),
        (
            "DAMAGED",
            Cause::Refused { reason: "secret `DAMAGED` does not open: it was sealed to another node".to_owned() },
        ),
        ("UNKNOWN", Cause::SecretMissing { name: "UNKNOWN".to_owned() }),
    ] {
        goal.env = [("X".to_owned(), format!("${{secrets.{name}}}").parse().unwrap())].into();
        goal.secrets = ["ABSENT", "DAMAGED"].map(|name| (name.to_owned(), name.parse().unwrap())).into();
        assert_eq!(bed.create(R1, &goal).await, Finished::Failed(expect));
    }
}

#[tokio::test]
async fn secrets_as_files_go_where_they_can_when_the_first_place_is_somebody_elses() {
    requires_docker!();
    let mut bed = Bed::new("elsewhere");
    // In memory, and not to be had, as `/run/orca` is not by an ordinary user.
    let taken = tempfile::NamedTempFile::new_in("/dev/shm").unwrap();
    bed.config.runtime_directory = taken.path().join("orca");
    bed.docker = Docker::new(bed.config.clone());
    let goal = bed.goal_with(|goal, env| {
        container(goal).secrets_as = SecretsAs::Files;
        goal.secrets = [("PASSWORD".to_owned(), "PASSWORD".parse().unwrap())].into();
        env.insert("PASSWORD", "${secrets.PASSWORD}");
    });
    let address = bed.up(R1, &goal).await;
    let text = eventually(async || get(address, "/file?/run/secrets/PASSWORD").await).await;
    assert_eq!(text, "ORCA-CANARY-PASSWORD");
    let inspected = bed.inspect(R1);
    let source = inspected.lines().find_map(|line| line.trim().strip_prefix("\"Source\": \"")).unwrap();
    let source = source.trim_end_matches(['"', ',']).to_owned();

    // An Orca that was started with another first place finds them too.
    let place = tempfile::tempdir_in("/dev/shm").unwrap();
    bed.config.runtime_directory = place.path().join("orca");
    bed.docker = Docker::new(bed.config.clone());
    assert_eq!(bed.docker.remove(R1, &goal, false).await, Finished::Removed);
    assert!(!std::path::Path::new(&source).exists());
}

#[tokio::test]
async fn named_volumes_outlive_the_container_and_go_only_when_erased() {
    requires_docker!();
    let bed = Bed::new("volumes");
    let goal = bed.goal_with(|goal, _| {
        let source = VolumeSource::Named(Label::new("data").unwrap());
        container(goal).volumes.push(Volume { source, path: "/data".to_owned(), read_only: false });
    });
    let volume = format!("orca-{}.data", bed.project);
    let exists = || run("docker", &["volume", "inspect", &volume]).is_ok();
    bed.up(R1, &goal).await;
    let r2 = ReplicaId(2);
    assert_eq!(bed.create(r2, &goal).await, Finished::Created);
    let busy = Cause::VolumeBusy { volume: volume.clone(), by: r2 };
    assert_eq!(bed.docker.remove(R1, &goal, true).await, Finished::Failed(busy));
    assert_eq!(bed.docker.remove(r2, &goal, false).await, Finished::Removed);
    assert!(exists());
    for _ in 0..2 {
        assert_eq!(bed.docker.remove(R1, &goal, true).await, Finished::Removed);
    }
    assert!(!exists());

    // What no goal speaks of is taken away, and what it kept stays.
    bed.up(R1, &goal).await;
    assert_eq!(bed.docker.remove_found(R1, &goal.service).await, Finished::Removed);
    assert!(exists() && !bed.network_exists());
}

#[tokio::test]
async fn the_host_is_not_mounted_whatever_it_is_called() {
    requires_docker!();
    let mut bed = Bed::new("mounts");
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_str().unwrap().to_owned();
    for directory in ["ok", "state"] {
        std::fs::create_dir(path(directory)).unwrap();
    }
    std::os::unix::fs::symlink(&bed.config.socket, path("innocent")).unwrap();
    std::fs::write(path("ok/file"), "from the host").unwrap();
    bed.config.state_directories.push(path("state").into());
    bed.docker = Docker::new(bed.config.clone());
    let with = |source: &str| {
        bed.goal_with(|goal, _| {
            let source = VolumeSource::Host(source.to_owned());
            container(goal).volumes.push(Volume { source, path: "/mnt".to_owned(), read_only: true });
        })
    };
    for bad in ["/", "/etc", "/proc/1", "/var/run/docker.sock", "/run", &path("innocent"), &path("state"), &path("")] {
        let refused = bed.create(R1, &with(bad)).await;
        assert!(
            matches!(&refused, Finished::Failed(Cause::Refused { reason }) if reason.contains(bad)),
            "{bad}: {refused:?}"
        );
    }
    let address = bed.up(R1, &with(&path("ok"))).await;
    assert_eq!(eventually(async || get(address, "/file?/mnt/file").await).await, "from the host");

    // What was a directory may be a link by the next start.
    run("docker", &["stop", "--time", "0", &bed.container(R1)]).unwrap();
    std::fs::rename(path("ok"), path("was-ok")).unwrap();
    std::os::unix::fs::symlink("/etc", path("ok")).unwrap();
    let refused = bed.start(R1, &with(&path("ok"))).await;
    assert!(matches!(&refused, Finished::Failed(Cause::Refused { .. })), "{refused:?}");
    std::fs::remove_file(path("ok")).unwrap();
    std::os::unix::fs::symlink(path("was-ok"), path("ok")).unwrap();
    let refused = bed.start(R1, &with(&path("ok"))).await;
    let told = format!("write {}", path("was-ok"));
    assert!(matches!(&refused, Finished::Failed(Cause::Refused { reason }) if reason.ends_with(&told)), "{refused:?}");
}

#[tokio::test]
async fn a_command_that_is_not_there_is_named() {
    requires_docker!();
    let bed = Bed::new("command");
    for (number, command) in ["/nope", "nope", "/tmp"].into_iter().enumerate() {
        let replica = ReplicaId(10 + number as u64);
        let goal = bed.goal_with(|goal, _| {
            container(goal).image = "orca-test/bare:1".to_owned();
            container(goal).command = vec![command.to_owned(), "argument".to_owned()];
        });
        assert_eq!(bed.create(replica, &goal).await, Finished::Created);
        let failed = bed.start(replica, &goal).await;
        let Finished::Failed(Cause::NoSuchCommand { command: named, .. }) = failed else { panic!("{failed:?}") };
        assert_eq!(named, command);
    }
    let goal = bed.goal_with(|goal, _| container(goal).image = "orca-test/bare:1".to_owned());
    bed.up(R1, &goal).await;
}

#[tokio::test]
async fn what_is_in_the_way_and_not_ours_is_named_and_left_alone() {
    requires_docker!();
    let bed = Bed::new("foreign");
    let goal = bed.goal();
    let name = bed.container(R1);
    run("docker", &["create", "--name", &name, "orca-test/app:1"]).unwrap();
    let refused = bed.create(R1, &goal).await;
    run("docker", &["rm", &name]).unwrap();
    assert!(
        matches!(&refused, Finished::Failed(Cause::Refused { reason }) if reason.contains("docker rm")),
        "{refused:?}"
    );
}

#[tokio::test]
async fn a_loopback_address_is_the_evidence_for_a_failing_probe() {
    requires_docker!();
    let bed = Bed::new("loopback");
    let goal = bed.goal_with(|_, env| env.extend([("BIND", "127.0.0.1")]));
    let address = bed.up(R1, &goal).await;
    let expect: SocketAddr = "127.0.0.1:8080".parse().unwrap();
    eventually(async || match bed.docker.listening(R1).await.unwrap() {
        sockets if sockets == [expect] => Ok(()),
        other => Err(other),
    })
    .await;
    let no_exec = async |_: &[String], _| panic!("nothing to run");
    let saw = probe(&Check::Http("/healthz".to_owned()), Some(address), GRACE, no_exec).await;
    assert_eq!(saw, Err(Saw::Refused));
    assert_eq!(bed.docker.listening(ReplicaId(99)).await, None);
}

#[tokio::test]
async fn probes_look_at_a_real_replica() {
    requires_docker!();
    let bed = Bed::new("probes");
    let goal = bed.goal();
    let address = bed.up(R1, &goal).await;
    let look = async |check: Check, timeout: Duration| {
        let exec = async |argv: &[String], timeout| bed.docker.run(R1, argv, timeout).await;
        probe(&check, Some(address), timeout, exec).await
    };
    let http = |path: &str| Check::Http(path.to_owned());
    let exec = |argv: &[&str]| Check::Exec(argv.iter().map(|a| (*a).to_owned()).collect());
    eventually(async || look(Check::Tcp, GRACE).await).await;
    assert_eq!(look(http("/healthz"), GRACE).await, Ok(()));
    assert_eq!(look(http("/nothing"), GRACE).await, Err(Saw::Status(404)));
    assert_eq!(look(http("/hang"), Duration::from_millis(100)).await, Err(Saw::TimedOut));
    assert_eq!(look(exec(&["/orca-test-app", "echo", "fine"]), GRACE).await, Ok(()));
    let failed = Saw::Exit { code: 7, output: "exit 7".to_owned() };
    assert_eq!(look(exec(&["/orca-test-app", "exit", "7"]), GRACE).await, Err(failed));
    let absent = look(exec(&["/nope"]), GRACE).await;
    assert!(
        matches!(&absent, Err(Saw::Exit { output, .. } | Saw::Error(output)) if output.contains("/nope")),
        "{absent:?}"
    );
    let begun = Instant::now();
    assert_eq!(look(exec(&["/orca-test-app", "sleep", "60000"]), Duration::from_millis(300)).await, Err(Saw::TimedOut));
    assert!(begun.elapsed() < Duration::from_secs(10));
    // The command was ended with its time.
    eventually(async || match run("docker", &["top", &bed.container(R1)]).unwrap() {
        processes if processes.contains("sleep 60000") => Err(processes),
        _ => Ok(()),
    })
    .await;
    // HTTP/1.1 is no gRPC.
    assert!(matches!(look(Check::Grpc, GRACE).await, Err(Saw::Error(_))));
    get(address, "/unready").await.unwrap();
    assert_eq!(look(http("/healthz"), GRACE).await, Err(Saw::Status(503)));
}
