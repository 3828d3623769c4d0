//! Talking with a replica: its logs, commands in it, what it uses.

use std::time::Duration;

use futures_util::StreamExt as _;
use orca_agent::docker::{Error, ExecRequest, LogLine, LogRequest, Size, Source};
use orca_cluster::id::ReplicaId;
use orca_cluster::resource::Cpu;
use orca_cluster::time::Timestamp;
use tokio::io::AsyncWriteExt as _;

use super::bed::{Bed, PATIENCE, eventually, get};

const R1: ReplicaId = ReplicaId(1);

fn argv(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

async fn lines(bed: &Bed, request: LogRequest) -> Vec<LogLine> {
    bed.docker.logs(R1, request).await.unwrap().map(Result::unwrap).collect().await
}

fn texts(lines: &[LogLine]) -> Vec<&str> {
    lines.iter().map(|line| line.text.as_str()).collect()
}

#[tokio::test]
async fn logs_are_had_since_a_time_from_the_end_and_as_they_come() {
    requires_docker!();
    let bed = Bed::new("logs");
    let goal = bed.goal();
    let address = bed.up(R1, &goal).await;
    eventually(async || get(address, "/unready").await).await;
    let request = LogRequest::default();
    let first = eventually(async || match lines(&bed, request).await {
        two if two.len() == 2 => Ok(two),
        other => Err(other),
    })
    .await;
    assert_eq!(texts(&first), ["version 1 listening on http://0.0.0.0:8080", "told to be unready"]);
    assert!(first.iter().all(|line| line.source == Source::Stdout && line.at > Timestamp(0)));

    let mut follow =
        Box::pin(bed.docker.logs(R1, LogRequest { follow: true, tail: Some(1), since: None }).await.unwrap());
    let next = |line: Option<Result<LogLine, Error>>| line.unwrap().unwrap().text;
    assert_eq!(next(follow.next().await), "told to be unready");
    get(address, "/ready").await.unwrap();
    let line = tokio::time::timeout(PATIENCE, follow.next()).await.unwrap();
    assert_eq!(next(line), "told to be ready");

    let all = lines(&bed, request).await;
    assert_eq!(texts(&all).len(), 3);
    assert_eq!(lines(&bed, LogRequest { tail: Some(2), ..request }).await, all[1..]);
    let since = lines(&bed, LogRequest { since: Some(all[2].at), ..request }).await;
    assert_eq!(texts(&since).last(), Some(&"told to be ready"));
    assert!(since.iter().all(|line| line.at >= all[2].at));

    bed.docker.stop(R1, Duration::from_secs(10)).await;
    let rest = tokio::time::timeout(PATIENCE, follow.map(|line| line.unwrap().text).collect::<Vec<_>>()).await.unwrap();
    assert_eq!(rest.last().map(String::as_str), Some("stopped, 0 connections unfinished"));
    assert!(matches!(bed.docker.logs(ReplicaId(9), request).await.err(), Some(Error::NoReplica(_))));
}

#[tokio::test]
async fn a_command_has_its_streams_and_its_exit_code() {
    requires_docker!();
    let bed = Bed::new("exec");
    bed.up(R1, &bed.goal()).await;
    let request = |words: &[&str]| ExecRequest { argv: argv(words), ..Default::default() };
    for (words, source, text, code) in [
        (&["/orca-test-app", "echo", "a b"][..], Source::Stdout, "a b\n", 0),
        (&["/orca-test-app", "complain", "c"], Source::Stderr, "c\n", 0),
        (&["/orca-test-app", "exit", "42"], Source::Stdout, "exit 42\n", 42),
    ] {
        let mut exec = bed.docker.exec(R1, request(words)).await.unwrap();
        let mut written = Vec::new();
        while let Some(output) = exec.output.next().await {
            let output = output.unwrap();
            assert_eq!(output.source, source);
            written.extend_from_slice(&output.bytes);
        }
        assert_eq!(written, text.as_bytes());
        assert_eq!(exec.control.code().await, Ok(code));
    }

    let env = ExecRequest { env: argv(&["GIVEN=yes"]), ..request(&["/orca-test-app", "env", "GIVEN"]) };
    let mut exec = bed.docker.exec(R1, env).await.unwrap();
    assert_eq!(&exec.output.next().await.unwrap().unwrap().bytes[..], b"yes\n");

    let mut exec =
        bed.docker.exec(R1, ExecRequest { stdin: true, ..request(&["/orca-test-app", "cat"]) }).await.unwrap();
    for text in ["one\n", "\u{1}\u{0} two"] {
        exec.input.write_all(text.as_bytes()).await.unwrap();
        assert_eq!(exec.output.next().await.unwrap().unwrap().bytes, text.as_bytes());
    }
    exec.input.shutdown().await.unwrap();
    assert!(exec.output.next().await.is_none(), "the end of the input ends it");
    assert_eq!(exec.control.code().await, Ok(0));

    assert!(matches!(bed.docker.exec(ReplicaId(9), request(&["x"])).await, Err(Error::NoReplica(_))));
    bed.docker.stop(R1, Duration::from_secs(10)).await;
    assert!(matches!(bed.docker.exec(R1, request(&["x"])).await, Err(Error::NotRunning(_))));
}

#[tokio::test]
async fn a_terminal_has_a_size_that_changes() {
    requires_docker!();
    let bed = Bed::new("terminal");
    bed.up(R1, &bed.goal()).await;
    let request = ExecRequest {
        argv: argv(&["/orca-test-app", "size"]),
        terminal: Some(Size { columns: 100, rows: 30 }),
        stdin: true,
        ..Default::default()
    };
    let mut exec = bed.docker.exec(R1, request).await.unwrap();
    let mut text = String::new();
    // The program may look before the first size is set; then that is a change too.
    while !text.contains("100x30") {
        let piece = tokio::time::timeout(PATIENCE, exec.output.next()).await.unwrap().unwrap().unwrap();
        text.push_str(&String::from_utf8_lossy(&piece.bytes));
    }
    if text == "100x30\r\n" {
        exec.control.resize(Size { columns: 120, rows: 40 }).await.unwrap();
        let piece = tokio::time::timeout(PATIENCE, exec.output.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(&piece.bytes[..], b"120x40\r\n");
    }
    assert!(exec.output.next().await.is_none());
    assert_eq!(exec.control.code().await, Ok(0));
    exec.control.resize(Size { columns: 1, rows: 1 }).await.unwrap();
}

#[tokio::test]
async fn usage_is_memory_without_file_pages_and_cpu_between_readings() {
    requires_docker!();
    let bed = Bed::new("usage");
    let address = bed.up(R1, &bed.goal()).await;
    eventually(async || get(address, "/healthz").await).await;
    // As the agent does: one that measures, and its readings one after the other.
    let mut usage = bed.docker.measure(Duration::from_millis(50));
    let before = usage.next().await[&R1];
    assert_eq!(before.cpu, Cpu(0), "one reading says nothing about CPU");
    get(address, "/eat?50").await.unwrap();
    let mut worked = false;
    let eaten = async {
        loop {
            let now = usage.next().await[&R1];
            worked |= now.cpu > Cpu(0);
            if worked && now.memory.0 >= before.memory.0 + (45 << 20) {
                return;
            }
        }
    };
    tokio::time::timeout(PATIENCE, eaten).await.expect("what it uses is seen");
    bed.docker.stop(R1, Duration::from_secs(10)).await;
    let none = async { while !usage.next().await.is_empty() {} };
    tokio::time::timeout(PATIENCE, none).await.expect("what has ended uses nothing");
}
