//! Byte-pair encoding in SentencePiece's order: of all neighbours that form a piece, the pair with the highest score is
//! joined first, and among equal scores the leftmost.
//!
//! Equal scores are common (all runs of spaces in the LLaMA-2 model share one), so joining in the order of ids instead
//! would be wrong.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use super::model::PieceType;
use super::vocabulary::{SPACE_MARK, Vocabulary};

/// The id of a piece, or, for a character that is not a piece, its code point with the bit [`CHARACTER`] set.
type Symbol = u32;

/// Marks a character that is not a piece.
const CHARACTER: Symbol = 1 << 31;
/// Marks a piece that is never joined with a neighbour.
const ALONE: Symbol = 1 << 30;
/// Stands where a symbol was joined into the one before it.
const GONE: Symbol = u32::MAX;

/// Up to this many symbols, each step searches all pairs for the best one. Above, pairs are kept in a heap.
const FEW: usize = 32;

/// The piece that two neighbours form. Lower priorities are joined first; equal scores have equal priority.
#[derive(Debug, Clone, Copy)]
struct Join {
    priority: u32,
    id: u32,
}

impl Join {
    const NONE: Self = Self { priority: u32::MAX, id: 0 };
}

/// The merges of a vocabulary, as tables.
#[derive(Debug, Clone)]
pub(super) struct Bpe {
    /// Symbols of the characters in the basic multilingual plane, by code point.
    basic: Box<[Symbol]>,
    /// Pieces that are single characters beyond that plane.
    others: HashMap<char, Symbol>,
    pairs: Pairs,
    /// Pieces that are split into their parts again when all merges are done.
    unused: HashSet<u32>,
}

/// Buffers that are reused from one encoding to the next.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    /// Positions of the left and right neighbours of each remaining symbol in a long chunk.
    neighbours: Vec<(u32, u32)>,
    /// Pairs in a long chunk that may be joined, the next one on top.
    candidates: BinaryHeap<Reverse<Candidate>>,
    /// The two symbols that each unused piece was last made of.
    parts: HashMap<u32, (Symbol, Symbol)>,
}

/// Two neighbours that form a piece. The order of the fields is the order of joining.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    priority: u32,
    /// Position of the left symbol.
    at: u32,
    left: Symbol,
    right: Symbol,
    id: u32,
}

impl Bpe {
    /// The tables of a SentencePiece vocabulary. With `escapes`, a space counts as [`SPACE_MARK`].
    pub(super) fn new(vocabulary: &Vocabulary, escapes: bool) -> Self {
        let by_text = vocabulary.by_text();
        let texts = vocabulary.of_texts().map(|(id, piece)| (piece.text.as_str(), id));
        let symbols = singles(texts);
        let of_char = |c: char| symbols.get(&c).copied().unwrap_or(CHARACTER | c as u32);
        let of_text = |text: &str| {
            let mut chars = text.chars();
            match (chars.next(), chars.next()) {
                (Some(c), None) => Some(of_char(c)),
                _ => by_text.get(text).copied(),
            }
        };

        let mut ranked: Vec<(u32, &str, f32)> = vocabulary
            .of_texts()
            .filter(|(_, piece)| piece.text.chars().nth(1).is_some())
            .map(|(id, piece)| (id, piece.text.as_str(), piece.score))
            .collect();
        // `total_cmp` puts 0.0 before -0.0, as SentencePiece 0.2.3 does.
        ranked.sort_by(|(.., a), (.., b)| b.total_cmp(a));
        let mut joins = Vec::new();
        let (mut priority, mut before) = (0, None);
        for (id, text, score) in ranked {
            let falls = before.is_some_and(|before: f32| before.total_cmp(&score).is_gt());
            (priority, before) = (priority + u32::from(falls), Some(score));
            for (at, _) in text.char_indices().skip(1) {
                let (left, right) = text.split_at(at);
                if let (Some(left), Some(right)) = (of_text(left), of_text(right)) {
                    joins.push(((left, right), Join { priority, id }));
                }
            }
        }

        let unused = vocabulary.of_kind(PieceType::Unused).map(|(id, _)| id).collect();
        Self { unused, ..Self::of_symbols(symbols, escapes, Pairs::new(&joins)) }
    }

    /// The tables of a list of merges (a pair, its rank and the resulting piece) over the characters in `tokens`.
    pub(super) fn of_merges<'t>(
        tokens: impl IntoIterator<Item = (&'t str, u32)>,
        merges: &[((u32, u32), u32, u32)],
    ) -> Self {
        Self::of_symbols(singles(tokens), true, Pairs::of_merges(merges))
    }

    fn of_symbols(symbols: HashMap<char, Symbol>, escapes: bool, pairs: Pairs) -> Self {
        let of_char = |c: char| symbols.get(&c).copied().unwrap_or(CHARACTER | c as u32);
        let mut basic: Box<[Symbol]> =
            (0..0x1_0000).map(|code| char::from_u32(code).map_or(CHARACTER | code, of_char)).collect();
        if escapes {
            basic[usize::from(b' ')] = of_char(SPACE_MARK);
        }
        let others = symbols.into_iter().filter(|(c, _)| *c as usize >= basic.len()).collect();
        Self { basic, others, pairs, unused: HashSet::new() }
    }

