//! The operations of real groups over loopback.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use ulmus_transport::ring::{Answer, ConnectError, DEAD_AFTER, Greeting, Listener, Place, readable, wait};
use ulmus_types::{Digest, Generation, GroupKey, Incarnation, Peer, WorkerId};

use super::frame::Header;
use super::*;

mod cut_links;

/// Far longer than anything that succeeds takes.
const PATIENCE: Duration = Duration::from_secs(30);
const LOOPBACK: &str = "127.0.0.1:0";
const KEY: GroupKey = GroupKey::from_bytes([9; 32]);

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
        key: KEY,
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

/// A value that differs between ranks and positions and has no short binary fraction.
fn value(rank: usize, index: usize) -> f32 {
    ((rank * 7919 + index * 104_729) % 1013) as f32 / 7.0 - 70.0
}

fn integer(rank: usize, index: usize) -> i64 {
    (value(rank, index) as f64 * 1e15) as i64
}

/// Runs every operation once on vectors of `length` elements and compares the results with sums made by one process.
fn check_all(size: usize, length: usize) {
    let vector = |rank: usize| (0..length).map(|index| value(rank, index)).collect::<Vec<f32>>();
    let integers = |rank: usize| (0..length).map(|index| integer(rank, index)).collect::<Vec<i64>>();
    let sums: Vec<i64> = (0..length).map(|index| (0..size).map(|rank| integer(rank, index)).sum()).collect();
    let owned = chunks(length, size);
    let owners: Vec<usize> =
        owned.parts().enumerate().flat_map(|(rank, part)| part.map(move |_| rank)).collect();
    assert_eq!(owners.len(), length);
    let gathered: Vec<f32> = (0..length).map(|index| value(owners[index], index)).collect();

    run_ring(size, |mut group| {
        let rank = group.rank().index();
        assert_eq!(group.size(), size);
        let own = owned.part(rank);

        let mut data = integers(rank);
        group.all_reduce(&mut data).unwrap();
        assert_eq!(data, sums);
        let mut data = integers(rank);
        group.reduce_scatter(&mut data).unwrap();
        assert_eq!(data[own.clone()], sums[own]);
        let mut data = vector(rank);
        group.all_gather(&mut data).unwrap();
        assert_eq!(data, gathered);

        for root in 0..size {
            let root_rank = Rank::new(root as u32);
            let mut data = integers(rank);
            group.broadcast(root_rank, data.as_mut_slice().into()).unwrap();
            assert_eq!(data, integers(root));
            let mut data = vector(rank);
            group.broadcast(root_rank, data.as_mut_slice().into()).unwrap();
            assert_eq!(data, vector(root));
        }
    });
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
            group.all_reduce(&mut data).map(|()| data)
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
            group.all_reduce(&mut data).unwrap();
            group.abort_handle().entered()
        });
        assert_eq!(sums, [2; 3]);
    }
    // A survivor goes on alone, without sockets.
    let alone = run_group(&mut listeners[..1], 8, |mut group| {
        let mut data = [5_i64];
        group.all_reduce(&mut data).map(|()| data)
    });
    assert_eq!(alone, [Ok([5])]);
}

/// Calls `disturb` on the one member that does not take part, while the others are blocked; returns the others' errors.
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
        let mut data = vec![1_i64; 2_000_000];
        let error = group.all_reduce(&mut data).unwrap_err();
        // The group is of no more use, and returns the same error.
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

    // Only one member is aborted: the error goes round the ring.
    let errors = errors_of_blocked(4, |group, handles| {
        handles[0].abort();
        let mut group = group;
        let mut data = vec![1_i64; 2_000_000];
        assert!(matches!(group.all_reduce(&mut data), Err(CollectiveError::PeerLost { .. })));
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
            assert!(matches!(error.blames(), Some((_, Blame::Lost))));
            assert_eq!(error.kind(), ErrorKind::Retry);
        }
    }
}

