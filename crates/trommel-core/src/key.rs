//! Content keys and checksums.
//!
//! Every output file's name contains the `Key` of what produced it: a changed setting gives a changed name, and a file
//! that is there is done. Keys are XXH3-128, which is fast and stable across machines; they guard against mistakes, not
//! against an adversary who crafts collisions.

use std::fmt;
use std::io::Read;
use std::path::Path;

use xxhash_rust::xxh3::{Xxh3, xxh3_64, xxh3_128};

use crate::error::{Error, Result};

/// A 128-bit name of content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(pub u128);

impl Key {
    /// The key of a sequence of parts; each part is length-prefixed, so `["ab", "c"]` and `["a", "bc"]` differ.
    pub fn of<T: AsRef<[u8]>>(parts: impl IntoIterator<Item = T>) -> Key {
        let mut hasher = Xxh3::new();
        for part in parts {
            let part = part.as_ref();
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        Key(hasher.digest128())
    }

    /// The key of one run of bytes, such as a document's text.
    pub fn of_bytes(bytes: &[u8]) -> Key {
        Key(xxh3_128(bytes))
    }

    /// The first 16 hexadecimal digits: what file names carry.
    pub fn short(&self) -> String {
        format!("{:016x}", (self.0 >> 64) as u64)
    }
}

impl fmt::Display for Key {
    /// All 32 hexadecimal digits.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", self.0)
    }
}

/// The XXH3-64 of bytes, in 16 hexadecimal digits: the `checksum` of tables and manifests.
pub fn checksum(bytes: &[u8]) -> String {
    format!("{:016x}", xxh3_64(bytes))
}

/// The XXH3-64 of a file's content.
pub fn checksum_file(path: &Path) -> Result<String> {
    let read = || -> std::io::Result<u64> {
        let mut file = std::fs::File::open(path)?;
        let mut hasher = Xxh3::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(hasher.digest()),
                n => hasher.update(&buffer[..n]),
            }
        }
    };
    let digest = read().map_err(|e| Error::system("cannot read the file").file(path.display()).source(e))?;
    Ok(format!("{digest:016x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_do_not_run_together() {
        assert_ne!(Key::of(["ab", "c"]), Key::of(["a", "bc"]));
        assert_eq!(Key::of(["ab"]).to_string().len(), 32);
    }

    #[test]
    fn a_file_and_its_bytes_have_one_checksum() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"gold").unwrap();
        assert_eq!(checksum_file(file.path()).unwrap(), checksum(b"gold"));
    }
}
