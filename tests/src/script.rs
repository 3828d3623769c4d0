//! Stories: commands in a text file, and after each the state of the world. One file for each story in
//! `tests/scenarios`; `UPDATE_EXPECT=1` rewrites them, and the difference is reviewed like code.
//!
//! ```text
//! nodes 2
//! deploy web image=ok:1 replicas=2
//! settle
//! ----
//! app/web v1: r1 (v1) on n1 ready, r2 (v1) on n2 ready
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::time::Duration;

use orca_cluster::command::{Applied, Command};

use orca_cluster::id::NodeId;
use orca_cluster::status;
use orca_cluster::time::Timestamp;
use orca_cluster::view::View;

use crate::sim::workload::{project, put};
use crate::sim::{Faults, Setup, World};

/// How long a story may take to settle.
const SETTLE_MAX: Duration = Duration::from_secs(600);

/// Runs the commands of a story and writes down what came of each block of them.
pub fn run(story: &str) -> String {
    let mut world: Option<World> = None;
    let mut output = String::new();
    let mut in_answer = false;
    for line in story.lines() {
        match line {
            "----" => {
                in_answer = true;
                output.push_str("----\n");
                let world = world.as_ref().expect("a story begins with `nodes N`");
                output.push_str(&world.describe());
            }
            "" => {
                in_answer = false;
                output.push('\n');
            }
            _ if in_answer || line.starts_with("  ") => {}
            command => {
                output.push_str(command);
                output.push('\n');
                if command.starts_with('#') {
                    continue;
                }
                if let Some(count) = command.strip_prefix("nodes ") {
                    let nodes = count.parse().expect("a number of nodes");
                    let mut fresh = World::new(Setup { seed: 1, nodes, faults: Faults::default() });
                    fresh.advance(Duration::from_secs(2));
                    world = Some(fresh);
                    continue;
                }
                let world = world.as_mut().expect("a story begins with `nodes N`");
                if let Some(answer) = step(world, command) {
                    let _ = writeln!(output, "  {answer}");
                }
            }
        }
    }
    output
}

