//! Scores requests: many at a time, and what they have in common once.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use ulmus_backend::Backend;
use ulmus_model::{Generator, Model, Span};

use super::tokens::Request;
use super::tree::{Forest, Node};
use crate::error::EvaluatorError;

/// How likely the model finds the scored ids of a request.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Likelihood {
    /// Log-likelihood in nats.
    pub log_likelihood: f64,
    /// Whether each of them is the likeliest to follow.
    pub greedy: bool,
}

/// Takes what has been scored: indices of requests, and their likelihoods.
type OnScored<'a> = dyn FnMut(&[(usize, Likelihood)]) -> Result<(), EvaluatorError> + 'a;

/// How much is computed at once. It changes no bits of the results.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Batching {
    /// Tokens that the model remembers at once, over all texts.
    pub remembered: usize,
    /// Tokens that go through the model at once.
    pub rows: usize,
}

impl Default for Batching {
    fn default() -> Self {
        Self { remembered: 16_384, rows: 256 }
    }
}

impl Batching {
    /// Texts that are remembered at once.
    pub(crate) fn texts(self, requests: &[&Request], forest: &Forest) -> usize {
        let least = LEAST_TEXTS.min(requests.len()) + forest.height();
        let within = longest(requests).map_or(0, |longest| self.remembered / longest);
        within.min(MOST_TEXTS).min(requests.len()).max(least)
    }

    /// What reads so many texts of at most `longest` tokens.
    pub(crate) fn generator<B: Backend>(
        self,
        model: &Arc<Model<B>>,
        longest: usize,
        texts: usize,
    ) -> Result<Generator<B>, EvaluatorError> {
        Ok(Generator::with_rows(Arc::clone(model), longest, texts, self.rows)?)
    }
}

/// The most ids that the model reads of a request.
fn longest(requests: &[&Request]) -> Option<usize> {
    requests.iter().map(|request| request.ids.len() - 1).max()
}

/// Texts that are remembered at once at least, besides one for each level of what they share.
const LEAST_TEXTS: usize = 4;
/// More texts at once than this make passes no fuller.
const MOST_TEXTS: usize = 256;

/// Scores all requests, and tells of each as soon as it is scored, by its index.
///
/// # Errors
/// Those of the device, and of `on_scored`.
pub(crate) fn score<B: Backend>(
    model: &Arc<Model<B>>,
    batching: Batching,
    requests: &[&Request],
    on_scored: &mut OnScored<'_>,
) -> Result<(), EvaluatorError> {
    let Some(longest) = longest(requests) else { return Ok(()) };
    let forest = Forest::new(requests);
    let texts = batching.texts(requests, &forest);
    let generator = batching.generator(model, longest, texts)?;
    let mut equal: BTreeMap<&Request, Vec<usize>> = BTreeMap::new();
    for (index, request) in requests.iter().enumerate() {
        equal.entry(*request).or_default().push(index);
    }
    let states = forest.order.iter().map(|index| State::new(requests[*index])).collect();
    let mut scorer = Scorer {
        requests,
        order: &forest.order,
        generator,
        states,
        equal,
        free: (0..texts).rev().collect(),
        on_scored,
    };
    scorer.siblings(forest.roots.iter().collect(), None)
}

/// What is known of a request.
struct State {
    /// Negative log-likelihoods of the scored ids, in order.
    nll: Vec<f32>,
    greedy: bool,
    /// Scored ids that are not known yet.
    missing: usize,
}

impl State {
    fn new(request: &Request) -> Self {
        Self { nll: vec![0.0; request.scored], greedy: true, missing: request.scored }
    }
}

struct Scorer<'a, 'b, B: Backend> {
    requests: &'a [&'a Request],
    order: &'a [usize],
    generator: Generator<B>,
    /// Of each request in `order`.
    states: Vec<State>,
    /// The indices of equal requests.
    equal: BTreeMap<&'a Request, Vec<usize>>,
    /// Sequences of the generator that are not in use.
    free: Vec<usize>,
    on_scored: &'a mut OnScored<'b>,
}

/// A piece that is read into a sequence.
#[derive(Clone, Copy)]
struct Reading<'a> {
    node: &'a Node,
    sequence: usize,
}

impl<B: Backend> Scorer<'_, '_, B> {
    /// Scores nodes that continue the same text, which is in the sequence `before`.
    fn siblings(&mut self, mut nodes: Vec<&Node>, before: Option<usize>) -> Result<(), EvaluatorError> {
        // Those of similar length fill passes best.
        nodes.sort_by_key(|node| (node.range.len(), node.request));
        let mut nodes = &nodes[..];
        while let Some(first) = nodes.first() {
            let mut leaves = 0;
            let together = nodes.iter().take_while(|node| {
                leaves += node.leaves();
                leaves <= self.free.len()
            });
            let (now, later) = nodes.split_at(together.count().max(1));
            if first.leaves() > self.free.len() {
                self.alone(first, before)?;
            } else {
                self.together(now, before)?;
            }
            nodes = later;
        }
        Ok(())
    }