    /// The tables of a list of merges over bytes, with the symbol of each byte.
    pub(super) fn of_bytes(symbols: &[u32; 256], merges: &[((u32, u32), u32, u32)]) -> Self {
        Self {
            basic: Box::new(*symbols),
            others: HashMap::new(),
            pairs: Pairs::of_merges(merges),
            unused: HashSet::new(),
        }
    }

    /// Whether chunks of a text can be encoded independently of each other.
    pub(super) fn is_local(&self) -> bool {
        self.unused.is_empty()
    }

    /// All pairs of pieces that form a piece, in the order of joining.
    pub(super) fn ranked(&self) -> Vec<(u32, u32)> {
        let mut pairs: Vec<_> =
            self.pairs.iter().map(|(pair, join)| ((join.priority, join.id), pair)).collect();
        pairs.sort_unstable();
        let pieces = pairs.into_iter().map(|(_, pair)| pair);
        pieces.filter(|(left, right)| (left | right) & CHARACTER == 0).collect()
    }

    #[inline]
    fn symbol(&self, c: char) -> Symbol {
        match self.basic.get(c as usize) {
            Some(symbol) => *symbol,
            None => self.others.get(&c).copied().unwrap_or(CHARACTER | c as u32),
        }
    }

    /// Appends the ids of a text, parts of which may be pieces already.
    pub(super) fn encode<'t>(
        &self,
        vocabulary: &Vocabulary,
        scratch: &mut Scratch,
        parts: impl IntoIterator<Item = Part<'t>>,
        ids: &mut Vec<u32>,
    ) {
        self.load(scratch, parts);
        self.join(scratch);
        for symbol in &scratch.symbols {
            self.push(vocabulary, &scratch.parts, *symbol, ids);
        }
    }

    /// Appends the ids of a symbol. An unused piece is replaced by its parts, or by unknown characters if it has none.
    fn push(
        &self,
        vocabulary: &Vocabulary,
        parts: &HashMap<u32, (Symbol, Symbol)>,
        symbol: Symbol,
        ids: &mut Vec<u32>,
    ) {
        if symbol & CHARACTER != 0 {
            let c = char::from_u32(symbol & !CHARACTER).expect("a character's symbol holds its code point");
            vocabulary.push_unknown(ids, c);
        } else if let Some((left, right)) = parts.get(&symbol) {
            self.push(vocabulary, parts, *left, ids);
            self.push(vocabulary, parts, *right, ids);
        } else if !self.is_local() && self.unused.contains(&symbol) {
            let text = &vocabulary.pieces[symbol as usize].text;
            text.chars().for_each(|c| vocabulary.push_unknown(ids, c));
        } else {
            ids.push(symbol & !ALONE);
        }
    }

    /// Appends the ids of a text in which every symbol is a piece.
    pub(super) fn encode_known<'t>(
        &self,
        scratch: &mut Scratch,
        parts: impl IntoIterator<Item = Part<'t>>,
        ids: &mut Vec<u32>,
    ) {
        self.load(scratch, parts);
        self.join(scratch);
        ids.extend_from_slice(&scratch.symbols);
    }

    fn load<'t>(&self, scratch: &mut Scratch, parts: impl IntoIterator<Item = Part<'t>>) {
        scratch.symbols.clear();
        for part in parts {
            match part {
                Part::Text(text) => scratch.symbols.extend(text.chars().map(|c| self.symbol(c))),
                Part::Bytes(bytes) => {
                    scratch.symbols.extend(bytes.iter().map(|byte| self.basic[usize::from(*byte)]));
                }
                Part::Piece(id) => scratch.symbols.push(ALONE | id),
            }
        }
    }

    fn join(&self, scratch: &mut Scratch) {
        if self.is_local() && scratch.symbols.len() <= FEW {
            self.join_few(&mut scratch.symbols);
        } else {
            scratch.parts.clear();
            self.join_many(scratch);
        }
    }

    /// Joins a few symbols, searching all pairs in each step.
    fn join_few(&self, symbols: &mut Vec<Symbol>) {
        let mut left = symbols.len();
        let mut joins = [Join::NONE; FEW];
        for (join, pair) in joins.iter_mut().zip(symbols.windows(2)) {
            *join = self.pairs.get(pair[0], pair[1]);
        }
        while left > 1 {
            let mut best = (Join::NONE, 0);
            for (at, join) in joins[..left - 1].iter().enumerate() {
                if join.priority < best.0.priority {
                    best = (*join, at);
                }
            }
            let (join, at) = best;
            if join.priority == Join::NONE.priority {
                break;
            }
            left -= 1;
            symbols[at] = join.id;
            for next in at + 1..left {
                symbols[next] = symbols[next + 1];
                joins[next] = joins[next + 1];
            }
            joins[at] = if at + 1 < left { self.pairs.get(join.id, symbols[at + 1]) } else { Join::NONE };
            if at > 0 {
                joins[at - 1] = self.pairs.get(symbols[at - 1], join.id);
            }
        }
        symbols.truncate(left);
    }

    /// Joins any number of symbols, with all candidates in a heap.
    fn join_many(&self, scratch: &mut Scratch) {
        let Scratch { symbols, neighbours, candidates, parts, .. } = scratch;
        let mut push = |heap: &mut BinaryHeap<Reverse<Candidate>>, at: u32, left: Symbol, right: Symbol| {
            let Join { priority, id } = self.pairs.get(left, right);
            if priority != u32::MAX {
                heap.push(Reverse(Candidate { priority, at, left, right, id }));
                if self.unused.contains(&id) {
                    parts.insert(id, (left, right));
                }
            }
        };
        neighbours.clear();
        neighbours.extend((0..symbols.len() as u32).map(|at| (at.wrapping_sub(1), at + 1)));
        for at in 1..symbols.len() {
            push(candidates, at as u32 - 1, symbols[at - 1], symbols[at]);
        }
        while let Some(Reverse(Candidate { at, left, right, id, .. })) = candidates.pop() {
            let here = at as usize;
            let (before, next) = neighbours[here];
            // The candidate is stale if one of its symbols has been joined since.
            if symbols[here] != left || symbols.get(next as usize) != Some(&right) {
                continue;
            }
            let after = neighbours[next as usize].1;
            symbols[here] = id;
            symbols[next as usize] = GONE;
            neighbours[here].1 = after;
            if let Some(symbol) = symbols.get(before as usize) {
                push(candidates, before, *symbol, id);
            }
            if let Some(symbol) = symbols.get(after as usize) {
                neighbours[after as usize].0 = at;
                push(candidates, at, id, *symbol);
            }
        }
        symbols.retain(|symbol| *symbol != GONE);
    }
}

