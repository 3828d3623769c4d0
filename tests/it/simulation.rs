//! The seeded simulator in the ordinary test run; `cargo xtask sim --seeds N` runs more.

use orca_tests::sim::run_seed;

/// Seeds of the ordinary run, in slices so that a test runner can spread them over cores.
const SLICE: u64 = 125;

fn slice(number: u64) {
    for seed in number * SLICE..(number + 1) * SLICE {
        run_seed(seed);
    }
}

#[test]
fn every_promise_holds_in_seeds_0_to_124() {
    slice(0);
}

#[test]
fn every_promise_holds_in_seeds_125_to_249() {
    slice(1);
}

#[test]
fn every_promise_holds_in_seeds_250_to_374() {
    slice(2);
}

#[test]
fn every_promise_holds_in_seeds_375_to_499() {
    slice(3);
}

#[test]
fn every_promise_holds_in_seeds_500_to_624() {
    slice(4);
}

#[test]
fn every_promise_holds_in_seeds_625_to_749() {
    slice(5);
}

#[test]
fn every_promise_holds_in_seeds_750_to_874() {
    slice(6);
}

#[test]
fn every_promise_holds_in_seeds_875_to_999() {
    slice(7);
}

#[test]
fn the_same_seed_gives_the_same_run() {
    let (first, second) = (run_seed(42), run_seed(42));
    assert!(first.state == second.state);
    assert_eq!(first.story, second.story);
}
