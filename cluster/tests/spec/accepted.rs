//! What is right is read as it was meant.

use expect_test::{Expect, expect, expect_file};
use orca_cluster::spec::{Service, Strategy, toml};

use crate::{file, label, project, rendered};

const ALL: &str = include_str!("../fixtures/all.toml");

#[test]
fn every_key_of_today_is_read() {
    let project = project(ALL).unwrap_or_else(|problems| panic!("{}", rendered(ALL, &problems)));
    let json = serde_json::to_string_pretty(&project).expect("a project is JSON") + "\n";
    expect_file!["../fixtures/all.json"].assert_eq(&json);
}

/// What people look keys up in. It must be right, and leave none out.
#[test]
fn the_documents_are_files_that_are_read_and_name_every_key() {
    const SERVICE: &str = include_str!("../../../docs/service.toml");
    const CLUSTER: &str = include_str!("../../../docs/cluster.toml");
    project(SERVICE).unwrap_or_else(|problems| panic!("{}", rendered(SERVICE, &problems)));
    toml::settings(&file(CLUSTER)).unwrap_or_else(|problems| panic!("{}", rendered(CLUSTER, &problems)));
    // Accepted with the only value that changes nothing; a variable of somebody's own.
    let left_out = ["internal", "sticky", "\"discovery.type\""];
    let words: Vec<&str> = SERVICE.split(|c: char| !(c.is_ascii_alphanumeric() || c == '_')).collect();
    for line in ALL.lines() {
        let key = match (line.split_once(" = "), line.trim_matches(['[', ']']).rsplit_once('.')) {
            (Some((key, _)), _) => key,
            (None, Some((_, table))) if line.starts_with('[') => table,
            _ => continue,
        };
        assert!(words.contains(&key) || left_out.contains(&key), "docs/service.toml does not name `{key}`");
    }
}

fn service(text: &str) -> Service {
    let text = format!("[[service]]\nname = \"web\"\n{text}");
    let project = project(&text).unwrap_or_else(|problems| panic!("{}", rendered(&text, &problems)));
    project.services.into_values().next().expect("one service")
}

fn routes(text: &str, expect: Expect) {
    let service = service(text);
    let routes: Vec<String> = service.routes.iter().map(ToString::to_string).collect();
    expect.assert_eq(&routes.join(" "));
}

#[test]
fn routes_are_every_domain_with_every_path() {
    let image = "image = \"nginx\"\nport = 80\n";
    routes(&format!("{image}domain = \"a.example.com\""), expect!["a.example.com/*"]);
    routes(
        &format!("{image}domains = [\"a.example.com\", \"*.b.example.com\"]\nroutes = [\"/\", \"/x/*\", \"/y/\"]"),
        expect![
            "a.example.com/* a.example.com/x/* a.example.com/y/* *.b.example.com/* *.b.example.com/x/* *.b.example.com/y/*"
        ],
    );
    routes(&format!("{image}routes = [\"/x\"]"), expect!["/x/*"]);
    routes(image, expect![""]);
}

#[test]
fn a_module_serves_every_host_unless_it_says_otherwise() {
    routes("module = \"./web.wasm\"", expect!["/*"]);
    routes("module = \"web.wasm\"\ndomain = \"a.example.com\"", expect!["a.example.com/*"]);
    routes("module = \"web.wasm\"\ntriggers = [\"http:/x/*\"]", expect!["/x/*"]);
    routes("module = \"web.wasm\"\ntriggers = [\"cron:0 9 * * *\"]", expect![""]);
    routes(
        "module = \"web.wasm\"\ntriggers = [\"cron:0 9 * * *\"]\ndomain = \"a.example.com\"",
        expect!["a.example.com/*"],
    );
}

#[test]
fn a_service_with_data_is_recreated_and_any_other_rolls() {
    assert_eq!(service("image = \"nginx\"").deploy.strategy, Strategy::Rolling);
    let volume = "image = \"redis\"\n[service.volume]\nname = \"data\"\npath = \"/data\"\n";
    assert_eq!(service(volume).deploy.strategy, Strategy::Recreate);
    assert_eq!(service(&format!("{volume}read_only = true")).deploy.strategy, Strategy::Rolling);
}

#[test]
fn the_memory_of_a_module_is_the_memory_of_an_instance() {
    assert_eq!(service("module = \"a.wasm\"").limits.memory.to_string(), "64Mi");
    assert_eq!(service("module = \"a.wasm\"\nresources.memory = \"1Gi\"").limits.memory.to_string(), "1Gi");
}

#[test]
fn health_is_both_probes_and_a_table_refines_one() {
    let service =
        service("image = \"nginx\"\nport = 80\nhealth = \"/h\"\nliveness.interval_secs = 7\nreadiness.tcp = true");
    expect![[r#"
        (
            Some(
                Probe {
                    check: Http(
                        "/h",
                    ),
                    interval: 7s,
                    timeout: 3s,
                    failure_threshold: 3,
                    success_threshold: 1,
                    initial_delay: 0ns,
                },
            ),
            Some(
                Probe {
                    check: Tcp,
                    interval: 1s,
                    timeout: 3s,
                    failure_threshold: 3,
                    success_threshold: 1,
                    initial_delay: 0ns,
                },
            ),
        )
    "#]]
    .assert_debug_eq(&(service.liveness, service.readiness));
}

#[test]
fn a_project_is_named_by_its_directory_or_by_itself() {
    let text = "[[service]]\nname = \"web\"\nimage = \"nginx\"\n";
    assert_eq!(project(text).expect("it is right").name, label("p"));
    assert_eq!(project(&format!("project = \"shop\"\n{text}")).expect("it is right").name, label("shop"));
}

#[test]
fn settings_are_read() {
    let text = "[policy]\nallow_host = [\"/srv/media\", \"network\"]\n";
    let settings = toml::settings(&file(text)).unwrap_or_else(|problems| panic!("{}", rendered(text, &problems)));
    expect![[r#"
        Settings {
            name: None,
            domain: None,
            log_level: None,
            allow_host: {
                "/srv/media",
                "network",
            },
        }
    "#]]
    .assert_debug_eq(&settings);
    assert_eq!(toml::settings(&file("")), Ok(Default::default()));
}
