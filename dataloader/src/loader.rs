//! Reads lanes ahead and hands out their sequences, the same ones whoever reads them.
//!
//! Each stream of a hosted lane holds the window that it gives from and at most one that is being read ahead, so
//! memory is bounded by twice the windows of the hosted streams. `data.threads` threads build windows; callers
//! are plain threads and wait only when a window is not ready. A window is a pure function of the corpus and its
//! place, so neither threads nor read-ahead nor a move to another worker changes what comes.
//!
//! A reader's error waits in its stream until that stream is asked: sequences that are in memory come first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use ulmus_types::{ErrorKind, LaneId, SourceReading};

use crate::corpus::Corpus;
use crate::error::DataError;
use crate::format::Segments;
use crate::order::{Epoch, Stream, window_order};
use crate::pack::{Packed, Sequence};
use crate::sources::AGAIN;
use ulmus_tokenizer::Encoder;

/// Words per stream.
const WORDS: usize = 4;
/// How often somebody who waits for text says so.
const TELL_EVERY: Duration = Duration::from_millis(250);

/// Where every stream of every lane stands: four words each (sequences given, epoch, where the window begins, offset in
/// the window), no contents. A window begins at a unit (the low 32 bits) and a segment of it (the high ones).
///
/// Streams that a worker does not host are zero in its cursors, so that the cursors of a group are the sum of the
/// cursors of its workers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursors(Vec<i64>);

/// Where one stream stands.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Cursor {
    emitted: u64,
    place: Place,
    /// Sequences of the window that have been given.
    offset: u64,
}

/// Where a window begins: the epoch, how many of the stream's units of that epoch come before it, and how many segments
/// of its first unit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Place {
    epoch: u64,
    unit: u32,
    segment: u32,
}

impl Cursors {
    pub(crate) fn start(streams: usize) -> Self {
        Self(vec![0; WORDS * streams])
    }

    /// Takes words that [`Self::words`] gave, or their sum over a group.
    pub const fn from_words(words: Vec<i64>) -> Self {
        Self(words)
    }

    /// The plain words, for checkpoints and for sums over a group.
    pub fn words(&self) -> &[i64] {
        &self.0
    }

    fn get(&self, stream: usize) -> Cursor {
        let word = |index: usize| self.0[WORDS * stream + index].max(0).cast_unsigned();
        let place = Place { epoch: word(1), unit: word(2) as u32, segment: (word(2) >> 32) as u32 };
        Cursor { emitted: word(0), place, offset: word(3) }
    }

    fn set(&mut self, stream: usize, cursor: Cursor) {
        let Place { epoch, unit, segment } = cursor.place;
        let words = [cursor.emitted, epoch, u64::from(unit) | u64::from(segment) << 32, cursor.offset];
        self.0[WORDS * stream..WORDS * (stream + 1)].copy_from_slice(&words.map(u64::cast_signed));
    }
}

/// Consecutive units of a stream, and the order in which their sequences are given.
#[derive(Debug)]
struct Window {
    place: Place,
    /// Where the next window begins.
    next: Place,
    segments: Vec<Part>,
    /// (segment of the window, sequence of the segment), shuffled.
    order: Vec<(u32, u32)>,
    /// The unit within which the next window begins, if it does.
    open: Option<Segments>,
    /// Kept for the next window of the same epoch.
    _epoch: Arc<Epoch>,
}

/// A segment of a window.
#[derive(Debug)]
struct Part {
    /// Its unit, by number in the manifest.
    unit: u32,
    segment: u32,
    packed: Packed,
}

/// Where a sequence comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    pub(crate) source: usize,
    pub(crate) epoch: u64,
    pub(crate) unit: u32,
    pub(crate) segment: u32,
    /// Its number among the sequences of the segment.
    pub(crate) index: u32,
}

type WindowResult = Result<Window, DataError>;

/// A request for the first window with any sequence at or after a place.
#[derive(Debug)]
struct Job {
    stream: usize,
    place: Place,
    /// The unit at that place, if it is open.
    open: Option<Segments>,
    /// Dead when nobody waits for the reply any more.
    wanted: Weak<()>,
    reply: Sender<WindowResult>,
}

