//! Caches the ids of short chunks of text: most chunks are words, and words repeat.

/// The cache has `1 << BITS` slots.
const BITS: u32 = 17;
/// Maximum number of ids in a slot.
const IDS: usize = 3;

/// Half a cache line: a chunk of 1 to 16 bytes and its ids.
#[derive(Debug, Clone, Copy, Default)]
#[repr(align(32))]
struct Slot {
    chunk: [u64; 2],
    ids: [u32; IDS],
    length: u8,
    count: u8,
}

/// The latest chunk of each hash.
#[derive(Debug)]
pub(super) struct Cache(Box<[Slot]>);

/// A chunk that is short enough for the cache.
#[derive(Debug, Clone, Copy)]
pub(super) struct Key {
    chunk: [u64; 2],
    length: u8,
    slot: usize,
}

impl Key {
    /// The key of a chunk, or `None` if the chunk is too long.
    #[inline]
    pub(super) fn new(chunk: &[u8]) -> Option<Self> {
        let word = |at: usize| chunk[at..].first_chunk().map(|bytes| u64::from_le_bytes(*bytes));
        let half = |at: usize| chunk[at..].first_chunk().map(|bytes| u64::from(u32::from_le_bytes(*bytes)));
        // The first and last bytes overlap or meet in the middle, so together with the length they identify the chunk.
        let words = match chunk.len() {
            8..=16 => [word(0)?, word(chunk.len() - 8)?],
            4..8 => [half(0)? | half(chunk.len() - 4)? << 32, 0],
            1..4 => {
                let byte = |at: usize| u64::from(chunk[at]);
                [byte(0) | byte(chunk.len() / 2) << 8 | byte(chunk.len() - 1) << 16, 0]
            }
            _ => return None,
        };
        let length = chunk.len() as u8;
        // The highest bits of a product depend on all bits below them.
        let mixed = (words[0] ^ u64::from(length) << 56).wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mixed = (mixed.rotate_left(32) ^ words[1]).wrapping_mul(0x5899_65CC_7537_4CC3);
        Some(Self { chunk: words, length, slot: (mixed >> (u64::BITS - BITS)) as usize })
    }
}

impl Cache {
    pub(super) fn new() -> Self {
        Self(vec![Slot::default(); 1 << BITS].into())
    }

    /// Appends the chunk's ids, and returns whether they were cached.
    #[inline]
    pub(super) fn get(&self, key: &Key, ids: &mut Vec<u32>) -> bool {
        let slot = &self.0[key.slot];
        let known = slot.chunk == key.chunk && slot.length == key.length;
        if known {
            // Copying all ids and truncating is far cheaper than a copy of variable size.
            ids.extend_from_slice(&slot.ids);
            ids.truncate(ids.len() - IDS + usize::from(slot.count));
        }
        known
    }

    /// Stores the chunk's ids if they fit in a slot.
    pub(super) fn put(&mut self, key: &Key, ids: &[u32]) {
        if ids.len() <= IDS {
            let mut slot =
                Slot { chunk: key.chunk, ids: [0; IDS], length: key.length, count: ids.len() as u8 };
            slot.ids[..ids.len()].copy_from_slice(ids);
            self.0[key.slot] = slot;
        }
    }
}
