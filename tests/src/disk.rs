//! A disk so small that a test can fill it.

use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::process::Command;

use tempfile::TempDir;

/// What fills it.
const BALLAST: &str = "ballast";

/// A small disk, mounted on a temporary folder; gone when this is dropped.
#[derive(Debug)]
pub struct SmallDisk {
    folder: TempDir,
}

impl SmallDisk {
    /// An empty disk of so many MiB; `None` where the system does not let one mount it.
    ///
    /// # Panics
    /// When there is no temporary folder.
    pub fn new(mebibytes: usize) -> Option<Self> {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        let size = format!("size={mebibytes}M");
        let mounted =
            run(Command::new("mount").args(["-t", "tmpfs", "-o", &size, "none"]).arg(folder.path()));
        mounted.then_some(Self { folder })
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// Fills it to the last byte.
    ///
    /// # Panics
    /// When that cannot even be begun.
    pub fn fill(&self) {
        let mut ballast = File::create(self.path().join(BALLAST)).expect("an empty file needs no space");
        // A large piece may fail where a page still goes in.
        for piece in [1 << 20, 4096] {
            let piece = vec![0; piece];
            while ballast.write_all(&piece).is_ok() {}
        }
    }

    /// Gives the space back.
    pub fn free(&self) {
        fs::remove_file(self.path().join(BALLAST)).ok();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // Somebody who is dying may still have a file open.
        run(Command::new("umount").arg("-l").arg(self.folder.path()));
    }
}

fn run(command: &mut Command) -> bool {
    command.output().is_ok_and(|output| output.status.success())
}
