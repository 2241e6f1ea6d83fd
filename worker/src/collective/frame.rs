//! What goes over a connection besides the data: the greeting and its answer, the header of a frame and its checksum.
//!
//! Both sides of a connection prove that they have the key of the group before anything else is said. Every frame then
//! says what its sender believes to be doing. A receiver that believes something else refuses it before a byte of data
//! is taken, so that members which have drifted apart never add up unrelated numbers.
//!
//! Header and data have a checksum each. TCP's sum of 16 bits lets one damaged segment of some ten thousand pass, and
//! cards and middleboxes that compute it anew make a valid one for what they have damaged themselves. A checksum finds
//! accidents; frames are not proof against somebody who changes them on purpose.

use std::hash::Hasher as _;

use twox_hash::xxhash3_64::Hasher;
use ulmus_types::{Digest, Generation, GroupKey, Incarnation, Rank};

/// First bytes of every connection; the last one is the version of this format.
const MAGIC: [u8; 8] = *b"ulmusC\0\x02";
/// Bytes of a proof that its author has the key.
const PROOF: usize = blake3::OUT_LEN;

/// The first thing that the caller of a connection sends: who it is, and whom it means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Greeting {
    pub(super) run: Digest,
    pub(super) generation: Generation,
    pub(super) from: Rank,
    pub(super) from_incarnation: Incarnation,
    pub(super) to_incarnation: Incarnation,
}

impl Greeting {
    /// Bytes with the proof.
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

    /// Proves that its author has `key`, as the caller or, with the other `role`, as the one who was called.
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

    /// The greeting and its proof, which is yet to be looked at; `None` when this is no connection of a group, or one of
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

    /// Whether the caller has `key`. Hashes are compared in constant time.
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
    /// Bytes with the proof.
    pub(super) const BYTES: usize = 1 + PROOF;

    const ALL: [Self; 6] = [
        Self::Welcome,
        Self::StaleGeneration,
        Self::OtherRun,
        Self::OtherIncarnation,
        Self::NotYourNeighbour,
        Self::OtherKey,
    ];

    /// A welcome, with the proof that a member says it.
    pub(super) fn welcome(greeting: &Greeting, key: &GroupKey) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = Self::Welcome as u8;
        bytes[1..].copy_from_slice(greeting.proof(b"welcome", key).as_bytes());
        bytes
    }

    /// Any other answer. It is often given by one who does not have the key, and proves nothing: whoever could forge it
    /// could as well close the connection.
    pub(super) const fn refusal(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self as u8;
        bytes
    }

    /// The answer to `greeting`; `None` when nobody answers so who has the key.
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
            Self::OtherIncarnation => "the worker that was meant has been restarted",
            Self::NotYourNeighbour => "another worker has this place in the group",
            Self::OtherKey => "the key is not that of the group; wait for the next generation",
        }
    }
}

/// Which operation a frame belongs to.
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
    /// Place of the frame within the operation.
    pub(super) part: u32,
    /// Bytes of data that follow.
    pub(super) bytes: u64,
}

/// What a header turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Decoded {
    Header(Header),
    /// It is as it was sent, and names no operation.
    Unknown,
    /// It is not what was sent.
    Damaged,
}

impl Header {
    /// Bytes with the header's own checksum: what it says is believed before the data are there.
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

/// XXH3 of what has gone over a connection, of 64 bits: it misses one damage of 2^64, at the speed of memory.
pub(super) struct Checksum(Hasher);

impl Checksum {
    pub(super) const BYTES: usize = 8;

    /// The checksum of a frame with this header, to which its data are yet to be added.
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
        // What the caller has sent is no answer to it.
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
