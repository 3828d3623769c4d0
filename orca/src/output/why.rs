//! What `why` says: the cause, what was seen, what to do.

use orca_cluster::state::Evidence;
use orca_cluster::status::{ServiceState, ServiceStatus};
use orca_cluster::why::Diagnosis;

use super::status::state;
use super::text::{Ink, Text};

pub fn why(service: &ServiceStatus, found: Option<&Diagnosis>) -> Vec<Text> {
    let (ink, symbol, word) = state(service.state);
    let mut lines = vec![
        Text::of(Ink::Bold, service.name.to_string())
            .and(ink, format!("  {symbol} {word}"))
            .and(Ink::Plain, format!("  {}/{} ready", service.ready, service.wanted)),
    ];
    match found {
        Some(found) => lines.extend(diagnosis(found)),
        None if service.state == ServiceState::Running && service.waiting.is_empty() => {
            lines.push(Text::plain("  nothing is wrong: it is as asked"));
        }
        // On its way, and it has not met with anything that would keep it.
        None => lines.push(Text::plain(format!("  nothing is wrong so far: it is {}", under_way(service.state)))),
    }
    lines
}

fn under_way(state: ServiceState) -> &'static str {
    match state {
        ServiceState::Running => "as asked, but for what is on its way out",
        ServiceState::Starting => "starting",
        ServiceState::Updating => "being updated",
        ServiceState::RollingBack => "going back to what served before",
        ServiceState::Canary => "waiting for its canary to be judged",
        ServiceState::Degraded | ServiceState::Failing | ServiceState::CrashLooping => "about to be started again",
        ServiceState::Stopped => "stopped",
        ServiceState::Removing => "being removed",
    }
}

pub fn diagnosis(found: &Diagnosis) -> Vec<Text> {
    let mut lines = Vec::new();
    let mut labelled = |label: &str, ink: Ink, text: &str| {
        lines.push(Text::of(Ink::Cyan, format!("  {label:<5} ")).and(ink, text));
    };
    labelled("why", Ink::Bold, &found.cause);
    let (mut seen, mut logs) = (Vec::new(), Vec::new());
    for evidence in &found.evidence {
        match evidence {
            Evidence::Seen(line) => seen.push(line),
            Evidence::Printed(line) => logs.push(line),
        }
    }
    for (at, line) in seen.into_iter().enumerate() {
        labelled(if at == 0 { "seen" } else { "" }, Ink::Plain, line);
    }
    for (at, line) in logs.into_iter().enumerate() {
        labelled(if at == 0 { "logs" } else { "" }, Ink::Dim, line);
    }
    if let Some(fix) = &found.fix {
        labelled("fix", Ink::Plain, fix);
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::super::sample::{self, show};
    use super::*;
    use expect_test::expect;

    #[test]
    fn the_cause_comes_first_and_the_fix_last() {
        let worker = sample::worker();
        expect![[r#"
            shop/worker  ✖ crash-looping  0/1 ready
              why   it exits with code 1 after 0.3 s, 4 times in a row (crash-looping)
              logs  no DATABASE_URL
              fix   the reason is in its last lines; more with `orca logs shop/worker`
        "#]]
        .assert_eq(&show(&why(&worker, worker.why.as_ref())));
        expect![[r#"
            shop/api  ● running  3/3 ready
              nothing is wrong: it is as asked
        "#]]
        .assert_eq(&show(&why(&sample::api(), None)));
    }
}
