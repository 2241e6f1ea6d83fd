//! How a member connects to its neighbours: it calls the next one while the previous one calls it.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rustix::event::PollFd;
use rustix::io::Errno;
use socket2::{Domain, Protocol, Socket, Type};
use ulmus_types::GroupKey;

use super::greeting::{Answer, Greeting};
use super::listener::Listener;
use super::wakeup::{Interrupt, WakeupPipe, readable, wait, writable};
use super::{ConnectError, Place, link, or_would_block};

/// Pause before an unreachable neighbour is called again.
const REDIAL: Duration = Duration::from_millis(50);
/// How long connecting to one address may take before the next address of the same name is tried.
const DIAL_WITHIN: Duration = Duration::from_secs(3);

/// Calls the next member and waits for the call of the previous one, both at once. Returns both connections in this
/// order. Blocks until both have agreed, `interrupt` is raised, or `timeout` has passed.
///
/// # Errors
/// [`ConnectError::Refused`] if a neighbour is in a later generation or has been replaced; [`ConnectError::Unreachable`]
/// if the next member does not answer; [`ConnectError::NeverCame`] if it does, but the previous member does not call.
pub fn connect(
    listener: &mut Listener,
    place: &Place,
    interrupt: &Interrupt,
    timeout: Duration,
) -> Result<(TcpStream, TcpStream), ConnectError> {
    let deadline = Instant::now() + timeout;
    let (next_rank, previous_rank) = (place.neighbour(1), place.neighbour(place.size - 1));
    let expected = Greeting {
        run: place.run,
        generation: place.generation,
        from: previous_rank,
        from_incarnation: place.previous.worker.incarnation(),
        to_incarnation: listener.incarnation(),
    };
    let greeting = Greeting {
        from: place.rank,
        from_incarnation: listener.incarnation(),
        to_incarnation: place.next.worker.incarnation(),
        ..expected
    };
    listener.advance(place.run, place.generation, place.key);
    let mut call = Call::new(&place.next.address, greeting, place.key);
    let mut previous = None;
    loop {
        if interrupt.is_raised() {
            return Err(ConnectError::Interrupted);
        }
        // It may have given up a call that was answered late and called again: only the last call counts.
        previous = listener.take(&expected).or(previous);
        call.go_on();
        match (call.stage, previous) {
            (Stage::Answered(_, answer), _) if answer != Answer::Welcome => {
                return Err(ConnectError::Refused { rank: next_rank, reason: answer.text() });
            }
            (Stage::Answered(next, _), Some(previous)) => return Ok((next, previous)),
            (stage, waiting) => (call.stage, previous) = (stage, waiting),
        }
        if Instant::now() >= deadline {
            let (generation, after) = (place.generation, timeout);
            return Err(match &call.stage {
                Stage::Answered(..) => ConnectError::NeverCame { rank: previous_rank, generation, after },
                _ => ConnectError::Unreachable {
                    rank: next_rank,
                    address: place.next.address.clone(),
                    generation,
                    after,
                    reason: call.reason(),
                },
            });
        }
        let (source, until) = call.stage.awaited();
        let mut sources = vec![readable(interrupt), readable(listener)];
        sources.extend(source);
        let until = until.map_or(deadline, |until| until.min(deadline));
        wait(&mut sources, until).map_err(|error| ConnectError::Network {
            act: "cannot wait for sockets".to_owned(),
            reason: error.to_string(),
        })?;
    }
}

/// A call to the next member, repeated until a member answers.
struct Call<'a> {
    address: &'a str,
    greeting: Greeting,
    key: GroupKey,
    attempts: usize,
    stage: Stage,
    /// What went wrong at the last attempt.
    trouble: Option<String>,
}

enum Stage {
    Pausing(Instant),
    LookingUp(Lookup),
    Dialling(TcpStream, Instant),
    Greeted(TcpStream, Reply),
    Answered(TcpStream, Answer),
}

/// The part of the answer that has been received.
struct Reply {
    bytes: [u8; Answer::BYTES],
    filled: usize,
}

impl Stage {
    /// What this stage waits for, and until when.
    fn awaited(&self) -> (Option<PollFd<'_>>, Option<Instant>) {
        match self {
            Self::Pausing(end) => (None, Some(*end)),
            Self::LookingUp(lookup) => (Some(readable(&*lookup.done)), None),
            Self::Dialling(stream, end) => (Some(writable(stream)), Some(*end)),
            Self::Greeted(stream, _) => (Some(readable(stream)), None),
            Self::Answered(..) => (None, None),
        }
    }
}

impl<'a> Call<'a> {
    fn new(address: &'a str, greeting: Greeting, key: GroupKey) -> Self {
        Self { address, greeting, key, attempts: 0, stage: Stage::Pausing(Instant::now()), trouble: None }
    }

