//! The stories of `tests/scenarios`.

use std::path::Path;

use expect_test::expect_file;
use orca_tests::script;

#[test]
fn every_story_ends_as_written() {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenarios");
    let mut stories: Vec<_> = std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().path()).collect();
    stories.sort();
    assert!(!stories.is_empty());
    for story in stories {
        let text = std::fs::read_to_string(&story).unwrap();
        expect_file![story].assert_eq(&script::run(&text));
    }
}