/// One command; what there is to say about it at once.
fn step(world: &mut World, command: &str) -> Option<String> {
    let (verb, rest) = command.split_once(' ').unwrap_or((command, ""));
    let service = |name: &str, world: &World| world.service(&format!("app/{name}"));
    let command = match verb {
        "settle" => {
            assert!(world.settle(SETTLE_MAX), "it does not settle:\n{}", world.describe());
            world.check_settled();
            return None;
        }
        "advance" => {
            let seconds: f64 = rest.trim_end_matches('s').parse().expect("advance 2.5s");
            world.advance(Duration::from_secs_f64(seconds));
            return None;
        }
        // Until a moment after a schedule of the service is due next.
        "until-due" => {
            let next = world.state.services[&service(rest, world)].schedules.values().filter_map(|s| s.next).min();
            let due = next.expect("it has a schedule");
            world.advance(due.since(world.now) + Duration::from_millis(80));
            return None;
        }
        "kill" => {
            world.kill_container(rest.parse().expect("kill r1"));
            return None;
        }
        "kill-agent" => {
            world.kill_agent(node(world, rest));
            return None;
        }
        "cut-off" => {
            world.cut_off(node(world, rest));
            return None;
        }
        "heal" => {
            world.heal(node(world, rest));
            return None;
        }
        "engine-fails" => {
            world.engine_fails(node(world, rest));
            return None;
        }
        "engine-back" => {
            world.engine_back(node(world, rest));
            return None;
        }
        "ledger-fails" => {
            world.disk_full(node(world, rest));
            return None;
        }
        "ledger-back" => {
            world.disk_free(node(world, rest));
            return None;
        }
        "change-leader" => {
            world.change_leader();
            return None;
        }
        // How long a response of each service may take to begin.
        "response-timeouts" => {
            let goals = world.leader.as_ref().map(|leader| leader.goals().values()).expect("somebody leads");
            let services = goals.last().map(|goal| &goal.tables.services).into_iter().flatten();
            let each: Vec<String> = services.map(|(name, up)| format!("{name} {:?}", up.response_timeout)).collect();
            return Some(each.join(", "));
        }
        // Which replicas get requests, and which share of them.
        "tables" => {
            let name = service(rest, world);
            let goals = world.leader.as_ref().map(|leader| leader.goals().values()).expect("somebody leads");
            let backends =
                goals.last().and_then(|goal| goal.tables.services.get(&name)).map_or(&[][..], |up| &up.backends);
            let shares: Vec<String> =
                backends.iter().map(|b| format!("{} ({}) x{}", b.replica, b.revision, b.weight)).collect();
            return Some(if shares.is_empty() { "nobody".to_owned() } else { shares.join(", ") });
        }
        // Who answers each route, or why nobody does.
        "routes" => {
            let goals = world.leader.as_ref().map(|leader| leader.goals().values()).expect("somebody leads");
            let Some(tables) = goals.last().map(|goal| &goal.tables) else { return Some("none".to_owned()) };
            let routes = tables.routes.iter().map(|(route, name)| {
                let (route, upstream) = (String::from(route.clone()), &tables.services[name]);
                let revisions: BTreeSet<String> = upstream.backends.iter().map(|b| b.revision.to_string()).collect();
                match revisions.is_empty() {
                    true => format!("{route} by {name}, {:?}", upstream.absence),
                    false => format!("{route} by {name} {}", revisions.into_iter().collect::<Vec<_>>().join(" and ")),
                }
            });
            let routes: Vec<String> = routes.collect();
            return Some(if routes.is_empty() { "none".to_owned() } else { routes.join("; ") });
        }
        // What people are told of a service, in a word and in a sentence.
        "state" | "why" => {
            let (leader, recent) = (world.leader.as_ref().expect("somebody leads"), BTreeMap::new());
            let (state, inventory, sent) = (&*world.state, leader.inventory(), leader.sent());
            let view = View { state, inventory, sent, recent: &recent, now: world.now };
            let name = service(rest, world);
            let waiting = leader.waiting().get(&name).map_or(&[][..], Vec::as_slice);
            let told = status::service(view, &name, &world.state.services[&name], waiting);
            return Some(match &told.why {
                _ if verb == "state" => format!("{:?}", told.state),
                Some(why) => why.cause.clone(),
                None => "nothing is wrong".to_owned(),
            });
        }
        "volumes" => {
            let kept = world
                .nodes
                .values()
                .flat_map(|node| node.runtime.volumes.iter().map(|volume| format!("{volume} on {}", node.name)));
            let kept: Vec<String> = kept.collect();
            return Some(if kept.is_empty() { "none".to_owned() } else { kept.join(", ") });
        }
        // What happened, of one kind.
        "events" => {
            let texts = world
                .state
                .events
                .iter()
                .filter(|event| event.kind.to_string() == rest)
                .map(|event| event.text.clone());
            let texts: Vec<String> = texts.collect();
            return Some(if texts.is_empty() { "none".to_owned() } else { texts.join("; ") });
        }
        // How often something was done to a replica, beside probing it.
        "touched" => {
            let replica = rest.parse().expect("touched r1");
            let times: u64 = world.nodes.values().filter_map(|node| node.runtime.touched.get(&replica)).sum();
            return Some(format!("{times} times"));
        }
        "reports" => {
            let id = node(world, rest);
            let interval = world.nodes[&id].brain.as_ref().expect("it runs").report_interval();
            return Some(format!("every {} ms", interval.as_millis()));
        }
        // Which times of its schedules are decided next.
        "schedules" => {
            let records = &world.state.services[&service(rest, world)].schedules;
            let next = records.iter().map(|(cron, record)| {
                format!("`{cron}` {}", record.next.map_or_else(|| "never".to_owned(), Timestamp::to_minute))
            });
            let next: Vec<String> = next.collect();
            return Some(if next.is_empty() { "none".to_owned() } else { next.join(", ") });
        }
        // What ran by itself, and where.
        "runs" => {
            let (name, runs) = (service(rest, world), &world.invariants.runs);
            let runs = runs.iter().filter(|((service, ..), _)| *service == name);
            let runs: Vec<String> =
                runs.map(|((_, _, due), replica)| format!("{} on {replica}", due.to_minute())).collect();
            return Some(if runs.is_empty() { "never".to_owned() } else { runs.join(", ") });
        }
        "receipt" => {
            let deployed = &world.state.services[&service(rest, world)];
            let receipt = deployed.receipts.back().expect("a rollout has ended");
            let failure = receipt.failure.as_ref().map_or(String::new(), |f| format!(", because {}", f.cause));
            return Some(format!("{} {:?}, {} replaced{failure}", receipt.revision, receipt.outcome, receipt.replaced));
        }
        "deploy" => put(project(&rest.split(" ; ").map(spec).collect::<String>()), false, false),
        "prune" => put(project(&rest.split(" ; ").map(spec).collect::<String>()), true, false),
        "replace" => put(project(&rest.split(" ; ").map(spec).collect::<String>()), false, true),
        "scale" => {
            let (name, replicas) = rest.split_once(' ').expect("scale web 3");
            Command::Scale { service: service(name, world), replicas: replicas.parse().expect("a number") }
        }
        "stop" => Command::Stop { service: service(rest, world) },
        "start" => Command::Start { service: service(rest, world) },
        "restart" => Command::Restart { service: service(rest, world), pull: false },
        "rm" => Command::Remove { service: service(rest, world), volumes: true },
        "promote" => Command::Promote { service: service(rest, world) },
        "rollback" => {
            let (name, to) = rest.split_once(' ').map_or((rest, None), |(name, to)| (name, Some(to)));
            let to = to.map(|to| to.parse().expect("rollback web v2"));
            let service = service(name, world);
            let settled = world.state.services.get(&service).filter(|deployed| deployed.rollout.is_none());
            let to = to.or_else(|| settled?.previous());
            Command::Rollback { service, to }
        }
        other => panic!("`{other}` is no command of a story"),
    };
    match world.command(command) {
        Applied::Done { .. } => None,
        Applied::Unchanged { .. } => Some("unchanged".to_owned()),
        Applied::Refused(refusal) => Some(format!("refused: {refusal}")),
    }
}

