//! The port at which a process takes part in one group after another.
//!
//! The port is bound once, so that others can be told its address before any group exists. A thread of its own accepts
//! connections and reads their greetings. Its invariant: a connection reaches the group it is meant for and no other.
//! Callers from an older generation or another run, without the group's key, or looking for an earlier incarnation of
//! this process are told so and dropped. Neighbours that are early, because they heard of a new generation first, are
//! kept until this process hears of it, too; only then does it have the key to check them with.
//!
//! Anybody can call. So everything that a stranger can fill is bounded and separate from what members use, and the
//! oldest entry gives way to the newest: a member sends its whole greeting at once, and calls again if it is dropped.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use socket2::SockRef;
use ulmus_types::{Digest, Generation, GroupKey, Incarnation};

use super::greeting::{Answer, Greeting};
use super::link;
use super::wakeup::{WakeupPipe, readable, wait};

/// How long a caller may take to send its greeting.
const GREETING_TIME: Duration = Duration::from_secs(2);
/// How long an early neighbour is kept. It calls again if necessary.
const PARKING_TIME: Duration = Duration::from_secs(30);
/// The most callers at a time whose greeting is incomplete; one more replaces the oldest.
const CALLERS: usize = 128;
/// The most of these from one address.
const CALLERS_OF_ONE_ADDRESS: usize = 64;
/// The most callers at a time that have greeted and wait for their group. A member has one per generation.
const PARKED: usize = 64;
/// The most callers that the system keeps until they are accepted; one that does not fit would try again a second
/// later.
const BACKLOG: i32 = 4096;
/// Pause after the system failed to accept a connection, for instance because of too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// A bound port, and the thread that sorts its callers.
#[derive(Debug)]
pub struct Listener {
    address: SocketAddr,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    incarnation: Incarnation,
    state: Mutex<State>,
    /// Raised when a caller has been parked.
    arrival: WakeupPipe,
    /// Raised when the thread must end.
    quit: WakeupPipe,
}

#[derive(Debug, Default)]
struct State {
    /// The newest group that this process was assigned to.
    newest: Option<Membership>,
    /// Callers that proved to be members of that group.
    proved: Parked,
    /// Callers that claim to be members of a later group.
    early: Parked,
}

/// What this process knows of its newest group.
#[derive(Debug, Clone, Copy)]
struct Membership {
    run: Digest,
    generation: Generation,
    key: GroupKey,
}

/// Callers that wait for their group, oldest first; for each place in a group, only the last caller.
#[derive(Debug, Default)]
struct Parked(Vec<Parking>);

#[derive(Debug)]
struct Parking {
    greeting: Greeting,
    proof: blake3::Hash,
    stream: TcpStream,
    until: Instant,
}

/// A caller whose greeting is incomplete.
#[derive(Debug)]
struct Caller {
    from: IpAddr,
    stream: TcpStream,
    bytes: [u8; Greeting::BYTES],
    filled: usize,
    until: Instant,
}

/// What becomes of a caller that has greeted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// It is a member of the newest group.
    Proved,
    /// It may be a member of a later group.
    Early,
    /// It will never be let in.
    Refused(Answer),
}

