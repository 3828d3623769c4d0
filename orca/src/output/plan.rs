//! What a deploy would do, as a table.

use std::collections::{BTreeMap, BTreeSet};

use orca_cluster::command::put::ServiceOutcome;
use orca_cluster::id::{Generation, ServiceName};
use orca_cluster::spec::{Service, Source, Strategy};

use super::text::{Ink, Side, Text, table};
use super::{count, short_source};

/// What will happen to each service, and what its file says about it (nothing if it is being removed).
pub type Changes<'a> = BTreeMap<&'a ServiceName, (&'a ServiceOutcome, Option<&'a Service>)>;

/// And what becomes different in the cluster's settings.
pub fn plan(generation: Generation, changes: &Changes<'_>, settings: &[String]) -> Vec<Text> {
    let of = |wanted: fn(&ServiceOutcome) -> bool| changes.values().filter(|(what, _)| wanted(what)).count() as u64;
    let created = of(|what| matches!(what, ServiceOutcome::Created { .. }));
    let removed = of(|what| matches!(what, ServiceOutcome::Removed));
    let changed = of(|what| matches!(what, ServiceOutcome::Changed { .. }));
    if created + removed + changed == 0 && settings.is_empty() {
        return vec![Text::plain(format!("Nothing to change (index {generation})"))];
    }
    let replaced: Vec<&Service> =
        changes.values().filter_map(|(what, spec)| replaces(what).then_some(*spec)?).collect();
    let mut head = count(created + removed + changed, "service");
    if !replaced.is_empty() {
        let replicas: u64 = replaced.iter().map(|spec| u64::from(spec.replicas)).sum();
        let pace = if replaced.iter().all(|spec| one_by_one(spec)) { " one by one" } else { "" };
        head.push_str(&format!(", {} replaced{pace}", count(replicas, "replica")));
    }
    head.push_str(&format!(", {created} created, {removed} removed"));
    let mut lines = vec![Text::of(Ink::Bold, "Plan").and(Ink::Plain, format!(" (index {generation}): {head}"))];
    let of_cluster = (!settings.is_empty()).then(|| {
        let name = Text::of(Ink::Yellow, "~ cluster.toml");
        vec![name, Text::plain(settings.join(", ")), Text::of(Ink::Dim, "the whole cluster's settings")]
    });
    let of_services = changes.iter().filter_map(|(name, (what, spec))| row(name, what, *spec));
    let rows = of_cluster.into_iter().chain(of_services).collect();
    lines.extend(table(2, &[Side::Left, Side::Left, Side::Left], rows));
    lines
}

/// That some services stay without being in the files, if there are any.
pub fn unlisted(names: &BTreeSet<ServiceName>) -> Option<Text> {
    let (they, them) = if names.len() == 1 { ("it is", "it") } else { ("they are", "them") };
    let all = names.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
    let text = format!("not in the files, left as {they}: {all} (`orca deploy --prune` removes {them})");
    (!names.is_empty()).then(|| Text::of(Ink::Yellow, text))
}

fn replaces(what: &ServiceOutcome) -> bool {
    matches!(what, ServiceOutcome::Changed { replaces: true, stopped: false, .. })
}

fn one_by_one(spec: &Service) -> bool {
    matches!(spec.deploy.strategy, Strategy::Rolling) && spec.deploy.max_surge + spec.deploy.max_unavailable <= 1
}

fn row(name: &ServiceName, what: &ServiceOutcome, spec: Option<&Service>) -> Option<Vec<Text>> {
    let (ink, sign, text, way) = match what {
        ServiceOutcome::Unchanged { .. } => return None,
        ServiceOutcome::Created { replicas, .. } => {
            (Ink::Green, "+", spec.map(source).unwrap_or_default(), count(*replicas, "replica"))
        }
        ServiceOutcome::Removed => {
            (Ink::Red, "-", "not in the files any more".to_owned(), "drain and stop; volumes are kept".to_owned())
        }
        ServiceOutcome::Changed { replaces, differences, stopped, .. } => {
            let differences: Vec<String> = differences.iter().map(|difference| shorten(difference)).collect();
            let way = match (stopped, replaces, spec) {
                (true, ..) => "stopped; `orca start` runs it".to_owned(),
                (false, true, Some(spec)) => strategy(spec.deploy.strategy),
                (false, true, None) => "replaced".to_owned(),
                (false, false, _) => "nothing restarted".to_owned(),
            };
            (Ink::Yellow, "~", differences.join(", "), way)
        }
    };
    Some(vec![Text::of(ink, format!("{sign} {name}")), Text::plain(text), Text::of(Ink::Dim, way)])
}

fn source(spec: &Service) -> String {
    match &spec.source {
        Source::Image(image) => short_source(image),
        Source::Module(module) => module.path.clone(),
    }
}

