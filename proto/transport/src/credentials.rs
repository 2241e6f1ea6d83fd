//! What a run's coordinator needs to accept sessions: its key and its token.

use std::io;
use std::path::{Path, PathBuf};

use ulmus_types::ErrorKind;

use crate::hidden;
use crate::identity::{IDENTITY_FILE, Identity, IdentityError};
use crate::source::{TokenSource, read_token};
use crate::token::{JoinToken, MalformedToken};

/// Name of the token file in the coordinator's own folder.
pub const TOKEN_FILE: &str = "join.token";

/// What a run's coordinator needs to accept sessions.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The coordinator's key.
    pub identity: Identity,
    /// The token that workers show.
    pub token: JoinToken,
    /// Where workers that can read the coordinator's disk find the token; `None` if it came from the environment.
    pub token_file: Option<PathBuf>,
    /// Files of the run that other users could read until now.
    pub exposed: Vec<PathBuf>,
}

/// Why a run has no credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// The key could not be loaded or made.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// The key is missing, but a token with its hash exists.
    #[error(
        "{0} is missing, though {1} tells workers its hash; restore it, or delete {1}: workers then need the new token"
    )]
    KeyIsGone(PathBuf, PathBuf),
    /// Something that should be a token is not one.
    #[error("{0}: {1}; or omit it, and a token is made")]
    Malformed(String, MalformedToken),
    /// The token belongs to another key.
    #[error("{origin} is the token of another run: workers would not accept the key of {folder}; {advice}")]
    OtherKey {
        /// Where the token came from.
        origin: String,
        /// The coordinator's folder.
        folder: PathBuf,
        /// What to do.
        advice: String,
    },
    /// A file cannot be read or written.
    #[error("{0}: {1}; correct the path or its permissions")]
    Io(PathBuf, io::Error),
}

impl CredentialsError {
    /// What can be done about it.
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::Identity(error) => error.kind(),
            Self::KeyIsGone(..) => ErrorKind::Corrupt,
            Self::Malformed(..) => ErrorKind::InvalidInput,
            Self::OtherKey { .. } => ErrorKind::Refused,
            Self::Io(_, error) if error.kind() == io::ErrorKind::NotFound => ErrorKind::InvalidInput,
            Self::Io(..) => ErrorKind::Disk,
        }
    }
}

impl Credentials {
    /// The credentials of the run whose coordinator keeps its own files in `folder`. A missing key is made. So is a
    /// missing token, unless one is given; if the given token file does not exist, it is written.
    ///
    /// # Errors
    /// When something is damaged, cannot be read or written, or belongs to another run.
    pub fn of_run(folder: &Path, given: &TokenSource) -> Result<Self, CredentialsError> {
        let (kept, key) = (folder.join(TOKEN_FILE), folder.join(IDENTITY_FILE));
        if kept.exists() && !key.exists() {
            return Err(CredentialsError::KeyIsGone(key, kept));
        }
        let identity = Identity::of_run(folder)?;
        let (text, origin, advice, token_file) = match given {
            TokenSource::Text(text) => {
                let advice = format!("unset ULMUS_TOKEN, or set it to the content of {}", kept.display());
                (text.clone(), "ULMUS_TOKEN".to_owned(), advice, None)
            }
            TokenSource::File(path) => {
                let own = || own_token(&kept, &identity);
                let advice = "name another file with --token-file, or delete this one";
                (read_or_write(path, own)?, path.display().to_string(), advice.to_owned(), Some(path.clone()))
            }
            TokenSource::Unspecified => {
                let advice = "delete it: workers then need the new token".to_owned();
                (own_token(&kept, &identity)?, kept.display().to_string(), advice, Some(kept))
            }
        };
        let token: JoinToken =
            text.parse().map_err(|error| CredentialsError::Malformed(origin.clone(), error))?;
        if token.key() != identity.hash() {
            return Err(CredentialsError::OtherKey { origin, folder: folder.to_path_buf(), advice });
        }
        // A token file that a person names elsewhere is not touched: who may read it is that person's decision.
        let mut exposed = Vec::new();
        for path in [folder.join(TOKEN_FILE), key] {
            match hidden::hide(&path) {
                Ok(true) => exposed.push(path),
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(CredentialsError::Io(path, error));
                }
                _ => {}
            }
        }
        Ok(Self { identity, token, token_file, exposed })
    }
}

