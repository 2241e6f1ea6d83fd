//! Reads lanes ahead and hands out their sequences, which are the same on every worker.
//!
//! Each stream of a hosted lane holds its current window and at most one that is being read ahead, so memory is bounded
//! by two windows per hosted stream. `data.threads` threads build windows; callers are plain threads, and wait only
//! when a window is not ready. A window is a pure function of the corpus and the window's start, so the sequences do
//! not depend on threads, on read-ahead or on the worker that hosts a lane.
//!
//! A reader's error is kept in its stream until the stream reaches it: sequences that are in memory come first.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError};
use ulmus_types::{ErrorKind, LaneId, SourceReading};

use crate::corpus::Corpus;
use crate::cursors::{Cursor, Cursors, NUMBERS_PER_STREAM, WindowStart};
use crate::error::DataError;
use crate::format::Segments;
use crate::order::{Epoch, Stream, window_order};
use crate::pack::{Packed, Sequence};
use crate::sources::RETRIES;
use ulmus_tokenizer::Encoder;

/// How often a caller that waits for text reports that it is waiting.
const REPORT_EVERY: Duration = Duration::from_millis(250);

/// Consecutive units of a stream, and the order in which their sequences are handed out.
#[derive(Debug)]
struct Window {
    start: WindowStart,
    /// Start of the next window.
    next: WindowStart,
    segments: Vec<WindowSegment>,
    /// Pairs of (index in `segments`, index of a sequence in that segment), shuffled.
    order: Vec<(u32, u32)>,
    /// The open unit, if the next window begins within one.
    open: Option<Segments>,
    /// Keeps the epoch in memory for the next window.
    _epoch: Arc<Epoch>,
}

/// A segment that is part of a window.
#[derive(Debug)]
struct WindowSegment {
    /// Index of its unit in the manifest.
    unit: u32,
    segment: u32,
    packed: Packed,
}

/// The place in the corpus that a sequence comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Origin {
    pub(crate) source: usize,
    pub(crate) epoch: u64,
    pub(crate) unit: u32,
    pub(crate) segment: u32,
    /// Index among the sequences of the segment.
    pub(crate) index: u32,
}

type WindowResult = Result<Window, DataError>;

/// A request for the first window at or after `start` that has any sequence.
#[derive(Debug)]
struct Request {
    stream: usize,
    start: WindowStart,
    /// The unit at `start`, if it is open.
    open: Option<Segments>,
    /// Dead once the reply is no longer wanted.
    wanted: Weak<()>,
    reply: Sender<WindowResult>,
}

/// A stream of a hosted lane.
#[derive(Debug)]
struct OpenStream {
    emitted: u64,
    offset: u64,
    window: Option<Window>,
    ahead: ReadAhead,
}

/// A window that was requested.
#[derive(Debug)]
struct ReadAhead {
    start: WindowStart,
    window: Receiver<WindowResult>,
    _wanted: Arc<()>,
}

/// Hands out the sequences of some lanes. When it is dropped, each thread stops after its current window.
#[derive(Debug)]
pub struct Loader {
    corpus: Arc<Corpus>,
    length: usize,
    requests: Option<Sender<Request>>,
    threads: Vec<JoinHandle<()>>,
    streams: BTreeMap<usize, OpenStream>,
    epochs: Arc<Epochs>,
    /// Time spent waiting for windows, by source.
    waits: Vec<Duration>,
    opened: Instant,
}