/// The pieces that are single characters.
fn singles<'t>(pieces: impl IntoIterator<Item = (&'t str, u32)>) -> HashMap<char, Symbol> {
    let single = |(text, id): (&str, u32)| {
        let mut chars = text.chars();
        let first = chars.next()?;
        chars.next().is_none().then_some((first, id))
    };
    pieces.into_iter().filter_map(single).collect()
}

/// A part of the input: a text, bytes, or a piece that was matched already.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part<'t> {
    Text(&'t str),
    Bytes(&'t [u8]),
    Piece(u32),
}

/// The join of each pair of symbols, in a hash table with open addressing.
#[derive(Debug, Clone)]
struct Pairs {
    slots: Box<[((Symbol, Symbol), Join)]>,
    shift: u32,
}

impl Pairs {
    const EMPTY: ((Symbol, Symbol), Join) = ((GONE, GONE), Join::NONE);

    fn new(joins: &[((Symbol, Symbol), Join)]) -> Self {
        let size = (2 * joins.len() + 1).next_power_of_two();
        let mut pairs =
            Self { slots: vec![Self::EMPTY; size].into(), shift: u64::BITS - size.trailing_zeros().max(1) };
        for (pair, join) in joins {
            let mut slot = pairs.slot(pair.0, pair.1);
            while pairs.slots[slot].0 != Self::EMPTY.0 {
                slot = (slot + 1) & (size - 1);
            }
            pairs.slots[slot] = (*pair, *join);
        }
        pairs
    }

    /// If a pair is listed twice, the last merge counts.
    fn of_merges(merges: &[((u32, u32), u32, u32)]) -> Self {
        let mut seen = HashSet::new();
        let last = merges.iter().rev().filter(|(pair, ..)| seen.insert(*pair));
        let joins: Vec<_> = last.map(|(pair, rank, id)| (*pair, Join { priority: *rank, id: *id })).collect();
        Self::new(&joins)
    }

    fn iter(&self) -> impl Iterator<Item = ((Symbol, Symbol), Join)> {
        self.slots.iter().copied().filter(|(pair, _)| *pair != Self::EMPTY.0)
    }

    #[inline]
    fn slot(&self, left: Symbol, right: Symbol) -> usize {
        let key = u64::from(left) << 32 | u64::from(right);
        // The shift mixes the upper half into the lower, so that the product's high bits depend on all bits of the key.
        ((key ^ key >> 29).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> self.shift) as usize
            & (self.slots.len() - 1)
    }

    #[inline]
    fn get(&self, left: Symbol, right: Symbol) -> Join {
        let mut slot = self.slot(left, right);
        loop {
            let (pair, join) = self.slots[slot];
            if pair == (left, right) || pair == Self::EMPTY.0 {
                return join;
            }
            slot = (slot + 1) & (self.slots.len() - 1);
        }
    }
}
