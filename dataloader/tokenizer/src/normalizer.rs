//! What SentencePiece does to a text before it is cut into pieces.
//!
//! The published models do next to nothing (they prepend a space). Others map characters, for example to NFKC, and
//! collapse runs of spaces.

use aho_corasick::{AhoCorasick, Anchored, Input, MatchKind, StartKind};

use super::bpe::Part;
use super::model::{ModelProto, PieceType};
use super::vocabulary::{SPACE_MARK, Vocabulary};

/// The normalisation rules of a model.
#[derive(Debug, Clone)]
pub(super) struct Normalizer {
    map: Option<CharacterMap>,
    /// Pieces that are matched in texts before anything else.
    user_defined: Option<(AhoCorasick, Vec<u32>)>,
    /// Where a space is added to a text.
    added: Option<Side>,
    remove_extra: bool,
    escape: bool,
    /// Whether a leading space is dropped from a decoded text.
    drops: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Side {
    Front,
    /// In front of a text that does not begin with a space.
    FrontIfNone,
    Back,
}

impl Normalizer {
    /// Reads the rules of a model, or says what is wrong with them.
    pub(super) fn new(model: &ModelProto, vocabulary: &Vocabulary) -> Result<Self, String> {
        let rules = model.normalizer.clone().unwrap_or_default();
        let suffix = model.trainer.clone().unwrap_or_default().treat_whitespace_as_suffix();
        let map = if rules.charsmap().is_empty() {
            None
        } else {
            let map = CharacterMap::new(rules.charsmap());
            Some(map.ok_or("its table of characters is damaged; fetch the model again")?)
        };
        let (added, remove_extra) = (rules.add_dummy_prefix(), rules.remove_extra_whitespaces());
        Ok(Self {
            map,
            user_defined: user_defined(vocabulary)?,
            added: added.then_some(if suffix { Side::Back } else { Side::Front }),
            remove_extra,
            escape: rules.escape_whitespaces(),
            drops: added || remove_extra,
        })
    }

    /// Rules that write spaces as [`SPACE_MARK`], and with `prefix` prepend one: always, or with `if_none` only to
    /// texts that do not begin with one.
    pub(super) fn of_spaces(prefix: bool, if_none: bool, drops: bool) -> Self {
        let side = if if_none { Side::FrontIfNone } else { Side::Front };
        Self {
            map: None,
            user_defined: None,
            added: prefix.then_some(side),
            remove_extra: false,
            escape: true,
            drops,
        }
    }

    /// Whether nothing is done to a text except that a space may be prepended.
    pub(super) fn is_plain(&self) -> bool {
        self.map.is_none()
            && self.user_defined.is_none()
            && self.added != Some(Side::Back)
            && !self.remove_extra
            && self.escape
    }

    /// Whether a space is prepended to texts, with possible exceptions.
    pub(super) fn has_prefix(&self) -> bool {
        matches!(self.added, Some(Side::Front | Side::FrontIfNone))
    }

    /// Whether a space is prepended to `text`.
    #[inline]
    pub(super) fn prefixes(&self, text: &str) -> bool {
        match self.added {
            Some(Side::Front) => !text.is_empty(),
            Some(Side::FrontIfNone) => !text.is_empty() && !text.starts_with([' ', SPACE_MARK]),
            Some(Side::Back) | None => false,
        }
    }

    /// Whether spaces in texts are written as [`SPACE_MARK`].
    pub(super) const fn escapes(&self) -> bool {
        self.escape
    }

    /// Whether the first leading space of a decoded text is dropped, and whether all leading spaces are.
    pub(super) const fn drops_spaces(&self) -> (bool, bool) {
        (self.drops, self.remove_extra)
    }

    /// Whether there are pieces that are matched before anything else.
    pub(super) const fn has_user_defined(&self) -> bool {
        self.user_defined.is_some()
    }