impl Loader {
    /// Starts reading `lanes` from `cursors`, in sequences of `length` tokens.
    ///
    /// # Errors
    /// When the cursors belong to another plan.
    pub fn open(
        corpus: Arc<Corpus>,
        length: usize,
        lanes: &[LaneId],
        cursors: &Cursors,
    ) -> Result<Self, DataError> {
        let (requests, queue) = crossbeam_channel::unbounded();
        let epochs = Arc::new(Epochs::default());
        let threads = (0..corpus.threads)
            .map(|number| {
                let reader = Reader { corpus: Arc::clone(&corpus), length, epochs: Arc::clone(&epochs) };
                let queue: Receiver<Request> = queue.clone();
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
            requests: Some(requests),
            threads,
            streams: BTreeMap::new(),
            epochs,
            waits,
            opened: Instant::now(),
        };
        loader.host(lanes, cursors)?;
        Ok(loader)
    }

    /// From now on, reads `lanes` from `cursors`. Windows that are in memory and still needed are kept, so it costs
    /// little to go back by a step or to take over some lanes.
    ///
    /// # Errors
    /// When the cursors belong to another plan.
    pub fn host(&mut self, lanes: &[LaneId], cursors: &Cursors) -> Result<(), DataError> {
        let expected = NUMBERS_PER_STREAM * self.corpus.mixture.streams().len();
        if cursors.numbers().len() != expected {
            return Err(DataError::Cursors { numbers: cursors.numbers().len(), expected });
        }
        let mut before = std::mem::take(&mut self.streams);
        for stream in lanes.iter().flat_map(|lane| self.corpus.mixture.of_lane(*lane)) {
            let Cursor { emitted, start, offset } = cursors.get(stream);
            let open = match before.remove(&stream) {
                Some(open) if open.window.as_ref().is_some_and(|window| window.start == start) => {
                    OpenStream { emitted, offset, ..open }
                }
                Some(open) if open.ahead.start == start => {
                    OpenStream { emitted, offset, window: None, ..open }
                }
                _ => {
                    let ahead = ReadAhead::ask(self.requests.as_ref(), stream, start, None);
                    OpenStream { emitted, offset, window: None, ahead }
                }
            };
            self.streams.insert(stream, open);
        }
        Ok(())
    }

    /// Returns the next `per_lane` sequences of each of `lanes`, lane by lane, as they form a micro-batch. Waits until
    /// they have been read.
    ///
    /// # Errors
    /// Errors of the readers, and [`DataError::Exhausted`] when a source has been read as often as the plan allows.
    /// Some of the sequences may have been taken by then: continue from earlier cursors with [`Self::host`].
    pub fn take(&mut self, lanes: &[LaneId], per_lane: usize) -> Result<Vec<Sequence>, DataError> {
        self.take_with_progress(lanes, per_lane, &mut || {})
    }

    /// Like [`Self::take`], but calls `waits` several times a second while it waits for text, so that a waiting thread
    /// can be told from one that hangs.
    ///
    /// # Errors
    /// The same as for [`Self::take`].
    pub fn take_with_progress(
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

    /// Skips the next sequence of a lane, and returns where it comes from.
    ///
    /// # Errors
    /// The same as for [`Self::take`].
    pub fn pass(&mut self, lane: LaneId) -> Result<Origin, DataError> {
        let emitted = |stream| self.streams.get(&stream).map_or(0, |open| open.emitted);
        let stream = self.corpus.mixture.next_stream(lane, emitted);
        Ok(self.take_from(stream, &mut || {})?.0)
    }

    /// Reading statistics of each source.
    pub fn readings(&self) -> Vec<SourceReading> {
        let (counts, traffic) = (self.corpus.counts(), self.corpus.traffic());
        let of = |source: usize| {
            let of_source = |stream: &usize| self.corpus.mixture.streams()[*stream].source == source;
            let streams: Vec<(&usize, &OpenStream)> =
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

    /// Epochs that a stream has read, including the fraction of the current one.
    fn epochs_passed(&self, stream: usize, open: &OpenStream) -> f64 {
        let WindowStart { epoch, unit, .. } =
            open.window.as_ref().map_or(open.ahead.start, |window| window.start);
        let Stream { source, index, .. } = self.corpus.mixture.streams()[stream];
        let units = self.epochs.get(&self.corpus, source, epoch).units(index).len();
        let in_window = open.window.as_ref().map_or(0.0, |window| {
            let end = if window.next.epoch > epoch { units as u32 } else { window.next.unit };
            f64::from(end - unit) * open.offset as f64 / window.order.len() as f64
        });
        epoch as f64 + (f64::from(unit) + in_window) / units.max(1) as f64
    }

    /// The cursors of the hosted lanes after everything that has been taken, and zero for all others.
    pub fn cursors(&self) -> Cursors {
        let mut cursors = self.corpus.start();
        for (stream, open) in &self.streams {
            let start = open.window.as_ref().map_or(open.ahead.start, |window| window.start);
            cursors.set(*stream, Cursor { emitted: open.emitted, start, offset: open.offset });
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
                // The read-ahead may have failed long ago, and the store may be available again.
                open.ahead = ReadAhead::ask(self.requests.as_ref(), stream, open.ahead.start, None);
                arrived = open.ahead.arrives(waits);
            }
            self.waits[self.corpus.mixture.streams()[stream].source] += asked.elapsed();
            // After an error the same window is requested again, so that the caller may retry.
            let (next, unit) = match &mut arrived {
                Ok(window) => (window.next, window.open.take()),
                Err(_) => (open.ahead.start, None),
            };
            open.ahead = ReadAhead::ask(self.requests.as_ref(), stream, next, unit);
            open.window = Some(arrived?);
        }
        let window = open.window.as_ref().expect("it was just filled");
        let Some((segment, index)) = window.order.get(open.offset as usize) else {
            if !self.corpus.is_whole() {
                // Units of this window have been left out since the cursor was stored, so it ends earlier.
                (open.window, open.offset) = (None, 0);
                return self.take_from(stream, waits);
            }
            let source = self.corpus.mixture.streams()[stream].source;
            return Err(DataError::Position { name: self.corpus.sources.name(source).to_owned() });
        };
        let pad = self.corpus.pad;
        let WindowSegment { unit, segment, packed } = &window.segments[*segment as usize];
        let origin = Origin {
            source: self.corpus.mixture.streams()[stream].source,
            epoch: window.start.epoch,
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
        // No request is wanted any more, so the queue empties at once.
        self.streams.clear();
        self.requests = None;
        for thread in self.threads.drain(..) {
            if thread.join().is_err() {
                tracing::error!("a reading thread panicked");
            }
        }
    }
}

impl ReadAhead {
    fn ask(
        requests: Option<&Sender<Request>>,
        stream: usize,
        start: WindowStart,
        open: Option<Segments>,
    ) -> Self {
        let wanted = Arc::new(());
        let (reply, window) = crossbeam_channel::bounded(1);
        let request = Request { stream, start, open, wanted: Arc::downgrade(&wanted), reply };
        // If no thread takes the request, it is dropped here or in the queue, and waiting for its reply fails.
        if let Some(requests) = requests {
            let _not_taken = requests.send(request);
        }
        Self { start, window, _wanted: wanted }
    }

    fn arrives(&self, waits: &mut dyn FnMut()) -> WindowResult {
        let mut arrived = self.window.try_recv().map_err(|error| match error {
            TryRecvError::Empty => RecvTimeoutError::Timeout,
            TryRecvError::Disconnected => RecvTimeoutError::Disconnected,
        });
        while matches!(arrived, Err(RecvTimeoutError::Timeout)) {
            waits();
            arrived = self.window.recv_timeout(REPORT_EVERY);
        }
        arrived.unwrap_or(Err(DataError::Stopped))
    }
}

/// The data that a reading thread needs.
#[derive(Debug)]
struct Reader {
    corpus: Arc<Corpus>,
    length: usize,
    epochs: Arc<Epochs>,
}

impl Reader {
    fn serve(&self, queue: &Receiver<Request>) {
        let mut encoder = self.corpus.tokenizer().encoder();
        for request in queue {
            if request.wanted.strong_count() > 0 {
                // Sending fails if the loader was dropped in the meantime.
                let _not_wanted = request.reply.send(self.window_with_retries(
                    &mut encoder,
                    request.stream,
                    request.start,
                    request.open,
                ));
            }
        }
    }

    /// Builds a window. A unit that cannot be read is read again, because it may have been damaged in transit.
    fn window_with_retries(
        &self,
        encoder: &mut Encoder,
        stream: usize,
        start: WindowStart,
        open: Option<Segments>,
    ) -> WindowResult {
        let mut window = self.window(encoder, stream, start, open, false);
        for _ in 0..RETRIES {
            match &window {
                Err(error @ DataError::BadUnit { .. }) => tracing::warn!(%error, "reading the unit again"),
                _ => break,
            }
            window = self.window(encoder, stream, start, None, true);
        }
        window
    }

    /// Builds the first window at or after `start` that has any sequence. The unit at `start` may be `open`.
    fn window(
        &self,
        encoder: &mut Encoder,
        stream: usize,
        mut start: WindowStart,
        mut open: Option<Segments>,
        again: bool,
    ) -> WindowResult {
        let stream = self.corpus.mixture.streams()[stream];
        let name = || self.corpus.sources.name(stream.source).to_owned();
        let mut barren = 0;
        loop {
            if let Some(epochs) = self.corpus.max_epochs[stream.source].filter(|most| start.epoch >= *most) {
                return Err(DataError::Exhausted { name: name(), epochs });
            }
            let epoch = self.epochs.get(&self.corpus, stream.source, start.epoch);
            let units = epoch.units(stream.index);
            let (mut segments, mut order) = (Vec::new(), Vec::new());
            let mut next = start;
            while let Some(unit) = units.get(next.unit as usize)
                && (order.len() as u64) < self.corpus.window
            {
                let number = *unit as usize;
                if self.corpus.leaves_out(stream.source, number) {
                    next = WindowStart { unit: next.unit + 1, segment: 0, ..next };
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
                    segments.push(WindowSegment { unit: *unit, segment: next.segment, packed });
                }
                if reading.ended().map_err(bad)? {
                    next = WindowStart { unit: next.unit + 1, segment: 0, ..next };
                    barren += 1;
                } else {
                    next.segment = reading.position() as u32;
                    open = Some(reading);
                }
            }
            let first = units.get(start.unit as usize).copied();
            if next.unit as usize >= units.len() {
                next = WindowStart { epoch: next.epoch + 1, unit: 0, segment: 0 };
            }
            if let Some(first) = first.filter(|_| !order.is_empty()) {
                let (seed, source) = (self.corpus.seed, stream.source);
                let segment = u64::from(start.segment);
                let shuffled = window_order(order.len(), seed, source, start.epoch, first, segment);
                let order = shuffled.into_iter().map(|index| order[index as usize]).collect();
                return Ok(Window { start, next, segments, order, open, _epoch: epoch });
            }
            if barren >= self.corpus.sources.unit_sizes(stream.source).len() {
                return Err(DataError::Empty { name: name() });
            }
            start = next;
        }
    }
}

/// The epochs of all windows in memory. An epoch's permutation is shared by all streams of a source.
#[derive(Debug, Default)]
struct Epochs(Mutex<BTreeMap<(usize, u64), Weak<Epoch>>>);

impl Epochs {
    fn get(&self, corpus: &Corpus, source: usize, epoch: u64) -> Arc<Epoch> {
        // The lock is held during the computation, so that it is done once. A panic elsewhere cannot leave half an
        // entry.
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
