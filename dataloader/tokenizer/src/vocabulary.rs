//! The pieces of a SentencePiece model, and the encoding of characters that are not pieces.

use std::collections::HashMap;

use super::model::{ModelProto, PieceType};

/// Stands for a space inside pieces.
pub(super) const SPACE_MARK: char = '\u{2581}';

#[derive(Debug, Clone)]
pub(super) struct Piece {
    pub text: String,
    pub score: f32,
    pub kind: PieceType,
}

/// How a character is encoded that is not a piece.
#[derive(Debug, Clone)]
pub(super) enum Unknown {
    /// As the pieces of its UTF-8 bytes.
    Bytes(Box<[u32; 256]>),
    /// As one piece, which also stands for a run of such characters.
    Piece(u32),
}

/// All pieces. The id of a piece is its index.
#[derive(Debug, Clone)]
pub(super) struct Vocabulary {
    pub pieces: Vec<Piece>,
    pub unknown: Unknown,
    /// The text that the unknown piece decodes to.
    pub unknown_surface: String,
    /// BOS, if the model names it.
    pub bos: Option<u32>,
    pub eos: Option<u32>,
}

impl Vocabulary {
    /// The vocabulary of a model, or what is wrong with it and what to give instead.
    pub(super) fn new(model: &ModelProto) -> Result<Self, String> {
        let trainer = model.trainer.clone().unwrap_or_default();
        let pieces: Vec<Piece> = model
            .pieces
            .iter()
            .map(|piece| Piece {
                kind: piece.kind(),
                score: piece.score(),
                text: piece.text.clone().unwrap_or_default(),
            })
            .collect();
        let special = |id: i32| u32::try_from(id).ok().filter(|id| (*id as usize) < pieces.len());
        let (bos, eos) = (special(trainer.bos_id()), special(trainer.eos_id()));
        let unknown = if trainer.byte_fallback() {
            Unknown::Bytes(byte_pieces(&pieces)?)
        } else {
            let unknown = (0..).zip(&pieces).find(|(_, piece)| piece.kind == PieceType::Unknown);
            Unknown::Piece(unknown.ok_or("it has no piece for unknown characters; give a model with one")?.0)
        };
        Ok(Self { pieces, unknown, unknown_surface: trainer.unk_surface().to_owned(), bos, eos })
    }

    /// A vocabulary with a piece for each byte.
    pub(super) fn of_pieces(pieces: Vec<Piece>) -> Result<Self, String> {
        let unknown = Unknown::Bytes(byte_pieces(&pieces)?);
        Ok(Self { pieces, unknown, unknown_surface: String::new(), bos: None, eos: None })
    }

    /// The pieces that can be part of an encoded text, with their ids.
    pub(super) fn of_texts(&self) -> impl Iterator<Item = (u32, &Piece)> {
        (0..).zip(&self.pieces).filter(|(_, piece)| {
            matches!(piece.kind, PieceType::Normal | PieceType::UserDefined | PieceType::Unused)
        })
    }

    pub(super) fn of_kind(&self, kind: PieceType) -> impl Iterator<Item = (u32, &Piece)> {
        (0..).zip(&self.pieces).filter(move |(_, piece)| piece.kind == kind)
    }

    /// The ids of the pieces that can be part of an encoded text, by their own text.
    pub(super) fn by_text(&self) -> HashMap<&str, u32> {
        self.of_texts().map(|(id, piece)| (piece.text.as_str(), id)).collect()
    }

    /// Whether a piece can be part of an encoded text and begins with [`SPACE_MARK`].
    pub(super) fn begins_with_space(&self, id: u32) -> bool {
        let Piece { text, kind, .. } = &self.pieces[id as usize];
        text.starts_with(SPACE_MARK)
            && matches!(kind, PieceType::Normal | PieceType::UserDefined | PieceType::Unused)
    }

    /// The bytes that a piece decodes to.
    pub(super) fn surface(&self, piece: &Piece) -> Vec<u8> {
        match piece.kind {
            PieceType::Byte => byte_of(&piece.text).into_iter().collect(),
            PieceType::Control => Vec::new(),
            PieceType::Unknown => self.unknown_surface.clone().into_bytes(),
            PieceType::Normal | PieceType::UserDefined | PieceType::Unused => {
                piece.text.replace(SPACE_MARK, " ").into_bytes()
            }
        }
    }

    /// Appends the ids of a character that is not a piece.
    pub(super) fn push_unknown(&self, ids: &mut Vec<u32>, c: char) {
        match &self.unknown {
            Unknown::Bytes(bytes) => {
                let mut utf8 = [0; 4];
                ids.extend(c.encode_utf8(&mut utf8).bytes().map(|byte| bytes[usize::from(byte)]));
            }
            Unknown::Piece(id) => ids.push(*id),
        }
    }

    /// Merges each run of unknown pieces from `start` on into one.
    pub(super) fn merge_unknown(&self, ids: &mut Vec<u32>, start: usize) {
        let Unknown::Piece(unknown) = self.unknown else { return };
        let mut kept = start;
        for at in start..ids.len() {
            if at == start || ids[at] != unknown || ids[at - 1] != unknown {
                ids[kept] = ids[at];
                kept += 1;
            }
        }
        ids.truncate(kept);
    }
}

fn byte_pieces(pieces: &[Piece]) -> Result<Box<[u32; 256]>, String> {
    let mut ids = [None; 256];
    for (id, piece) in (0..).zip(pieces).filter(|(_, piece)| piece.kind == PieceType::Byte) {
        let byte = byte_of(&piece.text)
            .ok_or_else(|| format!("its byte piece {:?} is not of the form <0x00>", piece.text))?;
        ids[usize::from(byte)] = Some(id);
    }
    let mut all = Box::new([0; 256]);
    for (to, id) in all.iter_mut().zip(ids) {
        *to = id.ok_or("its byte fallback is incomplete; give a model with all 256 byte pieces")?;
    }
    Ok(all)
}

/// The byte of a piece such as `<0x0A>`.
pub(super) fn byte_of(piece: &str) -> Option<u8> {
    let digits = piece.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_digit = |digit: u8| matches!(digit, b'0'..=b'9' | b'A'..=b'F');
    (digits.len() == 2 && digits.bytes().all(is_digit)).then(|| u8::from_str_radix(digits, 16).ok())?
}
