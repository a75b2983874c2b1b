//! The GEMM algorithms that the warm-up has chosen, kept in a file for the next start.

use std::{
    env,
    fs::{self, Permissions},
    io::{self, Write},
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

/// A text file in the user's cache; there is one for each kind of GPU and version of the library.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChoiceFile(PathBuf);

impl ChoiceFile {
    /// The file of the GPU and library that `of` names, below `XDG_CACHE_HOME` or `~/.cache`; `None` if neither is
    /// known.
    pub fn of(of: &str) -> Option<ChoiceFile> {
        let home = || Some(PathBuf::from(env::var_os("HOME")?).join(".cache"));
        // The XDG specification says that an empty variable counts as unset.
        let cache = env::var_os("XDG_CACHE_HOME").filter(|folder| !folder.is_empty());
        let cache = cache.map(PathBuf::from).or_else(home)?;
        Some(ChoiceFile::within(&cache.join("lorax").join("products"), of))
    }

    fn within(folder: &Path, of: &str) -> ChoiceFile {
        let name: String = of.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '-' }).collect();
        ChoiceFile(folder.join(name + ".txt"))
    }

    /// The text that was kept; empty if there is none or it cannot be read.
    pub fn read(&self) -> String {
        fs::read_to_string(&self.0).unwrap_or_default()
    }

    /// Replaces the text. Other processes see the old text or the new one, whole, even after a crash. A failure leaves
    /// no temporary file behind.
    pub fn write(&self, text: &str) -> io::Result<()> {
        let folder = self.0.parent().unwrap_or(Path::new("."));
        fs::create_dir_all(folder)?;
        // Other users may share the folder, so that the file is as readable as any other.
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
        let file = ChoiceFile::within(folder.path(), "gpu");
        fs::create_dir(&file.0).unwrap();
        assert!(file.write("text").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