/// The token that is kept with the run. It is made when it is first needed.
fn own_token(path: &Path, identity: &Identity) -> Result<String, CredentialsError> {
    read_or_write(path, || Ok(JoinToken::new(identity.hash()).reveal()))
}

/// The content of a file. If the file does not exist, it is written first, readable by its owner alone.
fn read_or_write(
    path: &Path,
    make: impl FnOnce() -> Result<String, CredentialsError>,
) -> Result<String, CredentialsError> {
    let failed = |error| CredentialsError::Io(path.to_path_buf(), error);
    match read_token(path) {
        Ok(text) => Ok(text),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let text = make()?.trim().to_owned();
            hidden::write(path, &format!("{text}\n")).map_err(failed)?;
            Ok(text)
        }
        Err(error) => Err(failed(error)),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn of_run(folder: &Path, given: &TokenSource) -> Result<Credentials, CredentialsError> {
        Credentials::of_run(folder, given)
    }

    #[test]
    fn a_run_keeps_its_token() {
        let folder = tempfile::tempdir().unwrap();
        let first = of_run(folder.path(), &TokenSource::Unspecified).unwrap();
        assert_eq!(first.token.key(), first.identity.hash());
        let file = folder.path().join(TOKEN_FILE);
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(of_run(folder.path(), &TokenSource::Unspecified).unwrap().token, first.token);
        assert_eq!(first.token_file, Some(file));
    }

    #[test]
    fn files_that_others_could_read_are_hidden_and_told() {
        let folder = tempfile::tempdir().unwrap();
        assert!(of_run(folder.path(), &TokenSource::Unspecified).unwrap().exposed.is_empty());
        let files = [folder.path().join(TOKEN_FILE), folder.path().join(IDENTITY_FILE)];
        for file in &files {
            fs::set_permissions(file, fs::Permissions::from_mode(0o644)).unwrap();
        }
        assert_eq!(of_run(folder.path(), &TokenSource::Unspecified).unwrap().exposed, files);
        for file in &files {
            assert_eq!(fs::metadata(file).unwrap().permissions().mode() & 0o777, 0o600);
        }
    }

    #[test]
    fn a_token_file_is_written_once_and_then_obeyed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("shared.token");
        let given = TokenSource::File(file.clone());
        let first = of_run(folder.path(), &given).unwrap();
        assert_eq!(fs::read_to_string(&file).unwrap(), first.token.reveal() + "\n");
        assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        // Another secret for the same key, which a person makes to keep earlier workers out.
        let other = JoinToken::new(first.identity.hash());
        fs::write(&file, other.reveal()).unwrap();
        assert_eq!(of_run(folder.path(), &given).unwrap().token, other);
        assert_eq!(of_run(folder.path(), &TokenSource::Text(other.reveal())).unwrap().token, other);
    }

    #[test]
    fn tokens_of_other_keys_are_refused() {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let foreign = of_run(other.path(), &TokenSource::Unspecified).unwrap();
        let file = TokenSource::File(foreign.token_file.clone().unwrap());
        for (given, advice) in [(file, "--token-file"), (TokenSource::Text(foreign.token.reveal()), "unset")]
        {
            let error = of_run(folder.path(), &given).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Refused);
            assert!(error.to_string().contains(advice), "{error}");
        }
        let error = of_run(folder.path(), &TokenSource::Text("secret".into())).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
        assert!(!error.to_string().contains("\"secret\""), "{error}");
    }

    #[test]
    fn a_token_without_its_key_is_not_passed_over() {
        let folder = tempfile::tempdir().unwrap();
        of_run(folder.path(), &TokenSource::Unspecified).unwrap();
        fs::remove_file(folder.path().join(IDENTITY_FILE)).unwrap();
        let error = of_run(folder.path(), &TokenSource::Unspecified).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Corrupt);
        assert!(error.to_string().contains(TOKEN_FILE), "{error}");
    }

    #[test]
    fn a_file_without_an_end_is_no_token() {
        let error = read_token(Path::new("/dev/zero")).unwrap_err();
        assert!(error.to_string().contains("more than 65536 bytes"), "{error}");
    }
}
