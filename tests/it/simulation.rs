//! The seeded simulator in the ordinary test run; `cargo xtask sim --seeds N` runs more.

use orca_tests::sim::run_seed;

/// Seeds of the ordinary run, in slices so that a test runner can spread them over cores.
const SLICE: u64 = 250;

fn slice(number: u64) {
    for seed in number * SLICE..(number + 1) * SLICE {
        run_seed(seed);
    }
}

#[test]
fn every_promise_holds_in_seeds_0_to_249() {
    slice(0);
}

#[test]
fn every_promise_holds_in_seeds_250_to_499() {
    slice(1);
}

#[test]
fn every_promise_holds_in_seeds_500_to_749() {
    slice(2);
}

#[test]
fn every_promise_holds_in_seeds_750_to_999() {
    slice(3);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let (first, second) = (run_seed(42), run_seed(42));
    assert!(first.state == second.state);
    assert_eq!(first.story, second.story);
}
