//! The port at which a process takes part in one group after another.
//!
//! It is bound once, so that its address can be told to others before any group exists. A thread of its own accepts
//! connections and reads who is calling; what it protects is that a connection reaches the group it is meant for and
//! no other: callers of an older generation, of another run or looking for an earlier life of this process are told
//! so and dropped. Neighbours that are ahead, because they heard of a new generation first, are kept until this
//! process hears of it too.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ulmus_types::{Digest, Generation, Incarnation};

use super::frame::{Answer, Greeting};
use super::wake::{Wake, readable, wait};

/// How long a caller may take to say who it is.
const GREETING_TIME: Duration = Duration::from_secs(5);
/// How long a neighbour that is ahead is kept. It calls again if it still wants to.
const PARKING_TIME: Duration = Duration::from_secs(30);
/// Callers that are kept at a time; a group has one for each process, so more are a mistake or an attack.
const CALLERS: usize = 64;
/// Pause after the system could not accept a connection, for instance because of too many open files.
const PAUSE: Duration = Duration::from_millis(100);

/// A bound port and the thread that sorts who calls there.
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
    arrival: Wake,
    /// Raised when the thread must end.
    quit: Wake,
}

#[derive(Debug, Default)]
struct State {
    /// The newest group that this process was assigned to.
    newest: Option<(Digest, Generation)>,
    parked: Vec<Parked>,
}

#[derive(Debug)]
struct Parked {
    greeting: Greeting,
    stream: TcpStream,
    until: Instant,
}

/// Somebody who has not finished the greeting.
struct Caller {
    stream: TcpStream,
    bytes: [u8; Greeting::BYTES],
    filled: usize,
    until: Instant,
}

