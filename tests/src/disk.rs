//! A disk small enough for a test to fill.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// The file that fills the disk.
const BALLAST: &str = "ballast";

/// A small disk that is mounted on a temporary folder until this value is dropped.
#[derive(Debug)]
pub struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// Mounts an empty disk of this size in MiB; `None` if the system does not permit that.
    ///
    /// # Panics
    /// When no temporary folder can be made.
    pub fn new(mebibytes: usize) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let size = format!("size={mebibytes}M");
        let mounted =
            run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(folder.path()));
        mounted.then_some(Self { folder })
    }

    /// The folder on which the disk is mounted.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Fills the disk to the last byte.
    ///
    /// # Panics
    /// When not even an empty file can be created.
    pub fn fill(&self) {
        let mut ballast = File::create(self.path().join(BALLAST)).expect("an empty file needs no space");
        // A large write may fail where a single page still fits.
        for piece in [1 << 20, 4096] {
            let piece = vec![0; piece];
            while ballast.write_all(&piece).is_ok() {}
        }
    }

    /// Frees the space again.
    pub fn free(&self) {
        fs::remove_file(self.path().join(BALLAST)).ok();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A dying process may still have a file open.
        run(Command::new("umount").arg("-l").arg(self.folder.path()));
    }
}

fn run(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}