/// A member watches its group while it does something else.
#[test]
fn a_watch_tells_who_is_lost() {
    let broken = |watch: &Watch| std::iter::repeat_with(|| watch.broken()).flatten().next();
    run_ring(2, |mut group| {
        let watch = group.watch(PATIENCE).unwrap();
        assert_eq!(watch.broken(), None);
        let late = group.watch(Duration::ZERO).unwrap();
        assert!(matches!(broken(&late), Some(CollectiveError::Timeout { .. })));
        // What the other member has sent belongs to the next operation.
        group.all_reduce(&mut [1; 8]).unwrap();
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
        let error = group.all_reduce(&mut [1, 2]).unwrap_err();
        done.send(()).unwrap();
        assert!(matches!(error, CollectiveError::Timeout { rank, .. } if rank == Rank::new(1)), "{error}");
        assert_eq!(error.blames(), Some((Rank::new(1), Blame::Silent)));
    });
}

#[test]
fn members_that_drifted_apart_do_not_add_up_unrelated_numbers() {
    let errors: Vec<_> = run_ring(2, |mut group| {
        if group.rank().index() == 0 {
            group.all_reduce(&mut [1; 8]).unwrap_err()
        } else {
            group.all_gather(&mut [1.0; 8]).unwrap_err()
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
        // The other's port tells when the early one has called.
        wait(&mut [readable(first)], std::time::Instant::now() + PATIENCE).unwrap();
        form(first, &place(2, 0, peers)).unwrap();
        drop(early.join().unwrap());
    });
}

fn refusal(listener: &mut Listener, place: &Place) -> &'static str {
    match form(listener, place).unwrap_err() {
        CollectiveError::Connect(ConnectError::Refused { reason, rank }) => {
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
    // The connection is closed (or reset, as not all of it was read) without an answer.
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
    assert_eq!(error.blames(), Some((Rank::new(1), Blame::Unreachable)), "{error}");
    assert!(error.to_string().contains("generation 1"), "{error}");
    assert!(error.to_string().contains(&peers[1].address), "{error}");

    let error = std::thread::scope(|scope| {
        let forming = scope.spawn(|| {
            TcpGroup::form(&mut listener, &place(2, 0, &peers), &abort, PATIENCE, PATIENCE).unwrap_err()
        });
        abort.abort();
        forming.join().unwrap()
    });
    assert_eq!(error, CollectiveError::Aborted);
}

/// Neither an address that answers no packet nor a machine that refuses delays a group beyond its patience.
#[test]
fn an_address_that_nobody_answers_is_named_from_both_sides() {
    // One connection fills a queue of length zero: the system answers no further call.
    let full = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    full.bind(&LOOPBACK.parse::<SocketAddr>().unwrap().into()).unwrap();
    full.listen(0).unwrap();
    let deaf = full.local_addr().unwrap().as_socket().unwrap();
    let _waiting = TcpStream::connect(deaf).unwrap();

    for (generation, address) in [(1, deaf.to_string()), (2, "192.0.2.1:9".to_owned())] {
        let mut listeners: Vec<_> = (0..2).map(listen).collect();
        let unreachable = Peer { address, worker: WorkerId::new("x", Incarnation::new(7)).unwrap() };
        let peers = [peer(&listeners[0]), peer(&listeners[1]), unreachable];
        let patience = Duration::from_millis(300);
        let begun = Instant::now();
        let errors: Vec<CollectiveError> = std::thread::scope(|scope| {
            let peers = &peers;
            let members = listeners.iter_mut().enumerate().map(|(rank, listener)| {
                scope.spawn(move || {
                    let (place, abort) = (place(generation, rank, peers), AbortHandle::new().unwrap());
                    TcpGroup::form(listener, &place, &abort, patience, PATIENCE).unwrap_err()
                })
            });
            members.collect::<Vec<_>>().into_iter().map(|member| member.join().unwrap()).collect()
        });
        assert!(begun.elapsed() < PATIENCE / 10);
        let blames: Vec<_> = errors.iter().filter_map(CollectiveError::blames).collect();
        assert_eq!(blames, [(Rank::new(2), Blame::Absent), (Rank::new(2), Blame::Unreachable)], "{errors:?}");
        assert!(errors.iter().all(|error| error.kind() == ErrorKind::Retry));

        let abort = AbortHandle::new().unwrap();
        let begun = Instant::now();
        let error = std::thread::scope(|scope| {
            let last = &mut listeners[1];
            let (abort, place) = (&abort, place(generation + 10, 1, &peers));
            let forming = scope.spawn(move || TcpGroup::form(last, &place, abort, PATIENCE, PATIENCE));
            abort.abort();
            forming.join().unwrap().unwrap_err()
        });
        assert_eq!(error, CollectiveError::Aborted);
        assert!(begun.elapsed() < PATIENCE / 10);
    }
}

#[test]
fn neighbours_are_found_by_name() {
    let mut listeners: Vec<_> = (0..2).map(listen).collect();
    let named = |listener: &Listener| Peer {
        address: format!("localhost:{}", listener.address().port()),
        ..peer(listener)
    };
    let peers: Vec<Peer> = listeners.iter().map(named).collect();
    let [first, second] = &mut listeners[..] else { unreachable!() };
    std::thread::scope(|scope| {
        let peers = &peers;
        let other = scope.spawn(move || form(second, &place(1, 1, peers)).map(drop));
        form(first, &place(1, 0, peers)).map(drop).unwrap();
        other.join().unwrap().unwrap();
    });
}

/// The stranger knows everything except the key.
#[test]
fn nobody_is_a_member_without_the_key() {
    let other_key = GroupKey::from_bytes([1; 32]);
    let short = Duration::from_millis(300);
    let mut listeners: Vec<_> = (0..2).map(listen).collect();
    let peers: Vec<Peer> = listeners.iter().map(peer).collect();
    let greeting = Greeting {
        run: Digest::of(b"run"),
        generation: Generation::new(2),
        from: Rank::new(1),
        from_incarnation: Incarnation::new(1),
        to_incarnation: Incarnation::new(0),
    };
    let said = |stream: &mut TcpStream| {
        let mut answer = [0; Answer::BYTES];
        stream.read_exact(&mut answer).unwrap();
        Answer::decode(&answer, &greeting, &KEY).unwrap()
    };

    // First early, when nobody can check the key yet; then in a known generation.
    let mut early = TcpStream::connect(listeners[0].address()).unwrap();
    early.write_all(&greeting.encode(&other_key)).unwrap();
    wait(&mut [readable(&listeners[0])], Instant::now() + PATIENCE).unwrap();
    let [first, second] = &mut listeners[..] else { unreachable!() };
    std::thread::scope(|scope| {
        let peers = &peers;
        let other = scope.spawn(move || form(second, &place(2, 1, peers)).unwrap());
        let group = form(first, &place(2, 0, peers)).unwrap();
        drop((group, other.join().unwrap()));
    });
    assert_eq!(said(&mut early), Answer::OtherKey);
    let mut late = TcpStream::connect(listeners[0].address()).unwrap();
    late.write_all(&greeting.encode(&other_key)).unwrap();
    assert_eq!(said(&mut late), Answer::OtherKey);

    let mut keyless = place(3, 0, &peers);
    keyless.key = other_key;
    let [first, second] = &mut listeners[..] else { unreachable!() };
    std::thread::scope(|scope| {
        let peers = &peers;
        let abort = AbortHandle::new().unwrap();
        let member = scope
            .spawn(move || TcpGroup::form(second, &place(3, 1, peers), &abort, short, PATIENCE).unwrap_err());
        let refused = refusal(first, &keyless);
        assert!(refused.contains("key"), "{refused}");
        let error = member.join().unwrap();
        // The first one let no member in, because it has another key.
        assert!(
            error.blames().is_some()
                || matches!(error, CollectiveError::Connect(ConnectError::Refused { .. })),
            "{error}"
        );
    });
}

/// An answer that anybody could give does not make a connection to a member.
#[test]
fn whoever_answers_must_be_a_member() {
    let mut listener = listen(0);
    let impostor = TcpListener::bind(LOOPBACK).unwrap();
    let worker = WorkerId::new("w", Incarnation::new(1)).unwrap();
    let peers = [peer(&listener), Peer { address: impostor.local_addr().unwrap().to_string(), worker }];
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let (mut stream, _) = impostor.accept().unwrap();
                let mut greeting = [0; Greeting::BYTES];
                if stream.read_exact(&mut greeting).is_ok() {
                    // "Welcome", and the caller's own proof.
                    let mut answer = [0; Answer::BYTES];
                    answer[1..].copy_from_slice(&greeting[Greeting::BYTES - 32..]);
                    stream.write_all(&answer).unwrap();
                }
            }
        });
        let abort = AbortHandle::new().unwrap();
        let patience = Duration::from_millis(300);
        let error =
            TcpGroup::form(&mut listener, &place(1, 0, &peers), &abort, patience, PATIENCE).unwrap_err();
        over.store(true, Ordering::Relaxed);
        drop(TcpStream::connect(impostor.local_addr().unwrap()));
        assert_eq!(error.blames(), Some((Rank::new(1), Blame::Unreachable)), "{error}");
        assert!(error.to_string().contains("no member of the group"), "{error}");
    });
}