fn strategy(strategy: Strategy) -> String {
    match strategy {
        Strategy::Rolling => "start new, move traffic, drain old".to_owned(),
        Strategy::Recreate => "stop old, then start new".to_owned(),
        Strategy::BlueGreen => "start all new, move all traffic at once, drain old".to_owned(),
        Strategy::Canary { weight } => format!("start one new, give it {weight}% of the requests, wait for you"),
    }
}

/// `image myorg/api:1.4.2 -> myorg/api:1.4.3` becomes `myorg/api:1.4.2 -> 1.4.3`.
fn shorten(difference: &str) -> String {
    let images = difference.strip_prefix("image ").and_then(|rest| rest.split_once(" -> "));
    let Some((old, new)) = images else { return difference.to_owned() };
    if new.starts_with("module ") {
        return difference.to_owned();
    }
    let (old, new) = (short_source(old), short_source(new));
    match (old.rsplit_once(':'), new.rsplit_once(':')) {
        (Some((repository, _)), Some((other, tag))) if repository == other => format!("{old} -> {tag}"),
        _ => format!("{old} -> {new}"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::sample::{name, show};
    use super::*;
    use expect_test::expect;
    use orca_cluster::id::{Label, Revision};
    use orca_cluster::spec::toml::{SourceFile, project};

    #[test]
    fn a_plan_says_what_happens_to_each_service_and_how() {
        let text = "[[service]]\nname = \"api\"\nimage = \"myorg/api:1.4.3\"\nreplicas = 3\n\
                    [[service]]\nname = \"db\"\nimage = \"docker.io/library/postgres:17\"\n";
        let file = SourceFile { name: "service.toml".to_owned(), text: text.to_owned() };
        let project = project(&file, &Label::new("shop").unwrap()).unwrap();
        let spec = |label: &str| project.services.get(&Label::new(label).unwrap());
        let (api, cron, db, old) = (name("shop/api"), name("shop/cron"), name("shop/db"), name("shop/old"));
        let changed = ServiceOutcome::Changed {
            from: Revision(4),
            revision: Revision(5),
            replaces: true,
            differences: vec!["image myorg/api:1.4.2 -> myorg/api:1.4.3".to_owned(), "env LEVEL changed".to_owned()],
            stopped: false,
        };
        let same = ServiceOutcome::Unchanged { revision: Revision(1), rolling_out: false, proven: true };
        let created = ServiceOutcome::Created { revision: Revision(1), replicas: 1 };
        let changes: Changes<'_> = BTreeMap::from([
            (&api, (&changed, spec("api"))),
            (&cron, (&same, None)),
            (&db, (&created, spec("db"))),
            (&old, (&ServiceOutcome::Removed, None)),
        ]);
        expect![[r#"
            Plan (index 4182): 3 services, 3 replicas replaced one by one, 1 created, 1 removed
              ~ shop/api  myorg/api:1.4.2 -> 1.4.3, env LEVEL changed  start new, move traffic, drain old
              + shop/db   postgres:17                                  1 replica
              - shop/old  not in the files any more                    drain and stop; volumes are kept
        "#]]
        .assert_eq(&show(&plan(Generation(4182), &changes, &[])));
        let stopped = ServiceOutcome::Changed {
            from: Revision(4),
            revision: Revision(5),
            replaces: true,
            differences: vec!["replicas 1 -> 2".to_owned()],
            stopped: true,
        };
        let changes: Changes<'_> = BTreeMap::from([(&api, (&stopped, spec("api")))]);
        expect![[r#"
            Plan (index 4182): 1 service, 0 created, 0 removed
              ~ shop/api  replicas 1 -> 2  stopped; `orca start` runs it
        "#]]
        .assert_eq(&show(&plan(Generation(4182), &changes, &[])));
        let widened = ["allow_host /srv added".to_owned()];
        expect![[r#"
            Plan (index 4182): 0 services, 0 created, 0 removed
              ~ cluster.toml  allow_host /srv added  the whole cluster's settings
        "#]]
        .assert_eq(&show(&plan(Generation(4182), &Changes::new(), &widened)));
        let nothing: Changes<'_> = BTreeMap::from([(&cron, (&same, None))]);
        expect![[r#"
            Nothing to change (index 4182)
        "#]]
        .assert_eq(&show(&plan(Generation(4182), &nothing, &[])));
    }

    #[test]
    fn what_is_not_in_the_files_and_stays_is_named() {
        let told = |names: &[&str]| unlisted(&names.iter().map(|text| name(text)).collect());
        assert!(told(&[]).is_none());
        expect![[r#"
            not in the files, left as it is: shop/old (`orca deploy --prune` removes it)
            not in the files, left as they are: shop/old, shop/older (`orca deploy --prune` removes them)
        "#]]
        .assert_eq(&show(&[told(&["shop/old"]).unwrap(), told(&["shop/old", "shop/older"]).unwrap()]));
    }
}
