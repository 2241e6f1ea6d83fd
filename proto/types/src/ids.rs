//! Newtypes for the identities of a run.
//!
//! A restarted process is a *different* worker: [`WorkerId`] carries an [`Incarnation`]. Every change of
//! membership is a new [`Generation`], and a message that carries an older one is fenced.

use std::fmt;
use std::str::FromStr;

use arrayvec::ArrayString;
use serde::{Deserialize, Serialize};

/// Text that is not a valid id or name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a {what}; {rule}")]
pub struct IdError {
    what: &'static str,
    text: String,
    rule: &'static str,
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name($inner);

        impl $name {
            /// Wraps a plain number.
            pub const fn new(value: $inner) -> Self {
                Self(value)
            }

            /// The plain number.
            pub const fn get(self) -> $inner {
                self.0
            }

            /// The next number.
            #[must_use]
            pub const fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

number! {
    /// The membership number of a run. It increases with every change of the training group, is stored before any
    /// assignment is sent, and fences every message sent under an older one.
    Generation(u64)
}
number! {
    /// The number of optimizer updates that a state has seen; 0 is the state after initialisation.
    Step(u64)
}
number! {
    /// A worker's position in the training group of one generation, from 0.
    Rank(u32)
}
number! {
    /// One of the K logical data streams of a run.
    LaneId(u32)
}
number! {
    /// Distinguishes one life of a worker process from the next.
    Incarnation(u64)
}

impl Rank {
    /// The rank as an index into per-rank slices.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl LaneId {
    /// The lane as an index into per-lane slices.
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

fn is_name(text: &str) -> bool {
    let mut bytes = text.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphanumeric())
        && text.len() <= 64
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
}

/// A name of a stage is also a segment of the paths of keys, and of files.
fn is_stage_name(text: &str) -> bool {
    is_name(text) && !text.contains('.') && text.starts_with(|first: char| first.is_ascii_alphabetic())
}

/// Distinguishes a run from every other, whatever their names: 16 random bytes, written as 32 hexadecimal digits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct RunId(u128);

impl RunId {
    /// Builds an id from random bytes.
    pub const fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(u128::from_be_bytes(bytes))
    }

    /// The 16 bytes of the id.
    pub const fn to_bytes(self) -> [u8; 16] {
        self.0.to_be_bytes()
    }

    /// The first 8 digits, enough for a person to compare.
    pub fn short(self) -> String {
        self.to_string()[..8].to_owned()
    }
}

impl fmt::Display for RunId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

impl FromStr for RunId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let digits = text.len() == 32 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        match u128::from_str_radix(text, 16) {
            Ok(id) if digits => Ok(Self(id)),
            _ => Err(IdError { what: "run id", text: text.to_owned(), rule: "use 32 hexadecimal digits" }),
        }
    }
}

impl TryFrom<String> for RunId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<RunId> for String {
    fn from(id: RunId) -> Self {
        id.to_string()
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal, $is_one:ident, $rule:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                if $is_one(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(IdError {
                        what: $what,
                        text: text.to_owned(),
                        rule: $rule,
                    })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name! {
    /// The name of a run and of its folder.
    RunName,
    "run name",
    is_name,
    "use 1 to 64 letters, digits, '-', '_' and '.', beginning with a letter or digit"
}

/// The name of a stage, which no other stage of the plan has. It is stored in place, so that what names a stage can be copied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct StageName(ArrayString<80>);

impl StageName {
    /// The name as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The name of a stage that belongs to this one. It has room, since names that are read have 64 characters at most.
    pub(crate) fn with(self, suffix: &str) -> Self {
        let mut name = self.0;
        name.push('-');
        name.push_str(suffix);
        Self(name)
    }
}

impl FromStr for StageName {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let name = ArrayString::from(text).ok().filter(|name| is_stage_name(name));
        name.map(Self).ok_or_else(|| IdError {
            what: "stage name",
            text: text.to_owned(),
            rule: "use 1 to 64 letters, digits, '-' and '_', beginning with a letter",
        })
    }
}

impl TryFrom<String> for StageName {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<StageName> for String {
    fn from(name: StageName) -> Self {
        name.as_str().to_owned()
    }
}

impl fmt::Display for StageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// One life of one worker: its name and incarnation.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct WorkerId {
    name: String,
    incarnation: Incarnation,
}

impl WorkerId {
    /// Builds the identity.
    ///
    /// # Errors
    /// When `name` is not 1 to 64 letters, digits, '-', '_' and '.'.
    pub fn new(name: impl Into<String>, incarnation: Incarnation) -> Result<Self, IdError> {
        let name = name.into();
        if is_name(&name) {
            Ok(Self { name, incarnation })
        } else {
            Err(IdError {
                what: "worker name",
                text: name,
                rule: "use 1 to 64 letters, digits, '-', '_' and '.', beginning with a letter or digit",
            })
        }
    }

    /// The name, which a restarted worker keeps.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The incarnation, which a restarted worker does not keep.
    pub const fn incarnation(&self) -> Incarnation {
        self.incarnation
    }
}

impl fmt::Display for WorkerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}#{:x}", self.name, self.incarnation.get())
    }
}