/// Passes one connection on to `target`, and changes one bit of what the caller sends.
fn damaging(target: SocketAddr, bit: usize) -> SocketAddr {
    let port = TcpListener::bind(LOOPBACK).unwrap();
    let address = port.local_addr().unwrap();
    std::thread::spawn(move || {
        let (mut caller, _) = port.accept().unwrap();
        let mut called = TcpStream::connect(target).unwrap();
        let (mut back_from, mut back_to) = (called.try_clone().unwrap(), caller.try_clone().unwrap());
        std::thread::spawn(move || {
            drop(std::io::copy(&mut back_from, &mut back_to));
            drop(back_to.shutdown(std::net::Shutdown::Both));
        });
        let (mut buffer, mut passed) = (vec![0; 1 << 16], 0);
        while let Ok(count @ 1..) = caller.read(&mut buffer) {
            if let Some(byte) = (bit / 8).checked_sub(passed).filter(|byte| *byte < count) {
                buffer[byte] ^= 1 << (bit % 8);
            }
            passed += count;
            if called.write_all(&buffer[..count]).is_err() {
                break;
            }
        }
        drop(called.shutdown(std::net::Shutdown::Both));
    });
    address
}

/// Changes a single bit on the way from rank 0 to rank 1.
#[test]
fn damage_on_the_way_ends_the_group_and_names_the_link() {
    let length = 3 * 40_000;
    let data = length / 3 * size_of::<i64>();
    let frame = Greeting::BYTES;
    let second_frame = frame + Header::BYTES + data + 8;
    let places = [
        ("the header", frame),
        ("the header", frame + 9),
        ("the header", frame + 17),
        ("the header", frame + 19),
        ("the header", frame + 31),
        ("the header", frame + Header::BYTES - 1),
        ("the data or the checksum", frame + Header::BYTES),
        ("the data or the checksum", frame + Header::BYTES + data / 2),
        ("the data or the checksum", frame + Header::BYTES + data - 1),
        ("the data or the checksum", frame + Header::BYTES + data),
        ("the data or the checksum", frame + Header::BYTES + data + 7),
        ("the data or the checksum", second_frame + Header::BYTES + 5),
    ];
    for (index, (what, byte)) in places.into_iter().enumerate() {
        let mut listeners: Vec<_> = (0..3).map(listen).collect();
        let true_peers: Vec<Peer> = listeners.iter().map(peer).collect();
        let bit = 8 * byte + index % 8;
        let errors: Vec<(CollectiveError, Vec<i64>)> = std::thread::scope(|scope| {
            let members = listeners.iter_mut().enumerate().map(|(rank, listener)| {
                let mut place = place(1, rank, &true_peers);
                if rank == 0 {
                    place.next.address = damaging(true_peers[1].address.parse().unwrap(), bit).to_string();
                }
                scope.spawn(move || {
                    let mut group = form(listener, &place).unwrap();
                    let mut values: Vec<i64> = (0..length).map(|index| integer(rank, index)).collect();
                    let error = group.all_reduce(&mut values).unwrap_err();
                    (error, values)
                })
            });
            members.collect::<Vec<_>>().into_iter().map(|member| member.join().unwrap()).collect()
        });
        let (error, values) = &errors[1];
        assert_eq!(error.blames(), Some((Rank::new(0), Blame::Damaged)), "byte {byte}: {error}");
        assert_eq!(error.kind(), ErrorKind::Retry);
        let text = error.to_string();
        assert!(text.contains("rank 0 (w)") && text.contains("rank 1") && text.contains(what), "{text}");
        if byte < second_frame {
            // Nothing was added up.
            assert!(values.iter().enumerate().all(|(index, value)| *value == integer(1, index)));
        }
        for (error, _) in [&errors[0], &errors[2]] {
            assert!(matches!(error, CollectiveError::PeerLost { .. }), "{error}");
        }
    }
}

