//! Connections to one replica, kept for the next request. The one used last is taken first, so that surplus ones
//! grow old and go. A server may close an idle connection at the moment we send on it; nothing prevents that, so
//! ours are given up before usual servers would, one that the server has already closed is not handed out, and
//! what still goes wrong is for [`forward`](super::forward) to retry where that is safe.

use super::upstream::Link;

/// Idle connections kept for one replica by one worker. The replica has taken as many at once before; what is not
/// needed again goes by its age.
const IDLE_MAX: usize = 512;

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

    /// Closes what has been idle for so many milliseconds.
    pub fn sweep(&mut self, now: u64, idle_max: u64) {
        self.idle.retain(|(link, since)| now.saturating_sub(*since) < idle_max && link.is_quiet());
    }

    pub fn clear(&mut self) {
        self.idle.clear();
    }
}