/// A stream of a hosted lane.
#[derive(Debug)]
struct Open {
    emitted: u64,
    offset: u64,
    window: Option<Window>,
    ahead: Ahead,
}

/// A window that was asked for.
#[derive(Debug)]
struct Ahead {
    place: Place,
    window: Receiver<WindowResult>,
    _wanted: Arc<()>,
}

/// Hands out the sequences of some lanes. Dropping it stops its threads after the window each is at.
#[derive(Debug)]
pub struct Loader {
    corpus: Arc<Corpus>,
    length: usize,
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    streams: BTreeMap<usize, Open>,
    epochs: Arc<Epochs>,
    /// Time spent waiting for windows, by source.
    waits: Vec<Duration>,
    opened: Instant,
}

impl Loader {
    /// Starts reading `lanes` from `cursors`; sequences have `length` tokens.
    ///
    /// # Errors
    /// When the cursors belong to another plan.
    pub fn open(
        corpus: Arc<Corpus>,
        length: usize,
        lanes: &[LaneId],
        cursors: &Cursors,
    ) -> Result<Self, DataError> {
        let (jobs, queue) = crossbeam_channel::unbounded();
        let epochs = Arc::new(Epochs::default());
        let threads = (0..corpus.threads)
            .map(|number| {
                let reader = Reader { corpus: Arc::clone(&corpus), length, epochs: Arc::clone(&epochs) };
                let queue: Receiver<Job> = queue.clone();
                std::thread::Builder::new()
                    .name(format!("ulmus-reader-{number}"))
                    .spawn(move || reader.serve(&queue))
                    .expect("a thread for reading can be started")
            })
            .collect();
        let waits = vec![Duration::ZERO; corpus.max_epochs.len()];
        let mut loader = Self {
            corpus,
            length,
            jobs: Some(jobs),
            threads,
            streams: BTreeMap::new(),
            epochs,
            waits,
            opened: Instant::now(),
        };
        loader.host(lanes, cursors)?;
        Ok(loader)
    }

    /// Reads `lanes` from `cursors` from now on. Windows that are in memory and still wanted are kept, so going
    /// back by a step, or taking over some lanes, costs little.
    ///
    /// # Errors
    /// When the cursors belong to another plan.
    pub fn host(&mut self, lanes: &[LaneId], cursors: &Cursors) -> Result<(), DataError> {
        let expected = WORDS * self.corpus.mixture.streams().len();
        if cursors.words().len() != expected {
            return Err(DataError::Cursors { words: cursors.words().len(), expected });
        }
        let mut before = std::mem::take(&mut self.streams);
        for stream in lanes.iter().flat_map(|lane| self.corpus.mixture.of_lane(*lane)) {
            let Cursor { emitted, place, offset } = cursors.get(stream);
            let open = match before.remove(&stream) {
                Some(open) if open.window.as_ref().is_some_and(|window| window.place == place) => {
                    Open { emitted, offset, ..open }
                }
                Some(open) if open.ahead.place == place => Open { emitted, offset, window: None, ..open },
                _ => {
                    let ahead = Ahead::ask(self.jobs.as_ref(), stream, place, None);
                    Open { emitted, offset, window: None, ahead }
                }
            };
            self.streams.insert(stream, open);
        }
        Ok(())
    }

    /// The next `per_lane` sequences of each of `lanes`, lane by lane: a micro-batch is such a run of lanes. Waits
    /// until they are read.
    ///
    /// # Errors
    /// Of the readers, and [`DataError::Exhausted`] when a source has been read as often as the plan allows. The
    /// loader then stands somewhere within the call: go on from earlier cursors with [`Self::host`].
    pub fn take(&mut self, lanes: &[LaneId], per_lane: usize) -> Result<Vec<Sequence>, DataError> {
        self.take_telling(lanes, per_lane, &mut || {})
    }

