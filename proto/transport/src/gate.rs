//! Limits how many connections may wait to be admitted.
//!
//! A connection that arrives while the gate is full displaces another: of the address with the most waiting
//! connections, the one that has waited longest. So strangers displace each other, and a worker, which needs a few
//! milliseconds, gets through between them. There is one gate for the TLS handshake and another for the hello, so that
//! peers that only connect cannot displace those that have completed the handshake.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio_util::sync::CancellationToken;

/// Limits on connections that are not admitted yet.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long the TLS handshake may take.
    pub handshake: Duration,
    /// How long a hello may take after the handshake.
    pub hello: Duration,
    /// Maximum number of waiting connections per address, at each of the two gates.
    pub per_address: usize,
    /// Maximum number of waiting connections overall, at each of the two gates.
    pub total: usize,
}

impl Limits {
    /// Limits that fit the number of files that this process may open, most of which are for workers and the run.
    pub fn of_this_process() -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let total = usize::try_from(files / 8).unwrap_or(usize::MAX).clamp(1, 128);
        Self {
            handshake: Duration::from_secs(5),
            hello: Duration::from_secs(10),
            per_address: total.min(64),
            total,
        }
    }
}

/// Counts waiting connections.
#[derive(Debug)]
pub(crate) struct Gate {
    limits: Limits,
    waiting: Mutex<Waiting>,
    /// Cancelled at the end, when nobody is admitted any more.
    closed: CancellationToken,
}

/// The waiting connections of each address, in the order in which they arrived.
#[derive(Debug, Default)]
struct Waiting {
    arrived: u64,
    by_address: BTreeMap<IpAddr, BTreeMap<u64, CancellationToken>>,
}

/// A connection's place among those that wait, until the connection is admitted or closed.
#[derive(Debug)]
pub(crate) struct Ticket {
    gate: Arc<Gate>,
    address: IpAddr,
    number: u64,
    displaced: CancellationToken,
    admitted: AtomicBool,
}

impl Gate {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, waiting: Mutex::default(), closed: CancellationToken::new() })
    }

    /// Adds a connection from `address`, and displaces another one if there is no room.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Ticket {
        let address = network(address);
        let displaced = self.closed.child_token();
        let number = self.waiting().enter(address, displaced.clone(), self.limits);
        Ticket { gate: Arc::clone(self), address, number, displaced, admitted: AtomicBool::new(false) }
    }

    /// Displaces all waiting connections, and all that arrive later.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // No change below can panic halfway.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn enter(&mut self, address: IpAddr, connection: CancellationToken, limits: Limits) -> u64 {
        let own = |waiting: &Self| waiting.by_address.get(&address).map_or(0, BTreeMap::len);
        while own(self) >= limits.per_address {
            self.displace_oldest(address);
        }
        while self.by_address.values().map(BTreeMap::len).sum::<usize>() >= limits.total {
            let most = self.by_address.iter().max_by_key(|(_, waiting)| {
                let oldest = waiting.keys().next().copied();
                (waiting.len(), std::cmp::Reverse(oldest))
            });
            let Some((&most, _)) = most else { break };
            self.displace_oldest(most);
        }
        self.arrived += 1;
        self.by_address.entry(address).or_default().insert(self.arrived, connection);
        self.arrived
    }

    fn displace_oldest(&mut self, address: IpAddr) {
        let oldest = self.by_address.get(&address).and_then(|waiting| waiting.keys().next().copied());
        if let Some(connection) = oldest.and_then(|oldest| self.leave(address, oldest)) {
            connection.cancel();
        }
    }

    fn leave(&mut self, address: IpAddr, number: u64) -> Option<CancellationToken> {
        let waiting = self.by_address.get_mut(&address)?;
        let connection = waiting.remove(&number);
        if waiting.is_empty() {
            self.by_address.remove(&address);
        }
        connection
    }
}

impl Ticket {
    /// Admits the connection: from now on it does not count, and cannot be displaced.
    pub(crate) fn admit(&self) {
        self.admitted.store(true, Ordering::Release);
        self.leave();
    }

    pub(crate) fn is_admitted(&self) -> bool {
        self.admitted.load(Ordering::Acquire)
    }

    /// Cancelled when the connection has to make room for another.
    pub(crate) const fn displaced(&self) -> &CancellationToken {
        &self.displaced
    }

    fn leave(&self) {
        self.gate.waiting().leave(self.address, self.number);
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.leave();
    }
}

/// What counts as one address: for IPv6 the whole /64 network, because whoever has one address in it has them all.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(address) if !address.is_loopback() => {
            Ipv6Addr::from_bits(address.to_bits() & !u128::from(u64::MAX)).into()
        }
        address => address,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gate(per_address: usize, total: usize) -> Arc<Gate> {
        let hour = Duration::from_hours(1);
        Gate::new(Limits { handshake: hour, hello: hour, per_address, total })
    }

    fn stay(tickets: &[Ticket]) -> Vec<bool> {
        tickets.iter().map(|ticket| !ticket.displaced().is_cancelled()).collect()
    }

    fn enter(gate: &Arc<Gate>, addresses: &[&str]) -> Vec<Ticket> {
        addresses.iter().map(|address| gate.enter(address.parse().unwrap())).collect()
    }

    #[test]
    fn an_address_pushes_out_its_own_oldest() {
        let tickets = enter(&gate(2, 9), &["1.0.0.1", "1.0.0.2", "1.0.0.1", "1.0.0.1", "::ffff:1.0.0.1"]);
        assert_eq!(stay(&tickets), [false, true, false, true, true]);
    }

    #[test]
    fn a_full_house_pushes_out_whoever_has_the_most() {
        let gate = gate(9, 4);
        let mut tickets = enter(&gate, &["1.0.0.9", "1.0.0.1", "1.0.0.1", "1.0.0.1", "1.0.0.2"]);
        assert_eq!(stay(&tickets), [true, false, true, true, true]);
        tickets.extend(enter(&gate, &["1.0.0.3"]));
        assert_eq!(stay(&tickets), [true, false, false, true, true, true]);
        // Every address has one connection: the oldest goes.
        tickets.extend(enter(&gate, &["1.0.0.4"]));
        assert_eq!(stay(&tickets), [false, false, false, true, true, true, true]);
    }

    #[test]
    fn a_network_of_one_customer_is_one_address() {
        let tickets = enter(&gate(1, 9), &["2001:db8::1", "2001:db8::ffff:0:0:2", "2001:db8:0:1::1", "::1"]);
        assert_eq!(stay(&tickets), [false, true, true, true]);
    }

    #[test]
    fn those_that_are_admitted_or_gone_take_no_place() {
        let gate = gate(2, 2);
        let mut tickets = enter(&gate, &["1.0.0.1", "1.0.0.1"]);
        tickets[0].admit();
        drop(tickets.pop());
        tickets.extend(enter(&gate, &["1.0.0.1", "1.0.0.1"]));
        assert_eq!(stay(&tickets), [true, true, true]);
        drop(tickets);
        assert!(gate.waiting().by_address.is_empty());
    }

    #[test]
    fn nobody_waits_at_the_end() {
        let gate = gate(9, 9);
        let mut tickets = enter(&gate, &["1.0.0.1"]);
        gate.close();
        tickets.extend(enter(&gate, &["1.0.0.1"]));
        assert_eq!(stay(&tickets), [false, false]);
    }
}