    /// Splits a normalised text into the pieces that are matched before anything else, and the text between them.
    pub(super) fn parts<'t>(&self, text: &'t str) -> Vec<Part<'t>> {
        let mut parts = Vec::new();
        let mut end = 0;
        if let Some((matcher, ids)) = &self.user_defined {
            for found in matcher.find_iter(text) {
                parts.push(Part::Text(&text[end..found.start()]));
                parts.push(Part::Piece(ids[found.pattern().as_usize()]));
                end = found.end();
            }
        }
        parts.push(Part::Text(&text[end..]));
        parts
    }

    /// Normalises a text to the form in which pieces are written.
    pub(super) fn apply(&self, text: &str) -> String {
        let space = if self.escape { SPACE_MARK } else { ' ' };
        let mut out = String::with_capacity(text.len() + text.len() / 4);
        let mut rest = text;
        if self.remove_extra {
            while let (" ", length) = self.first(rest) {
                rest = &rest[length..];
            }
        }
        if rest.is_empty() {
            return out;
        }
        if self.has_prefix() {
            out.push(space);
        }
        let mut after_space = self.remove_extra;
        while !rest.is_empty() {
            let (mut found, length) = self.first(rest);
            if after_space {
                found = found.trim_start_matches(' ');
            }
            if !found.is_empty() {
                out.extend(found.chars().map(|c| if c == ' ' { space } else { c }));
                after_space = self.remove_extra && found.ends_with(' ');
            }
            rest = &rest[length..];
        }
        if self.remove_extra {
            out.truncate(out.trim_end_matches(space).len());
        }
        if self.added == Some(Side::Back) {
            out.push(space);
        }
        out
    }

    /// What the beginning of a text is mapped to, and how many of its bytes are consumed.
    fn first<'a>(&'a self, text: &'a str) -> (&'a str, usize) {
        if let Some((matcher, _)) = &self.user_defined
            && let Some(found) = matcher.find(Input::new(text).anchored(Anchored::Yes))
        {
            return (&text[..found.end()], found.end());
        }
        if let Some(found) = self.map.as_ref().and_then(|map| map.longest(text)) {
            return found;
        }
        let length = text.chars().next().map_or(0, char::len_utf8);
        (&text[..length], length)
    }
}

/// A matcher for user-defined pieces (leftmost, then longest), and their ids.
fn user_defined(vocabulary: &Vocabulary) -> Result<Option<(AhoCorasick, Vec<u32>)>, String> {
    let (ids, texts): (Vec<u32>, Vec<&str>) = vocabulary
        .of_kind(PieceType::UserDefined)
        .filter(|(_, piece)| !piece.text.is_empty())
        .map(|(id, piece)| (id, piece.text.as_str()))
        .unzip();
    if ids.is_empty() {
        return Ok(None);
    }
    let builder = AhoCorasick::builder()
        .match_kind(MatchKind::LeftmostLongest)
        .start_kind(StartKind::Both)
        .build(texts);
    let matcher =
        builder.map_err(|error| format!("its user-defined pieces cannot be searched for: {error}"))?;
    Ok(Some((matcher, ids)))
}

/// A table that maps strings to strings: a double-array trie in the format of Darts-clone, whose values are offsets of
/// zero-terminated strings.
#[derive(Debug, Clone)]
struct CharacterMap {
    trie: Vec<u32>,
    strings: String,
}

impl CharacterMap {
    fn new(bytes: &[u8]) -> Option<Self> {
        let (length, rest) = bytes.split_first_chunk()?;
        let (trie, strings) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        let (units, odd) = trie.as_chunks();
        if units.is_empty() || !odd.is_empty() {
            return None;
        }
        let strings = String::from_utf8(strings.to_vec()).ok()?;
        Some(Self { trie: units.iter().map(|unit| u32::from_le_bytes(*unit)).collect(), strings })
    }

    /// What the longest prefix of `text` in the table is mapped to, and the length of that prefix.
    fn longest(&self, text: &str) -> Option<(&str, usize)> {
        let offset = |unit: u32| ((unit >> 10) << ((unit & (1 << 9)) >> 6)) as usize;
        let mut node = offset(self.trie[0]);
        let mut found = None;
        for (index, byte) in text.bytes().enumerate() {
            node ^= usize::from(byte);
            let unit = *self.trie.get(node)?;
            // The label of a unit that holds a value has its highest bit set and equals no byte.
            if unit & (1 << 31 | 0xff) != u32::from(byte) {
                break;
            }
            node ^= offset(unit);
            if unit >> 8 & 1 == 1 {
                let value = self.trie.get(node)? & !(1 << 31);
                found = Some((value as usize, index + 1));
            }
        }
        let (start, length) = found?;
        let string = self.strings.get(start..)?;
        Some((string.split('\0').next().unwrap_or_default(), length))
    }
}