/// A damaged greeting makes no connection, whatever it says now.
#[test]
fn a_damaged_greeting_is_not_taken() {
    for byte in [2, 20, 45, 50, 55, 66, 70, 99] {
        let mut listeners: Vec<_> = (0..2).map(listen).collect();
        let peers: Vec<Peer> = listeners.iter().map(peer).collect();
        let patience = Duration::from_millis(200);
        let [first, second] = &mut listeners[..] else { unreachable!() };
        let errors = std::thread::scope(|scope| {
            let mut damaged = place(1, 0, &peers);
            damaged.next.address = damaging(peers[1].address.parse().unwrap(), 8 * byte).to_string();
            let whole = place(1, 1, &peers);
            let (one, other) = (AbortHandle::new().unwrap(), AbortHandle::new().unwrap());
            let first = scope.spawn(move || TcpGroup::form(first, &damaged, &one, patience, PATIENCE));
            let second = scope.spawn(move || TcpGroup::form(second, &whole, &other, patience, PATIENCE));
            [first.join().unwrap().err(), second.join().unwrap().err()]
        });
        assert!(errors.iter().all(Option::is_some), "byte {byte}: {errors:?}");
    }
}

/// Several hundred silent connections stay, and new ones keep coming.
#[test]
fn idle_strangers_do_not_keep_members_out() {
    let mut listeners: Vec<_> = (0..2).map(listen).collect();
    let addresses: Vec<SocketAddr> = listeners.iter().map(Listener::address).collect();
    let idle: Vec<TcpStream> =
        (0..400).map(|index| TcpStream::connect(addresses[index % 2]).unwrap()).collect();
    let over = AtomicBool::new(false);
    let (begun, busy) = mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut held = std::collections::VecDeque::new();
            while !over.load(Ordering::Relaxed) {
                held.extend(addresses.iter().filter_map(|address| TcpStream::connect(address).ok()));
                held.drain(..held.len().saturating_sub(200));
                begun.send(()).unwrap();
            }
        });
        for _ in 0..200 {
            busy.recv().unwrap();
        }
        let peers: Vec<Peer> = listeners.iter().map(peer).collect();
        let within = Duration::from_secs(2);
        for generation in 1..4 {
            let (listeners, peers) = (&mut listeners, &peers);
            let results: Vec<_> = std::thread::scope(|scope| {
                let members = listeners.iter_mut().enumerate().map(|(rank, listener)| {
                    let place = place(generation, rank, peers);
                    let abort = AbortHandle::new().unwrap();
                    scope.spawn(move || TcpGroup::form(listener, &place, &abort, within, PATIENCE).map(drop))
                });
                members.collect::<Vec<_>>().into_iter().map(|member| member.join().unwrap()).collect()
            });
            assert_eq!(results, [Ok(()), Ok(())]);
        }
        over.store(true, Ordering::Relaxed);
    });
    drop(idle);
    drop(busy);
}

