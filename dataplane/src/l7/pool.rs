//! Connections to one replica, kept for the next request. The one used last is taken first, so that surplus ones
//! grow old and go. A server may close an idle connection at the moment we send on it; nothing prevents that, so
//! ours are given up before usual servers would, one that the server has already closed is not handed out, and
//! what still goes wrong is for [`forward`](super::forward) to retry where that is safe.

use std::time::Duration;

use super::upstream::Link;

/// Idle connections kept for one replica by one worker. The replica has taken as many at once before; what is not
/// needed again goes by its age.
const IDLE_MAX: usize = 512;
/// Shorter than the 5 s after which common application servers close an idle connection.
const IDLE_TIME_MAX: Duration = Duration::from_secs(4);

#[derive(Debug, Default)]
pub struct Pool {
    /// Those with the longest idle time first.
    idle: Vec<(Link, u64)>,
}

impl Pool {
    /// One that is ready to be used, if there is one.
    pub fn take(&mut self) -> Option<Link> {
        while let Some((link, _)) = self.idle.pop() {
            if link.is_quiet() {
                return Some(link);
            }
        }
        None
    }

    pub fn put(&mut self, link: Link, now: u64) {
        if self.idle.len() < IDLE_MAX {
            self.idle.push((link, now));
        }
    }

    /// Closes what has been idle for too long.
    pub fn sweep(&mut self, now: u64) {
        let limit = u64::try_from(IDLE_TIME_MAX.as_millis()).unwrap_or(u64::MAX);
        self.idle.retain(|(link, since)| now.saturating_sub(*since) < limit && link.is_quiet());
    }

    pub fn clear(&mut self) {
        self.idle.clear();
    }
}
