//! Who may begin a handshake. Handshakes cost signatures and memory before anybody is known, so there are limits; and
//! a source address costs nothing to forge, so an address that has not been proven is never punished: it is asked to
//! prove itself (QUIC's retry), which needs no memory here.

use std::collections::HashMap;
use std::net::IpAddr;
use std::time::{Duration, Instant};

/// Most handshakes at a time.
pub(super) const HANDSHAKES_MAX: usize = 1_000;

/// From here on a source must prove its address first.
const HANDSHAKES_EASY_MAX: usize = HANDSHAKES_MAX / 2;

/// Handshakes that one address may begin in one window. A node that restarts, with every plane and every peer, needs
/// a dozen; a build farm behind one address some more.
const PER_SOURCE_MAX: u32 = 64;

const WINDOW: Duration = Duration::from_secs(1);

/// Most sources counted in one window: 4096 entries are about 100 KiB.
const SOURCES_MAX: usize = 4_096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Entry {
    Open,
    /// Ask it to prove its address.
    Prove,
    /// Not a word: an answer would be work, and might go to a victim.
    Silence,
}

/// Two counts, so that packets under a forged address use up nothing of what its real owner may do.
#[derive(Debug)]
pub(super) struct Gate {
    window: Instant,
    unproven: Count,
    proven: Count,
}

impl Gate {
    pub fn new(now: Instant) -> Gate {
        Gate { window: now, unproven: Count::default(), proven: Count::default() }
    }

    /// A handshake is asked for by `source`, while `running` others run.
    pub fn entry(&mut self, source: IpAddr, proven: bool, running: usize, now: Instant) -> Entry {
        if now.saturating_duration_since(self.window) >= WINDOW {
            *self = Gate::new(now);
        }
        if running >= HANDSHAKES_MAX {
            return Entry::Silence;
        }
        if proven {
            return if self.proven.one_more(source) { Entry::Open } else { Entry::Silence };
        }
        if running >= HANDSHAKES_EASY_MAX || !self.unproven.one_more(source) { Entry::Prove } else { Entry::Open }
    }
}

#[derive(Debug, Default)]
struct Count {
    begun: HashMap<IpAddr, u32>,
}

impl Count {
    /// Whether this source may begin one more in this window.
    fn one_more(&mut self, source: IpAddr) -> bool {
        let source = network(source);
        if self.begun.len() >= SOURCES_MAX && !self.begun.contains_key(&source) {
            return false;
        }
        let begun = self.begun.entry(source).or_insert(0);
        *begun = begun.saturating_add(1);
        *begun <= PER_SOURCE_MAX
    }
}

/// One customer has a whole /64 of IPv6 addresses, so they count as one.
pub fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) => IpAddr::V6((u128::from(address) >> 64 << 64).into()),
        v4 => v4,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ONE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const TWO: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    #[test]
    fn an_address_must_be_proven_once_it_is_used_much_or_many_handshakes_run() {
        let now = Instant::now();
        let mut gate = Gate::new(now);
        for _ in 0..PER_SOURCE_MAX {
            assert_eq!(gate.entry(ONE, false, 0, now), Entry::Open);
        }
        assert_eq!(gate.entry(ONE, false, 0, now), Entry::Prove);
        assert_eq!(gate.entry(TWO, false, 0, now), Entry::Open, "others are not affected");
        assert_eq!(gate.entry(TWO, false, HANDSHAKES_EASY_MAX, now), Entry::Prove);
        assert_eq!(gate.entry(TWO, true, HANDSHAKES_EASY_MAX, now), Entry::Open);
        assert_eq!(gate.entry(TWO, true, HANDSHAKES_MAX, now), Entry::Silence);
        assert_eq!(gate.entry(ONE, false, 0, now + WINDOW), Entry::Open, "a new window, a new count");
    }

    #[test]
    fn a_forged_address_does_not_shut_out_its_owner() {
        let now = Instant::now();
        let mut gate = Gate::new(now);
        for forged in 0..100_000u32 {
            gate.entry(ONE, false, 0, now);
            gate.entry(IpAddr::V4(forged.into()), false, 0, now);
        }
        assert_eq!(gate.unproven.begun.len(), SOURCES_MAX, "and memory stays bounded");
        for _ in 0..PER_SOURCE_MAX {
            assert_eq!(gate.entry(ONE, true, 0, now), Entry::Open);
        }
        assert_eq!(gate.entry(ONE, true, 0, now), Entry::Silence, "its owner has a limit too");
    }

    #[test]
    fn the_addresses_of_one_ipv6_network_count_together() {
        let address = |text: &str| network(text.parse().unwrap());
        assert_eq!(address("2001:db8::1"), address("2001:db8::ffff:2"));
        assert_ne!(address("2001:db8::1"), address("2001:db8:0:1::1"));
        assert_eq!(address("::ffff:192.0.2.1"), ONE);
    }
}
