//! The same tokenizer as Hugging Face's `tokenizer.json`, for programs that read only that.
//!
//! The control pieces are deliberately not among `added_tokens`: there they would be cut out of texts in which
//! they stand literally. The list of merges gives every pair a rank of its own, so a reader of this file may
//! differ where one piece can be made in several ways or pieces share a score; `tokenizer.model` is what counts.

use serde_json::{Map, Value, json};

use super::Tokenizer;

impl Tokenizer {
    /// The contents of `tokenizer.json`.
    pub fn to_json(&self) -> String {
        let vocab: Map<String, Value> =
            (0..).zip(&self.pieces).map(|(id, piece): (u32, _)| (piece.text.clone(), json!(id))).collect();
        let special = |id: u32| &self.pieces[id as usize].text;
        let unknown = special(0);
        let bos = special(self.bos);
        let one = |sequence: &str| json!([{"SpecialToken": {"id": bos, "type_id": 0}}, {"Sequence": {"id": sequence, "type_id": 0}}]);
        let mut pair = one("A").as_array().cloned().unwrap_or_default();
        pair.extend(one("B").as_array().cloned().unwrap_or_default());
        let prepend = self.dummy_prefix.then(|| json!({"type": "Prepend", "prepend": "▁"}));
        let replace = json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"});
        let strip =
            self.dummy_prefix.then(|| json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
        let blank = json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "});
        let decoders: Vec<Value> = [blank, json!({"type": "ByteFallback"}), json!({"type": "Fuse"})]
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
                "special_tokens": {bos: {"id": bos, "ids": [self.bos], "tokens": [bos]}},
            },
            "decoder": {"type": "Sequence", "decoders": decoders},
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": unknown,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": true,
                "byte_fallback": true,
                "ignore_merges": false,
                "vocab": vocab,
                "merges": self.ranked_pairs(),
            },
        });
        let mut text = serde_json::to_string_pretty(&file).expect("a JSON value can be written");
        text.push('\n');
        text
    }

    /// All pairs that make a piece: by score, then by id of the piece, then by ids of the two parts.
    fn ranked_pairs(&self) -> Vec<[&str; 2]> {
        let mut pairs: Vec<((u32, u32), (u32, u32))> = self
            .merges
            .iter()
            .filter(|((left, right), _)| (*left.max(right) as usize) < self.pieces.len())
            .map(|(pair, merge)| ((merge.priority, merge.id), *pair))
            .collect();
        pairs.sort_unstable();
        let text = |id: u32| self.pieces[id as usize].text.as_str();
        pairs.into_iter().map(|(_, (left, right))| [text(left), text(right)]).collect()
    }

    /// Texts of the pieces that texts are made of.
    #[cfg(test)]
    pub(super) fn normal_texts(&self) -> Vec<&str> {
        super::normal(&self.pieces).map(|(_, piece)| piece.text.as_str()).collect()
    }
}
