//! Decodes the part of a text that is settled while more ids are still to come.
//!
//! Most decoders only append, except for a character whose bytes are not complete yet. Some look back: where a
//! `tokenizer.json` falls back to bytes, a run of byte tokens is valid text as a whole or not at all, so one more byte
//! can change the text of all the others. With a decoder that is not known to append, nothing is settled before the
//! end.

use tokenizers::decoders::DecoderWrapper;

use super::model::PieceType;
use super::{Decoding, Kind, Tokenizer};

/// How far back one more token can reach.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    /// To an incomplete character at the end.
    Character,
    /// To the last token, whose text differs at the end of a text.
    Token,
    /// To the run of byte tokens at the end.
    Bytes,
    /// To the beginning of the text.
    Everything,
}

impl Tokenizer {
    /// The text of `ids` as far as no later ids can change it. It is a prefix of what [`Self::decode`] returns for
    /// `ids` and for `ids` followed by any others. It never ends in U+FFFD, which may stand for an incomplete
    /// character.
    pub fn decode_settled(&self, ids: &[u32]) -> String {
        let reach = match &self.0.kind {
            Kind::SentencePiece(model) if model.decoding == Decoding::PerRun => Reach::Bytes,
            Kind::SentencePiece(_) | Kind::ByteLevel(_) => Reach::Character,
            Kind::Reference(reference) => reference.get_decoder().map_or(Reach::Character, reach),
        };
        let end = match reach {
            Reach::Token => return self.decode_in_the_middle(ids),
            Reach::Character => ids.len(),
            // Tokens without text do not end a run.
            Reach::Bytes => {
                ids.iter().rposition(|id| self.is_byte(*id) == Some(false)).map_or(0, |last| last + 1)
            }
            Reach::Everything => 0,
        };
        let text = self.decode(&ids[..end]);
        text.trim_end_matches(char::REPLACEMENT_CHARACTER).to_owned()
    }

    /// The text that `ids` have both at the end of a text and before another token.
    fn decode_in_the_middle(&self, ids: &[u32]) -> String {
        let Some(last) = ids.iter().rfind(|id| self.is_byte(**id).is_some()) else { return String::new() };
        let (text, longer) = (self.decode(ids), self.decode(&[ids, &[*last]].concat()));
        let both = text.chars().zip(longer.chars()).take_while(|(here, there)| here == there);
        both.map(|(here, _)| here).collect()
    }

    /// Whether a token stands for a byte, or `None` if it has no text.
    pub(super) fn is_byte(&self, id: u32) -> Option<bool> {
        match &self.0.kind {
            Kind::SentencePiece(model) => {
                let kind = model.vocabulary.pieces.get(id as usize)?.kind;
                (kind != PieceType::Control).then_some(kind == PieceType::Byte)
            }
            Kind::ByteLevel(_) => Some(false),
            Kind::Reference(reference) => {
                let token = reference.id_to_token(id)?;
                let special = reference.get_added_vocabulary().is_special_token(&token);
                (!special).then(|| names_byte(&token))
            }
        }
    }
}

/// Whether Hugging Face's library decodes `token` as a byte.
fn names_byte(token: &str) -> bool {
    let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
    digits.is_some_and(|digits| digits.len() == 2 && u8::from_str_radix(digits, 16).is_ok())
}

/// How far a decoder of Hugging Face's library looks back. Steps that change one token at a time only append. So do
/// steps that join tokens, unless a later step searches the joined text: text that is stripped at its ends can only
/// return.
fn reach(decoder: &DecoderWrapper) -> Reach {
    use DecoderWrapper as Step;
    let steps = match decoder {
        Step::BPE(_) => return Reach::Token,
        Step::Sequence(sequence) => sequence.get_decoders(),
        step => std::slice::from_ref(step),
    };
    let joined = steps.iter().position(|step| matches!(step, Step::Fuse(_) | Step::ByteLevel(_)));
    let (single, whole) = steps.split_at(joined.unwrap_or(steps.len()));
    let appends = single.iter().all(|step| !matches!(step, Step::Sequence(_) | Step::BPE(_)))
        && whole.iter().skip(1).all(|step| matches!(step, Step::Strip(_) | Step::Fuse(_)));
    if !appends {
        Reach::Everything
    } else if single.iter().any(|step| matches!(step, Step::ByteFallback(_))) {
        Reach::Bytes
    } else {
        Reach::Character
    }
}