/// A checkpoint: the state of a training stage after `step`, as the group of `generation` wrote it.
///
/// Its text form is the name of its directory, `step-00005000-g3`, after the name of the stage unless that is pretraining:
/// `dpo/step-00000300-g9`. The generation is part of the name so that a fenced group can never write into the directory of the
/// group that replaced it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct CheckpointId {
    training: StageName,
    step: Step,
    generation: Generation,
}

impl CheckpointId {
    /// Names the checkpoint of `step` of a training stage by the group of `generation`.
    pub const fn new(training: StageName, step: Step, generation: Generation) -> Self {
        Self { training, step, generation }
    }

    /// The training stage.
    pub const fn training(self) -> StageName {
        self.training
    }

    /// The number of optimizer updates that the state has seen.
    pub const fn step(self) -> Step {
        self.step
    }

    /// The generation whose group wrote it.
    pub const fn generation(self) -> Generation {
        self.generation
    }

    /// The checkpoint of a training stage that is in a directory of this name.
    ///
    /// # Errors
    /// When no checkpoint has a directory of that name.
    pub fn in_directory(training: StageName, directory: &str) -> Result<Self, IdError> {
        let error = || IdError {
            what: "checkpoint name",
            text: directory.to_owned(),
            rule: "use the form step-00005000-g3",
        };
        let (step, generation) =
            directory.strip_prefix("step-").and_then(|rest| rest.split_once("-g")).ok_or_else(error)?;
        let id = Self::new(
            training,
            Step::new(step.parse().map_err(|_| error())?),
            Generation::new(generation.parse().map_err(|_| error())?),
        );
        // Only the canonical spelling is accepted, so that no checkpoint has two names.
        if id.directory() == directory { Ok(id) } else { Err(error()) }
    }

    /// The name of its directory.
    pub fn directory(self) -> String {
        format!("step-{:08}-g{}", self.step.get(), self.generation.get())
    }
}

impl fmt::Display for CheckpointId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.training == StageName::pretraining() {
            f.pad(&self.directory())
        } else {
            f.pad(&format!("{}/{}", self.training, self.directory()))
        }
    }
}

impl FromStr for CheckpointId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        let Some((training, directory)) = text.split_once('/') else {
            return Self::in_directory(StageName::pretraining(), text);
        };
        let id = Self::in_directory(training.parse()?, directory)?;
        if id.training != StageName::pretraining() {
            return Ok(id);
        }
        let (what, text) = ("checkpoint name", text.to_owned());
        Err(IdError { what, text, rule: "leave out the stage for a checkpoint of pretraining" })
    }
}

impl TryFrom<String> for CheckpointId {
    type Error = IdError;

    fn try_from(text: String) -> Result<Self, IdError> {
        text.parse()
    }
}

impl From<CheckpointId> for String {
    fn from(id: CheckpointId) -> Self {
        id.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_names_round_trip_and_sort_by_step() {
        let id = |training: StageName, step, generation| {
            CheckpointId::new(training, Step::new(step), Generation::new(generation))
        };
        let pretraining = StageName::pretraining();
        assert_eq!(id(pretraining, 5000, 3).to_string(), "step-00005000-g3");
        assert_eq!("step-00005000-g3".parse(), Ok(id(pretraining, 5000, 3)));
        assert!(id(pretraining, 5000, 3) < id(pretraining, 10_000, 1));
        assert_eq!(id("dpo".parse().unwrap(), 20, 7).to_string(), "dpo/step-00000020-g7");
        assert_eq!("dpo/step-00000020-g7".parse(), Ok(id("dpo".parse().unwrap(), 20, 7)));
        for wrong in [
            "step-5000-g3",
            "step-00005000",
            "step-00005000-g",
            "step-00005000-g03",
            "",
            "train/step-00005000-g3",
            "a/b/step-00005000-g3",
            "../step-00005000-g3",
        ] {
            assert!(wrong.parse::<CheckpointId>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_cannot_leave_their_folder() {
        for wrong in ["", "..", "../x", "a/b", ".hidden", "-x", "a b", &"x".repeat(65)] {
            assert!(wrong.parse::<RunName>().is_err(), "{wrong}");
            assert!(WorkerId::new(wrong, Incarnation::new(1)).is_err(), "{wrong}");
        }
        assert!("quickstart-2.b_c".parse::<RunName>().is_ok());
        for wrong in ["", "1", "v1.0", "export.json", "a/b"] {
            assert!(wrong.parse::<StageName>().is_err(), "{wrong}");
        }
        assert!("zero-shot_2".parse::<StageName>().is_ok());
    }
}
