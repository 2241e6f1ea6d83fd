//! The user's runtime folder, in which workers find the token of a coordinator of the same user on the same machine.
//!
//! It holds one token per port. It is refused unless it is accessible to the user alone: another user may have created
//! a folder of the same name in the folder for temporary files.

use std::fs::{self, DirBuilder};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use crate::hidden;
use crate::token::JoinToken;

/// Why the runtime folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RuntimeError {
    /// Other users could read or change its content.
    #[error("{0} is not a folder that only you can use; delete it, or set XDG_RUNTIME_DIR to such a folder")]
    NotPrivate(PathBuf),
    /// The folder, or a file in it, cannot be read or written.
    #[error("{0}: {1}")]
    Io(PathBuf, io::Error),
}

/// A published token. Dropping this value deletes it from the folder.
#[derive(Debug)]
pub struct Published {
    path: PathBuf,
    text: String,
}

impl Drop for Published {
    fn drop(&mut self) {
        // By now, another coordinator may have the port and the file.
        if fs::read_to_string(&self.path).is_ok_and(|text| text.trim() == self.text) {
            fs::remove_file(&self.path).ok();
        }
    }
}

/// Publishes a token where workers of the same user on this machine look for that of the coordinator at `port`.
///
/// # Errors
/// When the folder cannot be used. Workers then have to be given the token in another way.
pub fn publish(port: u16, token: &JoinToken) -> Result<Published, RuntimeError> {
    publish_in(&folder(), port, token)
}

fn publish_in(folder: &Path, port: u16, token: &JoinToken) -> Result<Published, RuntimeError> {
    let failed = |error| RuntimeError::Io(folder.to_path_buf(), error);
    match DirBuilder::new().mode(0o700).create(folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    check(folder)?;
    let (path, text) = (file(folder, port), token.reveal());
    hidden::write(&path, &format!("{text}\n")).map_err(|error| RuntimeError::Io(path.clone(), error))?;
    Ok(Published { path, text })
}

/// The text published for `port`, if any, and its path for messages.
pub(crate) fn published(port: u16) -> (PathBuf, Result<Option<String>, RuntimeError>) {
    let folder = folder();
    (file(&folder, port), published_in(&folder, port))
}

fn published_in(folder: &Path, port: u16) -> Result<Option<String>, RuntimeError> {
    if fs::symlink_metadata(folder).is_err() {
        return Ok(None);
    }
    check(folder)?;
    let path = file(folder, port);
    match fs::read_to_string(&path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(RuntimeError::Io(path, error)),
    }
}

/// Checks that the folder is a folder, not a link to one, and accessible to the user alone. Once it is, it stays so:
/// other users can neither rename it nor put anything into it.
fn check(folder: &Path) -> Result<(), RuntimeError> {
    let found =
        fs::symlink_metadata(folder).map_err(|error| RuntimeError::Io(folder.to_path_buf(), error))?;
    let is_ours = found.is_dir() && found.uid() == geteuid().as_raw();
    if is_ours && found.mode() & 0o777 == 0o700 {
        Ok(())
    } else {
        Err(RuntimeError::NotPrivate(folder.to_path_buf()))
    }
}

fn folder() -> PathBuf {
    let xdg = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    match xdg.filter(|path| path.is_absolute() && path.is_dir()) {
        Some(path) => path.join("ulmus"),
        None => std::env::temp_dir().join(format!("ulmus-{}", geteuid().as_raw())),
    }
}

fn file(folder: &Path, port: u16) -> PathBuf {
    folder.join(format!("{port}.token"))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn token() -> JoinToken {
        JoinToken::new(crate::Identity::of_run(tempfile::tempdir().unwrap().path()).unwrap().hash())
    }

    #[test]
    fn a_token_lies_there_as_long_as_its_coordinator_lives() {
        let home = tempfile::tempdir().unwrap();
        let folder = home.path().join("ulmus");
        assert_eq!(published_in(&folder, 7070).unwrap(), None);
        let first = publish_in(&folder, 7070, &token()).unwrap();
        assert_eq!(fs::metadata(&folder).unwrap().mode() & 0o777, 0o700);
        assert_eq!(fs::metadata(file(&folder, 7070)).unwrap().mode() & 0o777, 0o600);
        // The next one on the port was killed, and the first ends late.
        let second = publish_in(&folder, 7070, &token()).unwrap();
        drop(first);
        assert_eq!(published_in(&folder, 7070).unwrap().unwrap().trim(), second.text);
        assert_eq!(published_in(&folder, 7071).unwrap(), None);
        drop(second);
        assert_eq!(published_in(&folder, 7070).unwrap(), None);
    }

    #[test]
    fn a_folder_that_others_can_use_is_refused() {
        let home = tempfile::tempdir().unwrap();
        let [open, link, file] = ["open", "link", "file"].map(|name| home.path().join(name));
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).unwrap();
        let real = home.path().join("real");
        DirBuilder::new().mode(0o700).create(&real).unwrap();
        symlink(&real, &link).unwrap();
        fs::write(&file, "").unwrap();
        for folder in [open, link, file] {
            assert!(matches!(publish_in(&folder, 1, &token()), Err(RuntimeError::NotPrivate(_))));
            assert!(matches!(published_in(&folder, 1), Err(RuntimeError::NotPrivate(_))));
        }
        assert_eq!(fs::read_dir(&real).unwrap().count(), 0);
    }
}
