//! Errors follow one rule: none repeats its `#[source]`. Whoever tells people of one tells all of it, with this.

use std::error::Error;

/// An error with everything that led to it, in one line.
pub fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}
