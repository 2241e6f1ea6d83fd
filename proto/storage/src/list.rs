//! Which files a folder has.

use std::collections::BTreeSet;

use futures::TryStreamExt;
use object_store::ObjectMeta;

use crate::error::StoreError;
use crate::file::FileInfo;
use crate::store::Store;

impl Store {
    /// All files below the folder `path`, at any depth, sorted by path.
    ///
    /// # Errors
    /// When the store refuses or is out of order. A folder that does not exist has no files.
    pub async fn list(&self, path: &str) -> Result<Vec<FileInfo>, StoreError> {
        let target = self.resolve(path);
        let target = (!target.as_ref().is_empty()).then_some(&target);
        let list = || self.objects.list(target).try_collect();
        let found: Vec<ObjectMeta> = self.attempt("list", path, list).await?;
        let mut files: Vec<FileInfo> = found
            .iter()
            .filter_map(|meta| Some(FileInfo::of(self.relative(&meta.location)?, meta)))
            .collect();
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Ok(files)
    }

    /// The names of the folders directly in the folder `path`, sorted.
    ///
    /// # Errors
    /// As [`Store::list`].
    pub async fn list_folders(&self, path: &str) -> Result<Vec<String>, StoreError> {
        let target = self.resolve(path);
        let found = self.attempt("list", path, || self.objects.list_with_delimiter(Some(&target))).await?;
        let mut names: Vec<_> =
            found.common_prefixes.iter().filter_map(|folder| folder.filename()).map(str::to_owned).collect();
        names.sort();
        Ok(names)
    }

    /// Paths below this folder that listings have left out so far, as no request can be made for them.
    pub fn odd_names(&self) -> BTreeSet<String> {
        let below = format!("{}/", self.resolve(""));
        let below = if below == "/" { "" } else { &below };
        let names = self.counters.odd_names();
        names.iter().filter_map(|name| name.strip_prefix(below)).map(str::to_owned).collect()
    }
}
