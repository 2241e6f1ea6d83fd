//! Finds the files below a folder of this machine.
//!
//! Links to files and folders are followed, except for links to a folder that contains them, which would never end. A
//! file that is reached again through a link within the folder is marked, so that callers can count every file once.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A file below a folder.
#[derive(Debug, Clone)]
pub(crate) struct Walked {
    /// Path below the folder, with `/` between its parts, and U+FFFD for invalid UTF-8.
    pub(crate) name: String,
    pub(crate) path: PathBuf,
    /// Whether the path is valid UTF-8, so that `name` is exact.
    pub(crate) is_utf8: bool,
    /// Whether the file was reached through a link, and is also found under its own name.
    pub(crate) is_again: bool,
}

/// Why something below a folder is skipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Passed {
    /// Its name begins with a dot.
    Hidden,
    /// A link to a folder that contains it.
    Loop,
    /// A link whose target does not exist, or that is part of a circle of links.
    Dangling,
    /// A socket, a pipe or a device.
    Special,
}

/// The files below a folder, sorted by name within each folder.
#[derive(Debug, Default)]
pub(crate) struct Walk {
    pub(crate) files: Vec<Walked>,
    /// Everything that was skipped: the reason, and the name.
    pub(crate) passed: Vec<(Passed, String)>,
    enters_hidden: bool,
    /// The folders that the walk is currently in, with links resolved.
    within: Vec<PathBuf>,
    /// Files that were found under their own names.
    own: BTreeSet<PathBuf>,
    /// Files that were reached through links: the index in `files`, and the real path.
    linked: Vec<(usize, PathBuf)>,
}

/// Finds all files below a folder, hidden ones only with `enters_hidden`.
///
/// # Errors
/// When a folder cannot be listed, with its path.
pub(crate) fn walk(folder: &Path, enters_hidden: bool) -> Result<Walk, (PathBuf, io::Error)> {
    let root = fs::canonicalize(folder).map_err(|error| (folder.to_owned(), error))?;
    let mut walk = Walk { enters_hidden, ..Walk::default() };
    let route = Route { prefix: String::new(), is_utf8: true, is_linked: false };
    walk.enter(folder, &root, &route)?;
    for (index, real) in std::mem::take(&mut walk.linked) {
        walk.files[index].is_again = walk.own.contains(&real);
    }
    Ok(walk)
}

/// How the walk has reached a folder.
struct Route {
    /// What the names of the folder's files begin with.
    prefix: String,
    is_utf8: bool,
    /// Whether a link is on the way.
    is_linked: bool,
}

impl Walk {
    fn enter(&mut self, folder: &Path, real: &Path, route: &Route) -> Result<(), (PathBuf, io::Error)> {
        let failed = |error| (folder.to_owned(), error);
        let entries = match fs::read_dir(folder) {
            // The folder has been removed since its parent was listed.
            Err(error) if error.kind() == io::ErrorKind::NotFound && !route.prefix.is_empty() => {
                return Ok(());
            }
            entries => entries.map_err(failed)?,
        };
        let mut names =
            entries.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        names.sort();
        self.within.push(real.to_path_buf());
        for file_name in names {
            let path = folder.join(&file_name);
            let name = format!("{}{}", route.prefix, file_name.to_string_lossy());
            if !self.enters_hidden && file_name.as_encoded_bytes().starts_with(b".") {
                self.passed.push((Passed::Hidden, name));
                continue;
            }
            let is_utf8 = route.is_utf8 && file_name.to_str().is_some();
            let is_link = path.is_symlink();
            let metadata = match fs::metadata(&path) {
                Ok(metadata) => metadata,
                Err(error) if is_link && leads_nowhere(&error) => {
                    self.passed.push((Passed::Dangling, name));
                    continue;
                }
                // The file has been removed since the folder was listed.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err((path, error)),
            };
            if metadata.is_file() {
                let real = real.join(&file_name);
                if is_link {
                    let real = fs::canonicalize(&path).map_err(|error| (path.clone(), error))?;
                    self.linked.push((self.files.len(), real));
                } else if route.is_linked {
                    self.linked.push((self.files.len(), real));
                } else {
                    self.own.insert(real);
                }
                self.files.push(Walked { name, path, is_utf8, is_again: false });
            } else if metadata.is_dir() {
                let target = if is_link {
                    fs::canonicalize(&path).map_err(|error| (path.clone(), error))?
                } else {
                    real.join(&file_name)
                };
                if is_link && self.within.iter().any(|folder| folder.starts_with(&target)) {
                    self.passed.push((Passed::Loop, name));
                    continue;
                }
                let is_linked = route.is_linked || is_link;
                let below = Route { prefix: format!("{name}/"), is_utf8, is_linked };
                self.enter(&path, &target, &below)?;
            } else {
                self.passed.push((Passed::Special, name));
            }
        }
        self.within.pop();
        Ok(())
    }
}

