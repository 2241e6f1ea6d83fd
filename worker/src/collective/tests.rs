//! The operations of real groups over loopback.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::mpsc;
use std::time::Duration;

use proptest::prelude::*;
use ulmus_types::{Digest, Generation, Incarnation, Peer, WorkerId};

use super::*;

/// Far longer than anything takes that succeeds.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOPBACK: &str = "127.0.0.1:0";

fn listen(incarnation: u64) -> Listener {
    Listener::bind(LOOPBACK.parse().unwrap(), Incarnation::new(incarnation)).unwrap()
}

fn peer(listener: &Listener) -> Peer {
    let worker = WorkerId::new("w", listener.incarnation()).unwrap();
    Peer { address: listener.address().to_string(), worker }
}

/// The place of `rank` among these peers.
fn place(generation: u64, rank: usize, peers: &[Peer]) -> Place {
    let size = peers.len();
    Place {
        run: Digest::of(b"run"),
        generation: Generation::new(generation),
        rank: Rank::new(rank as u32),
        size: size as u32,
        previous: peers[(rank + size - 1) % size].clone(),
        next: peers[(rank + 1) % size].clone(),
    }
}

fn form(listener: &mut Listener, place: &Place) -> Result<TcpGroup, CollectiveError> {
    TcpGroup::form(listener, place, &AbortHandle::new().unwrap(), PATIENCE, PATIENCE)
}

