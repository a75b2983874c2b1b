//! What a device found out about itself, kept for the next start.

use std::{
    env,
    fs::{self, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// A text file in the user's cache, one for each card and library version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChoiceFile(PathBuf);

impl ChoiceFile {
    /// The file for what `of` names, below `XDG_CACHE_HOME` or `~/.cache`; none if there is no such folder.
    pub fn of(of: &str) -> Option<ChoiceFile> {
        let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cache"));
        // An empty variable counts as none, by the XDG specification.
        let cache = env::var_os("XDG_CACHE_HOME").filter(|folder| !folder.is_empty());
        let cache = cache.map(PathBuf::from).or_else(home)?;
        Some(ChoiceFile::within(&cache.join("lorax").join("products"), of))
    }

    fn within(folder: &Path, of: &str) -> ChoiceFile {
        let name: String = of.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        ChoiceFile(folder.join(name + ".txt"))
    }

    /// What was kept; nothing where nothing can be read.
    pub fn read(&self) -> String {
        fs::read_to_string(&self.0).unwrap_or_default()
    }

    /// Keeps a text in place of the one before. Others, and whoever looks after a crash, see either of them whole; a
    /// failure leaves nothing behind.
    pub fn write(&self, text: &str) -> io::Result<()> {
        let folder = self.0.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        // Others may share the folder: as readable as any file.
        let permissions = Permissions::from_mode(0o666);
        let mut new = tempfile::Builder::new().permissions(permissions).tempfile_in(folder)?;
        new.write_all(text.as_bytes())?;
        new.as_file().sync_all()?;
        new.persist(&self.0)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_kept() {
        let folder = tempfile::tempdir().unwrap();
        let file = ChoiceFile::within(&folder.path().join("new"), "NVIDIA H100/80GB 13.0");
        assert!(file.0.ends_with("NVIDIA-H100-80GB-13-0.txt"));
        assert_eq!(file.read(), "");
        file.write("one").unwrap();
        file.write("two").unwrap();
        assert_eq!(file.read(), "two");
        assert_eq!(fs::read_dir(folder.path().join("new")).unwrap().count(), 1);
    }

    #[test]
    fn what_cannot_be_kept_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let file = ChoiceFile::within(folder.path(), "card");
        fs::create_dir(&file.0).unwrap();
        assert!(file.write("text").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
