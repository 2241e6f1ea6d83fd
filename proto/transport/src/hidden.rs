//! Files that only their owner can ever read.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use tempfile::NamedTempFile;

/// Writes a file atomically and durably, readable by its owner alone.
pub(crate) fn write(path: &Path, text: &str) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // `NamedTempFile` creates files with mode 0600.
    let mut file = NamedTempFile::new_in(folder)?;
    file.write_all(text.as_bytes())?;
    file.as_file().sync_all()?;
    file.persist(path)?;
    File::open(folder)?.sync_all()
}

/// Makes a file accessible to its owner alone. Returns whether others had access before.
pub(crate) fn hide(path: &Path) -> io::Result<bool> {
    let exposed = std::fs::metadata(path)?.permissions().mode() & 0o077 != 0;
    if exposed {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    }
    Ok(exposed)
}
