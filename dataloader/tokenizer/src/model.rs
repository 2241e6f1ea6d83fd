//! The wire format of SentencePiece's `tokenizer.model`, as far as BPE models with byte fallback need it.
//!
//! Field numbers are those of `sentencepiece_model.proto`. Fields that are not listed here are skipped when a file is
//! read, and omitted when one is written.

use prost::Message;

/// A `tokenizer.model`.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct ModelProto {
    #[prost(message, repeated, tag = "1")]
    pub(crate) pieces: Vec<PieceProto>,
    #[prost(message, optional, tag = "2")]
    pub(crate) trainer: Option<TrainerProto>,
    #[prost(message, optional, tag = "3")]
    pub(crate) normalizer: Option<NormalizerProto>,
    #[prost(message, optional, tag = "5")]
    pub(crate) denormalizer: Option<NormalizerProto>,
}

/// One piece. Its id is its index in the list of pieces.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct PieceProto {
    #[prost(string, optional, tag = "1")]
    pub(crate) text: Option<String>,
    #[prost(float, optional, tag = "2")]
    pub(crate) score: Option<f32>,
    #[prost(enumeration = "PieceType", optional, tag = "3", default = "Normal")]
    pub(crate) kind: Option<i32>,
}

/// The kind of a piece.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum PieceType {
    Normal = 1,
    Unknown = 2,
    Control = 3,
    UserDefined = 4,
    Unused = 5,
    Byte = 6,
}

/// How the model was trained. Readers take the kind of model and the special ids from here.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct TrainerProto {
    #[prost(enumeration = "ModelType", optional, tag = "3", default = "Unigram")]
    pub(crate) model_type: Option<i32>,
    #[prost(int32, optional, tag = "4")]
    pub(crate) vocab_size: Option<i32>,
    #[prost(float, optional, tag = "10")]
    pub(crate) character_coverage: Option<f32>,
    #[prost(int32, optional, tag = "20")]
    pub(crate) max_piece_length: Option<i32>,
    #[prost(bool, optional, tag = "24")]
    pub(crate) treat_whitespace_as_suffix: Option<bool>,
    #[prost(bool, optional, tag = "25")]
    pub(crate) split_digits: Option<bool>,
    #[prost(bool, optional, tag = "26")]
    pub(crate) allow_whitespace_only_pieces: Option<bool>,
    #[prost(bool, optional, tag = "35")]
    pub(crate) byte_fallback: Option<bool>,
    #[prost(int32, optional, tag = "40", default = "0")]
    pub(crate) unk_id: Option<i32>,
    #[prost(int32, optional, tag = "41", default = "1")]
    pub(crate) bos_id: Option<i32>,
    #[prost(int32, optional, tag = "42", default = "2")]
    pub(crate) eos_id: Option<i32>,
    #[prost(int32, optional, tag = "43", default = "-1")]
    pub(crate) pad_id: Option<i32>,
    #[prost(string, optional, tag = "44", default = " \u{2047} ")]
    pub(crate) unk_surface: Option<String>,
}

/// Kinds of models.
#[derive(Debug, Clone, Copy, PartialEq, Eq, prost::Enumeration)]
#[repr(i32)]
pub(crate) enum ModelType {
    Unigram = 1,
    Bpe = 2,
    Word = 3,
    Char = 4,
}

/// How a text is normalised before it is cut into pieces.
#[derive(Clone, PartialEq, Message)]
pub(crate) struct NormalizerProto {
    #[prost(string, optional, tag = "1")]
    pub(crate) name: Option<String>,
    #[prost(bytes = "vec", optional, tag = "2")]
    pub(crate) charsmap: Option<Vec<u8>>,
    #[prost(bool, optional, tag = "3", default = "true")]
    pub(crate) add_dummy_prefix: Option<bool>,
    #[prost(bool, optional, tag = "4", default = "true")]
    pub(crate) remove_extra_whitespaces: Option<bool>,
    #[prost(bool, optional, tag = "5", default = "true")]
    pub(crate) escape_whitespaces: Option<bool>,
}