    /// As [`Self::take`]; while it waits for text it calls `waits` several times a second, so that a thread that waits can
    /// be told from one that stands still.
    ///
    /// # Errors
    /// As [`Self::take`].
    pub fn take_telling(
        &mut self,
        lanes: &[LaneId],
        per_lane: usize,
        waits: &mut dyn FnMut(),
    ) -> Result<Vec<Sequence>, DataError> {
        let mut sequences = Vec::with_capacity(lanes.len() * per_lane);
        for lane in lanes {
            for _ in 0..per_lane {
                let emitted = |stream| self.streams.get(&stream).map_or(0, |open| open.emitted);
                let stream = self.corpus.mixture.next_stream(*lane, emitted);
                sequences.push(self.take_from(stream, waits)?.1);
            }
        }
        Ok(sequences)
    }

    /// Passes over the next sequence of a lane, and tells where it comes from.
    ///
    /// # Errors
    /// As for [`Self::take`].
    pub fn pass(&mut self, lane: LaneId) -> Result<Origin, DataError> {
        let emitted = |stream| self.streams.get(&stream).map_or(0, |open| open.emitted);
        let stream = self.corpus.mixture.next_stream(lane, emitted);
        Ok(self.take_from(stream, &mut || {})?.0)
    }

    /// How reading goes, source by source.
    pub fn readings(&self) -> Vec<SourceReading> {
        let (counts, traffic) = (self.corpus.counts(), self.corpus.traffic());
        let of = |source: usize| {
            let of_source = |stream: &usize| self.corpus.mixture.streams()[*stream].source == source;
            let streams: Vec<(&usize, &Open)> =
                self.streams.iter().filter(|(stream, _)| of_source(stream)).collect();
            let epochs = streams.iter().map(|(stream, open)| self.epochs_passed(**stream, open));
            let (counts, traffic) = (counts[source], traffic[source]);
            SourceReading {
                source: self.corpus.sources.name(source).to_owned(),
                epochs: epochs.reduce(f64::min).unwrap_or_default(),
                documents: counts.documents,
                tokens: counts.tokens,
                text_bytes: counts.bytes,
                short_characters: counts.short_characters,
                short_tokens: counts.short_tokens,
                held_out: counts.held_out,
                bad_units: self.corpus.left_out_of(source) as u64,
                fetched_bytes: traffic.fetched_bytes,
                cached_bytes: traffic.cached_bytes,
                failed_requests: traffic.failed_requests,
                streams: streams.len() as u64,
                ready: streams.iter().filter(|(_, open)| !open.ahead.window.is_empty()).count() as u64,
                waited: self.waits[source],
                elapsed: self.opened.elapsed(),
            }
        };
        (0..counts.len()).map(of).collect()
    }

    /// Epochs that a stream has passed, with the share of its units in the one it is in.
    fn epochs_passed(&self, stream: usize, open: &Open) -> f64 {
        let Place { epoch, unit, .. } = open.window.as_ref().map_or(open.ahead.place, |window| window.place);
        let Stream { source, place, .. } = self.corpus.mixture.streams()[stream];
        let units = self.epochs.get(&self.corpus, source, epoch).units(place).len();
        let in_window = open.window.as_ref().map_or(0.0, |window| {
            let end = if window.next.epoch > epoch { units as u32 } else { window.next.unit };
            f64::from(end - unit) * open.offset as f64 / window.order.len() as f64
        });
        epoch as f64 + (f64::from(unit) + in_window) / units.max(1) as f64
    }

    /// Where the hosted lanes stand after what has been taken; zero for all others.
    pub fn cursors(&self) -> Cursors {
        let mut cursors = self.corpus.start();
        for (stream, open) in &self.streams {
            let place = open.window.as_ref().map_or(open.ahead.place, |window| window.place);
            cursors.set(*stream, Cursor { emitted: open.emitted, place, offset: open.offset });
        }
        cursors
    }

