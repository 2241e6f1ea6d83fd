//! Greeting and answer: both ends of a ring's connection prove that they have the group's key before anything else.

use ulmus_types::{Digest, Generation, GroupKey, Incarnation, Rank};

/// The first bytes of every connection; the last of them is the version of this format.
const MAGIC: [u8; 8] = *b"ulmusC\0\x02";
/// Bytes of a proof that its author has the group's key.
const PROOF: usize = blake3::OUT_LEN;

/// The first thing that a caller sends: who it is, and whom it is calling.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Greeting {
    /// The run.
    pub run: Digest,
    /// The generation of the group.
    pub generation: Generation,
    /// The caller's rank.
    pub from: Rank,
    /// The caller's incarnation.
    pub from_incarnation: Incarnation,
    /// The incarnation that the caller expects to answer.
    pub to_incarnation: Incarnation,
}

impl Greeting {
    /// Encoded bytes, proof included.
    pub const BYTES: usize = Self::FIELDS + PROOF;
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

    /// The bytes that are sent, with the proof that their author has `key`.
    pub fn encode(&self, key: &GroupKey) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..Self::FIELDS].copy_from_slice(&self.fields());
        bytes[Self::FIELDS..].copy_from_slice(self.proof(b"greeting", key).as_bytes());
        bytes
    }

    /// The greeting and its proof, which is not checked yet; `None` if this is not a member's connection, or one of
    /// another version.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Option<(Self, blake3::Hash)> {
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
    pub fn is_proved(&self, proof: blake3::Hash, key: &GroupKey) -> bool {
        self.proof(b"greeting", key) == proof
    }
}

/// The answer to a greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    /// The connection is accepted.
    Welcome,
    /// The caller's group has been replaced by a later one.
    StaleGeneration,
    /// The caller belongs to another run.
    OtherRun,
    /// The caller looks for an earlier incarnation of this process.
    OtherIncarnation,
    /// The caller is not the previous member of the group.
    NotYourNeighbour,
    /// The caller does not have the group's key.
    OtherKey,
}

impl Answer {
    /// Encoded bytes, proof included.
    pub const BYTES: usize = 1 + PROOF;

    const ALL: [Self; 6] = [
        Self::Welcome,
        Self::StaleGeneration,
        Self::OtherRun,
        Self::OtherIncarnation,
        Self::NotYourNeighbour,
        Self::OtherKey,
    ];

    /// A welcome, with the proof that a member sent it.
    pub fn welcome(greeting: &Greeting, key: &GroupKey) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = Self::Welcome as u8;
        bytes[1..].copy_from_slice(greeting.proof(b"welcome", key).as_bytes());
        bytes
    }

    /// Any other answer, without a proof: often its author does not have the key, and whoever could forge it could just
    /// as well close the connection.
    pub const fn refusal(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[0] = self as u8;
        bytes
    }

    /// The answer to `greeting`; `None` if nobody with the key can have sent it.
    pub fn decode(bytes: &[u8; Self::BYTES], greeting: &Greeting, key: &GroupKey) -> Option<Self> {
        let answer = Self::ALL.get(bytes[0] as usize).copied()?;
        let proof = blake3::Hash::from_bytes(word(bytes, 1));
        (answer != Self::Welcome || greeting.proof(b"welcome", key) == proof).then_some(answer)
    }

    /// What the answer means, for a person.
    pub const fn text(self) -> &'static str {
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
    fn answers_round_trip() {
        let key = GroupKey::from_bytes([3; 32]);
        for answer in Answer::ALL.into_iter().skip(1) {
            assert_eq!(Answer::decode(&answer.refusal(), &greeting(), &key), Some(answer));
        }
        let mut unknown = Answer::OtherRun.refusal();
        unknown[0] = 200;
        assert_eq!(Answer::decode(&unknown, &greeting(), &key), None);
    }
}