impl Listener {
    /// Binds `address` (with port 0 the system chooses one) and starts to accept. `incarnation` is this process's.
    ///
    /// # Errors
    /// When the address is in use or not this machine's.
    pub fn bind(address: SocketAddr, incarnation: Incarnation) -> io::Result<Self> {
        let socket = TcpListener::bind(address)?;
        socket.set_nonblocking(true)?;
        // The standard library asks for a short queue; the system may still shorten this one.
        SockRef::from(&socket).listen(BACKLOG)?;
        let address = socket.local_addr()?;
        let shared = Arc::new(Shared {
            incarnation,
            state: Mutex::default(),
            arrival: WakeupPipe::new()?,
            quit: WakeupPipe::new()?,
        });
        let thread = std::thread::Builder::new().name("collective-listener".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.accept_all(&socket)
        })?;
        Ok(Self { address, shared, thread: Some(thread) })
    }

    /// The bound address, with the port that the system chose.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// This process's incarnation, which callers must know.
    pub fn incarnation(&self) -> Incarnation {
        self.shared.incarnation
    }

    /// Moves on to `generation` of `run`: from now on, callers from an older generation or without its key are refused.
    pub(super) fn advance(&mut self, run: Digest, generation: Generation, key: GroupKey) {
        let mut state = self.shared.state();
        state.newest = Some(Membership { run, generation, key });
        let waiting =
            std::mem::take(&mut state.proved.0).into_iter().chain(std::mem::take(&mut state.early.0));
        for caller in waiting {
            state.park(caller, self.shared.incarnation);
        }
    }

    /// The connection of the caller with exactly this greeting, if it has called. Refuses all others that claim a place
    /// in the group.
    pub(super) fn take(&mut self, expected: &Greeting) -> Option<TcpStream> {
        self.shared.arrival.lower();
        let mut state = self.shared.state();
        let key = state.newest?.key;
        let mut taken = None;
        for caller in std::mem::take(&mut state.proved.0) {
            if caller.greeting == *expected {
                answer(&caller.stream, &Answer::welcome(expected, &key));
                taken = Some(caller.stream);
            } else {
                answer(&caller.stream, &Answer::NotYourNeighbour.refusal());
            }
        }
        taken
    }
}

