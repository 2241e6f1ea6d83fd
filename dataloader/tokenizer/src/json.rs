//! Writes a SentencePiece tokenizer as Hugging Face's `tokenizer.json`, for programs that read only that.
//!
//! The control pieces are deliberately not among `added_tokens`, because they would then be matched in texts that
//! contain them literally. The list of merges gives every pair its own rank, so a reader of this file may differ where
//! a piece can be formed in several ways or pieces share a score. `tokenizer.model` is authoritative.

use serde_json::{Map, Value, json};

use super::bpe::Bpe;
use super::model::PieceType;
use super::vocabulary::{Unknown, Vocabulary};
use super::{Kind, SentencePiece, SpecialToken, Tokenizer};

impl Tokenizer {
    /// The contents of `tokenizer.json`, or `None` if the format cannot express what the model does to a text.
    pub fn to_json(&self) -> Option<String> {
        let Kind::SentencePiece(SentencePiece { vocabulary, normalizer, bpe, .. }) = &self.0.kind else {
            return String::from_utf8(self.0.file.clone()).ok();
        };
        if self.is_json() {
            return String::from_utf8(self.0.file.clone()).ok();
        }
        let byte_fallback = matches!(vocabulary.unknown, Unknown::Bytes(_));
        if !(normalizer.is_plain() && bpe.is_local() && byte_fallback) {
            return None;
        }
        let pieces = &vocabulary.pieces;
        let vocab: Map<String, Value> =
            (0..).zip(pieces).map(|(id, piece): (u32, _)| (piece.text.clone(), json!(id))).collect();
        let unknown = vocabulary.of_kind(PieceType::Unknown).next().map(|(_, piece)| &piece.text);
        let SpecialToken { id: bos_id, name: bos } = &self.0.bos;
        let one = |sequence: &str| json!([{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": sequence, "type_id": 0}}]);
        let mut pair = one("A").as_array().cloned().unwrap_or_default();
        pair.extend(one("B").as_array().cloned().unwrap_or_default());
        let prepend = normalizer.has_prefix().then(|| json!({"type": "Prepend", "prepend": "▁"}));
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let strip =
            normalizer.has_prefix().then(|| json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        let space = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let decoders: Vec<Value> = [space, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})]
            .into_iter()
            .chain(strip)
            .collect();
        let file = json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": [],
            "normalizer": {"type": "Sequence", "normalizers": prepend.into_iter().chain([replace]).collect::<Vec<_>>()},
            "pre_tokenizer": null,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": one("A"),
                "pair": pair,
                "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
            },
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": unknown,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": byte_fallback,
                "ignore_merges": false,
                "vocab": vocab,
                "merges": ranked_pairs(vocabulary, bpe),
            },
        });
        let mut text = serde_json::to_string_pretty(&file).expect("a JSON value can be written");
        text.push('\n');
        Some(text)
    }

    /// The texts of all pieces that can be part of an encoded text.
    #[cfg(test)]
    pub(super) fn normal_texts(&self) -> Vec<&str> {
        match &self.0.kind {
            Kind::SentencePiece(model) => {
                model.vocabulary.of_texts().map(|(_, piece)| piece.text.as_str()).collect()
            }
            Kind::ByteLevel(_) | Kind::Reference(_) => Vec::new(),
        }
    }
}

/// All pairs that form a piece, ordered by score, then by the piece's id, then by the ids of the two parts.
fn ranked_pairs<'v>(vocabulary: &'v Vocabulary, bpe: &Bpe) -> Vec<[&'v str; 2]> {
    let text = |id: u32| vocabulary.pieces[id as usize].text.as_str();
    bpe.ranked().into_iter().map(|(left, right)| [text(left), text(right)]).collect()
}
