//! The wire format: greeting and answer of a connection, header and checksum of a frame.
//!
//! Before anything else, both ends of a connection prove that they have the group's key. Every frame then names the
//! operation that its sender is in. A receiver that is in another one refuses the frame before it accepts a byte of
//! data, so members that have drifted apart never add up unrelated numbers.
//!
//! Header and data have a checksum each. TCP's 16-bit sum lets about one in 65,000 damaged segments pass, and network
//! cards and middleboxes that recompute it make a valid one for what they damaged themselves. Checksums find accidents;
//! frames are not protected against somebody who changes them on purpose.

use std::hash::Hasher as _;

use twox_hash::xxhash3_64::Hasher;
use ulmus_types::{Digest, Generation, GroupKey, Incarnation, Rank};

/// The first bytes of every connection; the last of them is the version of this format.
const MAGIC: [u8; 8] = *b"ulmusC\0\x02";
/// Bytes of a proof that its author has the group's key.
const PROOF: usize = blake3::OUT_LEN;

/// The first thing that a caller sends: who it is, and whom it is calling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Greeting {
    pub(super) run: Digest,
    pub(super) generation: Generation,
    pub(super) from: Rank,
    pub(super) from_incarnation: Incarnation,
    pub(super) to_incarnation: Incarnation,
}

impl Greeting {
    /// Encoded bytes, proof included.
    pub(super) const BYTES: usize = Self::FIELDS + PROOF;
    const FIELDS: usize = 68;

    fn fields(&self) -> [u8; Self::FIELDS] {
        let mut bytes = [0; Self::FIELDS];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..40].copy_from_slice(self.run.as_bytes());
        bytes[40..48].copy_from_slice(&self.generation.get().to_le_bytes());
        bytes[48..52].copy_from_slice(&self.from.get().to_le_bytes());
        bytes[52..60].copy_from_slice(&self.from_incarnation.get().to_le_bytes());
        bytes[60..68].copy_from_slice(&self.to_incarnation.get().to_le_bytes());
        bytes
    }

    /// The proof that its author has `key`. `role` tells the caller's proof from the answerer's.
    fn proof(&self, role: &[u8], key: &GroupKey) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(key.as_bytes());
        hasher.update(role).update(&self.fields()).finalize()
    }

    pub(super) fn encode(&self, key: &GroupKey) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..Self::FIELDS].copy_from_slice(&self.fields());
        bytes[Self::FIELDS..].copy_from_slice(self.proof(b"greeting", key).as_bytes());
        bytes
    }

    /// The greeting and its proof, which is not checked yet; `None` if this is not a member's connection, or one of
    /// another version.
    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Option<(Self, blake3::Hash)> {
        let greeting = (bytes[..8] == MAGIC).then(|| Self {
            run: Digest::from_bytes(word(bytes, 8)),
            generation: Generation::new(u64::from_le_bytes(word(bytes, 40))),
            from: Rank::new(u32::from_le_bytes(word(bytes, 48))),
            from_incarnation: Incarnation::new(u64::from_le_bytes(word(bytes, 52))),
            to_incarnation: Incarnation::new(u64::from_le_bytes(word(bytes, 60))),
        })?;
        Some((greeting, blake3::Hash::from_bytes(word(bytes, Self::FIELDS))))
    }

    /// Whether `proof` shows that the caller has `key`. The comparison takes constant time.
    pub(super) fn is_proved(&self, proof: blake3::Hash, key: &GroupKey) -> bool {
        self.proof(b"greeting", key) == proof
    }
}

/// The answer to a greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Welcome,
    StaleGeneration,
    OtherRun,
    OtherIncarnation,
    NotYourNeighbour,
    OtherKey,
}

impl Answer {
    /// Encoded bytes, proof included.
    pub(super) const BYTES: usize = 1 + PROOF;

    const ALL: [Self; 6] = [
        Self::Welcome,
        Self::StaleGeneration,
        Self::OtherRun,
        Self::OtherIncarnation,
        Self::NotYourNeighbour,
        Self::OtherKey,
    ];

