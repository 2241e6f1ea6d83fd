//! What goes over a connection before the data: the greeting of a connection and the header of a frame.
//!
//! Every frame says what its sender believes to be doing. A receiver that believes something else refuses it before
//! a byte of data is taken, so that members which have drifted apart never add up unrelated numbers.

use ulmus_types::{Digest, Generation, Incarnation, Rank};

/// First bytes of every connection; the last one is the version of this format.
const MAGIC: [u8; 8] = *b"ulmusC\0\x01";

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
    pub(super) const BYTES: usize = 68;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..40].copy_from_slice(self.run.as_bytes());
        bytes[40..48].copy_from_slice(&self.generation.get().to_le_bytes());
        bytes[48..52].copy_from_slice(&self.from.get().to_le_bytes());
        bytes[52..60].copy_from_slice(&self.from_incarnation.get().to_le_bytes());
        bytes[60..68].copy_from_slice(&self.to_incarnation.get().to_le_bytes());
        bytes
    }

    /// `None` when this is no connection of a group, or one of another version.
    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        (bytes[..8] == MAGIC).then(|| Self {
            run: Digest::from_bytes(word(bytes, 8)),
            generation: Generation::new(u64::from_le_bytes(word(bytes, 40))),
            from: Rank::new(u32::from_le_bytes(word(bytes, 48))),
            from_incarnation: Incarnation::new(u64::from_le_bytes(word(bytes, 52))),
            to_incarnation: Incarnation::new(u64::from_le_bytes(word(bytes, 60))),
        })
    }
}

/// The answer to a greeting, one byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    Welcome,
    StaleGeneration,
    OtherRun,
    OtherIncarnation,
    NotYourNeighbour,
}

impl Answer {
    const ALL: [Self; 5] = [
        Self::Welcome,
        Self::StaleGeneration,
        Self::OtherRun,
        Self::OtherIncarnation,
        Self::NotYourNeighbour,
    ];

    pub(super) const fn encode(self) -> u8 {
        self as u8
    }

    pub(super) fn decode(byte: u8) -> Option<Self> {
        Self::ALL.get(byte as usize).copied()
    }

    pub(super) const fn text(self) -> &'static str {
        match self {
            Self::Welcome => "welcome",
            Self::StaleGeneration => "the generation is over; leave the group and wait for the next",
            Self::OtherRun => "it belongs to another run",
            Self::OtherIncarnation => "the worker that was meant has been restarted",
            Self::NotYourNeighbour => "another worker has this place in the group",
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
    Bf16,
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

impl Header {
    pub(super) const BYTES: usize = 32;

    pub(super) fn encode(&self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.generation.get().to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16] = self.operation as u8;
        bytes[17] = self.element as u8;
        bytes[20..24].copy_from_slice(&self.part.to_le_bytes());
        bytes[24..].copy_from_slice(&self.bytes.to_le_bytes());
        bytes
    }

    pub(super) fn decode(bytes: &[u8; Self::BYTES]) -> Option<Self> {
        Some(Self {
            generation: Generation::new(u64::from_le_bytes(word(bytes, 0))),
            number: u64::from_le_bytes(word(bytes, 8)),
            operation: match bytes[16] {
                0 => Operation::ReduceScatter,
                1 => Operation::AllGather,
                2 => Operation::Broadcast,
                _ => return None,
            },
            element: match bytes[17] {
                0 => ElementType::I64,
                1 => ElementType::F32,
                2 => ElementType::Bf16,
                _ => return None,
            },
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

fn word<const N: usize>(bytes: &[u8], start: usize) -> [u8; N] {
    bytes[start..start + N].try_into().expect("a range of N bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn greetings_round_trip_and_strangers_are_not_understood() {
        let greeting = Greeting {
            run: Digest::of(b"run"),
            generation: Generation::new(u64::MAX - 1),
            from: Rank::new(7),
            from_incarnation: Incarnation::new(0x1234_5678_9abc_def0),
            to_incarnation: Incarnation::new(2),
        };
        let bytes = greeting.encode();
        assert_eq!(Greeting::decode(&bytes), Some(greeting));
        let mut http = bytes;
        http[..4].copy_from_slice(b"GET ");
        assert_eq!(Greeting::decode(&http), None);
    }

    #[test]
    fn headers_and_answers_round_trip() {
        for operation in [Operation::ReduceScatter, Operation::AllGather, Operation::Broadcast] {
            for element in [ElementType::I64, ElementType::F32, ElementType::Bf16] {
                let header = Header {
                    generation: Generation::new(3),
                    number: 1 << 40,
                    operation,
                    element,
                    part: u32::MAX,
                    bytes: 1 << 35,
                };
                assert_eq!(Header::decode(&header.encode()), Some(header));
            }
        }
        for answer in Answer::ALL {
            assert_eq!(Answer::decode(answer.encode()), Some(answer));
        }
        assert_eq!(Answer::decode(200), None);
    }
}