/// Whether a link has no target, or is part of a circle.
fn leads_nowhere(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        || error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

#[cfg(all(test, unix))]
mod tests {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    use super::*;

    fn write(place: &Path, name: &str) {
        let path = place.join(name);
        fs::create_dir_all(path.parent().expect("it lies in a folder")).expect("the folder can be made");
        fs::write(path, name).expect("the file can be written");
    }

    fn names(walk: &Walk) -> Vec<&str> {
        walk.files.iter().map(|file| file.name.as_str()).collect()
    }

    #[test]
    fn links_are_followed_but_never_upwards() {
        let place = tempfile::tempdir().unwrap();
        let (root, outside) = (place.path().join("root"), place.path().join("outside"));
        write(&root, "a/x.txt");
        write(&root, "b/y.txt");
        write(&outside, "z.txt");
        for (target, link) in [
            (".", "self"),
            ("..", "a/up"),
            ("../..", "a/above"),
            ("../b", "a/b"),
            ("../a", "b/a"),
            ("../outside", "out"),
            ("../root", "root"),
            ("../outside/z.txt", "z.txt"),
            ("nowhere", "gone"),
            ("circle", "circle"),
        ] {
            symlink(target, root.join(link)).unwrap();
        }
        let walk = walk(&root, false).unwrap();
        assert_eq!(names(&walk), ["a/b/y.txt", "a/x.txt", "b/a/x.txt", "b/y.txt", "out/z.txt", "z.txt"]);
        let again: Vec<_> = walk.files.iter().map(|file| file.is_again).collect();
        assert_eq!(again, [true, false, true, false, false, false]);
        let of = |reason| {
            let passed = walk.passed.iter().filter(|(passed, _)| *passed == reason);
            passed.map(|(_, name)| name.as_str()).collect::<Vec<_>>()
        };
        assert_eq!(
            of(Passed::Loop),
            ["a/above", "a/b/a", "a/up", "b/a/above", "b/a/b", "b/a/up", "root", "self"]
        );
        assert_eq!(of(Passed::Dangling), ["circle", "gone"]);
    }

    /// There are links into a hidden folder, as made by programs that switch versions atomically, and a file with two
    /// names.
    #[test]
    fn a_file_that_only_a_link_leads_to_is_found_once() {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), ".versions/7/a.txt");
        write(place.path(), "b.txt");
        symlink(".versions/7", place.path().join("current")).unwrap();
        symlink("b.txt", place.path().join("c.txt")).unwrap();
        let walk = walk(place.path(), false).unwrap();
        assert_eq!(names(&walk), ["b.txt", "c.txt", "current/a.txt"]);
        assert_eq!(walk.files.iter().map(|file| file.is_again).collect::<Vec<_>>(), [false, true, false]);
    }

    /// The folder may be listed but not entered. Root may enter any folder, so root skips the test.
    #[test]
    fn a_folder_that_must_not_be_entered_is_an_error() {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), "sub/a.txt");
        let sub = place.path().join("sub");
        fs::set_permissions(&sub, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
        let walked = walk(place.path(), false);
        let may_enter_all = fs::metadata(sub.join("a.txt")).is_ok();
        fs::set_permissions(&sub, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        match walked {
            Ok(walk) => assert!(may_enter_all && walk.files.len() == 1),
            Err((path, error)) => {
                assert_eq!(
                    (path.ends_with("sub/a.txt"), error.kind()),
                    (true, io::ErrorKind::PermissionDenied)
                );
            }
        }
    }

    #[test]
    fn odd_names_are_found() {
        let place = tempfile::tempdir().unwrap();
        write(place.path(), "b\n1.txt");
        write(place.path(), ".hidden/c.txt");
        fs::write(place.path().join(OsStr::from_bytes(b"caf\xe9.txt")), "").unwrap();
        let listed = walk(place.path(), false).unwrap();
        assert_eq!(names(&listed), ["b\n1.txt", "caf\u{fffd}.txt"]);
        assert_eq!(listed.files.iter().map(|file| file.is_utf8).collect::<Vec<_>>(), [true, false]);
        assert_eq!(listed.passed, [(Passed::Hidden, ".hidden".to_owned())]);
        assert_eq!(names(&walk(place.path(), true).unwrap())[0], ".hidden/c.txt");
    }
}
