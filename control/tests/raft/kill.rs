//! `kill -9` while it writes: what was acknowledged is there afterwards.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use crate::support::{entry, leads, member, start_alone, texts};

const ROUNDS: usize = 20;

/// Set for the process that is to be killed; names its directory.
const DIR: &str = "ORCA_TEST_KILL_DIR";

#[test]
fn acknowledged_proposals_survive_kill_9() {
    if let Ok(dir) = std::env::var(DIR) {
        write_until_killed(&dir);
    }
    let dir = tempfile::tempdir().unwrap();
    let mut acknowledged = 0;
    for round in 0..ROUNDS {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "kill::acknowledged_proposals_survive_kill_9", "--nocapture"])
            .env(DIR, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines().map(Result::unwrap);
        let mut numbers = lines.filter_map(|line| {
            let (word, number) = line.split_once(' ')?;
            Some((word.to_owned(), number.parse::<u64>().ok()?))
        });
        let (word, recovered) = numbers.find(|(word, _)| word == "recovered").expect("it starts");
        assert!(recovered >= acknowledged, "round {round}: {word} {recovered} of {acknowledged} acknowledged");
        // Kill it at another point every time: after 1, 4, 7 … acknowledgements of this round.
        let last = numbers.filter(|(word, _)| word == "acknowledged").nth(1 + round * 3 % 17).expect("it writes");
        child.kill().unwrap();
        child.wait().unwrap();
        acknowledged = last.1;
    }
    assert!(acknowledged > ROUNDS as u64);
}

fn write_until_killed(dir: &str) -> ! {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        let raft = start_alone(Path::new(dir)).await;
        if raft.members().is_empty() {
            raft.initialise(member(1)).await.unwrap();
        }
        leads(&raft).await;
        let found = texts(&raft.read().await.unwrap());
        let all: Vec<String> = (1..=found.len()).map(|n| n.to_string()).collect();
        assert_eq!(found, all, "what is there is what was written, in order");
        let mut out = std::io::stdout().lock();
        writeln!(out, "\nrecovered {}", found.len()).unwrap();
        for n in found.len() + 1.. {
            raft.propose(entry(n.to_string())).await.unwrap();
            writeln!(out, "acknowledged {n}").unwrap();
            out.flush().unwrap();
        }
        unreachable!("it writes until it is killed")
    })
}
