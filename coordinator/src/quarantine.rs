//! `quarantine.json` in the run folder: the units that everybody leaves out, where workers read it.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use ulmus_types::BadUnit;

use crate::store::StoreError;

/// The file of one run.
#[derive(Debug)]
pub(crate) struct QuarantineFile(pub(crate) PathBuf);

impl QuarantineFile {
    /// Writes all units that are left out, and why.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(crate) fn write(&self, quarantine: &BTreeMap<BadUnit, String>) -> Result<(), StoreError> {
        let units: Vec<_> = quarantine.iter().collect();
        let text = serde_json::to_vec(&units).expect("names and numbers can be written as JSON");
        // Whoever reads it sees the old list or the new one, even after a loss of power.
        let written = || {
            let folder = self.0.parent().unwrap_or(&self.0);
            // Workers may be other users.
            let readable = fs::Permissions::from_mode(0o644);
            let mut file = tempfile::Builder::new().permissions(readable).tempfile_in(folder)?;
            std::io::Write::write_all(&mut file, &text)?;
            file.as_file().sync_all()?;
            file.persist(&self.0)?;
            fs::File::open(folder)?.sync_all()
        };
        written().map_err(|error| StoreError::File { path: self.0.clone(), error })
    }
}