impl Listener {
    /// Binds `address` (port 0 lets the system choose) and starts to accept. `incarnation` is this process's.
    ///
    /// # Errors
    /// When the address is in use or not this machine's.
    pub fn bind(address: SocketAddr, incarnation: Incarnation) -> io::Result<Self> {
        let socket = TcpListener::bind(address)?;
        socket.set_nonblocking(true)?;
        let address = socket.local_addr()?;
        let shared = Arc::new(Shared {
            incarnation,
            state: Mutex::default(),
            arrival: Wake::new()?,
            quit: Wake::new()?,
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
    pub(super) fn incarnation(&self) -> Incarnation {
        self.shared.incarnation
    }

    /// From now on this process is in `generation` of `run`: whoever calls for an older one is refused.
    pub(super) fn advance(&mut self, run: Digest, generation: Generation) {
        let mut state = self.shared.state();
        state.newest = Some((run, generation));
        let parked = std::mem::take(&mut state.parked);
        for caller in parked {
            match judge(&caller.greeting, self.shared.incarnation, state.newest) {
                Some(refusal) => answer(&caller.stream, refusal),
                None => state.parked.push(caller),
            }
        }
    }

    /// The connection of the one who greets exactly so, if it has called. Whoever else claims this place in
    /// the group is refused.
    pub(super) fn take(&mut self, expected: &Greeting) -> Option<TcpStream> {
        self.shared.arrival.lower();
        let mut state = self.shared.state();
        let mut taken = None;
        let parked = std::mem::take(&mut state.parked);
        for caller in parked {
            if caller.greeting == *expected {
                // Of several calls the last counts: the caller gave up the others.
                taken = Some(caller.stream);
            } else if (caller.greeting.run, caller.greeting.generation) == (expected.run, expected.generation)
            {
                answer(&caller.stream, Answer::NotYourNeighbour);
            } else {
                state.parked.push(caller);
            }
        }
        if let Some(stream) = &taken {
            answer(stream, Answer::Welcome);
        }
        taken
    }
}

/// Readable when somebody has called since the last [`Listener::take`].
impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.shared.arrival.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.shared.quit.raise();
        if let Some(thread) = self.thread.take() {
            // It cannot panic on input; if it did, there is nothing left to stop.
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
            deaf_until = deaf_until.filter(|deaf| *deaf > now);

            let mut sources = vec![readable(&self.quit)];
            match deaf_until {
                Some(deaf) => until = until.min(deaf),
                None => sources.push(readable(socket)),
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

            if deaf_until.is_none() && accept(socket, &mut callers).is_err() {
                deaf_until = Some(Instant::now() + PAUSE);
            }
            for mut caller in std::mem::take(&mut callers) {
                match caller.read() {
                    Ok(None) => callers.push(caller),
                    Ok(Some(greeting)) => self.sort(greeting, caller.stream),
                    Err(error) => tracing::debug!(%error, "a caller went away before it said who it is"),
                }
            }
        }
    }

    /// Drops parked callers whose time is over; answers when the next one's is.
    fn expire(&self, now: Instant) -> Instant {
        let mut state = self.state();
        state.parked.retain(|caller| caller.until > now);
        state.parked.iter().map(|caller| caller.until).min().unwrap_or(now + PARKING_TIME)
    }

    fn sort(&self, greeting: Greeting, stream: TcpStream) {
        let mut state = self.state();
        if let Some(refusal) = judge(&greeting, self.incarnation, state.newest) {
            tracing::debug!(?greeting, reason = refusal.text(), "refused a connection");
            answer(&stream, refusal);
            return;
        }
        if state.parked.len() == CALLERS {
            state.parked.remove(0);
        }
        state.parked.push(Parked { greeting, stream, until: Instant::now() + PARKING_TIME });
        self.arrival.raise();
    }
}

/// Accepts whoever is waiting. An error asks for a pause.
fn accept(socket: &TcpListener, callers: &mut Vec<Caller>) -> io::Result<()> {
    while callers.len() < CALLERS {
        match socket.accept() {
            Ok((stream, _)) => {
                if stream.set_nonblocking(true).is_ok() && stream.set_nodelay(true).is_ok() {
                    let until = Instant::now() + GREETING_TIME;
                    callers.push(Caller { stream, bytes: [0; Greeting::BYTES], filled: 0, until });
                }
            }
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection of another worker, will try again");
                return Err(error);
            }
        }
    }
    Err(ErrorKind::QuotaExceeded.into())
}

impl Caller {
    fn read(&mut self) -> io::Result<Option<Greeting>> {
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

/// Why a caller cannot be let in, whatever comes; `None` when it may be meant for the newest group or a later one.
fn judge(greeting: &Greeting, me: Incarnation, newest: Option<(Digest, Generation)>) -> Option<Answer> {
    if greeting.to_incarnation != me {
        return Some(Answer::OtherIncarnation);
    }
    let (run, generation) = newest?;
    if greeting.run != run {
        Some(Answer::OtherRun)
    } else if greeting.generation < generation {
        Some(Answer::StaleGeneration)
    } else {
        None
    }
}

fn answer(mut stream: &TcpStream, answer: Answer) {
    // One byte fits the empty buffer of a new connection; if the caller is gone, it needs no answer.
    drop(stream.write(&[answer.encode()]));
}

#[cfg(test)]
mod tests {
    use ulmus_types::Rank;

    use super::*;

    #[test]
    fn only_the_newest_group_and_later_ones_are_let_in() {
        let me = Incarnation::new(5);
        let run = Digest::of(b"run");
        let greeting = |run: Digest, generation: u64, to: u64| Greeting {
            run,
            generation: Generation::new(generation),
            from: Rank::new(0),
            from_incarnation: Incarnation::new(1),
            to_incarnation: Incarnation::new(to),
        };
        let newest = Some((run, Generation::new(3)));
        assert_eq!(judge(&greeting(run, 3, 5), me, newest), None);
        assert_eq!(judge(&greeting(run, 4, 5), me, newest), None);
        assert_eq!(judge(&greeting(run, 2, 5), me, newest), Some(Answer::StaleGeneration));
        assert_eq!(judge(&greeting(run, 3, 6), me, newest), Some(Answer::OtherIncarnation));
        let other = Digest::of(b"other");
        assert_eq!(judge(&greeting(other, 3, 5), me, newest), Some(Answer::OtherRun));
        assert_eq!(judge(&greeting(other, 3, 5), me, None), None);
    }
}
