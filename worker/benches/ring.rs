//! The ring over TCP with all members on this machine: what an all-reduce costs apart from the network.
//!
//! `cargo bench -p ulmus-worker` prints the time of one operation with all members at once, and its speed in bytes of
//! the vector per second.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Barrier;
use std::time::Duration;

use divan::Bencher;
use divan::counter::BytesCount;
use ulmus_transport::ring::{Listener, Place};
use ulmus_types::{Digest, Generation, GroupKey, Incarnation, Peer, Rank, WorkerId};
use ulmus_worker::collective::{AbortHandle, Collective, TcpGroup};

const TIMEOUT: Duration = Duration::from_secs(30);
/// Numbers of members and of elements, for the step consensus and for gradients.
const CASES: [(usize, usize); 6] = [(2, 8), (2, 1 << 17), (2, 1 << 22), (4, 8), (4, 1 << 17), (4, 1 << 22)];

fn main() {
    divan::main();
}

fn listen(rank: usize) -> Listener {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    Listener::bind(any, Incarnation::new(rank as u64)).expect("loopback has a free port")
}

fn peer((rank, listener): (usize, &Listener)) -> Peer {
    let worker = WorkerId::new("w", Incarnation::new(rank as u64)).expect("a legal name");
    Peer { address: listener.address().to_string(), worker }
}

fn form(rank: usize, listener: &mut Listener, peers: &[Peer]) -> TcpGroup {
    let size = peers.len();
    let place = Place {
        run: Digest::of(b"bench"),
        generation: Generation::new(1),
        rank: Rank::new(rank as u32),
        size: size as u32,
        key: GroupKey::from_bytes([0; 32]),
        previous: peers[(rank + size - 1) % size].clone(),
        next: peers[(rank + 1) % size].clone(),
    };
    let abort = AbortHandle::new().expect("descriptors are left");
    TcpGroup::form(listener, &place, &abort, TIMEOUT, TIMEOUT).expect("all members are there")
}

#[divan::bench(args = CASES)]
fn all_reduce(bencher: Bencher<'_, '_>, (size, length): (usize, usize)) {
    let mut listeners: Vec<Listener> = (0..size).map(listen).collect();
    let peers: Vec<Peer> = listeners.iter().enumerate().map(peer).collect();
    let (first, others) = listeners.split_first_mut().expect("a group has members");
    let (begin, peers) = (Barrier::new(size), &peers);
    std::thread::scope(|scope| {
        for (index, listener) in others.iter_mut().enumerate() {
            let begin = &begin;
            scope.spawn(move || {
                let mut group = form(index + 1, listener, peers);
                let mut values = vec![1_i64; length];
                begin.wait();
                // Until the first member leaves.
                while group.all_reduce(&mut values).is_ok() {}
            });
        }
        let mut group = form(0, first, peers);
        let mut values = vec![1_i64; length];
        begin.wait();
        bencher
            .counter(BytesCount::of_many::<i64>(length))
            .bench_local(|| group.all_reduce(&mut values).expect("nobody leaves before this one"));
        drop(group);
    });
}