    /// Reads a node that has too many continuations to remember them all, and then these.
    fn alone(&mut self, node: &Node, before: Option<usize>) -> Result<(), EvaluatorError> {
        let sequence = self.free.pop().expect("there is one for each level");
        let reading = [Reading { node, sequence }];
        self.begin(before, &reading)?;
        self.read(&reading)?;
        self.siblings(node.children.iter().collect(), Some(sequence))?;
        self.free.push(sequence);
        Ok(())
    }

    /// Reads nodes and everything that continues them, level by level.
    fn together(&mut self, nodes: &[&Node], before: Option<usize>) -> Result<(), EvaluatorError> {
        let mut level = Vec::with_capacity(nodes.len());
        for node in nodes {
            level.push(Reading { node, sequence: self.free.pop().expect("there is one for each leaf") });
        }
        self.begin(before, &level)?;
        while !level.is_empty() {
            self.read(&level)?;
            let mut next = Vec::new();
            let mut forks = Vec::new();
            for Reading { node, sequence } in level {
                let mut children = node.children.iter();
                // The first child continues in place; the others continue copies.
                match children.next() {
                    Some(node) => next.push(Reading { node, sequence }),
                    None => self.free.push(sequence),
                }
                for node in children {
                    let to = self.free.pop().expect("there is one for each leaf");
                    forks.push((sequence, to));
                    next.push(Reading { node, sequence: to });
                }
            }
            self.generator.fork(&forks)?;
            level = next;
        }
        Ok(())
    }

    /// Lets sequences begin like `before`, or with nothing.
    fn begin(&mut self, before: Option<usize>, level: &[Reading<'_>]) -> Result<(), EvaluatorError> {
        match before {
            Some(before) => {
                let pairs: Vec<_> = level.iter().map(|reading| (before, reading.sequence)).collect();
                self.generator.fork(&pairs)?;
            }
            None => level.iter().for_each(|reading| self.generator.forget(reading.sequence)),
        }
        Ok(())
    }

    /// Reads pieces, as many rows per pass as there is room for.
    fn read(&mut self, pieces: &[Reading<'_>]) -> Result<(), EvaluatorError> {
        let mut done: Vec<usize> = vec![0; pieces.len()];
        let mut waiting: Vec<usize> = (0..pieces.len()).collect();
        while !waiting.is_empty() {
            let mut room = self.generator.rows();
            let mut parts: Vec<(usize, Range<usize>)> = Vec::new();
            for index in &waiting {
                let range = &pieces[*index].node.range;
                let start = range.start + done[*index];
                let end = range.end.min(start + room);
                if start < end {
                    parts.push((*index, start..end));
                    room -= end - start;
                    done[*index] += end - start;
                }
            }
            self.pass(pieces, &parts)?;
            waiting.retain(|index| done[*index] < pieces[*index].node.range.len());
        }
        Ok(())
    }

    /// Sends parts of pieces through the model.
    fn pass(
        &mut self,
        pieces: &[Reading<'_>],
        parts: &[(usize, Range<usize>)],
    ) -> Result<(), EvaluatorError> {
        // For each part, pairs of an index in it and an id that some request has next; and the requests.
        let mut targets = Vec::with_capacity(parts.len());
        let mut askers = Vec::new();
        for (piece, part) in parts {
            let mut wanted: BTreeMap<(usize, u32), Vec<usize>> = BTreeMap::new();
            for member in pieces[*piece].node.members.clone() {
                let request = self.requests[self.order[member]];
                let first = request.ids.len() - 1 - request.scored;
                for position in part.start.max(first)..part.end.min(request.ids.len() - 1) {
                    let target = (position - part.start, request.ids[position + 1]);
                    wanted.entry(target).or_default().push(member);
                }
            }
            targets.push(wanted.keys().copied().collect::<Vec<_>>());
            askers.extend(wanted.into_iter().map(|((at, _), members)| (part.start + at, members)));
        }
        let spans: Vec<Span<'_>> = parts
            .iter()
            .zip(&targets)
            .map(|((piece, part), targets)| {
                let Reading { node, sequence } = pieces[*piece];
                Span { sequence, tokens: &self.requests[node.request].ids[part.clone()], targets }
            })
            .collect();
        let scores = self.generator.extend(&spans)?;
        let mut finished = Vec::new();
        for (score, (position, members)) in scores.into_iter().zip(askers) {
            for member in members {
                let request = self.requests[self.order[member]];
                let state = &mut self.states[member];
                state.nll[position + 1 + request.scored - request.ids.len()] = score.nll;
                state.greedy &= score.greedy;
                state.missing -= 1;
                if state.missing == 0 {
                    let log_likelihood = -state.nll.iter().copied().map(f64::from).sum::<f64>();
                    let likelihood = Likelihood { log_likelihood, greedy: state.greedy };
                    finished.extend(self.equal[request].iter().map(|index| (*index, likelihood)));
                }
            }
        }
        (self.on_scored)(&finished)
    }
}