/// A stranger that knows whom to call fills the room for early callers, and claims the members' places there.
#[test]
fn early_strangers_do_not_keep_members_out() {
    let mut listeners: Vec<_> = (0..2).map(listen).collect();
    run_group(&mut listeners, 1, drop);
    let peers: Vec<Peer> = listeners.iter().map(peer).collect();
    let address = listeners[0].address();
    let stranger = |generation: u64, from: u32| {
        let greeting = Greeting {
            run: Digest::of(b"run"),
            generation: Generation::new(generation),
            from: Rank::new(from),
            from_incarnation: Incarnation::new(1),
            to_incarnation: Incarnation::new(0),
        };
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&greeting.encode(&GroupKey::from_bytes([1; 32]))).unwrap();
        stream
    };
    let [first, second] = &mut listeners[..] else { unreachable!() };
    std::thread::scope(|scope| {
        let peers = &peers;
        let early = scope.spawn(move || form(second, &place(2, 1, peers)).unwrap());
        wait(&mut [readable(first)], Instant::now() + PATIENCE).unwrap();
        let mut calls: Vec<TcpStream> = (0..300).map(|index| stranger(3 + index, 0)).collect();
        calls.push(stranger(2, 1));
        let within = Duration::from_secs(2);
        let abort = AbortHandle::new().unwrap();
        let group = TcpGroup::form(first, &place(2, 0, peers), &abort, within, PATIENCE).unwrap();
        drop((group, early.join().unwrap(), calls));
    });
}

