//! The join token, which a worker needs to join a run.

use std::fmt::{self, Write};
use std::str::FromStr;

use rustls::pki_types::CertificateDer;
use sha2::{Digest as _, Sha256};
use subtle::ConstantTimeEq;

/// Length of each half in bytes.
const LENGTH: usize = 32;

/// The SHA-256 hash of a public key, as X.509 encodes it (`SubjectPublicKeyInfo`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyHash([u8; LENGTH]);

impl KeyHash {
    /// The hash of a certificate's key; `None` if the certificate is invalid.
    pub(crate) fn of(certificate: &CertificateDer<'_>) -> Option<Self> {
        let certificate = webpki::EndEntityCert::try_from(certificate).ok()?;
        Some(Self(Sha256::digest(certificate.subject_public_key_info()).into()))
    }
}

/// The secret half of a token. `{:?}` does not print it, and comparing takes constant time.
#[derive(Clone)]
struct Secret([u8; LENGTH]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.ct_eq(&other.0).into()
    }
}

/// What a worker needs to join a run: a secret to show, and the hash of the key that the coordinator must have.
///
/// Its text form is `ulmus-SECRET-KEYHASH`, on one line.
#[derive(Debug, Clone, PartialEq)]
pub struct JoinToken {
    secret: Secret,
    key: KeyHash,
}

/// Text that is not a join token. The error does not show the text, because it may be nearly a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "expected one line ulmus-SECRET-KEYHASH, with 64 hexadecimal digits each, and found {0} characters; copy the whole \
     line of the coordinator's join.token"
)]
pub struct MalformedToken(usize);

impl JoinToken {
    /// Makes a token with a new secret for a coordinator with this key.
    pub fn new(key: KeyHash) -> Self {
        // This generator is cryptographically secure and seeded by the system.
        Self { secret: Secret(rand::random()), key }
    }

    /// The hash of the coordinator's key.
    pub const fn key(&self) -> KeyHash {
        self.key
    }

    /// The whole token as text. Take care where it goes: there is no `Display`, so that it is never printed by
    /// accident.
    pub fn reveal(&self) -> String {
        format!("ulmus-{}-{}", hex(&self.secret.0), hex(&self.key.0))
    }

    /// The value of the `authorization` header that proves the secret.
    pub(crate) fn bearer(&self) -> String {
        format!("Bearer {}", hex(&self.secret.0))
    }

    /// Whether the value of an `authorization` header proves the secret.
    pub(crate) fn is_proved_by(&self, bearer: &[u8]) -> bool {
        self.bearer().as_bytes().ct_eq(bearer).into()
    }
}

impl FromStr for JoinToken {
    type Err = MalformedToken;

    fn from_str(text: &str) -> Result<Self, MalformedToken> {
        // Some editors put a byte order mark at the start.
        let text = text.trim_start_matches('\u{feff}').trim();
        let halves = text.strip_prefix("ulmus-").and_then(|halves| halves.split_once('-'));
        let parsed = halves.and_then(|(secret, key)| {
            Some(Self { secret: Secret(unhex(secret)?), key: KeyHash(unhex(key)?) })
        });
        parsed.ok_or_else(|| MalformedToken(text.chars().count()))
    }
}

fn hex(bytes: &[u8; LENGTH]) -> String {
    bytes.iter().fold(String::with_capacity(2 * LENGTH), |mut text, byte| {
        write!(text, "{byte:02x}").expect("writing to a string cannot fail");
        text
    })
}

fn unhex(text: &str) -> Option<[u8; LENGTH]> {
    let digits: Vec<u8> = text.chars().map(|digit| Some(digit.to_digit(16)? as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> =
        digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
    if digits.len() == 2 * LENGTH { bytes.try_into().ok() } else { None }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn token() -> JoinToken {
        JoinToken::new(KeyHash([0xab; LENGTH]))
    }

    #[test]
    fn text_form_round_trips() {
        let token = token();
        let text = token.reveal();
        assert_eq!(text.len(), "ulmus-".len() + 64 + 1 + 64);
        assert_eq!(text.parse(), Ok(token.clone()));
        assert_eq!(format!(" {text}\n").parse(), Ok(token));
    }

    #[test]
    fn the_secret_is_never_printed_by_accident() {
        let token = token();
        let secret = hex(&token.secret.0);
        assert!(!format!("{token:?}").contains(&secret[..8]));
        // Only one character is wrong, so the others may still be those of a valid token.
        for broken in [token.reveal() + "0", token.reveal().replace("ulmus-", "ulmus_"), secret.clone()] {
            let error = broken.parse::<JoinToken>().unwrap_err().to_string();
            assert!(!error.contains(&secret[..8]) && error.contains("join.token"), "{error}");
        }
    }

    #[test]
    fn what_is_no_token_is_refused() {
        let text = token().reveal();
        let cut = &text[..text.len() - 1];
        let odd = text.replace("ab", "+f");
        for text in
            ["", "ulmus--", "ulmus-00-00", cut, &odd, &format!("{text}\n{text}"), &text.replace('a', "ä")]
        {
            assert!(text.parse::<JoinToken>().is_err(), "{text}");
        }
    }

    #[test]
    fn only_its_own_secret_proves_a_token() {
        let (ours, other) = (token(), token());
        assert!(ours.is_proved_by(ours.bearer().as_bytes()));
        for bearer in [other.bearer(), String::new(), ours.bearer() + " ", hex(&ours.secret.0)] {
            assert!(!ours.is_proved_by(bearer.as_bytes()));
        }
    }
}
