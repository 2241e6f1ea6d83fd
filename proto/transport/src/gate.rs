//! Who waits to be let in, and how many of them there may be.
//!
//! Whoever comes while it is full takes the place of the connection that has waited longest among those of the
//! address that has the most. So strangers push out each other, and a worker, which needs a few milliseconds, gets
//! through between them. There is a gate for TLS and another for hello, so that whoever has come through the first
//! is out of reach of those who only connect.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Resource, getrlimit};
use tokio_util::sync::CancellationToken;

/// What connections may take before they are admitted.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// How long TLS may take.
    pub handshake: Duration,
    /// How long it may take from there until hello is said.
    pub hello: Duration,
    /// Connections of one address that may wait, at either of the two.
    pub per_address: usize,
    /// Connections that may wait in all, at either of the two.
    pub in_all: usize,
}

impl Limits {
    /// The limits of a coordinator that may have as many files open as this process: most of them are for workers
    /// and for the run.
    pub fn of_this_process() -> Self {
        let files = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let in_all = usize::try_from(files / 8).unwrap_or(usize::MAX).clamp(1, 128);
        Self {
            handshake: Duration::from_secs(5),
            hello: Duration::from_secs(10),
            per_address: in_all.min(64),
            in_all,
        }
    }
}

/// Counts those that wait.
#[derive(Debug)]
pub(crate) struct Gate {
    limits: Limits,
    waiting: Mutex<Waiting>,
    /// Set at the end, when nobody is let in any more.
    closed: CancellationToken,
}

/// The waiting connections of each address, by the order in which they came.
#[derive(Debug, Default)]
struct Waiting {
    came: u64,
    by_address: BTreeMap<IpAddr, BTreeMap<u64, CancellationToken>>,
}

/// A connection's place among those that wait, until it is admitted or gone.
#[derive(Debug)]
pub(crate) struct Ticket {
    gate: Arc<Gate>,
    address: IpAddr,
    number: u64,
    pushed_out: CancellationToken,
    admitted: AtomicBool,
}

impl Gate {
    pub(crate) fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, waiting: Mutex::default(), closed: CancellationToken::new() })
    }

    /// Takes somebody in who came from `address`, and pushes out others where there is no room.
    pub(crate) fn enter(self: &Arc<Self>, address: IpAddr) -> Ticket {
        let address = neighbourhood(address);
        let pushed_out = self.closed.child_token();
        let number = self.waiting().enter(address, pushed_out.clone(), self.limits);
        Ticket { gate: Arc::clone(self), address, number, pushed_out, admitted: AtomicBool::new(false) }
    }

    /// Pushes out all that wait, and everybody who comes.
    pub(crate) fn close(&self) {
        self.closed.cancel();
    }

    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        // No change below can panic half way.
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Waiting {
    fn enter(&mut self, address: IpAddr, connection: CancellationToken, limits: Limits) -> u64 {
        let own = |waiting: &Self| waiting.by_address.get(&address).map_or(0, BTreeMap::len);
        while own(self) >= limits.per_address {
            self.push_out_oldest(address);
        }
        while self.by_address.values().map(BTreeMap::len).sum::<usize>() >= limits.in_all {
            let most = self.by_address.iter().max_by_key(|(_, waiting)| {
                let oldest = waiting.keys().next().copied();
                (waiting.len(), std::cmp::Reverse(oldest))
            });
            let Some((&most, _)) = most else { break };
            self.push_out_oldest(most);
        }
        self.came += 1;
        self.by_address.entry(address).or_default().insert(self.came, connection);
        self.came
    }

    fn push_out_oldest(&mut self, address: IpAddr) {
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
    /// From now on the connection neither counts nor ends by itself.
    pub(crate) fn admit(&self) {
        self.admitted.store(true, Ordering::Release);
        self.leave();
    }

    pub(crate) fn is_admitted(&self) -> bool {
        self.admitted.load(Ordering::Acquire)
    }

    /// Tells when the connection has to go for another.
    pub(crate) const fn pushed_out(&self) -> &CancellationToken {
        &self.pushed_out
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

/// What counts as one address: whoever has an IPv6 address has the 2⁶⁴ beside it as well.
fn neighbourhood(address: IpAddr) -> IpAddr {
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

    fn gate(per_address: usize, in_all: usize) -> Arc<Gate> {
        let hour = Duration::from_hours(1);
        Gate::new(Limits { handshake: hour, hello: hour, per_address, in_all })
    }

    fn stay(tickets: &[Ticket]) -> Vec<bool> {
        tickets.iter().map(|ticket| !ticket.pushed_out().is_cancelled()).collect()
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
        // Everybody has one: the oldest goes.
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