/// The slow member reads nothing while it computes, and has no room for what the others send meanwhile.
#[test]
fn a_member_that_is_slow_is_not_lost() {
    let (never, silence) = mpsc::channel::<()>();
    let silence = std::sync::Mutex::new(silence);
    let slow = DEAD_AFTER + Duration::from_millis(2500);
    let sums = run_ring(2, |mut group| {
        if group.rank() == Rank::new(1) {
            assert!(silence.lock().unwrap().recv_timeout(slow).is_err());
        }
        let mut data = vec![1_i64; 4_000_000];
        group.all_reduce(&mut data).map(|()| data[3_999_999])
    });
    drop(never);
    assert_eq!(sums, [Ok(2), Ok(2)]);
}

/// What heartbeats tell about a member, seen from another thread.
#[test]
fn an_operation_that_stands_still_can_be_seen_from_outside() {
    let still = |handle: &AbortHandle| {
        let deadline = Instant::now() + PATIENCE;
        while handle.still_for().is_none_or(|still| still < Duration::from_millis(50)) {
            assert!(Instant::now() < deadline);
            std::thread::yield_now();
        }
    };
    let (seen, told) = mpsc::channel::<()>();
    let (seen, told) = (std::sync::Mutex::new(Some(seen)), std::sync::Mutex::new(told));
    run_ring(2, |mut group| {
        let handle = group.abort_handle();
        assert_eq!(handle.still_for(), None);
        if group.rank() == Rank::new(0) {
            std::thread::scope(|scope| {
                let waiting = scope.spawn(|| group.all_reduce(&mut [1; 4]));
                still(&handle);
                assert_eq!(handle.entered(), 1);
                handle.abort();
                assert_eq!(waiting.join().unwrap(), Err(CollectiveError::Aborted));
            });
            assert_eq!(handle.still_for(), None);
            drop(seen.lock().unwrap().take());
        } else {
            // It does not take part.
            told.lock().unwrap().recv().unwrap_err();
        }
    });
}