    /// A welcome, with the proof that a member sent it.
    pub(super) fn welcome(greeting: &Greeting, key: &GroupKey) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = Self::Welcome as u8;
        bytes[1..].copy_from_slice(greeting.proof(b"welcome", key).as_bytes());
        bytes
    }

    /// Any other answer, without a proof: often its author does not have the key, and whoever could forge it could just
    /// as well close the connection.
    pub(super) const fn refusal(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self as u8;
        bytes
    }

    /// The answer to `greeting`; `None` if nobody with the key can have sent it.
    pub(super) fn decode(bytes: &[u8; Self::BYTES], greeting: &Greeting, key: &GroupKey) -> Option<Self> {
        let answer = Self::ALL.get(bytes[0] as usize).copied()?;
        let proof = blake3::Hash::from_bytes(word(bytes, 1));
        (answer != Self::Welcome || greeting.proof(b"welcome", key) == proof).then_some(answer)
    }

    pub(super) const fn text(self) -> &'static str {
        match self {
            Self::Welcome => "welcome",
            Self::StaleGeneration => "the generation is over; leave the group and wait for the next",
            Self::OtherRun => "it belongs to another run",
            Self::OtherIncarnation => "the worker that was called has been restarted",
            Self::NotYourNeighbour => "another worker has this place in the group",
            Self::OtherKey => "the key is not that of the group; wait for the next generation",
        }
    }
}

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

    fn greeting() -> Greeting {
        Greeting {
            run: Digest::of(b"run"),
            generation: Generation::new(u64::MAX - 1),
            from: Rank::new(7),
            from_incarnation: Incarnation::new(0x1234_5678_9abc_def0),
            to_incarnation: Incarnation::new(2),
        }
    }

    #[test]
    fn greetings_round_trip_and_strangers_are_not_understood() {
        let key = GroupKey::from_bytes([3; 32]);
        let bytes = greeting().encode(&key);
        let (decoded, proof) = Greeting::decode(&bytes).unwrap();
        assert_eq!(decoded, greeting());
        assert!(decoded.is_proved(proof, &key));
        let mut http = bytes;
        http[..4].copy_from_slice(b"GET ");
        assert_eq!(Greeting::decode(&http), None);
    }

    #[test]
    fn every_bit_of_a_greeting_and_of_a_welcome_is_proved() {
        let (key, other) = (GroupKey::from_bytes([3; 32]), GroupKey::from_bytes([4; 32]));
        let (_, proof) = Greeting::decode(&greeting().encode(&key)).unwrap();
        assert!(!greeting().is_proved(proof, &other));
        let bytes = greeting().encode(&key);
        for bit in 0..bytes.len() * 8 {
            let mut bytes = bytes;
            bytes[bit / 8] ^= 1 << (bit % 8);
            let proved = Greeting::decode(&bytes).is_some_and(|(found, proof)| found.is_proved(proof, &key));
            assert!(!proved, "bit {bit}");
        }

        let welcome = Answer::welcome(&greeting(), &key);
        assert_eq!(Answer::decode(&welcome, &greeting(), &key), Some(Answer::Welcome));
        assert_eq!(Answer::decode(&welcome, &greeting(), &other), None);
        let elsewhere = Greeting { from: Rank::new(8), ..greeting() };
        assert_eq!(Answer::decode(&welcome, &elsewhere, &key), None);
        // The caller's own proof is no answer.
        let mut echo = welcome;
        echo[1..].copy_from_slice(&bytes[Greeting::FIELDS..]);
        assert_eq!(Answer::decode(&echo, &greeting(), &key), None);
    }

    #[test]
    fn headers_and_answers_round_trip() {
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
        let key = GroupKey::from_bytes([3; 32]);
        for answer in Answer::ALL.into_iter().skip(1) {
            assert_eq!(Answer::decode(&answer.refusal(), &greeting(), &key), Some(answer));
        }
        let mut unknown = Answer::OtherRun.refusal();
        unknown[0] = 200;
        assert_eq!(Answer::decode(&unknown, &greeting(), &key), None);
    }
}
