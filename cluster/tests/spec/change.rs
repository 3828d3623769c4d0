//! What a difference between two specifications asks for.

use expect_test::{Expect, expect};
use orca_cluster::spec::Service;
use orca_cluster::spec::change::change;

use crate::{project, rendered};

fn service(text: &str) -> Service {
    let text = format!("[[service]]\nname = \"web\"\n{text}");
    let project = project(&text).unwrap_or_else(|problems| panic!("{}", rendered(&text, &problems)));
    project.services.into_values().next().expect("one service")
}

fn check(old: &str, new: &str, expect: Expect) {
    let change = change(&service(old), &service(new));
    let lines: Vec<String> = change.differences.iter().map(|d| format!("{:?}: {}\n", d.effect, d.what)).collect();
    let verdict = if change.needs_new_replicas() { "new replicas" } else { "same replicas" };
    expect.assert_eq(&format!("{}{verdict}\n", lines.concat()));
}

#[test]
fn the_same_text_is_no_change() {
    let text = include_str!("../fixtures/all.toml");
    let (one, other) = (project(text).expect("right"), project(text).expect("right"));
    for (name, service) in &one.services {
        assert!(change(service, &other.services[name]).is_nothing());
    }
}

#[test]
fn a_new_image_and_more_replicas_are_one_change() {
    check(
        "image = \"redis:6\"",
        "image = \"redis:7\"\nreplicas = 3",
        expect![[r#"
        Replace: image redis:6 -> redis:7
        Rescale: replicas 1 -> 3
        new replicas
    "#]],
    );
}

#[test]
fn what_the_process_sees_needs_a_new_process() {
    check(
        "image = \"a\"\nport = 80\nenv = { A = \"1\", B = \"${secrets.B}\", C = \"x\" }\n[service.volume]\nname = \"d\"\npath = \"/d\"",
        "image = \"a\"\nport = 81\ncommand = [\"run\", \"fast\"]\nprivileged = true\nenv = { A = \"2\", B = \"${secrets.B}\", D = \"x\" }\n\
         [service.volume]\nname = \"d\"\npath = \"/e\"\n[service.resources]\nmemory = \"1Gi\"\n[service.placement]\nlabels = { zone = \"b\" }",
        expect![[r#"
            Replace: command the image's own -> run fast
            Replace: port 80 -> 81
            Replace: env A changed
            Replace: env C removed
            Replace: env D added
            Replace: memory none -> 1Gi
            Replace: node label zone added
            Replace: volume d at /d removed
            Replace: volume d at /e added
            Replace: privileged false -> true
            new replicas
        "#]],
    );
}

#[test]
fn what_is_around_the_process_does_not() {
    check(
        "image = \"a\"\nport = 80\ndomain = \"a.example.com\"\nhealth = \"/h\"",
        "image = \"a\"\nport = 80\ndomain = \"b.example.com\"\nreplicas = 2\nresponse_timeout_secs = 300\nreadiness.tcp = true\nliveness.path = \"/h\"\n\
         [service.deploy]\nstrategy = \"canary\"\ncanary_weight = 5\nstop_grace_secs = 1\nauto_promote = {}\n\
         [service.registry]\nusername = \"a\"\npassword = \"${secrets.P}\"",
        expect![[r#"
            Rescale: replicas 1 -> 2
            Reroute: route a.example.com/* removed
            Reroute: route b.example.com/* added
            Reroute: response_timeout 60s -> 300s
            Reprobe: readiness GET /h -> tcp
            Remember: strategy rolling -> canary 5%
            Remember: auto_promote none -> at 99.5% after 300s
            Remember: stop_grace 10s -> 1s
            Remember: registry login added
            same replicas
        "#]],
    );
}

#[test]
fn a_default_that_is_written_down_is_no_change() {
    check(
        "image = \"a\"\nport = 80",
        "image = \"a\"\nport = 80\nresponse_timeout_secs = 60",
        expect![[r#"
            same replicas
        "#]],
    );
}

#[test]
fn a_module_is_its_bytes() {
    let with = |path: &str, digest: &str| {
        let mut service = service(&format!("module = \"{path}\""));
        let orca_cluster::spec::Source::Module(module) = &mut service.source else { panic!("it is a module") };
        module.digest = Some(digest.repeat(64));
        service
    };
    let moved = change(&with("./a.wasm", "0"), &with("./b.wasm", "0"));
    assert!(!moved.needs_new_replicas());
    expect!["module ./a.wasm -> ./b.wasm"].assert_eq(&moved.describe().join("\n"));
    let rebuilt = change(&with("./a.wasm", "0"), &with("./a.wasm", "1"));
    assert!(rebuilt.needs_new_replicas());
    expect!["module ./a.wasm has other content"].assert_eq(&rebuilt.describe().join("\n"));
}

#[test]
fn limits_and_times_of_a_module_are_compared() {
    check(
        "module.path = \"a.wasm\"\ntriggers = [\"cron:0 9 * * *\"]",
        "module = { path = \"a.wasm\", timeout_secs = 1, outbound = [\"x.example.com\"] }\ntriggers = [\"cron:0 8 * * *\"]\n\
         resources.memory = \"32Mi\"",
        expect![[r#"
            Remember: memory none -> 32Mi
            Reschedule: schedule 0 8 * * * added
            Reschedule: schedule 0 9 * * * removed
            Replace: memory of an instance 64Mi -> 32Mi
            Replace: time of a request 30s -> 1s
            Replace: outbound host x.example.com added
            new replicas
        "#]],
    );
    check(
        "image = \"a\"",
        "module = \"./a.wasm\"",
        expect![[r#"
            Replace: image a -> module ./a.wasm
            Reroute: route /* added
            new replicas
        "#]],
    );
}