    /// Why there is no answer yet, for people.
    fn reason(&self) -> String {
        match (&self.stage, &self.trouble) {
            (Stage::Greeted(..), None) => "it took the call and did not answer it".to_owned(),
            (Stage::Greeted(..), Some(trouble)) => {
                format!("it took the call and did not answer it; before that: {trouble}")
            }
            (_, Some(trouble)) => trouble.clone(),
            (_, None) => "it does not answer".to_owned(),
        }
    }

    /// Advances until there is something to wait for.
    fn go_on(&mut self) {
        loop {
            let stage = std::mem::replace(&mut self.stage, Stage::Pausing(Instant::now() + REDIAL));
            match self.step(stage) {
                Ok((stage, true)) => self.stage = stage,
                Ok((stage, false)) => {
                    self.stage = stage;
                    return;
                }
                Err(error) => {
                    self.trouble = Some(error.to_string());
                    return;
                }
            }
        }
    }

    /// The stage that follows, and whether it is a new one.
    fn step(&mut self, stage: Stage) -> io::Result<(Stage, bool)> {
        match stage {
            Stage::Pausing(until) if Instant::now() < until => Ok((stage, false)),
            Stage::Pausing(_) => match self.address.parse() {
                Ok(address) => Ok((self.dial(&[address])?, true)),
                Err(_) => Ok((Stage::LookingUp(Lookup::begin(self.address)?), true)),
            },
            Stage::LookingUp(lookup) => match lookup.found.try_recv() {
                Ok(found) => Ok((self.dial(&found?)?, true)),
                Err(mpsc::TryRecvError::Empty) => Ok((Stage::LookingUp(lookup), false)),
                Err(mpsc::TryRecvError::Disconnected) => Err(ErrorKind::NotFound.into()),
            },
            Stage::Dialling(stream, until) => {
                if let Some(error) = stream.take_error()? {
                    return Err(error);
                }
                match stream.peer_addr() {
                    Ok(_) => Ok((self.greet(stream)?, true)),
                    Err(error) if error.kind() != ErrorKind::NotConnected => Err(error),
                    Err(_) if Instant::now() >= until => Err(Errno::TIMEDOUT.into()),
                    Err(_) => Ok((Stage::Dialling(stream, until), false)),
                }
            }
            Stage::Greeted(mut stream, mut reply) => {
                match or_would_block(stream.read(&mut reply.bytes[reply.filled..]))? {
                    None => return Ok((Stage::Greeted(stream, reply), false)),
                    Some(0) => return Err(ErrorKind::UnexpectedEof.into()),
                    Some(count) => reply.filled += count,
                }
                if reply.filled < Answer::BYTES {
                    return Ok((Stage::Greeted(stream, reply), true));
                }
                let answer = Answer::decode(&reply.bytes, &self.greeting, &self.key)
                    .ok_or_else(|| io::Error::other("what answers there is no member of the group"))?;
                Ok((Stage::Answered(stream, answer), true))
            }
            Stage::Answered(..) => Ok((stage, false)),
        }
    }

    /// Begins to connect to one of the name's addresses, a different one at each attempt.
    fn dial(&mut self, addresses: &[SocketAddr]) -> io::Result<Stage> {
        let address = addresses.get(self.attempts % addresses.len().max(1)).ok_or(ErrorKind::NotFound)?;
        self.attempts += 1;
        let socket = Socket::new(Domain::for_address(*address), Type::STREAM, Some(Protocol::TCP))?;
        socket.set_nonblocking(true)?;
        match socket.connect(&(*address).into()) {
            Err(error) if error.raw_os_error() != Some(Errno::INPROGRESS.raw_os_error()) => Err(error),
            _ => Ok(Stage::Dialling(socket.into(), Instant::now() + DIAL_WITHIN)),
        }
    }

    fn greet(&mut self, mut stream: TcpStream) -> io::Result<Stage> {
        link::prepare(&stream)?;
        // The buffer of a new connection has room for one packet.
        if stream.write(&self.greeting.encode(&self.key))? < Greeting::BYTES {
            return Err(ErrorKind::WriteZero.into());
        }
        Ok(Stage::Greeted(stream, Reply { bytes: [0; Answer::BYTES], filled: 0 }))
    }
}

/// A name lookup on a thread of its own, because the system's resolver may take longer than a group may, and cannot be
/// interrupted.
struct Lookup {
    found: mpsc::Receiver<io::Result<Vec<SocketAddr>>>,
    /// Raised when the lookup has ended.
    done: Arc<WakeupPipe>,
}

impl Lookup {
    fn begin(name: &str) -> io::Result<Self> {
        let done = Arc::new(WakeupPipe::new()?);
        let (tell, found) = mpsc::channel();
        std::thread::Builder::new().name("collective-lookup".to_owned()).spawn({
            let (name, done) = (name.to_owned(), Arc::clone(&done));
            move || {
                // If the call has ended, nobody receives it.
                tell.send(name.to_socket_addrs().map(Iterator::collect)).ok();
                done.raise();
            }
        })?;
        Ok(Self { found, done })
    }
}