/// Readable if somebody has called since the last [`Listener::take`].
impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.arrival.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.quit.raise();
        if let Some(thread) = self.thread.take() {
            // The thread cannot panic on input; even if it had, there would be nothing left to stop.
            drop(thread.join());
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the lock panics")
    }

    fn accept_all(&self, socket: &TcpListener) {
        let mut callers: Vec<Caller> = Vec::new();
        let mut deaf_until: Option<Instant> = None;
        loop {
            let now = Instant::now();
            callers.retain(|caller| caller.until > now);
            let mut until = self.expire(now);
            until = callers.iter().map(|caller| caller.until).chain([until]).min().unwrap_or(until);
            let deaf = deaf_until.is_some_and(|deaf| deaf > now);

            let mut sources = vec![readable(&self.quit)];
            if deaf {
                until = deaf_until.map_or(until, |deaf| until.min(deaf));
            } else {
                sources.push(readable(socket));
            }
            sources.extend(callers.iter().map(|caller| readable(&caller.stream)));
            if let Err(error) = wait(&mut sources, until) {
                tracing::error!(%error, "cannot wait for connections of other workers; no group can be joined");
                return;
            }
            if !sources[0].revents().is_empty() {
                return;
            }
            drop(sources);

            callers =
                std::mem::take(&mut callers).into_iter().filter_map(|caller| self.hear(caller)).collect();
            if !deaf {
                match self.accept(socket, &mut callers) {
                    Ok(()) => deaf_until = None,
                    Err(error) => {
                        // Log this once, not ten times a second.
                        if deaf_until.is_none() {
                            tracing::warn!(%error, "cannot accept connections of other workers, will try again");
                        }
                        // File descriptors are short, and strangers hold them.
                        callers.drain(..callers.len().div_ceil(2));
                        deaf_until = Some(Instant::now() + PAUSE);
                    }
                }
            }
        }
    }

    /// Accepts waiting callers, but no more at a time than are kept. After an error the caller must pause.
    fn accept(&self, socket: &TcpListener, callers: &mut Vec<Caller>) -> io::Result<()> {
        for _ in 0..CALLERS {
            match socket.accept() {
                Ok((stream, address)) => {
                    if link::prepare(&stream).is_ok() {
                        let until = Instant::now() + GREETING_TIME;
                        let (from, bytes) = (address.ip(), [0; Greeting::BYTES]);
                        let caller = Caller { from, stream, bytes, filled: 0, until };
                        callers.extend(self.hear(caller));
                        make_room(callers);
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error)
                    if matches!(error.kind(), ErrorKind::ConnectionAborted | ErrorKind::Interrupted) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads a caller's greeting; returns the caller if the greeting is still incomplete.
    fn hear(&self, mut caller: Caller) -> Option<Caller> {
        match caller.read() {
            Ok(None) => return Some(caller),
            Ok(Some((greeting, proof))) => {
                let until = Instant::now() + PARKING_TIME;
                let caller = Parking { greeting, proof, stream: caller.stream, until };
                if self.state().park(caller, self.incarnation) {
                    self.arrival.raise();
                }
            }
            Err(error) => tracing::debug!(%error, "a caller went away before it said who it is"),
        }
        None
    }

    /// Drops parked callers whose time is over; returns when the next one's will be.
    fn expire(&self, now: Instant) -> Instant {
        let mut state = self.state();
        state.proved.0.retain(|caller| caller.until > now);
        state.early.0.retain(|caller| caller.until > now);
        let waiting = state.proved.0.iter().chain(&state.early.0);
        waiting.map(|caller| caller.until).min().unwrap_or(now + PARKING_TIME)
    }
}

impl State {
    /// Keeps a caller until its group takes it, or refuses it. Returns whether it was kept.
    fn park(&mut self, caller: Parking, me: Incarnation) -> bool {
        match judge(&caller.greeting, caller.proof, me, self.newest.as_ref()) {
            Verdict::Proved => self.proved.add(caller),
            Verdict::Early => self.early.add(caller),
            Verdict::Refused(refusal) => {
                tracing::debug!(greeting = ?caller.greeting, reason = refusal.text(), "refused a connection");
                answer(&caller.stream, &refusal.refusal());
                return false;
            }
        }
        true
    }
}

impl Parked {
    fn add(&mut self, caller: Parking) {
        let place = |caller: &Parking| (caller.greeting.generation, caller.greeting.from);
        // A caller that calls again has given up its earlier call.
        self.0.retain(|other| place(other) != place(&caller));
        if self.0.len() == PARKED {
            self.0.remove(0);
        }
        self.0.push(caller);
    }
}

/// Drops the oldest caller if the last one is one too many: the oldest of its address, if that has too many.
fn make_room(callers: &mut Vec<Caller>) {
    let Some(newest) = callers.last().map(|caller| caller.from) else { return };
    let mut same = callers.iter().enumerate().filter(|(_, caller)| caller.from == newest);
    let first_of_address = same.next().map_or(0, |(index, _)| index);
    // `same` is past the first one, which counts, too.
    if same.count() + 1 > CALLERS_OF_ONE_ADDRESS {
        callers.remove(first_of_address);
    } else if callers.len() > CALLERS {
        callers.remove(0);
    }
}

impl Caller {
    fn read(&mut self) -> io::Result<Option<(Greeting, blake3::Hash)>> {
        while self.filled < Greeting::BYTES {
            match self.stream.read(&mut self.bytes[self.filled..]) {
                Ok(0) => return Err(ErrorKind::UnexpectedEof.into()),
                Ok(count) => self.filled += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(None),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Greeting::decode(&self.bytes).map(Some).ok_or_else(|| ErrorKind::InvalidData.into())
    }
}

/// Decides what becomes of a caller.
fn judge(greeting: &Greeting, proof: blake3::Hash, me: Incarnation, newest: Option<&Membership>) -> Verdict {
    if greeting.to_incarnation != me {
        return Verdict::Refused(Answer::OtherIncarnation);
    }
    let Some(Membership { run, generation, key }) = newest else { return Verdict::Early };
    if greeting.run != *run {
        Verdict::Refused(Answer::OtherRun)
    } else if greeting.generation > *generation {
        Verdict::Early
    } else if greeting.generation < *generation {
        Verdict::Refused(Answer::StaleGeneration)
    } else if greeting.is_proved(proof, key) {
        Verdict::Proved
    } else {
        Verdict::Refused(Answer::OtherKey)
    }
}

fn answer(mut stream: &TcpStream, answer: &[u8; Answer::BYTES]) {
    // The answer fits the empty buffer of a new connection; a caller that is gone needs none.
    drop(stream.write(answer));
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd;

    use ulmus_types::Rank;

    use super::*;

    fn greeting(run: Digest, generation: u64, to: u64) -> Greeting {
        Greeting {
            run,
            generation: Generation::new(generation),
            from: Rank::new(0),
            from_incarnation: Incarnation::new(1),
            to_incarnation: Incarnation::new(to),
        }
    }

    #[test]
    fn only_members_of_the_newest_group_and_later_callers_are_let_in() {
        let (run, other) = (Digest::of(b"run"), Digest::of(b"other"));
        let key = GroupKey::from_bytes([1; 32]);
        let judge = |run: Digest, generation: u64, to: u64, newest: Option<&Membership>| {
            let greeting = greeting(run, generation, to);
            let (_, proof) = Greeting::decode(&greeting.encode(&key)).unwrap();
            super::judge(&greeting, proof, Incarnation::new(5), newest)
        };
        let newest = Membership { run, generation: Generation::new(3), key };
        assert_eq!(judge(run, 3, 5, Some(&newest)), Verdict::Proved);
        assert_eq!(judge(run, 4, 5, Some(&newest)), Verdict::Early);
        assert_eq!(judge(run, 2, 5, Some(&newest)), Verdict::Refused(Answer::StaleGeneration));
        assert_eq!(judge(run, 3, 6, Some(&newest)), Verdict::Refused(Answer::OtherIncarnation));
        assert_eq!(judge(other, 3, 5, Some(&newest)), Verdict::Refused(Answer::OtherRun));
        assert_eq!(judge(other, 3, 5, None), Verdict::Early);
        let other_key = Membership { key: GroupKey::from_bytes([2; 32]), ..newest };
        assert_eq!(judge(run, 3, 5, Some(&other_key)), Verdict::Refused(Answer::OtherKey));
        // Not refused yet, because the key of a later generation is not known.
        assert_eq!(judge(run, 4, 5, Some(&other_key)), Verdict::Early);
    }

    fn stream(port: &TcpListener) -> TcpStream {
        drop(TcpStream::connect(port.local_addr().unwrap()).unwrap());
        port.accept().unwrap().0
    }

    #[test]
    fn the_newest_of_each_place_is_kept_and_no_more_than_fit() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut parked = Parked::default();
        let mut add = |rank: u32| {
            let greeting = Greeting { from: Rank::new(rank), ..greeting(Digest::of(b"run"), 1, 5) };
            let stream = stream(&port);
            let descriptor = stream.as_raw_fd();
            let proof = blake3::hash(b"");
            parked.add(Parking { greeting, proof, stream, until: Instant::now() });
            let kept = |caller: &Parking| (caller.greeting.from.get(), caller.stream.as_raw_fd());
            (descriptor, parked.0.iter().map(kept).collect::<Vec<_>>())
        };
        let (_, first) = add(7);
        assert_eq!(first.len(), 1);
        let (again, kept) = add(7);
        assert_eq!(kept, [(7, again)]);
        for rank in 100..200 {
            assert!(add(rank).1.len() <= PARKED);
        }
        let (_, kept) = add(200);
        assert_eq!(kept.first().map(|(rank, _)| *rank), Some(201 - PARKED as u32));
    }

    #[test]
    fn who_does_not_finish_makes_room_for_the_newest() {
        let port = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut callers = Vec::new();
        let add = |callers: &mut Vec<Caller>, from: [u8; 4]| {
            let bytes = [0; Greeting::BYTES];
            let stream = stream(&port);
            callers.push(Caller { from: from.into(), stream, bytes, filled: 0, until: Instant::now() });
            make_room(callers);
        };
        add(&mut callers, [10, 0, 0, 1]);
        // One address fills only its own share.
        for _ in 0..2 * CALLERS {
            add(&mut callers, [10, 0, 0, 2]);
        }
        assert_eq!(callers.len(), 1 + CALLERS_OF_ONE_ADDRESS);
        assert_eq!(callers[0].from, IpAddr::from([10, 0, 0, 1]));
        // Many addresses fill all of it, and the newest are kept.
        for host in 0..CALLERS as u8 {
            add(&mut callers, [10, 0, 1, host]);
        }
        assert_eq!(callers.len(), CALLERS);
        assert!(callers.iter().all(|caller| caller.from.to_string().starts_with("10.0.1.")));
    }
}
