//! What one client may take of what all share.

use crate::config::Rate;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// The most clients that are known at once; a network of guests has half as many addresses.
const MOST_CLIENTS: usize = 4096;
/// How often those are looked through for clients that have been quiet, at most.
const SWEEP_EVERY: u64 = 1_000_000_000;

/// A token bucket per client, each kept as one number: when its bucket is full again. All times are in nanoseconds
/// since any moment that stays the same.
#[derive(Debug)]
pub(crate) struct Limiter {
    /// What one query costs.
    cost: u64,
    /// What a full bucket is worth.
    depth: u64,
    full_at: HashMap<IpAddr, u64>,
    /// The one bucket of all clients for which there is no room.
    others_full_at: u64,
    swept_at: u64,
}

impl Limiter {
    pub(crate) fn new(rate: Rate) -> Self {
        let cost = 1_000_000_000 / u64::from(rate.per_second.max(1));
        Self {
            cost,
            depth: cost * u64::from(rate.burst.max(1)),
            full_at: HashMap::new(),
            others_full_at: 0,
            swept_at: 0,
        }
    }

    /// Takes one query out of the client's bucket. `false` if that is empty.
    pub(crate) fn allows(&mut self, client: IpAddr, now: Duration) -> bool {
        let now = u64::try_from(now.as_nanos()).unwrap_or(u64::MAX / 2);
        let (cost, depth) = (self.cost, self.depth);
        let take = |full_at: &mut u64| {
            let after = now.max(*full_at) + cost;
            let allowed = after - now <= depth;
            if allowed {
                *full_at = after;
            }
            allowed
        };
        if let Some(full_at) = self.full_at.get_mut(&client) {
            return take(full_at);
        }
        if self.full_at.len() >= MOST_CLIENTS && now >= self.swept_at + SWEEP_EVERY {
            self.swept_at = now;
            self.full_at.retain(|_, full_at| *full_at > now);
        }
        if self.full_at.len() >= MOST_CLIENTS {
            return take(&mut self.others_full_at);
        }
        take(self.full_at.entry(client).or_insert(now))
    }
}

/// Places that are taken for a while: so many in all, and so many by one client.
#[derive(Debug)]
pub(crate) struct Slots {
    most: usize,
    most_per_client: usize,
    taken: Mutex<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    all: usize,
    by_client: HashMap<IpAddr, usize>,
}

/// A place that is free again when this value goes.
#[derive(Debug)]
pub(crate) struct Slot {
    slots: Arc<Slots>,
    client: IpAddr,
}

impl Slots {
    pub(crate) fn new(most: usize, most_per_client: usize) -> Arc<Self> {
        Arc::new(Self {
            most,
            most_per_client,
            taken: Mutex::default(),
        })
    }

    /// A place for `client`, if there is one.
    pub(crate) fn take(self: &Arc<Self>, client: IpAddr) -> Option<Slot> {
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        let by_client = taken.by_client.get(&client).copied().unwrap_or(0);
        if taken.all >= self.most || by_client >= self.most_per_client {
            return None;
        }
        taken.all += 1;
        taken.by_client.insert(client, by_client + 1);
        Some(Slot {
            slots: self.clone(),
            client,
        })
    }

    /// How many places are taken.
    pub(crate) fn taken(&self) -> usize {
        let taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        taken.all
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let taken = self.slots.taken.lock();
        let mut taken = taken.unwrap_or_else(PoisonError::into_inner);
        taken.all -= 1;
        match taken.by_client.get_mut(&self.client) {
            Some(1) | None => {
                taken.by_client.remove(&self.client);
            }
            Some(count) => *count -= 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::Ipv4Addr;

    fn client(number: u32) -> IpAddr {
        Ipv4Addr::from_bits(0x0a00_0000 + number).into()
    }

    fn limiter() -> Limiter {
        Limiter::new(Rate {
            per_second: 10,
            burst: 5,
        })
    }

    fn allowed(limiter: &mut Limiter, client: IpAddr, at: u64) -> usize {
        (0..100)
            .filter(|_| limiter.allows(client, Duration::from_millis(at)))
            .count()
    }

    #[test]
    fn a_burst_is_allowed_and_then_the_rate() {
        let mut limiter = limiter();
        assert_eq!(allowed(&mut limiter, client(1), 0), 5);
        assert_eq!(allowed(&mut limiter, client(1), 100), 1);
        assert_eq!(allowed(&mut limiter, client(1), 300), 2);
        assert_eq!(allowed(&mut limiter, client(1), 60_000), 5);
    }

    #[test]
    fn clients_do_not_take_from_each_other() {
        let mut limiter = limiter();
        assert_eq!(allowed(&mut limiter, client(1), 0), 5);
        assert_eq!(allowed(&mut limiter, client(2), 0), 5);
    }

    #[test]
    fn the_table_is_bounded_and_forgets_quiet_clients() {
        let mut limiter = limiter();
        for number in 0..10_000 {
            limiter.allows(client(number), Duration::ZERO);
        }
        assert_eq!(limiter.full_at.len(), MOST_CLIENTS);
        // All others share one bucket, which is empty by now; those that are known go on.
        assert_eq!(allowed(&mut limiter, client(9_999), 0), 0);
        assert_eq!(allowed(&mut limiter, client(0), 0), 4);
        assert_eq!(allowed(&mut limiter, client(9_999), 2000), 5);
        assert!(limiter.full_at.len() < 10);
    }

    #[test]
    fn a_rate_of_nothing_is_one_a_second() {
        let mut limiter = Limiter::new(Rate {
            per_second: 0,
            burst: 0,
        });
        assert_eq!(allowed(&mut limiter, client(1), 0), 1);
        assert_eq!(allowed(&mut limiter, client(1), 1000), 1);
    }

    #[test]
    fn places_are_bounded_in_all_and_per_client_and_come_back() {
        let slots = Slots::new(3, 2);
        let first = slots.take(client(1));
        let second = slots.take(client(1));
        assert!(first.is_some() && second.is_some());
        assert!(slots.take(client(1)).is_none());
        let other = slots.take(client(2));
        assert!(other.is_some() && slots.take(client(3)).is_none());
        drop(first);
        assert!(slots.take(client(3)).is_some());
        drop((second, other));
        assert_eq!(slots.taken(), 0);
        assert!(slots.taken.lock().unwrap().by_client.is_empty());
    }
}