    /// The next sequence of a stream.
    fn take_from(&mut self, stream: usize, waits: &mut dyn FnMut()) -> Result<(Origin, Sequence), DataError> {
        let open = self.streams.get_mut(&stream).expect("only hosted lanes are asked for");
        if open.window.is_none() {
            let asked = Instant::now();
            let mut arrived = open.ahead.arrives(waits);
            if matches!(&arrived, Err(error) if error.kind() == ErrorKind::Retry) {
                // It was read ahead, maybe long ago, and the store may be back.
                open.ahead = Ahead::ask(self.jobs.as_ref(), stream, open.ahead.place, None);
                arrived = open.ahead.arrives(waits);
            }
            self.waits[self.corpus.mixture.streams()[stream].source] += asked.elapsed();
            // After an error the same window is asked for again, so that the caller may try again.
            let (next, unit) = match &mut arrived {
                Ok(window) => (window.next, window.open.take()),
                Err(_) => (open.ahead.place, None),
            };
            open.ahead = Ahead::ask(self.jobs.as_ref(), stream, next, unit);
            open.window = Some(arrived?);
        }
        let window = open.window.as_ref().expect("it was just filled");
        let Some((segment, index)) = window.order.get(open.offset as usize) else {
            if !self.corpus.is_whole() {
                // Units that were in this window are left out since, so it ends earlier.
                (open.window, open.offset) = (None, 0);
                return self.take_from(stream, waits);
            }
            let source = self.corpus.mixture.streams()[stream].source;
            return Err(DataError::Position { name: self.corpus.sources.name(source).to_owned() });
        };
        let pad = self.corpus.tokenizer().pad();
        let Part { unit, segment, packed } = &window.segments[*segment as usize];
        let origin = Origin {
            source: self.corpus.mixture.streams()[stream].source,
            epoch: window.place.epoch,
            unit: *unit,
            segment: *segment,
            index: *index,
        };
        let sequence = packed.sequence(*index as usize, self.length, pad);
        open.emitted += 1;
        open.offset += 1;
        if open.offset as usize == window.order.len() {
            (open.window, open.offset) = (None, 0);
        }
        Ok((origin, sequence))
    }
}

impl Drop for Loader {
    fn drop(&mut self) {
        // Nothing is wanted any more, so the queue runs empty at once.
        self.streams.clear();
        self.jobs = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a reading thread panicked");
            }
        }
    }
}

impl Ahead {
    fn ask(jobs: Option<&Sender<Job>>, stream: usize, place: Place, open: Option<Segments>) -> Self {
        let wanted = Arc::new(());
        let (reply, window) = crossbeam_channel::bounded(1);
        let job = Job { stream, place, open, wanted: Arc::downgrade(&wanted), reply };
        // When no thread takes it, the job is dropped here or in the queue, and waiting for it says so.
        if let Some(jobs) = jobs {
            let _not_taken = jobs.send(job);
        }
        Self { place, window, _wanted: wanted }
    }

    fn arrives(&self, waits: &mut dyn FnMut()) -> WindowResult {
        let mut arrived = self.window.try_recv().map_err(|error| match error {
            TryRecvError::Empty => RecvTimeoutError::Timeout,
            TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
        });
        while matches!(arrived, Err(RecvTimeoutError::Timeout)) {
            waits();
            arrived = self.window.recv_timeout(TELL_EVERY);
        }
        arrived.unwrap_or(Err(DataError::Stopped))
    }
}

/// What a reading thread needs.
#[derive(Debug)]
struct Reader {
    corpus: Arc<Corpus>,
    length: usize,
    epochs: Arc<Epochs>,
}

impl Reader {
    fn serve(&self, queue: &Receiver<Job>) {
        let mut encoder = self.corpus.tokenizer().encoder();
        for job in queue {
            if job.wanted.strong_count() > 0 {
                // Nobody waits any more when the loader was dropped meanwhile.
                let _not_wanted =
                    job.reply.send(self.window_at_last(&mut encoder, job.stream, job.place, job.open));
            }
        }
    }

    /// A window, for which a unit that cannot be read is read again: it may have been damaged on its way.
    fn window_at_last(
        &self,
        encoder: &mut Encoder,
        stream: usize,
        place: Place,
        open: Option<Segments>,
    ) -> WindowResult {
        let mut window = self.window(encoder, stream, place, open, false);
        for _ in 0..AGAIN {
            match &window {
                Err(error @ DataError::BadUnit { .. }) => tracing::warn!(%error, "reading it again"),
                _ => break,
            }
            window = self.window(encoder, stream, place, None, true);
        }
        window
    }

