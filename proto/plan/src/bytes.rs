//! Sizes in plans, such as `"64MiB"`.

use std::fmt;
use std::str::FromStr;

use bytesize::ByteSize;
use serde::{Deserialize, Serialize};

/// A number of bytes. It reads any usual spelling ("64MiB", "1.5 GB", 4096) and writes an exact one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "ByteSizeText", into = "String")]
pub struct Bytes(u64);

#[derive(Deserialize)]
#[serde(untagged, expecting = "it must be a size")]
enum ByteSizeText {
    Number(u64),
    Text(String),
}

impl Bytes {
    /// A size of `bytes` bytes.
    pub const fn new(bytes: u64) -> Self {
        Self(bytes)
    }

    /// A size of `mib` times 1024² bytes.
    pub const fn mib(mib: u64) -> Self {
        Self(mib << 20)
    }

    /// The number of bytes.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl TryFrom<ByteSizeText> for Bytes {
    type Error = String;

    fn try_from(text: ByteSizeText) -> Result<Self, String> {
        match text {
            ByteSizeText::Number(bytes) => Ok(Self(bytes)),
            ByteSizeText::Text(text) => text.parse(),
        }
    }
}

impl FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        text.parse::<ByteSize>()
            .map(|size| Self(size.as_u64()))
            .map_err(|_| format!("invalid size {text:?}; write for instance \"64MiB\""))
    }
}

impl From<Bytes> for String {
    fn from(bytes: Bytes) -> Self {
        bytes.to_string()
    }
}

impl fmt::Display for Bytes {
    /// Uses the largest binary unit that divides the size, so that nothing is lost.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        match units.into_iter().find(|(shift, _)| self.0 > 0 && self.0.trailing_zeros() >= *shift) {
            Some((shift, unit)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_round_trip_exactly() {
        for bytes in [0, 1, 1000, 1 << 20, (1 << 20) + 1, 3 << 30, u64::MAX] {
            let text = Bytes::new(bytes).to_string();
            assert_eq!(text.parse(), Ok(Bytes::new(bytes)), "{text}");
        }
        assert_eq!("1.5 KiB".parse(), Ok(Bytes::new(1536)));
        assert!("much".parse::<Bytes>().is_err());
    }
}