/// Runs `member` on a thread for each of the listeners, in a group that they form.
fn run_group<T: Send>(
    listeners: &mut [Listener],
    generation: u64,
    member: impl Fn(TcpGroup) -> T + Sync,
) -> Vec<T> {
    let peers: Vec<Peer> = listeners.iter().map(peer).collect();
    let (peers, member) = (&peers, &member);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (listeners.iter_mut().enumerate())
            .map(|(rank, listener)| {
                scope.spawn(move || member(form(listener, &place(generation, rank, peers)).unwrap()))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

fn run_ring<T: Send>(size: usize, member: impl Fn(TcpGroup) -> T + Sync) -> Vec<T> {
    let mut listeners: Vec<_> = (0..size as u64).map(listen).collect();
    run_group(&mut listeners, 1, member)
}

/// Some value that differs between ranks and positions and has no short binary fraction.
fn value(rank: usize, index: usize) -> f32 {
    ((rank * 7919 + index * 104_729) % 1013) as f32 / 7.0 - 70.0
}

fn integer(rank: usize, index: usize) -> i64 {
    (value(rank, index) as f64 * 1e15) as i64
}

/// What a chunk's owner must find: the sum in the order of the ring.
fn ring_sum(size: usize, owner: usize, index: usize) -> f32 {
    (1..=size).map(|turn| value((owner + turn) % size, index)).reduce(|sum, value| sum + value).unwrap()
}

/// Runs everything once on vectors of `length` and compares with sums taken alone.
fn check_all(size: usize, length: usize) {
    let vector = |rank: usize| (0..length).map(|index| value(rank, index)).collect::<Vec<f32>>();
    let integers = |rank: usize| (0..length).map(|index| integer(rank, index)).collect::<Vec<i64>>();
    let brain = |rank: usize| vector(rank).into_iter().map(bf16::from_f32).collect::<Vec<bf16>>();
    let owners: Vec<usize> =
        (0..size).flat_map(|rank| chunk(length, size, rank).map(move |_| rank)).collect();
    assert_eq!(owners.len(), length);

    let expected_integers: Vec<i64> =
        (0..length).map(|index| (0..size).map(|rank| integer(rank, index)).sum()).collect();
    let expected: Vec<f32> = (0..length).map(|index| ring_sum(size, owners[index], index)).collect();
    let expected_brain: Vec<bf16> = (0..length)
        .map(|index| {
            let wide = |rank: usize| bf16::from_f32(value(rank, index)).to_f32();
            let owner = owners[index];
            bf16::from_f32((1..=size).map(|turn| wide((owner + turn) % size)).reduce(|a, b| a + b).unwrap())
        })
        .collect();

    run_ring(size, |mut group| {
        let rank = group.rank().index();
        assert_eq!(group.size(), size);
        let own = chunk(length, size, rank);

        let mut data = integers(rank);
        group.all_reduce(data.as_mut_slice().into()).unwrap();
        assert_eq!(data, expected_integers);
        let mut data = vector(rank);
        group.all_reduce(data.as_mut_slice().into()).unwrap();
        assert_eq!(data, expected);
        let mut data = brain(rank);
        group.all_reduce(data.as_mut_slice().into()).unwrap();
        assert_eq!(data, expected_brain);

        let mut data = integers(rank);
        group.reduce_scatter(data.as_mut_slice().into()).unwrap();
        assert_eq!(data[own.clone()], expected_integers[own.clone()]);
        let mut data = vector(rank);
        group.reduce_scatter(data.as_mut_slice().into()).unwrap();
        assert_eq!(data[own.clone()], expected[own.clone()]);
        group.all_gather(data.as_mut_slice().into()).unwrap();
        assert_eq!(data, expected);
        let mut data = brain(rank);
        group.reduce_scatter(data.as_mut_slice().into()).unwrap();
        assert_eq!(data[own.clone()], expected_brain[own]);

        for root in 0..size {
            let root_rank = Rank::new(root as u32);
            let mut data = integers(rank);
            group.broadcast(root_rank, data.as_mut_slice().into()).unwrap();
            assert_eq!(data, integers(root));
            let mut data = brain(rank);
            group.broadcast(root_rank, data.as_mut_slice().into()).unwrap();
            assert_eq!(data, brain(root));
        }
    });
}

#[test]
fn chunks_tile_the_vector_on_block_boundaries() {
    for size in 1..9 {
        for length in [0, 1, 5, BLOCK - 1, BLOCK * size, BLOCK * size + 1, BLOCK * 40 + 123] {
            let chunks: Vec<_> = (0..size).map(|rank| chunk(length, size, rank)).collect();
            assert_eq!((chunks[0].start, chunks[size - 1].end), (0, length));
            assert!(chunks.windows(2).all(|pair| pair[0].end == pair[1].start));
            let unit = if length > BLOCK * (size - 1) { BLOCK } else { 1 };
            assert!(
                chunks.iter().all(|chunk| chunk.start % unit == 0 || chunk.start == length),
                "{chunks:?}"
            );
            let units = chunks.iter().map(|chunk| chunk.len().div_ceil(unit));
            assert!(units.clone().max().unwrap() - units.min().unwrap() <= 1, "{chunks:?}");
        }
    }
}

#[test]
fn all_operations_agree_with_sums_taken_alone() {
    for size in 1..=5 {
        for length in [0, 1, 3, 1001] {
            check_all(size, length);
        }
    }
}

#[test]
fn vectors_larger_than_any_socket_buffer_do_not_deadlock() {
    for size in [2, 3] {
        check_all(size, 3_000_001);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn integer_sums_are_exact_for_any_group(
        (size, vectors) in (1_usize..6, 0_usize..300).prop_flat_map(|(size, length)| {
            (Just(size), prop::collection::vec(prop::collection::vec(any::<i64>(), length), size))
        }),
    ) {
        let length = vectors[0].len();
        let expected: Vec<i64> =
            (0..length).map(|i| vectors.iter().fold(0, |sum: i64, vector| sum.wrapping_add(vector[i]))).collect();
        let results = run_ring(size, |mut group| {
            let mut data = vectors[group.rank().index()].clone();
            group.all_reduce(data.as_mut_slice().into()).map(|()| data)
        });
        for result in results {
            prop_assert_eq!(result.unwrap(), expected.clone());
        }
    }
}

#[test]
fn the_same_processes_form_one_group_after_another() {
    let mut listeners: Vec<_> = (0..3).map(listen).collect();
    for generation in [1, 2, 7] {
        let sums = run_group(&mut listeners, generation, |mut group| {
            let mut data = [generation as i64; 5];
            group.all_reduce(data.as_mut_slice().into()).unwrap();
            group.abort_handle().entered()
        });
        assert_eq!(sums, [2; 3]);
    }
    // A survivor goes on alone, without sockets.
    let alone = run_group(&mut listeners[..1], 8, |mut group| {
        let mut data = [5_i64];
        group.all_reduce(data.as_mut_slice().into()).map(|()| data)
    });
    assert_eq!(alone, [Ok([5])]);
}

/// One member does not take part; `disturb` is done while the others are blocked. Answers their errors.
fn errors_of_blocked(size: usize, disturb: impl Fn(TcpGroup, &[AbortHandle]) + Sync) -> Vec<CollectiveError> {
    let (blocked, seen) = mpsc::channel();
    let seen = std::sync::Mutex::new(seen);
    let results = run_ring(size, |mut group| {
        if group.rank().index() == 0 {
            let seen = seen.lock().unwrap();
            let handles: Vec<AbortHandle> = (1..size).map(|_| seen.recv().unwrap()).collect();
            disturb(group, &handles);
            return None;
        }
        blocked.send(group.abort_handle()).unwrap();
        let mut data = vec![1.0_f32; 4_000_000];
        let error = group.all_reduce(data.as_mut_slice().into()).unwrap_err();
        // The group is of no more use and says why.
        assert_eq!(group.broadcast(Rank::new(0), data.as_mut_slice().into()), Err(error.clone()));
        Some(error)
    });
    results.into_iter().flatten().collect()
}

#[test]
fn an_abort_ends_a_blocked_operation_of_this_member_and_frees_the_others() {
    let errors = errors_of_blocked(2, |group, handles| {
        handles[0].abort();
        assert!(handles[0].is_aborted());
        drop(group);
    });
    assert_eq!(errors, [CollectiveError::Aborted]);

    // Only one is aborted, and nobody else does anything: the error goes round the ring.
    let errors = errors_of_blocked(4, |group, handles| {
        handles[0].abort();
        let mut group = group;
        let mut data = vec![1.0_f32; 4_000_000];
        assert!(matches!(
            group.all_reduce(data.as_mut_slice().into()),
            Err(CollectiveError::PeerLost { .. })
        ));
    });
    assert_eq!(errors.iter().filter(|error| **error == CollectiveError::Aborted).count(), 1);
    assert_eq!(errors.iter().filter(|error| matches!(error, CollectiveError::PeerLost { .. })).count(), 2);
}

#[test]
fn the_death_of_a_member_is_noticed_by_all() {
    for size in [2, 3, 5] {
        let errors = errors_of_blocked(size, |group, _| drop(group));
        assert_eq!(errors.len(), size - 1);
        for error in errors {
            assert!(matches!(error, CollectiveError::PeerLost { .. }), "{error}");
            assert_eq!(error.kind(), ErrorKind::Retry);
        }
    }
}

/// What a member sees that looks at its group while it does something else.
#[test]
fn a_watch_tells_who_is_lost() {
    let broken = |watch: &Watch| std::iter::repeat_with(|| watch.broken()).flatten().next();
    run_ring(2, |mut group| {
        let watch = group.watch(PATIENCE).unwrap();
        assert_eq!(watch.broken(), None);
        let late = group.watch(Duration::ZERO).unwrap();
        assert!(matches!(broken(&late), Some(CollectiveError::Timeout { .. })));
        // What the other sends already is for the next operation.
        group.all_reduce((&mut [1_i64; 8][..]).into()).unwrap();
        assert_eq!(watch.broken(), None);
        if group.rank() == Rank::new(1) {
            return;
        }
        let lost = broken(&watch);
        assert!(
            matches!(lost, Some(CollectiveError::PeerLost { rank, .. }) if rank == Rank::new(1)),
            "{lost:?}"
        );
        let watch = group.watch(PATIENCE).unwrap();
        group.abort_handle().abort();
        assert_eq!(watch.broken(), Some(CollectiveError::Aborted));
    });
}

#[test]
fn a_silent_member_is_named() {
    let mut listeners: Vec<_> = (0..2).map(listen).collect();
    let peers: Vec<Peer> = listeners.iter().map(peer).collect();
    let stall = Duration::from_millis(20);
    let (done, silent_until) = mpsc::channel();
    let [first, second] = &mut listeners[..] else { unreachable!() };
    std::thread::scope(|scope| {
        let peers = &peers;
        scope.spawn(move || {
            let group = form(second, &place(1, 1, peers)).unwrap();
            silent_until.recv().unwrap();
            drop(group);
        });
        let abort = AbortHandle::new().unwrap();
        let mut group = TcpGroup::form(first, &place(1, 0, peers), &abort, PATIENCE, stall).unwrap();
        let error = group.all_reduce([1_i64, 2].as_mut_slice().into()).unwrap_err();
        done.send(()).unwrap();
        assert!(matches!(error, CollectiveError::Timeout { rank, .. } if rank == Rank::new(1)), "{error}");
    });
}

#[test]
fn members_that_drifted_apart_do_not_add_up_unrelated_numbers() {
    let errors: Vec<_> = run_ring(2, |mut group| {
        if group.rank().index() == 0 {
            group.all_reduce([1.0_f32; 8].as_mut_slice().into()).unwrap_err()
        } else {
            group.all_gather([1_i64; 8].as_mut_slice().into()).unwrap_err()
        }
    });
    assert!(errors.iter().any(|error| matches!(error, CollectiveError::Protocol { .. })), "{errors:?}");

    let errors: Vec<_> = run_ring(2, |mut group| {
        let mut data = vec![1.0_f32; 8 + group.rank().index()];
        group.broadcast(Rank::new(0), data.as_mut_slice().into()).err()
    });
    let error = errors[1].as_ref().unwrap();
    assert!(error.to_string().contains("32 bytes of F32"), "{error}");
    assert!(error.to_string().contains("36 bytes of F32"), "{error}");
}

#[test]
fn a_member_that_comes_early_is_kept_until_its_group_is_known() {
    let mut listeners: Vec<_> = (0..2).map(listen).collect();
    run_group(&mut listeners, 1, drop);
    let peers: Vec<Peer> = listeners.iter().map(peer).collect();
    let [first, second] = &mut listeners[..] else { unreachable!() };
    std::thread::scope(|scope| {
        let peers = &peers;
        let early = scope.spawn(move || form(second, &place(2, 1, peers)).unwrap());
        // The early one has called when the port of the other says so.
        wake::wait(&mut [wake::readable(first)], std::time::Instant::now() + PATIENCE).unwrap();
        form(first, &place(2, 0, peers)).unwrap();
        drop(early.join().unwrap());
    });
}

fn refusal(listener: &mut Listener, place: &Place) -> &'static str {
    match form(listener, place).unwrap_err() {
        CollectiveError::Refused { reason, rank } => {
            assert_eq!(rank, Rank::new((place.rank.get() + 1) % place.size));
            reason
        }
        other => panic!("{other}"),
    }
}

#[test]
fn whoever_belongs_to_another_group_is_refused() {
    let mut listeners: Vec<_> = (0..2).map(listen).collect();
    run_group(&mut listeners, 5, drop);
    let peers: Vec<Peer> = listeners.iter().map(peer).collect();
    let mut stranger = listen(9);

    let mut stale = place(4, 0, &peers);
    assert!(refusal(&mut listeners[0], &stale).contains("generation is over"));
    stale.generation = Generation::new(6);
    stale.run = Digest::of(b"another run");
    assert!(refusal(&mut listeners[0], &stale).contains("another run"));

    let mut restarted = place(6, 0, &peers);
    restarted.next.worker = WorkerId::new("w", Incarnation::new(77)).unwrap();
    assert!(refusal(&mut listeners[0], &restarted).contains("restarted"));

    // The stranger claims rank 0 of generation 6, where `peers[0]` is expected.
    let [first, second] = &mut listeners[..] else { unreachable!() };
    std::thread::scope(|scope| {
        let peers = &peers;
        let mut claimed = place(6, 0, peers);
        let abort = AbortHandle::new().unwrap();
        let claim = scope.spawn(move || {
            claimed.previous = claimed.next.clone();
            refusal(&mut stranger, &claimed)
        });
        let member = scope.spawn({
            let abort = abort.clone();
            move || TcpGroup::form(second, &place(6, 1, peers), &abort, PATIENCE, PATIENCE)
        });
        assert!(claim.join().unwrap().contains("another worker has this place"));
        let partner = form(first, &place(6, 0, peers)).unwrap();
        drop((partner, member.join().unwrap().unwrap()));
    });
}

#[test]
fn strangers_on_the_port_do_no_harm() {
    let mut listeners: Vec<_> = (0..2).map(listen).collect();
    let mut silent = TcpStream::connect(listeners[0].address()).unwrap();
    let mut browser = TcpStream::connect(listeners[0].address()).unwrap();
    browser.write_all(format!("GET / HTTP/1.1\r\nX: {}\r\n\r\n", "y".repeat(100)).as_bytes()).unwrap();
    silent.write_all(b"u").unwrap();
    run_group(&mut listeners, 1, drop);
    // The connection is closed (or reset, for it was not read to its end), without a word.
    assert!(!matches!(browser.read(&mut [0; 16]), Ok(count) if count > 0));
}

#[test]
fn forming_ends_on_abort_and_when_patience_is_over() {
    let mut listener = listen(0);
    let absent = {
        let gone = listen(1);
        peer(&gone)
    };
    let peers = [peer(&listener), absent];
    let abort = AbortHandle::new().unwrap();
    let patience = Duration::from_millis(30);
    let error = TcpGroup::form(&mut listener, &place(1, 0, &peers), &abort, patience, PATIENCE).unwrap_err();
    assert!(matches!(&error, CollectiveError::Timeout { rank, .. } if *rank == Rank::new(1)), "{error}");
    assert!(error.to_string().contains("generation 1"), "{error}");

    let error = std::thread::scope(|scope| {
        let forming = scope.spawn(|| {
            TcpGroup::form(&mut listener, &place(2, 0, &peers), &abort, PATIENCE, PATIENCE).unwrap_err()
        });
        abort.abort();
        forming.join().unwrap()
    });
    assert_eq!(error, CollectiveError::Aborted);
}
