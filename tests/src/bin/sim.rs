//! Runs the simulator: so many seeds, or one again.
//!
//! `sim --seeds 1000 [--from N]`, `sim --seed 0x2a [--story]`, `sim --tell scenarios/canary.txt`

#![expect(clippy::print_stdout, reason = "a program that reports what it did")]

use std::ops::Range;
use std::process::ExitCode;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;

use orca_tests::sim::run_seed;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    let (mut seeds, mut from, mut one, mut story) = (1_000, 0, None, false);
    while let Some(argument) = arguments.next() {
        let mut number = || arguments.next().as_deref().and_then(parse);
        match argument.as_str() {
            "--seeds" => seeds = number().unwrap_or(seeds),
            "--from" => from = number().unwrap_or(from),
            "--seed" => one = number(),
            "--story" => story = true,
            "--tell" => {
                let told = arguments.next().and_then(|file| std::fs::read_to_string(file).ok());
                let Some(told) = told else {
                    println!("--tell wants a story's file");
                    return ExitCode::from(2);
                };
                print!("{}", orca_tests::script::run(&told));
                return ExitCode::SUCCESS;
            }
            other => {
                println!("`{other}` is not known; --seeds N, --from N, --seed N, --story, --tell FILE are");
                return ExitCode::from(2);
            }
        }
    }
    if let Some(seed) = one {
        let world = run_seed(seed);
        if story {
            println!("{}", world.story.join("\n"));
        }
        println!("seed {seed:#x}: {} entries in the log, settled\n{}", world.log.len(), world.describe());
        return ExitCode::SUCCESS;
    }
    let begun = std::time::Instant::now();
    let entries = run(from..from + seeds);
    println!(
        "{seeds} seeds from {from}, {entries} log entries, {:.1} s: every promise held",
        begun.elapsed().as_secs_f64()
    );
    ExitCode::SUCCESS
}

/// Runs the seeds on all cores, in order of their numbers; returns how long the logs are together.
fn run(seeds: Range<u64>) -> u64 {
    let next = AtomicU64::new(seeds.start);
    let entries = AtomicU64::new(0);
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    entries.fetch_add(run_seed(seed).log.len() as u64, Relaxed);
                }
            });
        }
    });
    entries.into_inner()
}

fn parse(text: &str) -> Option<u64> {
    match text.strip_prefix("0x") {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}
