//! Files that are whole or absent.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// A file that appears under its name when it is committed; dropped before, it leaves nothing.
#[derive(Debug)]
pub struct AtomicFile {
    path: PathBuf,
    temporary: tempfile::NamedTempFile,
}

impl AtomicFile {
    /// Opens a temporary file beside `path`, and creates the folder if there is none.
    pub fn create(path: &Path) -> Result<AtomicFile> {
        let folder = folder_of(path);
        create_folder(folder)?;
        let temporary =
            tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(folder).map_err(|e| write_error(path, e))?;
        Ok(AtomicFile { path: path.to_owned(), temporary })
    }

    /// Another handle to write through.
    pub fn handle(&self) -> Result<File> {
        self.temporary.as_file().try_clone().map_err(|e| write_error(&self.path, e))
    }

    /// Syncs the content and gives the file its name, replacing what had it.
    pub fn commit(self) -> Result<()> {
        let failed = |e: io::Error| write_error(&self.path, e);
        // Temporary files are private to their owner; outputs follow the usual permissions.
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            self.temporary.as_file().set_permissions(fs::Permissions::from_mode(0o644)).map_err(failed)?;
        }
        self.temporary.as_file().sync_all().map_err(failed)?;
        self.temporary.persist(&self.path).map_err(|e| write_error(&self.path, e.error))?;
        let synced = File::open(folder_of(&self.path)).and_then(|f| f.sync_all());
        synced.map_err(|e| write_error(&self.path, e))
    }
}

fn folder_of(path: &Path) -> &Path {
    path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."))
}

/// Writes `path` through `write`; a reader never sees a part of the file, and a failure leaves nothing under `path`.
pub fn write_atomic<T>(path: &Path, write: impl FnOnce(&mut File) -> Result<T>) -> Result<T> {
    let file = AtomicFile::create(path)?;
    let value = write(&mut file.handle()?).map_err(|e| e.file(path.display()))?;
    file.commit()?;
    Ok(value)
}

/// [`write_atomic`] for bytes that are already in memory.
pub fn write_bytes(path: &Path, bytes: &[u8]) -> Result<()> {
    use io::Write;
    write_atomic(path, |file| file.write_all(bytes).map_err(|e| write_error(path, e)))
}

/// Fills a new folder through `write`; it appears under `path` when it is whole, and a failure leaves nothing there.
pub fn write_new_folder(path: &Path, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    refuse_existing(path)?;
    let parent = folder_of(path);
    create_folder(parent)?;
    let failed = |e| write_error(path, e);
    let temporary = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempdir_in(parent).map_err(failed)?;
    write(temporary.path())?;
    // Temporary folders are private to their owner; outputs follow the usual permissions.
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        fs::set_permissions(temporary.path(), fs::Permissions::from_mode(0o755)).map_err(failed)?;
    }
    fs::rename(temporary.path(), path).map_err(failed)?;
    // There is nothing under the temporary name to remove any more.
    let _ = temporary.keep();
    File::open(parent).and_then(|parent| parent.sync_all()).map_err(failed)
}

/// A [`Error::config`] if there is anything at `path`, for outputs that replace nothing.
pub fn refuse_existing(path: &Path) -> Result<()> {
    match path.symlink_metadata() {
        Err(_) => Ok(()),
        Ok(_) => {
            let error = Error::config("there is something already, and it is not overwritten").file(path.display());
            Err(error.hint("remove it, or name another place"))
        }
    }
}

/// Holds an output folder, which is created if need be, for this process; the lock ends with the process, however it ends.
pub fn lock(folder: &Path) -> Result<File> {
    create_folder(folder)?;
    let path = folder.join(".lock");
    let file = File::create(&path).map_err(|e| write_error(&path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(Error::system("another `trommel` is working in this folder")
            .file(folder.display())
            .hint("wait until it has ended, or name another folder for the output")),
        Err(fs::TryLockError::Error(e)) => Err(write_error(&path, e)),
    }
}

/// Creates a folder and its parents.
pub fn create_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|e| write_error(folder, e))
}

/// Removes what a killed process left unfinished below `folder`, whose [`lock`] the caller holds.
pub fn remove_temporaries(folder: &Path) -> Result<()> {
    let Ok(entries) = fs::read_dir(folder) else { return Ok(()) };
    for entry in entries.flatten() {
        let path = entry.path();
        let is_folder = entry.file_type().is_ok_and(|t| t.is_dir());
        match (entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX), is_folder) {
            (true, true) => fs::remove_dir_all(&path).map_err(|e| write_error(&path, e))?,
            (true, false) => fs::remove_file(&path).map_err(|e| write_error(&path, e))?,
            (false, true) => remove_temporaries(&path)?,
            (false, false) => {}
        }
    }
    Ok(())
}

/// The error of a failed write, with the remedy that fits its cause.
pub fn write_error(path: &Path, error: io::Error) -> Error {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            "free some space, or name an output folder on another disk; then run the same command again"
        }
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            "make the folder writable, or name another one for the output"
        }
        _ => "check the path and the disk, or name another folder for the output",
    };
    Error::system("cannot write").file(path.display()).source(error).hint(hint)
}

const TEMPORARY_PREFIX: &str = ".unfinished-";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_write_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/out.bin");
        let result: Result<()> = write_atomic(&path, |_| Err(Error::data("stopped")));
        assert!(result.is_err());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
        write_bytes(&path, b"whole").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
    }

    #[test]
    fn one_process_holds_a_folder() {
        let folder = tempfile::tempdir().unwrap();
        let held = lock(folder.path()).unwrap();
        assert!(lock(folder.path()).is_err_and(|e| e.to_string().contains("another `trommel` is working")));
        drop(held);
        assert!(lock(folder.path()).is_ok());
    }

    #[test]
    fn a_new_folder_is_whole_or_absent_and_replaces_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("deep/new");
        let stopped = write_new_folder(&path, |new| write_bytes(&new.join("a"), b"a").and(Err(Error::data("stopped"))));
        assert_eq!(stopped.unwrap_err().message(), "stopped");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 0);
        write_new_folder(&path, |new| write_bytes(&new.join("a"), b"a")).unwrap();
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        for existing in [&path, &path.join("a")] {
            let refused = write_new_folder(existing, |_| Ok(())).unwrap_err();
            assert_eq!((refused.exit_code(), fs::read(path.join("a")).unwrap().as_slice()), (2, b"a".as_slice()));
        }
    }
}