fn node(world: &World, name: &str) -> NodeId {
    world.nodes.values().find(|node| node.name == name).map(|node| node.id).expect("a node's name")
}

/// `web image=ok:1 replicas=2 strategy=rolling volume=data` as a file would say it; ` ; ` parts services.
fn spec(words: &str) -> String {
    let mut words = words.split(' ');
    let name = words.next().unwrap_or_default();
    let mut top = format!("[[service]]\nname = \"{name}\"\n");
    let (mut deploy, mut tables, mut port) = (String::new(), String::new(), true);
    for word in words {
        let (key, value) = word.split_once('=').expect("key=value");
        let _ = match key {
            "image" | "domain" | "network" => writeln!(top, "{key} = \"{value}\""),
            // `./a.wasm`, or `./a.wasm@600` with its time-out.
            "module" => {
                port = false;
                let (path, seconds) = value.split_once('@').unwrap_or((value, "30"));
                writeln!(top, "{key} = {{ path = \"{path}\", timeout_secs = {seconds} }}")
            }
            "cron" => writeln!(top, "triggers = [\"cron:{}\"]", value.replace('_', " ")),
            "port" => {
                port = value != "none";
                Ok(())
            }
            "routes" => writeln!(top, "{key} = {:?}", value.split(',').collect::<Vec<_>>()),
            "replicas" | "response_timeout_secs" => writeln!(top, "{key} = {value}"),
            "needs" => writeln!(top, "depends_on = [\"{value}\"]"),
            "strategy" => writeln!(deploy, "{key} = \"{value}\""),
            "max_surge" | "max_unavailable" | "canary_weight" | "ready_timeout_secs" | "drain_timeout_secs" => {
                writeln!(deploy, "{key} = {value}")
            }
            "auto_promote_secs" => writeln!(deploy, "auto_promote = {{ after_secs = {value} }}"),
            "volume" => writeln!(tables, "[[service.volume]]\nname = \"{value}\"\npath = \"/data\""),
            "readiness" | "liveness" => writeln!(tables, "[service.{key}]\npath = \"{value}\"\ninterval_secs = 1"),
            "memory" => writeln!(tables, "[service.resources]\nmemory = \"{value}\""),
            other => panic!("`{other}` is no word of a deploy"),
        };
    }
    if port {
        top.push_str("port = 80\n");
    }
    format!("{top}[service.deploy]\n{deploy}{tables}")
}
