//! The wire format of an operation: header and checksum of a frame.
//!
//! Every frame names the operation that its sender is in. A receiver that is in another one refuses the frame before it accepts a byte of
//! data, so members that have drifted apart never add up unrelated numbers.
//!
//! Header and data have a checksum each. TCP's 16-bit sum lets about one in 65,000 damaged segments pass, and network
//! cards and middleboxes that recompute it make a valid one for what they damaged themselves. Checksums find accidents;
//! frames are not protected against somebody who changes them on purpose.

use std::hash::Hasher as _;

use twox_hash::xxhash3_64::Hasher;
use ulmus_types::Generation;

/// The operation that a frame belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Operation {
    ReduceScatter,
    AllGather,
    Broadcast,
}

/// The type of a frame's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ElementType {
    I64,
    F32,
}

/// The header of a frame.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) generation: Generation,
    /// Number of the operation within the generation, from 1.
    pub(super) number: u64,
    pub(super) operation: Operation,
    pub(super) element: ElementType,
    /// The frame's number within the operation.
    pub(super) part: u32,
    /// Bytes of data that follow.
    pub(super) bytes: u64,
}

/// The result of decoding a header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decoded {
    Header(Header),
    /// It arrived undamaged, but names no known operation.
    Unknown,
    /// It is not what was sent.
    Damaged,
}

impl Header {
    /// Encoded bytes. They include a checksum of the header itself, which is trusted before the data arrive.
    pub(super) const BYTES: usize = Self::FIELDS + Checksum::BYTES;
    const FIELDS: usize = 32;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.generation.get().to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16] = self.operation as u8;
        bytes[17] = self.element as u8;
        bytes[20..24].copy_from_slice(&self.part.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.bytes.to_le_bytes());
        let checksum = Checksum::of(&bytes[..Self::FIELDS]);
        bytes[Self::FIELDS..].copy_from_slice(&checksum);
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Decoded {
        if Checksum::of(&bytes[..Self::FIELDS]) != bytes[Self::FIELDS..] {
            return Decoded::Damaged;
        }
        let operation = match bytes[16] {
            0 => Operation::ReduceScatter,
            1 => Operation::AllGather,
            2 => Operation::Broadcast,
            _ => return Decoded::Unknown,
        };
        let element = match bytes[17] {
            0 => ElementType::I64,
            1 => ElementType::F32,
            _ => return Decoded::Unknown,
        };
        Decoded::Header(Self {
            generation: Generation::new(u64::from_le_bytes(word(bytes, 0))),
            number: u64::from_le_bytes(word(bytes, 8)),
            operation,
            element,
            part: u32::from_le_bytes(word(bytes, 20)),
            bytes: u64::from_le_bytes(word(bytes, 24)),
        })
    }
}

impl std::fmt::Display for Header {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { generation, number, operation, element, part, bytes } = self;
        write!(
            f,
            "{operation:?} {number} of generation {generation}, part {part} ({bytes} bytes of {element:?})"
        )
    }
}

/// The 64-bit XXH3 of a frame. It misses one in 2^64 damaged frames, and is as fast as memory.
pub(super) struct Checksum(Hasher);

impl Checksum {
    pub(super) const BYTES: usize = 8;

    /// The checksum of a frame with this header, to which the frame's data must be added.
    pub(super) fn begin(header: &[u8; Header::BYTES]) -> Self {
        let mut hasher = Hasher::new();
        hasher.write(header);
        Self(hasher)
    }

    pub(super) fn add(&mut self, data: &[u8]) {
        self.0.write(data);
    }

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        self.0.finish().to_le_bytes()
    }

    fn of(bytes: &[u8]) -> [u8; Self::BYTES] {
        Hasher::oneshot(bytes).to_le_bytes()
    }
}

fn word<const N: usize>(bytes: &[u8], start: usize) -> [u8; N] {
    bytes[start..start + N].try_into().expect("a range of N bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_round_trip() {
        for operation in [Operation::ReduceScatter, Operation::AllGather, Operation::Broadcast] {
            for element in [ElementType::I64, ElementType::F32] {
                let header = Header {
                    generation: Generation::new(3),
                    number: 1 << 40,
                    operation,
                    element,
                    part: u32::MAX,
                    bytes: 1 << 35,
                };
                let bytes = header.encode();
                assert_eq!(Header::decode(&bytes), Decoded::Header(header));
                for bit in 0..bytes.len() * 8 {
                    let mut bytes = bytes;
                    bytes[bit / 8] ^= 1 << (bit % 8);
                    assert_eq!(Header::decode(&bytes), Decoded::Damaged, "bit {bit}");
                }
            }
        }
    }
}
