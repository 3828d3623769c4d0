//! Times and spans of time as people write and read them.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use jiff::tz::TimeZone;
use orca_cluster::time::Timestamp;

/// The one place where the command line reads the clock of the day.
pub fn now() -> Timestamp {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Timestamp(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}

/// `500ms`, `30s`, `10m`, `2h`, `7d`, or several together: `1h30m`.
pub fn parse_span(text: &str) -> Result<Duration, String> {
    let wrong = || format!("`{text}` is no span of time; write such as 30s, 10m, 2h or 7d");
    let mut rest = text.trim();
    let mut millis: u64 = 0;
    if rest.is_empty() {
        return Err(wrong());
    }
    while !rest.is_empty() {
        let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
        let (number, after) = rest.split_at(digits);
        let letters = after.bytes().take_while(u8::is_ascii_alphabetic).count();
        let (unit, after) = after.split_at(letters);
        let factor: u64 = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" | "min" => 60_000,
            "h" => 3_600_000,
            "d" => 86_400_000,
            _ => return Err(wrong()),
        };
        let number: u64 = number.parse().map_err(|_| wrong())?;
        millis = number.checked_mul(factor).and_then(|more| millis.checked_add(more)).ok_or_else(wrong)?;
        rest = after;
    }
    Ok(Duration::from_millis(millis))
}

/// A point in time: so long ago (`10m`), or a date (`2026-01-31T14:00:00Z`).
pub fn parse_moment(text: &str, now: Timestamp) -> Result<Timestamp, String> {
    if let Ok(span) = parse_span(text) {
        return Ok(now - span);
    }
    let parsed: Result<jiff::Timestamp, _> = text.parse();
    match parsed.map(|at| u64::try_from(at.as_millisecond())) {
        Ok(Ok(millis)) => Ok(Timestamp(millis)),
        _ => Err(format!("`{text}` is neither so long ago (10m, 2h) nor a date (2026-01-31T14:00:00Z)")),
    }
}

/// `14:02:11`.
pub fn clock(at: Timestamp, zone: &TimeZone) -> String {
    zoned(at, zone).strftime("%H:%M:%S").to_string()
}

/// `2026-01-31 14:02:11`.
pub fn date(at: Timestamp, zone: &TimeZone) -> String {
    zoned(at, zone).strftime("%Y-%m-%d %H:%M:%S").to_string()
}

/// `2026-01-31T14:02:11.123Z`.
pub fn precise(at: Timestamp) -> String {
    zoned(at, &TimeZone::UTC).strftime("%Y-%m-%dT%H:%M:%S%.3fZ").to_string()
}

fn zoned(at: Timestamp, zone: &TimeZone) -> jiff::Zoned {
    let millis = i64::try_from(at.0).unwrap_or(i64::MAX);
    jiff::Timestamp::from_millisecond(millis).unwrap_or(jiff::Timestamp::MAX).to_zoned(zone.clone())
}

/// How long something took: `40ms`, `0.8s`, `11.6s`, `2m 5s`.
pub fn took(span: Duration) -> String {
    let seconds = span.as_secs_f64();
    match span.as_millis() {
        millis @ 0..100 => format!("{millis}ms"),
        100..59_950 => format!("{seconds:.1}s"),
        _ => age(span),
    }
}

/// How old something is, coarsely: `45s`, `12m`, `2h`, `3d`.
pub fn age(span: Duration) -> String {
    match span.as_secs() {
        seconds @ 0..=59 => format!("{seconds}s"),
        seconds @ 60..=599 if seconds % 60 != 0 => format!("{}m {}s", seconds / 60, seconds % 60),
        seconds @ 60..=3_599 => format!("{}m", seconds / 60),
        seconds @ 3_600..=86_399 => format!("{}h", seconds / 3_600),
        seconds => format!("{}d", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spans_are_read_as_people_write_them() {
        for (text, millis) in
            [("500ms", 500), ("30s", 30_000), ("10m", 600_000), ("1h30m", 5_400_000), ("2d", 172_800_000)]
        {
            assert_eq!(parse_span(text), Ok(Duration::from_millis(millis)), "{text}");
        }
        for text in ["", "10", "m", "10x", "-5s", "1h-", "99999999999999999999s", "999999999999999999d"] {
            assert!(parse_span(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_moment_is_relative_or_a_date() {
        let now = Timestamp(1_000_000_000);
        assert_eq!(parse_moment("10m", now), Ok(Timestamp(999_400_000)));
        assert_eq!(parse_moment("1970-01-01T00:00:02Z", now), Ok(Timestamp(2_000)));
        assert!(parse_moment("yesterday", now).is_err());
    }

    #[test]
    fn spans_are_short() {
        let shown = |millis| took(Duration::from_millis(millis));
        assert_eq!([shown(80), shown(11_640), shown(125_000)], ["80ms", "11.6s", "2m 5s"]);
        assert_eq!(age(Duration::from_secs(7_300)), "2h");
    }
}
