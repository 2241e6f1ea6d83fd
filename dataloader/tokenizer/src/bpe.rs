//! Byte-pair encoding in SentencePiece's order: of all neighbours that make a piece, those with the highest score are
//! joined first, and the leftmost of equals.
//!
//! Equal scores are common (the runs of blanks in the LLaMA-2 model share one), so joining in the order of ids instead
//! is wrong.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use super::model::PieceType;
use super::vocabulary::{BLANK, Vocabulary};

/// A piece by its id, or a character that is no piece: its code point and [`CHARACTER`].
type Symbol = u32;

/// Marks symbols that are no pieces.
const CHARACTER: Symbol = 1 << 31;
/// Marks pieces that nothing joins.
const ALONE: Symbol = 1 << 30;
/// A place whose symbol was joined to the one before.
const GONE: Symbol = u32::MAX;

/// Symbols up to which the best pair is looked for among all, and above which pairs are kept in order.
const FEW: usize = 32;

/// What two neighbours become. Lower priorities go first; equal scores have equal priority.
#[derive(Debug, Clone, Copy)]
struct Join {
    priority: u32,
    id: u32,
}

impl Join {
    const NONE: Self = Self { priority: u32::MAX, id: 0 };
}

/// The tables of a vocabulary.
#[derive(Debug, Clone)]
pub(super) struct Bpe {
    /// Symbols of the characters of the basic plane, by code point.
    basic: Box<[Symbol]>,
    /// Pieces of other single characters.
    others: HashMap<char, Symbol>,
    pairs: Pairs,
    /// Pieces that are taken apart again when everything is joined.
    unused: HashSet<u32>,
}

/// Buffers that encodings use in turn.
#[derive(Debug, Default)]
pub(super) struct Scratch {
    symbols: Vec<Symbol>,
    /// Left and right neighbour of each symbol that is left in a long chunk.
    neighbours: Vec<(u32, u32)>,
    /// Pairs of a long chunk, the next one on top.
    offers: BinaryHeap<Reverse<Offer>>,
    /// What unused pieces were last made of.
    parts: HashMap<u32, (Symbol, Symbol)>,
}

/// Two neighbours that make a piece. The order of the fields is the order of joining.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Offer {
    priority: u32,
    /// Position of the left one.
    at: u32,
    left: Symbol,
    right: Symbol,
    id: u32,
}

impl Bpe {
    /// The tables of a vocabulary; `escapes` says that a blank is the same as [`BLANK`].
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
        // By this order 0.0 comes before -0.0, as in SentencePiece 0.2.3.
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

    /// The tables of a list of merges, each a pair, its rank and the piece; `tokens` are those that texts are made of.
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
            basic[usize::from(b' ')] = of_char(BLANK);
        }
        let others = symbols.into_iter().filter(|(c, _)| *c as usize >= basic.len()).collect();
        Self { basic, others, pairs, unused: HashSet::new() }
    }

    /// The tables of a list of merges over bytes, whose symbols are given.
    pub(super) fn of_bytes(symbols: &[u32; 256], merges: &[((u32, u32), u32, u32)]) -> Self {
        Self {
            basic: Box::new(*symbols),
            others: HashMap::new(),
            pairs: Pairs::of_merges(merges),
            unused: HashSet::new(),
        }
    }

    /// Whether chunks of a text are independent of each other.
    pub(super) fn is_local(&self) -> bool {
        self.unused.is_empty()
    }

    /// All pairs that make a piece, in the order of joining: the two texts' symbols and the piece.
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

    /// Adds the ids of a text, parts of which may be pieces already.
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

    /// Adds the ids of a symbol, of unused pieces those of their parts; what has none is unknown.
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

    /// The same where every symbol is a piece.
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

    /// Of a few symbols, all pairs are looked at for each step.
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

    fn join_many(&self, scratch: &mut Scratch) {
        let Scratch { symbols, neighbours, offers, parts, .. } = scratch;
        let mut offer = |offers: &mut BinaryHeap<Reverse<Offer>>, at: u32, left: Symbol, right: Symbol| {
            let Join { priority, id } = self.pairs.get(left, right);
            if priority != u32::MAX {
                offers.push(Reverse(Offer { priority, at, left, right, id }));
                if self.unused.contains(&id) {
                    parts.insert(id, (left, right));
                }
            }
        };
        neighbours.clear();
        neighbours.extend((0..symbols.len() as u32).map(|at| (at.wrapping_sub(1), at + 1)));
        for at in 1..symbols.len() {
            offer(offers, at as u32 - 1, symbols[at - 1], symbols[at]);
        }
        while let Some(Reverse(Offer { at, left, right, id, .. })) = offers.pop() {
            let here = at as usize;
            let (before, next) = neighbours[here];
            // An older offer, one of whose symbols has been joined since.
            if symbols[here] != left || symbols.get(next as usize) != Some(&right) {
                continue;
            }
            let after = neighbours[next as usize].1;
            symbols[here] = id;
            symbols[next as usize] = GONE;
            neighbours[here].1 = after;
            if let Some(symbol) = symbols.get(before as usize) {
                offer(offers, before, *symbol, id);
            }
            if let Some(symbol) = symbols.get(after as usize) {
                neighbours[after as usize].0 = at;
                offer(offers, at, id, *symbol);
            }
        }
        symbols.retain(|symbol| *symbol != GONE);
    }
}

/// Those of some pieces that are single characters.
fn singles<'t>(pieces: impl IntoIterator<Item = (&'t str, u32)>) -> HashMap<char, Symbol> {
    let single = |(text, id): (&str, u32)| {
        let mut chars = text.chars();
        let first = chars.next()?;
        chars.next().is_none().then_some((first, id))
    };
    pieces.into_iter().filter_map(single).collect()
}

/// A part of a text.
#[derive(Debug, Clone, Copy)]
pub(super) enum Part<'t> {
    Text(&'t str),
    Bytes(&'t [u8]),
    Piece(u32),
}

/// What two symbols become, in a table with open addressing.
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

    /// Of a pair that is listed twice, the last counts.
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
        // The high bits of the product depend on all bits of the key, as far as those below go.
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
