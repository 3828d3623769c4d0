//! What people get wrong, and what they are told. Each test is one mistake, as `orca deploy` shows it.

use expect_test::{Expect, expect};
use orca_cluster::spec::toml;

use crate::{file, label, project, rendered};

const WEB: &str = "[[service]]\nname = \"web\"\nimage = \"nginx\"\nport = 80\n";

fn check(text: &str, expect: Expect) {
    match project(text) {
        Ok(project) => panic!("this is accepted: {project:?}"),
        Err(problems) => expect.assert_eq(&rendered(text, &problems)),
    }
}

/// A mistake in a service that is right otherwise.
fn check_key(keys: &str, expect: Expect) {
    check(&format!("{WEB}{keys}\n"), expect);
}

#[test]
fn a_key_that_does_not_exist() {
    check_key(
        "replica = 3",
        expect![[r#"
        error: unknown key `replica`
         --> service.toml:5:1
          |
        5 | replica = 3
          | ^^^^^^^
          = hint: did you mean `replicas`?
    "#]],
    );
}

#[test]
fn a_key_by_its_name_elsewhere() {
    check_key(
        r#"environment = { A = "1" }"#,
        expect![[r#"
        error: unknown key `environment`
         --> service.toml:5:1
          |
        5 | environment = { A = "1" }
          | ^^^^^^^^^^^
          = hint: did you mean `env`?
    "#]],
    );
}

#[test]
fn a_key_in_the_wrong_table() {
    check_key(
        "max_surge = 2",
        expect![[r#"
        error: unknown key `max_surge`
         --> service.toml:5:1
          |
        5 | max_surge = 2
          | ^^^^^^^^^
          = hint: `max_surge` goes into `[service.deploy]`
    "#]],
    );
}

#[test]
fn a_key_of_a_table_that_does_not_exist() {
    check_key(
        "deploy.speed = 1",
        expect![[r#"
        error: unknown key `speed`
         --> service.toml:5:8
          |
        5 | deploy.speed = 1
          |        ^^^^^
          = hint: known here: `strategy`, `canary_weight`, `auto_promote`, `max_unavailable`, `max_surge`, `ready_timeout_secs`, `drain_timeout_secs`, `stop_grace_secs`
    "#]],
    );
}

#[test]
fn a_number_for_a_text() {
    check_key(
        "domain = 80",
        expect![[r#"
        error: expected a text, found a whole number
         --> service.toml:5:10
          |
        5 | domain = 80
          |          ^^
          = hint: write it in quotes: "80"
    "#]],
    );
}

#[test]
fn a_text_for_a_number() {
    check_key(
        r#"replicas = "3""#,
        expect![[r#"
        error: expected a whole number, found a text
         --> service.toml:5:12
          |
        5 | replicas = "3"
          |            ^^^
          = hint: write it without quotes: 3
    "#]],
    );
}

#[test]
fn a_text_for_a_list() {
    check_key(
        r#"command = "serve""#,
        expect![[r#"
        error: expected an array, found a text
         --> service.toml:5:11
          |
        5 | command = "serve"
          |           ^^^^^^^
          = hint: write it in brackets: ["serve"]
    "#]],
    );
}

#[test]
fn a_negative_number() {
    check_key(
        "replicas = -1",
        expect![[r#"
        error: the number is negative
         --> service.toml:5:12
          |
        5 | replicas = -1
          |            ^^
    "#]],
    );
}

#[test]
fn too_many_replicas() {
    check_key(
        "replicas = 100000",
        expect![[r#"
        error: a service has at most 500 replicas, not 100000
         --> service.toml:5:12
          |
        5 | replicas = 100000
          |            ^^^^^^
    "#]],
    );
}

#[test]
fn a_port_out_of_range() {
    check(
        r#"[[service]]
name = "web"
image = "nginx"
port = 70000
"#,
        expect![[r#"
    error: a port is a number from 1 to 65535
     --> service.toml:4:8
      |
    4 | port = 70000
      |        ^^^^^
"#]],
    );
}

#[test]
fn no_name() {
    check(
        r#"[[service]]
image = "nginx"
"#,
        expect![[r#"
    error: this service has no `name`
     --> service.toml:1:1
      |
    1 | [[service]]
      | ^^^^^^^^^^^
      = hint: add `name = "…"`: other services call it by that
"#]],
    );
}

#[test]
fn a_name_that_is_no_host_name() {
    check(
        r#"[[service]]
name = "My_Shop"
image = "nginx"
"#,
        expect![[r#"
    error: a name has only a-z, 0-9 and hyphens, not `M`
     --> service.toml:2:8
      |
    2 | name = "My_Shop"
      |        ^^^^^^^^^
      = hint: such as "api": it is also the host name of the service
"#]],
    );
}

#[test]
fn nothing_to_run() {
    check(
        r#"[[service]]
name = "web"
"#,
        expect![[r#"
    error: `web` has nothing to run
     --> service.toml:1:1
      |
    1 | [[service]]
      | ^^^^^^^^^^^
      = hint: add `image = "…"` or `module = "./….wasm"`
"#]],
    );
}

#[test]
fn two_things_to_run() {
    check(
        r#"[[service]]
name = "web"
image = "nginx"
module = "./web.wasm"
"#,
        expect![[r#"
    error: `web` has `image` and `module`
     --> service.toml:4:1
      |
    4 | module = "./web.wasm"
      | ^^^^^^
      = hint: a service has exactly one of `image`, `module`, `build` and `template`
"#]],
    );
}

#[test]
fn a_path_and_a_table_of_limits_for_one_module() {
    check(
        r#"[[service]]
name = "web"
module = "./web.wasm"
[service.module]
timeout_secs = 5
"#,
        expect![[r#"
    error: `module` is already given
     --> service.toml:4:10
      |
    4 | [service.module]
      |          ^^^^^^
      = hint: with a table `[service.module]`, write the path into it: `path = "./api.wasm"`
"#]],
    );
}

#[test]
fn an_image_in_upper_case() {
    check(
        r#"[[service]]
name = "web"
image = "MyOrg/api"
"#,
        expect![[r#"
    error: an image's name is written in lower case, not `MyOrg`
     --> service.toml:3:9
      |
    3 | image = "MyOrg/api"
      |         ^^^^^^^^^^^
      = hint: write `myorg/api`
"#]],
    );
}

#[test]
fn an_image_with_a_scheme() {
    check(
        r#"[[service]]
name = "web"
image = "https://ghcr.io/org/app"
"#,
        expect![[r#"
    error: an image is named without `https://`
     --> service.toml:3:9
      |
    3 | image = "https://ghcr.io/org/app"
      |         ^^^^^^^^^^^^^^^^^^^^^^^^^
      = hint: write `ghcr.io/org/app`
"#]],
    );
}

#[test]
fn no_port_for_requests() {
    check(
        r#"[[service]]
name = "web"
image = "nginx"
domain = "example.com"
"#,
        expect![[r#"
    error: `web` needs `port`: requests are routed to it
     --> service.toml:1:1
      |
    1 | [[service]]
      | ^^^^^^^^^^^
      = hint: the TCP port that the process listens on: `port = 8080`
"#]],
    );
}

#[test]
fn no_port_for_a_probe() {
    check(
        r#"[[service]]
name = "web"
image = "nginx"
health = "/h"
"#,
        expect![[r#"
    error: `web` needs `port`: it is probed over the network
     --> service.toml:1:1
      |
    1 | [[service]]
      | ^^^^^^^^^^^
      = hint: the TCP port that the process listens on: `port = 8080`
"#]],
    );
}

#[test]
fn a_domain_with_a_scheme() {
    check_key(
        r#"domain = "https://example.com/shop""#,
        expect![[r#"
        error: a domain is a name only, without `://`
         --> service.toml:5:10
          |
        5 | domain = "https://example.com/shop"
          |          ^^^^^^^^^^^^^^^^^^^^^^^^^^
          = hint: write "example.com"; a path goes into `routes`
    "#]],
    );
}

#[test]
fn a_wildcard_in_the_middle() {
    check_key(
        r#"domain = "a.*.example.com""#,
        expect![[r#"
        error: `*` stands for the first parts of a domain only: `*.example.com`
         --> service.toml:5:10
          |
        5 | domain = "a.*.example.com"
          |          ^^^^^^^^^^^^^^^^^
          = hint: such as "api.example.com" or "*.example.com"
    "#]],
    );
}

#[test]
fn a_domain_that_is_not_ascii() {
    check_key(
        r#"domain = "bücher.example""#,
        expect![[r#"
        error: a domain has only a-z, 0-9, hyphens and dots, not `ü`
         --> service.toml:5:10
          |
        5 | domain = "bücher.example"
          |          ^^^^^^^^^^^^^^^^
          = hint: write it as it is in the DNS: "xn--…"
    "#]],
    );
}

#[test]
fn any_domain() {
    check_key(
        r#"domain = "*""#,
        expect![[r#"
        error: `*` stands for the first parts of a domain only: `*.example.com`
         --> service.toml:5:10
          |
        5 | domain = "*"
          |          ^^^
          = hint: leave `domain` out to serve every host
    "#]],
    );
}

#[test]
fn domain_and_domains() {
    check_key(
        r#"domain = "a.example.com"
domains = ["b.example.com"]"#,
        expect![[r#"
    error: a service has `domain` or `domains`, not both
     --> service.toml:6:1
      |
    6 | domains = ["b.example.com"]
      | ^^^^^^^
      = hint: write all of them into `domains = ["…"]`
"#]],
    );
}

#[test]
fn a_domain_twice() {
    check_key(
        r#"domains = ["a.example.com", "A.example.com"]"#,
        expect![[r#"
        error: `a.example.com` is already given
         --> service.toml:5:29
          |
        5 | domains = ["a.example.com", "A.example.com"]
          |                             ^^^^^^^^^^^^^^^
          = hint: leave it out here
    "#]],
    );
}

#[test]
fn a_path_without_a_slash() {
    check_key(
        r#"routes = ["api/*"]"#,
        expect![[r#"
        error: a path starts with `/`
         --> service.toml:5:11
          |
        5 | routes = ["api/*"]
          |           ^^^^^^^
          = hint: such as "/*" or "/api/*"
    "#]],
    );
}

#[test]
fn a_wildcard_inside_a_path() {
    check_key(
        r#"routes = ["/a*/b"]"#,
        expect![[r#"
        error: `*` may stand only at the end of a path, after a `/`: `/api/*`
         --> service.toml:5:11
          |
        5 | routes = ["/a*/b"]
          |           ^^^^^^^
          = hint: such as "/*" or "/api/*"
    "#]],
    );
}

#[test]
fn a_path_with_dots() {
    check_key(
        r#"routes = ["/a/../b"]"#,
        expect![[r#"
        error: a path may not contain an empty part, `.` or `..`
         --> service.toml:5:11
          |
        5 | routes = ["/a/../b"]
          |           ^^^^^^^^^
          = hint: such as "/*" or "/api/*"
    "#]],
    );
}

#[test]
fn a_list_of_nothing() {
    check_key(
        "domains = []\nroutes = []",
        expect![[r#"
        error: the list is empty
         --> service.toml:5:11
          |
        5 | domains = []
          |           ^^
          = hint: leave it out

        error: the list is empty
         --> service.toml:6:10
          |
        6 | routes = []
          |          ^^
          = hint: leave it out
    "#]],
    );
}

#[test]
fn a_path_twice() {
    check_key(
        r#"routes = ["/a", "/a/*"]"#,
        expect![[r#"
        error: `/a` and what is below it is already given
         --> service.toml:5:17
          |
        5 | routes = ["/a", "/a/*"]
          |                 ^^^^^^
          = hint: leave it out here
    "#]],
    );
}

#[test]
fn memory_without_a_unit() {
    check_key(
        "resources.memory = 512",
        expect![[r#"
        error: expected an amount of memory, found a whole number
         --> service.toml:5:20
          |
        5 | resources.memory = 512
          |                    ^^^
          = hint: write it with a unit: "512Mi"
    "#]],
    );
}

#[test]
fn memory_in_a_wrong_unit() {
    check_key(
        r#"resources.memory = "512mb""#,
        expect![[r#"
        error: `mb` is no unit of memory; use Ki, Mi, Gi or Ti (or k, M, G, T for powers of 1000)
         --> service.toml:5:20
          |
        5 | resources.memory = "512mb"
          |                    ^^^^^^^
          = hint: write "512Mi"
    "#]],
    );
}

#[test]
fn too_little_memory() {
    check_key(
        r#"resources.memory = "1Mi""#,
        expect![[r#"
        error: 1Mi of memory is less than the least, 6Mi
         --> service.toml:5:20
          |
        5 | resources.memory = "1Mi"
          |                    ^^^^^
    "#]],
    );
}

#[test]
fn cpu_as_kubernetes_writes_it() {
    check_key(
        r#"resources.cpu = "500m""#,
        expect![[r#"
        error: expected a number of CPUs, found a text
         --> service.toml:5:17
          |
        5 | resources.cpu = "500m"
          |                 ^^^^^^
          = hint: write 0.5
    "#]],
    );
}

#[test]
fn no_cpu_at_all() {
    check_key(
        "resources.cpu = 0",
        expect![[r#"
        error: 0 CPUs is out of range: 0.01 to 1024
         --> service.toml:5:17
          |
        5 | resources.cpu = 0
          |                 ^
    "#]],
    );
}

#[test]
fn a_time_as_a_text() {
    check_key(
        r#"deploy.drain_timeout_secs = "5m""#,
        expect![[r#"
        error: expected a number of seconds, found a text
         --> service.toml:5:29
          |
        5 | deploy.drain_timeout_secs = "5m"
          |                             ^^^^
          = hint: write the number of seconds: 300
    "#]],
    );
}

#[test]
fn a_response_that_may_take_too_long_or_never_comes() {
    check_key(
        "response_timeout_secs = 7200",
        expect![[r#"
            error: 7200 seconds is out of range: 1 to 3600
             --> service.toml:5:25
              |
            5 | response_timeout_secs = 7200
              |                         ^^^^
        "#]],
    );
    check_key(
        "response_timeout_secs = \"5m\"",
        expect![[r#"
            error: expected a number of seconds, found a text
             --> service.toml:5:25
              |
            5 | response_timeout_secs = "5m"
              |                         ^^^^
              = hint: write the number of seconds: 300
        "#]],
    );
    check(
        "[[service]]\nname = \"worker\"\nimage = \"busybox\"\nresponse_timeout_secs = 90\n",
        expect![[r#"
            error: `response_timeout_secs` needs a `port`: without one nobody sends requests
             --> service.toml:4:1
              |
            4 | response_timeout_secs = 90
              | ^^^^^^^^^^^^^^^^^^^^^
              = hint: add `port`, or leave it out
        "#]],
    );
    check(
        "[[service]]\nname = \"web\"\nmodule = \"./a.wasm\"\nresponse_timeout_secs = 90\n",
        expect![[r#"
            error: a module cannot have `response_timeout_secs`
             --> service.toml:4:1
              |
            4 | response_timeout_secs = 90
              | ^^^^^^^^^^^^^^^^^^^^^
              = hint: its time is a limit of its own: `module = { path = "…", timeout_secs = … }`
        "#]],
    );
}

#[test]
fn a_time_out_of_range() {
    check_key(
        "deploy.ready_timeout_secs = 86400",
        expect![[r#"
        error: 86400 seconds is out of range: 1 to 3600
         --> service.toml:5:29
          |
        5 | deploy.ready_timeout_secs = 86400
          |                             ^^^^^
    "#]],
    );
}

#[test]
fn an_unknown_strategy() {
    check_key(
        r#"deploy.strategy = "bluegreen""#,
        expect![[r#"
        error: `bluegreen` is not one of "rolling", "canary", "blue-green", "recreate"
         --> service.toml:5:19
          |
        5 | deploy.strategy = "bluegreen"
          |                   ^^^^^^^^^^^
          = hint: did you mean `blue-green`?
    "#]],
    );
}

#[test]
fn a_weight_without_a_canary() {
    check_key(
        "deploy.canary_weight = 20",
        expect![[r#"
        error: `canary_weight` needs strategy "canary"
         --> service.toml:5:8
          |
        5 | deploy.canary_weight = 20
          |        ^^^^^^^^^^^^^
          = hint: add `strategy = "canary"`, or leave it out
    "#]],
    );
}

#[test]
fn a_promotion_without_a_canary() {
    check_key(
        "deploy.auto_promote = { after_secs = 60 }",
        expect![[r#"
        error: `auto_promote` needs strategy "canary"
         --> service.toml:5:23
          |
        5 | deploy.auto_promote = { after_secs = 60 }
          |                       ^^^^^^^^^^^^^^^^^^^
          = hint: add `strategy = "canary"`, or leave it out
    "#]],
    );
}

#[test]
fn a_promotion_that_nothing_could_earn() {
    check_key(
        r#"domain = "example.com"
deploy = { strategy = "canary", auto_promote = { after_secs = 0, success_rate = 100.5 } }"#,
        expect![[r#"
            error: 0 seconds is out of range: 1 to 3600
             --> service.toml:6:63
              |
            6 | deploy = { strategy = "canary", auto_promote = { after_secs = 0, success_rate = 100.5 } }
              |                                                               ^

            error: a success rate is more than 0 and at most 100 per cent
             --> service.toml:6:81
              |
            6 | deploy = { strategy = "canary", auto_promote = { after_secs = 0, success_rate = 100.5 } }
              |                                                                                 ^^^^^
        "#]],
    );
}

#[test]
fn a_canary_without_requests() {
    check_key(
        r#"deploy.strategy = "canary""#,
        expect![[r#"
        error: a canary needs requests to share, and nothing is routed to this service
         --> service.toml:5:19
          |
        5 | deploy.strategy = "canary"
          |                   ^^^^^^^^
          = hint: give it a `domain` or `routes`, or use strategy "rolling"
    "#]],
    );
}

#[test]
fn a_canary_that_gets_everything() {
    check_key(
        r#"domain = "example.com"
deploy = { strategy = "canary", canary_weight = 100 }"#,
        expect![[r#"
    error: a canary gets 1 to 99 per cent of the requests
     --> service.toml:6:49
      |
    6 | deploy = { strategy = "canary", canary_weight = 100 }
      |                                                 ^^^
"#]],
    );
}

#[test]
fn no_replica_may_come_or_go() {
    check_key(
        "deploy = { max_surge = 0, max_unavailable = 0 }",
        expect![[r#"
        error: with `max_surge` and `max_unavailable` both 0 no replica could ever be replaced
         --> service.toml:5:24
          |
        5 | deploy = { max_surge = 0, max_unavailable = 0 }
          |                        ^
          = hint: leave one of them out: by default one new replica starts before an old one stops
    "#]],
    );
}

#[test]
fn a_probe_of_nothing() {
    check_key(
        "liveness.interval_secs = 5",
        expect![[r#"
        error: `liveness` does not say what to check
         --> service.toml:5:1
          |
        5 | liveness.interval_secs = 5
          | ^^^^^^^^
          = hint: a probe has exactly one of `path`, `tcp`, `exec` and `grpc`
    "#]],
    );
}

#[test]
fn a_probe_of_two_things() {
    check_key(
        r#"liveness = { tcp = true, path = "/h" }"#,
        expect![[r#"
        error: this probe has `path` and `tcp`
         --> service.toml:5:14
          |
        5 | liveness = { tcp = true, path = "/h" }
          |              ^^^
          = hint: a probe has exactly one of `path`, `tcp`, `exec` and `grpc`
    "#]],
    );
}

#[test]
fn a_probe_that_is_off() {
    check_key(
        "readiness.tcp = false",
        expect![[r#"
        error: `tcp = false` is no check
         --> service.toml:5:17
          |
        5 | readiness.tcp = false
          |                 ^^^^^
          = hint: a probe has exactly one of `path`, `tcp`, `exec` and `grpc`
    "#]],
    );
}

#[test]
fn a_probe_without_end() {
    check_key(
        "readiness = { tcp = true, failure_threshold = 0, interval_secs = 0 }",
        expect![[r#"
        error: 0 is out of range: 1 to 100
         --> service.toml:5:47
          |
        5 | readiness = { tcp = true, failure_threshold = 0, interval_secs = 0 }
          |                                               ^

        error: 0 seconds is out of range: 0.1 to 3600
         --> service.toml:5:66
          |
        5 | readiness = { tcp = true, failure_threshold = 0, interval_secs = 0 }
          |                                                                  ^
    "#]],
    );
}

#[test]
fn a_probe_of_an_empty_command() {
    check_key(
        "liveness.exec = []",
        expect![[r#"
        error: `exec` needs a command
         --> service.toml:5:17
          |
        5 | liveness.exec = []
          |                 ^^
          = hint: such as `exec = ["pg_isready"]`
    "#]],
    );
}

#[test]
fn a_health_path_that_is_none() {
    check_key(
        r#"health = "healthz""#,
        expect![[r#"
            error: a path starts with `/`
             --> service.toml:5:10
              |
            5 | health = "healthz"
              |          ^^^^^^^^^
              = hint: such as "/healthz"
        "#]],
    );
}

#[test]
fn a_variable_that_cannot_be() {
    check_key(
        r#"env = { "A=B" = "1" }"#,
        expect![[r#"
            error: `A=B` is no name for a variable
             --> service.toml:5:9
              |
            5 | env = { "A=B" = "1" }
              |         ^^^^^
              = hint: letters, digits, `_`, `.` and `-`, not starting with a digit, `.` or `-`
        "#]],
    );
}

#[test]
fn a_number_as_a_variable() {
    check_key(
        "env = { WORKERS = 4 }",
        expect![[r#"
        error: expected a text, found a whole number
         --> service.toml:5:19
          |
        5 | env = { WORKERS = 4 }
          |                   ^
          = hint: write it in quotes: "4"
    "#]],
    );
}

#[test]
fn a_key_below_the_environment() {
    check_key(
        r#"[service.env]
A = "1"
replicas = 3"#,
        expect![[r#"
    error: expected a text, found a whole number
     --> service.toml:7:12
      |
    7 | replicas = 3
      |            ^
      = hint: the service's own `replicas` goes above the line `[service.env]`
"#]],
    );
}

#[test]
fn a_reference_that_is_none() {
    check_key(
        r#"env = { TOKEN = "${secret.TOKEN}" }"#,
        expect![[r#"
        error: `${secret.TOKEN}` is not known; only ${secrets.NAME} is
         --> service.toml:5:17
          |
        5 | env = { TOKEN = "${secret.TOKEN}" }
          |                 ^^^^^^^^^^^^^^^^^
    "#]],
    );
}

#[test]
fn a_reference_without_an_end() {
    check_key(
        r#"env = { TOKEN = "${secrets.TOKEN" }"#,
        expect![[r#"
        error: `${` is never closed; write `$${` for the characters themselves
         --> service.toml:5:17
          |
        5 | env = { TOKEN = "${secrets.TOKEN" }
          |                 ^^^^^^^^^^^^^^^^^
    "#]],
    );
}

#[test]
fn waiting_for_nobody() {
    check_key(
        r#"depends_on = ["wep"]"#,
        expect![[r#"
        error: there is no service `wep` in this project
         --> service.toml:5:15
          |
        5 | depends_on = ["wep"]
          |               ^^^^^
          = hint: did you mean `web`?
    "#]],
    );
}

#[test]
fn waiting_for_itself() {
    check_key(
        r#"depends_on = ["web"]"#,
        expect![[r#"
        error: `web` cannot start after itself
         --> service.toml:5:14
          |
        5 | depends_on = ["web"]
          |              ^^^^^^^
    "#]],
    );
}

#[test]
fn waiting_in_a_circle() {
    check(
        r#"[[service]]
name = "api"
image = "api"
depends_on = ["db"]

[[service]]
name = "db"
image = "postgres"
depends_on = ["cache"]

[[service]]
name = "cache"
image = "redis"
depends_on = ["api"]
"#,
        expect![[r#"
    error: these wait for each other, so none can start: api -> db -> cache -> api
     --> service.toml:4:15
      |
    4 | depends_on = ["db"]
      |               ^^^^
      = hint: take one of them out of `depends_on`
"#]],
    );
}

#[test]
fn two_services_of_one_name() {
    check(
        r#"[[service]]
name = "web"
image = "nginx"

[[service]]
name = "web"
image = "caddy"
"#,
        expect![[r#"
    error: there is already a service named `web`
     --> service.toml:6:8
      |
    6 | name = "web"
      |        ^^^^^
      = hint: each service of a project has a name of its own
"#]],
    );
}

#[test]
fn two_services_at_one_address() {
    check(
        r#"[[service]]
name = "web"
image = "nginx"
port = 80
domain = "example.com"
routes = ["/*"]

[[service]]
name = "api"
image = "api"
port = 80
domain = "example.com"
routes = ["/api/*", "/"]
"#,
        expect![[r#"
    error: `example.com/*` is already routed to `web`
      --> service.toml:13:21
       |
    13 | routes = ["/api/*", "/"]
       |                     ^^^
       = hint: give one of the two another domain or path
"#]],
    );
}

#[test]
fn two_modules_that_serve_every_host() {
    check(
        r#"[[service]]
name = "a"
module = "./a.wasm"

[[service]]
name = "b"
module = "./b.wasm"
"#,
        expect![[r#"
    error: `/*` is already routed to `a`
     --> service.toml:5:1
      |
    5 | [[service]]
      | ^^^^^^^^^^^
      = hint: give one of the two another domain or path
"#]],
    );
}

#[test]
fn a_volume_twice() {
    check(
        r#"[[service]]
name = "db"
image = "postgres"
[[service.volume]]
name = "data"
path = "/a"

[[service]]
name = "cache"
image = "redis"
[service.volume]
name = "data"
path = "/b"
"#,
        expect![[r#"
    error: the volume `data` is already used by `db`
      --> service.toml:12:8
       |
    12 | name = "data"
       |        ^^^^^^
       = hint: a volume belongs to one service, at one path; give this one another name
"#]],
    );
}

#[test]
fn two_volumes_at_one_path() {
    check_key(
        r#"[[service.volume]]
name = "a"
path = "/data"
[[service.volume]]
name = "b"
path = "/data/""#,
        expect![[r#"
    error: there is already a volume at `/data`
      --> service.toml:10:8
       |
    10 | path = "/data/"
       |        ^^^^^^^^
"#]],
    );
}

#[test]
fn a_volume_with_a_relative_path() {
    check_key(
        r#"volume = { name = "a", path = "data" }"#,
        expect![[r#"
        error: the path must be absolute
         --> service.toml:5:31
          |
        5 | volume = { name = "a", path = "data" }
          |                               ^^^^^^
          = hint: an absolute path inside the container: "/data"
    "#]],
    );
}

#[test]
fn a_volume_with_two_sources() {
    check_key(
        r#"volume = { name = "a", host = "/srv", path = "/data" }"#,
        expect![[r#"
        error: a volume has `name` or `host`, not both
         --> service.toml:5:24
          |
        5 | volume = { name = "a", host = "/srv", path = "/data" }
          |                        ^^^^
          = hint: `host` mounts a path of the server itself
    "#]],
    );
}

#[test]
fn a_volume_without_anything() {
    check_key(
        "volume = {}",
        expect![[r#"
        error: this volume has no `name`
         --> service.toml:5:10
          |
        5 | volume = {}
          |          ^^
          = hint: add `name = "data"`

        error: this volume has no `path`
         --> service.toml:5:10
          |
        5 | volume = {}
          |          ^^
          = hint: add `path = "/data"`: where the container sees it
    "#]],
    );
}

#[test]
fn a_host_path_that_climbs() {
    check_key(
        r#"volume = { host = "/srv/../etc", path = "/data" }"#,
        expect![[r#"
        error: the path may not have an empty part, `.`, `..` or a slash at its end
         --> service.toml:5:19
          |
        5 | volume = { host = "/srv/../etc", path = "/data" }
          |                   ^^^^^^^^^^^^^
          = hint: an absolute path of the host: "/srv/media"
    "#]],
    );
}

#[test]
fn a_volume_in_the_way_of_the_system() {
    check_key(
        r#"volume = { name = "a", path = "/proc/x" }"#,
        expect![[r#"
        error: a volume cannot replace `/proc/x`
         --> service.toml:5:31
          |
        5 | volume = { name = "a", path = "/proc/x" }
          |                               ^^^^^^^^^
          = hint: such as "/data"
    "#]],
    );
}

#[test]
fn data_that_two_replicas_hold() {
    check_key(
        r#"replicas = 2
volume = { name = "a", path = "/data" }"#,
        expect![[r#"
    error: 2 replicas cannot all hold the volume `a`
     --> service.toml:5:12
      |
    5 | replicas = 2
      |            ^
      = hint: use 1 replica, or keep the data in a service of its own
"#]],
    );
}

#[test]
fn data_that_old_and_new_hold() {
    check_key(
        r#"deploy.strategy = "rolling"
volume = { name = "a", path = "/data" }"#,
        expect![[r#"
    error: the old and the new replica cannot both hold the volume `a`
     --> service.toml:5:19
      |
    5 | deploy.strategy = "rolling"
      |                   ^^^^^^^^^
      = hint: use strategy "recreate" (the default with volumes), or keep the data in another service
"#]],
    );
}

#[test]
fn a_port_of_the_host_that_old_and_new_have() {
    check_key(
        r#"network = "host"
deploy.strategy = "canary"
routes = ["/*"]"#,
        expect![[r#"
            error: the old and the new replica cannot both have the port on the host's network
             --> service.toml:6:19
              |
            6 | deploy.strategy = "canary"
              |                   ^^^^^^^^
              = hint: use strategy "recreate" (the default with `network = "host"` and a port)
        "#]],
    );
}

#[test]
fn what_a_module_cannot_have() {
    check(
        r#"[[service]]
name = "fn"
module = "./fn.wasm"
port = 80
command = ["x"]
liveness.tcp = true
secrets_as = "files"
"#,
        expect![[r#"
            error: a module cannot have `port`
             --> service.toml:4:1
              |
            4 | port = 80
              | ^^^^
              = hint: a module is called inside Orca: it has no process, no port and no files

            error: a module cannot have `command`
             --> service.toml:5:1
              |
            5 | command = ["x"]
              | ^^^^^^^
              = hint: a module is called inside Orca: it has no process, no port and no files

            error: a module cannot be probed by `tcp`
             --> service.toml:6:10
              |
            6 | liveness.tcp = true
              |          ^^^
              = hint: give the probe a `path`

            error: a module cannot have `secrets_as`
             --> service.toml:7:1
              |
            7 | secrets_as = "files"
              | ^^^^^^^^^^
              = hint: a module is called inside Orca: it has no process, no port and no files
        "#]],
    );
}

#[test]
fn a_trigger_that_is_none() {
    check(
        r#"[[service]]
name = "fn"
module = "./fn.wasm"
triggers = ["timer:5s"]
"#,
        expect![[r#"
    error: `timer:5s` is no trigger
     --> service.toml:4:13
      |
    4 | triggers = ["timer:5s"]
      |             ^^^^^^^^^^
      = hint: such as "http:/api/*" or "cron:0 9 * * *"
"#]],
    );
}

#[test]
fn a_schedule_of_six_fields() {
    check(
        r#"[[service]]
name = "fn"
module = "./fn.wasm"
triggers = ["cron:0 0 9 * * *"]
"#,
        expect![[r#"
    error: a schedule has five fields, in UTC: minute, hour, day, month, weekday
     --> service.toml:4:13
      |
    4 | triggers = ["cron:0 0 9 * * *"]
      |             ^^^^^^^^^^^^^^^^^^
      = hint: such as "cron:0 9 * * 1-5": at 9:00 UTC from Monday to Friday
"#]],
    );
}

#[test]
fn a_schedule_that_never_is() {
    check(
        r#"[[service]]
name = "fn"
module = "./fn.wasm"
triggers = ["cron:61 * * * *"]
"#,
        expect![[r#"
            error: `61 * * * *` is no schedule: number out of bounds
             --> service.toml:4:13
              |
            4 | triggers = ["cron:61 * * * *"]
              |             ^^^^^^^^^^^^^^^^^
              = hint: such as "cron:0 9 * * 1-5": at 9:00 UTC from Monday to Friday
        "#]],
    );
}

#[test]
fn a_container_with_triggers() {
    check_key(
        r#"triggers = ["http:/x"]"#,
        expect![[r#"
        error: only a module has `triggers`
         --> service.toml:5:1
          |
        5 | triggers = ["http:/x"]
          | ^^^^^^^^
          = hint: requests reach a container by `domain` and `routes`
    "#]],
    );
}

#[test]
fn an_address_that_a_module_may_reach_and_is_none() {
    check(
        r#"[[service]]
name = "fn"
module = { path = "./fn.wasm", outbound = ["https://api.example.com"], max_concurrent = 0 }
"#,
        expect![[r#"
            error: a domain is a name only, without `://`
             --> service.toml:3:44
              |
            3 | module = { path = "./fn.wasm", outbound = ["https://api.example.com"], max_concurrent = 0 }
              |                                            ^^^^^^^^^^^^^^^^^^^^^^^^^
              = hint: such as "api.example.com" or "*.example.com:8443"

            error: 0 is out of range: 1 to 10000
             --> service.toml:3:89
              |
            3 | ...s://api.example.com"], max_concurrent = 0 }
              |                                            ^
        "#]],
    );
}

#[test]
fn a_registry_without_a_password() {
    check_key(
        r#"registry.username = "robot""#,
        expect![[r#"
        error: the registry's `password` is missing
         --> service.toml:5:1
          |
        5 | registry.username = "robot"
          | ^^^^^^^^
          = hint: add `password = "${secrets.REGISTRY_PASSWORD}"`
    "#]],
    );
}

#[test]
fn another_network() {
    check_key(
        r#"network = "bridge""#,
        expect![[r#"
            error: `bridge` is not "host"
             --> service.toml:5:11
              |
            5 | network = "bridge"
              |           ^^^^^^^^
        "#]],
    );
}

#[test]
fn a_node_that_is_no_name() {
    check_key(
        r#"placement = { node = "n 1", labels = { zone = "" } }"#,
        expect![[r#"
        error: this is no name of a node
         --> service.toml:5:22
          |
        5 | placement = { node = "n 1", labels = { zone = "" } }
          |                      ^^^^^

        error: `zone` = `` is no label
         --> service.toml:5:47
          |
        5 | placement = { node = "n 1", labels = { zone = "" } }
          |                                               ^^
          = hint: 1 to 253 letters, digits, `.`, `_`, `/` and `-`
    "#]],
    );
}

#[test]
fn a_table_where_there_are_many() {
    check(
        r#"[service]
name = "web"
image = "nginx"
"#,
        expect![[r#"
    error: expected an array of tables
     --> service.toml:1:1
      |
    1 | [service]
      | ^^^^^^^^^
      = hint: write `[[service]]`: there can be several
"#]],
    );
}

#[test]
fn keys_without_a_service() {
    check(
        r#"name = "web"
image = "nginx"
"#,
        expect![[r#"
    error: there is no service in this file
     --> service.toml:1:1
      |
    1 | name = "web"
      | ^
      = hint: a service begins with a line `[[service]]`

    error: unknown key `name`
     --> service.toml:1:1
      |
    1 | name = "web"
      | ^^^^
      = hint: a key of a service goes below a line `[[service]]`

    error: unknown key `image`
     --> service.toml:2:1
      |
    2 | image = "nginx"
      | ^^^^^
      = hint: a key of a service goes below a line `[[service]]`
"#]],
    );
}

#[test]
fn an_empty_file() {
    check(
        "",
        expect![[r#"
        error: there is no service in this file
         --> service.toml:1:1
          |
        1 | 
          | ^
          = hint: a service begins with a line `[[service]]`
    "#]],
    );
}

#[test]
fn a_value_without_quotes() {
    check(
        r#"[[service]]
name = web
image = "nginx"
replicaz = 1
"#,
        expect![[r#"
    error: string values must be quoted, expected literal string
     --> service.toml:2:8
      |
    2 | name = web
      |        ^^^

    error: unknown key `replicaz`
     --> service.toml:4:1
      |
    4 | replicaz = 1
      | ^^^^^^^^
      = hint: did you mean `replicas`?
"#]],
    );
}

#[test]
fn a_quote_that_is_never_closed() {
    check(
        r#"[[service]]
name = "web
image = "nginx"
"#,
        expect![[r#"
    error: invalid basic string, expected `"`
     --> service.toml:2:12
      |
    2 | name = "web
      |            ^
"#]],
    );
}

#[test]
fn a_bracket_that_is_never_closed() {
    check(
        r#"[[service]]
name = "web"
image = "nginx"
command = ["a", "b"
port = 80
"#,
        expect![[r#"
    error: missing comma between array elements, expected `,`
     --> service.toml:5:1
      |
    5 | port = 80
      | ^
"#]],
    );
}

#[test]
fn a_header_that_is_never_closed() {
    check(
        r#"[[service]
name = "web"
image = "nginx"
"#,
        expect![[r#"
            error: unclosed array table, expected `]`
             --> service.toml:1:11
              |
            1 | [[service]
              |           ^
        "#]],
    );
}

#[test]
fn a_key_twice() {
    check(
        r#"[[service]]
name = "web"
image = "nginx"
image = "caddy"
"#,
        expect![[r#"
    error: `image` is already given
     --> service.toml:4:1
      |
    4 | image = "caddy"
      | ^^^^^
      = hint: keep one of them
"#]],
    );
}

#[test]
fn a_tab_and_a_wide_letter_before_the_mistake() {
    check_key(
        "\tcommand = [\"ネコ\", 5]",
        expect![[r#"
        error: expected a text, found a whole number
         --> service.toml:5:19
          |
        5 |  command = ["ネコ", 5]
          |                     ^
          = hint: write it in quotes: "5"
    "#]],
    );
}

#[test]
fn fifteen_mistakes_at_once() {
    check(
        include_str!("../fixtures/mistakes.toml"),
        expect![[r#"
            error: a name has only a-z, 0-9 and hyphens, not `W`
             --> service.toml:3:8
              |
            3 | name = "Web_Shop"
              |        ^^^^^^^^^^
              = hint: such as "api": it is also the host name of the service

            error: an image's name is written in lower case, not `Nginx`
             --> service.toml:4:9
              |
            4 | image = "Nginx:latest"
              |         ^^^^^^^^^^^^^^
              = hint: write `nginx:latest`

            error: a port is a number from 1 to 65535
             --> service.toml:5:8
              |
            5 | port = 80800
              |        ^^^^^

            error: unknown key `replica`
             --> service.toml:6:1
              |
            6 | replica = 3
              | ^^^^^^^
              = hint: did you mean `replicas`?

            error: a domain is a name only, without `://`
             --> service.toml:7:10
              |
            7 | domain = "https://shop.example.com/"
              |          ^^^^^^^^^^^^^^^^^^^^^^^^^^^
              = hint: write "shop.example.com"; a path goes into `routes`

            error: a path starts with `/`
             --> service.toml:8:11
              |
            8 | routes = ["api", "/a*b"]
              |           ^^^^^
              = hint: such as "/*" or "/api/*"

            error: `*` may stand only at the end of a path, after a `/`: `/api/*`
             --> service.toml:8:18
              |
            8 | routes = ["api", "/a*b"]
              |                  ^^^^^^
              = hint: such as "/*" or "/api/*"

            error: unknown key `healthcheck`
             --> service.toml:9:1
              |
            9 | healthcheck = "/healthz"
              | ^^^^^^^^^^^
              = hint: did you mean `health`?

            error: unknown key `strategy`
              --> service.toml:10:1
               |
            10 | strategy = "rolling"
               | ^^^^^^^^
               = hint: `strategy` goes into `[service.deploy]`

            error: expected a text, found a whole number
              --> service.toml:14:11
               |
            14 | WORKERS = 4
               |           ^
               = hint: write it in quotes: "4"

            error: `${secret.TOKEN}` is not known; only ${secrets.NAME} is
              --> service.toml:15:9
               |
            15 | TOKEN = "${secret.TOKEN}"
               |         ^^^^^^^^^^^^^^^^^

            error: expected a text, found a whole number
              --> service.toml:16:12
               |
            16 | replicas = 2
               |            ^
               = hint: the service's own `replicas` goes above the line `[service.env]`

            error: `mb` is no unit of memory; use Ki, Mi, Gi or Ti (or k, M, G, T for powers of 1000)
              --> service.toml:19:10
               |
            19 | memory = "512mb"
               |          ^^^^^^^
               = hint: write "512Mi"

            error: expected a number of CPUs, found a text
              --> service.toml:20:7
               |
            20 | cpu = "500m"
               |       ^^^^^^
               = hint: write 0.5

            error: `roling` is not one of "rolling", "canary", "blue-green", "recreate"
              --> service.toml:23:12
               |
            23 | strategy = "roling"
               |            ^^^^^^^^
               = hint: did you mean `rolling`?

            error: expected a number of seconds, found a text
              --> service.toml:24:22
               |
            24 | drain_timeout_secs = "30s"
               |                      ^^^^^
               = hint: write the number of seconds: 30

            error: `db` has `image` and `module`
              --> service.toml:30:1
               |
            30 | module = "./db.wasm"
               | ^^^^^^
               = hint: a service has exactly one of `image`, `module`, `build` and `template`

            error: not supported yet: replicas = "auto"
              --> service.toml:31:12
               |
            31 | replicas = "auto"
               |            ^^^^^^
               = hint: write a number; `orca scale` changes it at any time

            error: there is no service `dbb` in this project
              --> service.toml:32:15
               |
            32 | depends_on = ["dbb", "cache"]
               |               ^^^^^
               = hint: did you mean `db`?

            error: the path must be absolute
              --> service.toml:36:8
               |
            36 | path = "data"
               |        ^^^^^^
               = hint: an absolute path inside the container: "/data"

            error: not supported yet: `size` of a volume
              --> service.toml:37:8
               |
            37 | size = "10Gi"
               |        ^^^^^^
               = hint: leave it out: a volume may grow as large as its disk

            error: these wait for each other, so none can start: cache -> db -> cache
              --> service.toml:42:15
               |
            42 | depends_on = ["db"]
               |               ^^^^
               = hint: take one of them out of `depends_on`

            error: this probe has `tcp` and `exec`
              --> service.toml:46:1
               |
            46 | exec = ["redis-cli", "ping"]
               | ^^^^
               = hint: a probe has exactly one of `path`, `tcp`, `exec` and `grpc`
        "#]],
    );
}

/// Recognised, and refused by name with what to do meanwhile.
#[test]
fn what_a_later_version_will_do() {
    let text = r#"
[[service]]
name = "a"
build = { repo = "git@example.com:org/app.git", branch = "main" }
port = 80
replicas = "auto"
expose = ["5432/tcp", "53/udp"]
sticky = "cookie"
internal = true

[service.resources]
gpu = { count = 1, vendor = "nvidia", vram_min = "24Gi" }

[service.placement]
spread = "zone"

[service.rate_limit]
requests_per_second = 100

[service.autoscale]
min = 1
max = 10

[[service.volume]]
name = "data"
path = "/data"
size = "10Gi"

[[service]]
name = "b"
module = "ghcr.io/org/fn:1"
triggers = ["queue:emails", "event:deploy.*"]

[[service]]
name = "c"
template = "postgres"
"#;
    check(
        text,
        expect![[r#"
            error: not supported yet: `build`
             --> service.toml:4:1
              |
            4 | build = { repo = "git@example.com:org/app.git", branch = "main" }
              | ^^^^^
              = hint: build the image yourself, `docker build -t NAME .`, and write `image = "NAME"`

            error: not supported yet: replicas = "auto"
             --> service.toml:6:12
              |
            6 | replicas = "auto"
              |            ^^^^^^
              = hint: write a number; `orca scale` changes it at any time

            error: not supported yet: `expose`
             --> service.toml:7:1
              |
            7 | expose = ["5432/tcp", "53/udp"]
              | ^^^^^^
              = hint: HTTP is served by `domain` and `routes`; leave it out for anything else

            error: not supported yet: sticky sessions
             --> service.toml:8:10
              |
            8 | sticky = "cookie"
              |          ^^^^^^^^
              = hint: leave it out, and keep sessions in a database that all replicas share

            error: not supported yet: `internal = true`
             --> service.toml:9:12
              |
            9 | internal = true
              |            ^^^^
              = hint: services reach each other within a project: put both into one

            error: not supported yet: `gpu`
              --> service.toml:12:1
               |
            12 | gpu = { count = 1, vendor = "nvidia", vram_min = "24Gi" }
               | ^^^
               = hint: leave it out: no container is given a GPU yet

            error: not supported yet: `spread`
              --> service.toml:15:10
               |
            15 | spread = "zone"
               |          ^^^^^^
               = hint: use `labels` or `node` to say where replicas go

            error: not supported yet: `rate_limit`
              --> service.toml:17:10
               |
            17 | [service.rate_limit]
               |          ^^^^^^^^^^
               = hint: leave it out, and limit requests in the service itself

            error: not supported yet: `autoscale`
              --> service.toml:20:10
               |
            20 | [service.autoscale]
               |          ^^^^^^^^^
               = hint: leave it out and write `replicas = 3`; `orca scale` changes it at any time

            error: not supported yet: `size` of a volume
              --> service.toml:27:8
               |
            27 | size = "10Gi"
               |        ^^^^^^
               = hint: leave it out: a volume may grow as large as its disk

            error: not supported yet: a module from a registry
              --> service.toml:31:10
               |
            31 | module = "ghcr.io/org/fn:1"
               |          ^^^^^^^^^^^^^^^^^^
               = hint: download the component, and name its file: `module = "./api.wasm"`

            error: not supported yet: a trigger `queue:`
              --> service.toml:32:13
               |
            32 | triggers = ["queue:emails", "event:deploy.*"]
               |             ^^^^^^^^^^^^^^
               = hint: use `http:` or `cron:`

            error: not supported yet: a trigger `event:`
              --> service.toml:32:29
               |
            32 | triggers = ["queue:emails", "event:deploy.*"]
               |                             ^^^^^^^^^^^^^^^^
               = hint: use `http:` or `cron:`

            error: not supported yet: `template`
              --> service.toml:36:12
               |
            36 | template = "postgres"
               |            ^^^^^^^^^^
               = hint: write the `image` and what it needs; `orca init` prints such files
        "#]],
    );
}

#[test]
fn what_a_later_version_will_do_in_a_wrong_form() {
    check_key(
        "build = { repo = \"x\", path = \".\" }\nexpose = [\"5432\"]\nsticky = \"yes\"\nrate_limit.rps = 5\nautoscale.min = \"one\"",
        expect![[r#"
            error: `web` has `image` and `build`
             --> service.toml:5:1
              |
            5 | build = { repo = "x", path = "." }
              | ^^^^^
              = hint: a service has exactly one of `image`, `module`, `build` and `template`

            error: not supported yet: `build`
             --> service.toml:5:1
              |
            5 | build = { repo = "x", path = "." }
              | ^^^^^
              = hint: build the image yourself, `docker build -t NAME .`, and write `image = "NAME"`

            error: a build has `repo` or `path`, not both
             --> service.toml:5:23
              |
            5 | build = { repo = "x", path = "." }
              |                       ^^^^
              = hint: keep one of them

            error: `5432` is no port to expose
             --> service.toml:6:11
              |
            6 | expose = ["5432"]
              |           ^^^^^^
              = hint: such as "5432/tcp" or "53/udp"

            error: `yes` is not one of "off", "cookie", "source-ip"
             --> service.toml:7:10
              |
            7 | sticky = "yes"
              |          ^^^^^

            error: not supported yet: `rate_limit`
             --> service.toml:8:1
              |
            8 | rate_limit.rps = 5
              | ^^^^^^^^^^
              = hint: leave it out, and limit requests in the service itself

            error: unknown key `rps`
             --> service.toml:8:12
              |
            8 | rate_limit.rps = 5
              |            ^^^
              = hint: known here: `requests_per_second`, `burst`, `packets_per_second`, `connections_per_second`

            error: not supported yet: `autoscale`
             --> service.toml:9:1
              |
            9 | autoscale.min = "one"
              | ^^^^^^^^^
              = hint: leave it out and write `replicas = 3`; `orca scale` changes it at any time

            error: expected a whole number, found a text
             --> service.toml:9:17
              |
            9 | autoscale.min = "one"
              |                 ^^^^^
        "#]],
    );
}

fn check_settings(text: &str, expect: Expect) {
    match toml::settings(&file(text)) {
        Ok(settings) => panic!("this is accepted: {settings:?}"),
        Err(problems) => expect.assert_eq(&rendered(text, &problems)),
    }
}

#[test]
fn settings_that_cannot_be() {
    check_settings(
        r#"log_level = "info"
[cluster]
name = "Prod"
domain = "*.example.com"
log_level = "verbose"
loglevel = "info"
[policy]
allow_host = ["/", "srv", "privileged"]
allow_hosts = []
"#,
        expect![[r#"
            error: unknown key `log_level`
             --> service.toml:1:1
              |
            1 | log_level = "info"
              | ^^^^^^^^^
              = hint: `log_level` goes into `[cluster]`

            error: a name has only a-z, 0-9 and hyphens, not `P`
             --> service.toml:3:8
              |
            3 | name = "Prod"
              |        ^^^^^^
              = hint: such as "prod"

            error: the cluster's domain is a plain one: every service gets a name below it
             --> service.toml:4:10
              |
            4 | domain = "*.example.com"
              |          ^^^^^^^^^^^^^^^
              = hint: such as "example.com"

            error: `verbose` is not one of "error", "warn", "info", "debug", "trace"
             --> service.toml:5:13
              |
            5 | log_level = "verbose"
              |             ^^^^^^^^^

            error: unknown key `loglevel`
             --> service.toml:6:1
              |
            6 | loglevel = "info"
              | ^^^^^^^^
              = hint: did you mean `log_level`?

            error: `/` would allow every path of the host
             --> service.toml:8:15
              |
            8 | allow_host = ["/", "srv", "privileged"]
              |               ^^^
              = hint: write host paths such as "/srv/media", or "privileged", or "network"

            error: the path must be absolute
             --> service.toml:8:20
              |
            8 | allow_host = ["/", "srv", "privileged"]
              |                    ^^^^^
              = hint: write host paths such as "/srv/media", or "privileged", or "network"

            error: unknown key `allow_hosts`
             --> service.toml:9:1
              |
            9 | allow_hosts = []
              | ^^^^^^^^^^^
              = hint: did you mean `allow_host`?
        "#]],
    );
}

#[test]
fn settings_of_a_later_version() {
    check_settings(
        r#"[cluster]
acme_email = "ops@example.com"
name = "prod"
domain = "Example.com"
log_level = "debug"
[network]
service_cidr = "10.90.1.0/16"
[observability]
otlp_endpoint = "collector:4317"
[[notify]]
slack = "${secrets.SLACK}"
events = ["deploy_failed"]
[backup]
schedule = "daily"
[ai]
endpoint = "https://models.example.com/v1"
key = "sk-123"
[ai.auto_remediate]
enabled = true
[gitops]
prune = true
"#,
        expect![[r#"
            error: not supported yet: certificates by ACME
             --> service.toml:2:1
              |
            2 | acme_email = "ops@example.com"
              | ^^^^^^^^^^
              = hint: leave it out; for now put a proxy with TLS in front, and name it with `orca server --trusted-proxy`

            error: not supported yet: a cluster's name in its settings
             --> service.toml:3:1
              |
            3 | name = "prod"
              | ^^^^
              = hint: leave it out; `orca server --name` names a node

            error: not supported yet: a domain for the whole cluster
             --> service.toml:4:1
              |
            4 | domain = "Example.com"
              | ^^^^^^
              = hint: leave it out, and give each service its `domain`

            error: not supported yet: a log level for the whole cluster
             --> service.toml:5:1
              |
            5 | log_level = "debug"
              | ^^^^^^^^^
              = hint: leave it out, and set ORCA_LOG where the server runs

            error: not supported yet: `network`
             --> service.toml:6:2
              |
            6 | [network]
              |  ^^^^^^^
              = hint: leave it out: addresses are chosen by Docker

            error: the address has bits below the prefix
             --> service.toml:7:16
              |
            7 | service_cidr = "10.90.1.0/16"
              |                ^^^^^^^^^^^^^^
              = hint: such as "10.90.0.0/16"

            error: not supported yet: `observability`
             --> service.toml:8:2
              |
            8 | [observability]
              |  ^^^^^^^^^^^^^
              = hint: leave it out; metrics are at `/metrics` of the API

            error: this is no http:// or https:// address
             --> service.toml:9:17
              |
            9 | otlp_endpoint = "collector:4317"
              |                 ^^^^^^^^^^^^^^^^
              = hint: such as "http://10.0.0.5:4318"

            error: not supported yet: `notify`
              --> service.toml:10:3
               |
            10 | [[notify]]
               |   ^^^^^^
               = hint: leave it out, and follow `orca events -f`

            error: not supported yet: `backup`
              --> service.toml:13:2
               |
            13 | [backup]
               |  ^^^^^^
               = hint: leave it out, and back up volumes with tools of your own

            error: a schedule has five fields, in UTC: minute, hour, day, month, weekday
              --> service.toml:14:12
               |
            14 | schedule = "daily"
               |            ^^^^^^^
               = hint: such as "0 3 * * *"

            error: not supported yet: `ai`
              --> service.toml:15:2
               |
            15 | [ai]
               |  ^^
               = hint: leave it out: `orca why` needs no model

            error: a key is a reference to a secret, never the key itself
              --> service.toml:17:7
               |
            17 | key = "sk-123"
               |       ^^^^^^^^
               = hint: write "${secrets.AI_KEY}"

            error: not supported yet: `gitops`
              --> service.toml:20:2
               |
            20 | [gitops]
               |  ^^^^^^
               = hint: leave it out, and run `orca deploy --prune`
        "#]],
    );
}

#[test]
fn two_files_that_claim_one_address() {
    let of = |name: &str, text: &str| (toml::SourceFile { name: name.to_owned(), ..file(text) }, label("p"));
    let web = format!("project = \"shop\"\n{WEB}domain = \"example.com\"\n");
    let api = format!("{WEB}domains = [\"a.example.com\", \"example.com\"]\n");
    let blog = format!("{WEB}\n");
    let files = [of("shop.toml", &web), of("api.toml", &api), of("blog.toml", &blog)];
    let problems = toml::projects(&files).expect_err("they collide");
    let shown: Vec<String> = problems
        .iter()
        .filter_map(|problem| files.iter().find(|(file, _)| file.name == problem.file).map(|(file, _)| (problem, file)))
        .map(|(problem, file)| toml::render(problem, &file.text, false))
        .collect();
    expect![[r#"
        error: `example.com/*` is already routed to `shop/web` (shop.toml:6)
         --> api.toml:5:29
          |
        5 | domains = ["a.example.com", "example.com"]
          |                             ^^^^^^^^^^^^^
          = hint: give one of the two another domain or path

        error: the project `p` is already in api.toml
         --> blog.toml:1:1
          |
        1 | [[service]]
          | ^
          = hint: one project is one file; put `project = "…"` at the top of one of the two
    "#]]
    .assert_eq(&shown.join("\n"));
}

#[test]
fn colours_are_for_terminals() {
    let text = "[[service]]\nname = \"a\"\nimage = 5\n";
    let problems = project(text).expect_err("an image is a text");
    let shown = toml::render(&problems[0], text, true);
    expect![[r#"
        ESC[1;31merrorESC[0mESC[1m: expected a text, found a whole numberESC[0m
         ESC[1;34m-->ESC[0m service.toml:3:9
          ESC[1;34m|ESC[0m
        ESC[1;34m3 |ESC[0m image = 5
          ESC[1;34m|ESC[0m ESC[1;31m        ^ESC[0m
          ESC[1;34m=ESC[0m ESC[1;36mhintESC[0m: write it in quotes: "5"
    "#]]
    .assert_eq(&shown.replace('\x1b', "ESC"));
    let one_line = problems[0].to_string();
    expect![[r#"service.toml:3:9: expected a text, found a whole number (write it in quotes: "5")"#]]
        .assert_eq(&one_line);
}