    /// The first window with any sequence at or after `place`, whose unit may be open.
    fn window(
        &self,
        encoder: &mut Encoder,
        stream: usize,
        mut place: Place,
        mut open: Option<Segments>,
        again: bool,
    ) -> WindowResult {
        let stream = self.corpus.mixture.streams()[stream];
        let name = || self.corpus.sources.name(stream.source).to_owned();
        let mut barren = 0;
        loop {
            if let Some(epochs) = self.corpus.max_epochs[stream.source].filter(|most| place.epoch >= *most) {
                return Err(DataError::Exhausted { name: name(), epochs });
            }
            let epoch = self.epochs.get(&self.corpus, stream.source, place.epoch);
            let units = epoch.units(stream.place);
            let (mut segments, mut order) = (Vec::new(), Vec::new());
            let mut next = place;
            while let Some(unit) = units.get(next.unit as usize)
                && (order.len() as u64) < self.corpus.window
            {
                let number = *unit as usize;
                if self.corpus.leaves_out(stream.source, number) {
                    next = Place { unit: next.unit + 1, segment: 0, ..next };
                    barren += 1;
                    continue;
                }
                let bad = |error: DataError| error.of_unit(self.corpus.sources.name(stream.source), number);
                let mut reading = match open.take() {
                    Some(reading) => reading,
                    None => self
                        .corpus
                        .sources
                        .open_unit(stream.source, number, u64::from(next.segment), again)
                        .map_err(bad)?,
                };
                if let Some(documents) = reading.next().map_err(bad)? {
                    let contents = documents.into_iter().map(|document| document.content);
                    let packed = self.corpus.pack(stream.source, encoder, contents);
                    let number = segments.len() as u32;
                    order.extend((0..packed.sequences(self.length) as u32).map(|index| (number, index)));
                    segments.push(Part { unit: *unit, segment: next.segment, packed });
                }
                if reading.ended().map_err(bad)? {
                    next = Place { unit: next.unit + 1, segment: 0, ..next };
                    barren += 1;
                } else {
                    next.segment = reading.position() as u32;
                    open = Some(reading);
                }
            }
            let first = units.get(place.unit as usize).copied();
            if next.unit as usize >= units.len() {
                next = Place { epoch: next.epoch + 1, unit: 0, segment: 0 };
            }
            if let Some(first) = first.filter(|_| !order.is_empty()) {
                let (seed, source) = (self.corpus.seed, stream.source);
                let segment = u64::from(place.segment);
                let shuffled = window_order(order.len(), seed, source, place.epoch, first, segment);
                let order = shuffled.into_iter().map(|index| order[index as usize]).collect();
                return Ok(Window { place, next, segments, order, open, _epoch: epoch });
            }
            if barren >= self.corpus.sources.unit_sizes(stream.source).len() {
                return Err(DataError::Empty { name: name() });
            }
            place = next;
        }
    }
}

/// The epochs that some window in memory belongs to: their permutations are the same for all streams of a source.
#[derive(Debug, Default)]
struct Epochs(Mutex<BTreeMap<(usize, u64), Weak<Epoch>>>);

impl Epochs {
    fn get(&self, corpus: &Corpus, source: usize, epoch: u64) -> Arc<Epoch> {
        // Locked while it is computed, so that it is computed once. A panic elsewhere cannot leave half an entry.
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(epoch) = known.get(&(source, epoch)).and_then(Weak::upgrade) {
            return epoch;
        }
        let ends = corpus.mixture.ends_of_source(source);
        let made = Arc::new(Epoch::new(corpus.seed, source, epoch, &corpus.sources.unit_sizes(source), ends));
        known.retain(|_, epoch| epoch.strong_count() > 0);
        known.insert((source, epoch), Arc::downgrade(&made));
        made
    }
}
