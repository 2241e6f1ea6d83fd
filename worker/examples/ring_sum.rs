//! Three members form a ring over loopback, sum integers, and hand a vector round.
//!
//!     cargo run -p ulmus-worker --example ring_sum

#![expect(clippy::print_stdout, reason = "an example")]

use std::error::Error;
use std::time::Duration;

use ulmus_transport::ring::{Listener, Place};
use ulmus_types::{Digest, Generation, GroupKey, Incarnation, Peer, Rank, WorkerId};
use ulmus_worker::collective::{AbortHandle, Collective, TcpGroup};

const SIZE: usize = 3;
const WITHIN: Duration = Duration::from_secs(10);

/// What a member does: sums its numbers with those of the others, and takes over what rank 0 holds.
fn member(mut listener: Listener, place: &Place) -> Result<String, Box<dyn Error + Send + Sync>> {
    let mut group = TcpGroup::form(&mut listener, place, &AbortHandle::new()?, WITHIN, WITHIN)?;
    let rank = i64::from(group.rank().get());
    let mut sums = vec![rank, 10 * rank, 100 * rank];
    group.all_reduce(&mut sums)?;
    let mut state = vec![rank as f32 + 0.5; 2];
    group.broadcast(Rank::new(0), state.as_mut_slice().into())?;
    Ok(format!("rank {rank}: sums {sums:?}, state {state:?}"))
}

fn main() -> Result<(), Box<dyn Error + Send + Sync>> {
    let mut listeners = Vec::new();
    let mut peers = Vec::new();
    for number in 0..SIZE {
        let incarnation = Incarnation::new(number as u64);
        let listener = Listener::bind(([127, 0, 0, 1], 0).into(), incarnation)?;
        let worker = WorkerId::new(format!("worker-{number}"), incarnation)?;
        peers.push(Peer { address: listener.address().to_string(), worker });
        listeners.push(listener);
    }
    // The coordinator tells each its place; the key proves to the others that it did.
    let place = |rank: usize| Place {
        run: Digest::of(b"demo"),
        generation: Generation::new(1),
        rank: Rank::new(rank as u32),
        size: SIZE as u32,
        key: GroupKey::from_bytes([3; 32]),
        previous: peers[(rank + SIZE - 1) % SIZE].clone(),
        next: peers[(rank + 1) % SIZE].clone(),
    };
    let places: Vec<Place> = (0..SIZE).map(place).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = listeners
            .into_iter()
            .zip(&places)
            .map(|(listener, place)| scope.spawn(move || member(listener, place)))
            .collect();
        for thread in threads {
            println!("{}", thread.join().map_err(|_| "a member has panicked")??);
        }
        Ok(())
    })
}
