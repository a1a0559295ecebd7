//! The stream of training tokens of a folder of shards.
//!
//! Windows are read in the order of the manifest, each followed by the end-of-text token; after the last shard the first
//! one begins again. A place in the stream is a few numbers (`Position`), so a run continues exactly where it stopped.
//! One record batch is in memory at a time.

use std::fs::File;
use std::path::{Path, PathBuf};

use arrow::array::{Array, ArrayRef, AsArray, ListArray};
use arrow::datatypes::{DataType, UInt16Type, UInt32Type};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::key::{Key, checksum_file};
use trommel_core::manifest::Manifest;
use trommel_core::tokenizer;

use crate::batch::{Batch, Source};

/// The column of a shard that holds a window's tokens.
const TOKENS: &str = "tokens";
/// Windows that are read at once; over all clusters, where shards are read by cluster.
const ROWS: usize = 256;
const ROWS_OF_CLUSTERS: usize = 4096;
/// Clusters whose files stay open; with more of them, a file is opened again for each batch of rows.
const OPEN_CLUSTERS: usize = 256;

/// The remedy for shards that are not as they were written.
const WRITE_AGAIN: &str = "remove the shards' folder, and run the pipeline again, or copy the folder anew";

/// A place in the stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// How many times all shards were read.
    pub epoch: u64,
    /// Index into the manifest's shards.
    pub shard: usize,
    /// Row of the next window in the shard.
    pub row: u64,
    /// The next token in that window; the window's length stands for its end-of-text token.
    pub offset: usize,
    /// The token before the next one.
    pub previous: u32,
}

/// Reads a folder of shards from any place on.
pub struct Loader {
    folder: PathBuf,
    manifest: Manifest,
    position: Position,
    /// Rows of the open shard, and how many of them are read; `None` before the shard is opened.
    reader: Option<Box<ParquetRecordBatchReader>>,
    rows: Vec<Vec<u32>>,
    rows_at_once: usize,
    keep_open: bool,
    /// The row of the shard that `rows` begins with.
    first_row: u64,
    /// Whether a window was seen since the epoch began.
    progressed: bool,
    /// For each shard, whether its file was found to be as it was written.
    verified: Vec<bool>,
}

impl Source for Loader {
    type Position = Position;

    fn position(&self) -> Position {
        self.position
    }

    fn seek(&mut self, position: Position) -> Result<()> {
        if position.shard >= self.manifest.shards.len() {
            return Err(Error::data("the position lies beyond the shards").file(self.folder.display()));
        }
        self.position = position;
        self.reader = None;
        self.rows.clear();
        // The place itself shows that there are windows.
        self.progressed = true;
        Ok(())
    }

    fn next_sequence(&mut self, batch: &mut Batch) -> Result<()> {
        let previous = self.position.previous;
        let next = self.take(batch.time)?;
        batch.push(previous, &next, self.manifest.end_of_text);
        Ok(())
    }
}

impl Loader {
    /// Opens a folder that `trommel run` has written. `vocab` is the model's vocabulary, which holds every token id.
    pub fn open(folder: &Path, vocab: usize) -> Result<Loader> {
        let manifest = Manifest::read(folder)?;
        let path = folder.join(Manifest::FILE);
        if manifest.vocab as usize > vocab {
            let message = format!("the shards have {} token ids, and the model only {vocab}", manifest.vocab);
            return Err(Error::config(message).file(path.display()).hint("give the model the vocabulary of the tokenizer"));
        }
        if manifest.end_of_text >= manifest.vocab {
            return Err(Error::data(format!("`end_of_text` is {}, and `vocab` {}", manifest.end_of_text, manifest.vocab))
                .file(path.display()));
        }
        if manifest.shards.is_empty() {
            return Err(Error::data("the folder has no shards").file(path.display()).hint(WRITE_AGAIN));
        }
        let path = folder.join(Manifest::TOKENIZER);
        let ids = tokenizer::vocab(&tokenizer::read(&path)?);
        if ids > manifest.vocab {
            let message = format!("the tokenizer has {ids} token ids, and `{}` says {}", Manifest::FILE, manifest.vocab);
            return Err(Error::data(message).file(path.display()).hint("copy the one that made the shards"));
        }
        for shard in &manifest.shards {
            let path = folder.join(&shard.path);
            if !path.is_file() {
                return Err(Error::data("the shard is missing").file(path.display()).hint(WRITE_AGAIN));
            }
        }
        Ok(Self::over(folder, manifest, ROWS, true))
    }

    /// One reader for each cluster that `wanted` names, over the shards of a folder that was written by cluster. Windows that are
    /// held at once are bounded over all of them.
    pub fn open_clusters(folder: &Path, vocab: usize, wanted: &[u32]) -> Result<Vec<Loader>> {
        let whole = Self::open(folder, vocab)?.manifest;
        let rows = (ROWS_OF_CLUSTERS / wanted.len().max(1)).clamp(2, ROWS);
        let of = |cluster: &u32| {
            let shards: Vec<_> = whole.shards.iter().filter(|s| s.cluster_id == Some(*cluster)).cloned().collect();
            if shards.is_empty() {
                let place = folder.join(Manifest::FILE);
                return Err(Error::data(format!("cluster {cluster} has no text in the shards"))
                    .file(place.display())
                    .hint("write the shards with `shard: {by: cluster}`, on the corpus that the histogram was counted on"));
            }
            let tokens = shards.iter().map(|s| s.tokens).sum();
            let keep_open = wanted.len() <= OPEN_CLUSTERS;
            Ok(Self::over(folder, Manifest { shards, tokens, ..whole.clone() }, rows, keep_open))
        };
        wanted.iter().map(of).collect()
    }

    fn over(folder: &Path, manifest: Manifest, rows_at_once: usize, keep_open: bool) -> Loader {
        let position = Position { epoch: 0, shard: 0, row: 0, offset: 0, previous: manifest.end_of_text };
        Loader {
            folder: folder.to_path_buf(),
            verified: vec![false; manifest.shards.len()],
            manifest,
            position,
            reader: None,
            rows: Vec::new(),
            rows_at_once,
            keep_open,
            first_row: 0,
            progressed: false,
        }
    }

    /// The folder.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// What the folder says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// A name of the content that the folder holds.
    pub fn fingerprint(&self) -> Key {
        let shards = self.manifest.shards.iter().map(|shard| shard.checksum.clone());
        let sizes = [self.manifest.vocab, self.manifest.end_of_text].map(|n| n.to_string());
        Key::of(sizes.into_iter().chain(shards))
    }

    /// Words for the stretch of the stream from `from` to the next token, for messages.
    pub fn describe(&self, from: Position) -> String {
        let name = |p: Position| format!("`{}` row {}", self.manifest.shards[p.shard].path, p.row);
        format!("{} to {}", name(from), name(self.position))
    }

    /// The next `count` tokens of the stream.
    fn take(&mut self, count: usize) -> Result<Vec<u32>> {
        let mut taken = Vec::with_capacity(count);
        while taken.len() < count {
            let end_of_text = self.manifest.end_of_text;
            let offset = self.position.offset;
            let Some(window) = self.window()? else { continue };
            let part = &window[offset.min(window.len())..];
            let part = &part[..part.len().min(count - taken.len())];
            taken.extend_from_slice(part);
            let (offset, len) = (offset + part.len(), window.len());
            if taken.len() < count {
                taken.push(end_of_text);
                self.position.row += 1;
                self.position.offset = 0;
            } else {
                debug_assert!(offset <= len);
                self.position.offset = offset;
            }
        }
        if let Some(last) = taken.last() {
            self.position.previous = *last;
        }
        Ok(taken)
    }

    /// The window at the current place; `None` if the place moved to the next shard instead.
    fn window(&mut self) -> Result<Option<&[u32]>> {
        let here = self.position.row;
        if self.rows.is_empty() || here >= self.first_row + self.rows.len() as u64 {
            self.rows = self.read_rows()?;
            self.first_row = here;
            if self.rows.is_empty() {
                self.next_shard()?;
                return Ok(None);
            }
        }
        self.progressed = true;
        Ok(Some(&self.rows[(here - self.first_row) as usize]))
    }

    fn next_shard(&mut self) -> Result<()> {
        self.reader = None;
        self.position = Position { shard: self.position.shard + 1, row: 0, offset: 0, ..self.position };
        if self.position.shard == self.manifest.shards.len() {
            if !self.progressed {
                return Err(Error::data("the shards hold no windows").file(self.folder.display()).hint(WRITE_AGAIN));
            }
            self.position = Position { epoch: self.position.epoch + 1, shard: 0, ..self.position };
            self.progressed = false;
        }
        Ok(())
    }

    /// The next rows of the current shard, which is opened at the current row if need be; empty at its end.
    fn read_rows(&mut self) -> Result<Vec<Vec<u32>>> {
        let shard = &self.manifest.shards[self.position.shard];
        let path = self.folder.join(&shard.path);
        if !self.verified[self.position.shard] {
            if checksum_file(&path)? != shard.checksum {
                return Err(damaged(&path));
            }
            self.verified[self.position.shard] = true;
        }
        if self.reader.is_none() {
            self.reader = Some(Box::new(open(&path, self.position.row, self.rows_at_once)?));
        }
        let batch = self.reader.as_mut().and_then(Iterator::next);
        if !self.keep_open {
            self.reader = None;
        }
        let Some(batch) = batch else { return Ok(Vec::new()) };
        let batch = batch.map_err(|e| damaged(&path).source(e))?;
        let windows = lists(batch.column(0)).ok_or_else(|| wrong_type(&path, batch.column(0).data_type()))?;
        for (i, window) in windows.iter().enumerate() {
            if let Some(token) = window.iter().find(|token| **token >= self.manifest.vocab) {
                let row = self.position.row + i as u64;
                let message = format!("token {token} is outside the vocabulary of {}", self.manifest.vocab);
                return Err(Error::data(message).file(path.display()).row(row).hint(WRITE_AGAIN));
            }
        }
        Ok(windows)
    }
}

fn open(path: &Path, row: u64, rows_at_once: usize) -> Result<ParquetRecordBatchReader> {
    let file = File::open(path).map_err(|e| damaged(path).source(e))?;
    let builder = ParquetRecordBatchReaderBuilder::try_new(file).map_err(|e| damaged(path).source(e))?;
    let Some(column) = builder.schema().fields().iter().position(|field| field.name() == TOKENS) else {
        return Err(Error::data(format!("the shard has no column `{TOKENS}`")).file(path.display()));
    };
    let tokens = ProjectionMask::roots(builder.parquet_schema(), [column]);
    let reader = builder.with_projection(tokens).with_batch_size(rows_at_once).with_offset(row as usize).build();
    reader.map_err(|e| damaged(path).source(e))
}

fn damaged(path: &Path) -> Error {
    Error::data("the shard is damaged").file(path.display()).hint(WRITE_AGAIN)
}

fn wrong_type(path: &Path, found: &DataType) -> Error {
    Error::data(format!("column `{TOKENS}` is {found}, not a list of 16-bit or 32-bit unsigned numbers")).file(path.display())
}

/// A list column of either width as token ids; `None` if it is of another type.
fn lists(column: &ArrayRef) -> Option<Vec<Vec<u32>>> {
    let lists: &ListArray = column.as_list_opt()?;
    let wide = |values: ArrayRef| -> Option<Vec<u32>> {
        match values.data_type() {
            DataType::UInt16 => Some(values.as_primitive::<UInt16Type>().values().iter().map(|id| u32::from(*id)).collect()),
            DataType::UInt32 => Some(values.as_primitive::<UInt32Type>().values().to_vec()),
            _ => None,
        }
    };
    (0..lists.len()).map(|row| wide(lists.value(row))).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use arrow::array::{ListBuilder, UInt16Builder};
    use arrow::record_batch::RecordBatch;
    use parquet::arrow::ArrowWriter;
    use trommel_core::manifest::Shard;

    use super::*;

    const END: u32 = 99;

    fn write(folder: &Path, vocab: u32, shards: &[Vec<Vec<u16>>]) {
        let mut described = Vec::new();
        for (i, windows) in shards.iter().enumerate() {
            let mut builder = ListBuilder::new(UInt16Builder::new());
            windows.iter().for_each(|window| builder.append_value(window.iter().map(|id| Some(*id))));
            let batch = RecordBatch::try_from_iter([(TOKENS, Arc::new(builder.finish()) as ArrayRef)]).unwrap();
            let path = format!("{i}.parquet");
            let mut writer = ArrowWriter::try_new(File::create(folder.join(&path)).unwrap(), batch.schema(), None).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
            let tokens = windows.iter().map(Vec::len).sum::<usize>() as u64;
            let checksum = checksum_file(&folder.join(&path)).unwrap();
            described.push(Shard {
                shard: i as u32,
                path,
                rows: windows.len() as u64,
                tokens,
                bytes: 0,
                checksum,
                cluster_id: None,
            });
        }
        let tokens = described.iter().map(|shard| shard.tokens).sum();
        let manifest = Manifest { domain: "test".into(), vocab, end_of_text: END, tokens, shards: described };
        std::fs::write(folder.join(Manifest::FILE), serde_json::to_vec(&manifest).unwrap()).unwrap();
        let model = r#"{"type": "WordLevel", "vocab": {"end": 99}, "unk_token": "end"}"#;
        std::fs::write(folder.join(Manifest::TOKENIZER), format!(r#"{{"version": "1.0", "model": {model}}}"#)).unwrap();
    }

    fn windows() -> Vec<Vec<Vec<u16>>> {
        vec![vec![vec![1, 2, 3], vec![], vec![4]], vec![], vec![vec![5, 6, 7, 8, 9, 10, 11, 12]]]
    }

    #[test]
    fn a_flipped_bit_is_found_before_a_token_is_read() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 100, &windows());
        let path = folder.path().join("0.parquet");
        let mut bytes = std::fs::read(&path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&path, bytes).unwrap();
        let error = Loader::open(folder.path(), 100).unwrap().take(1).unwrap_err();
        assert!(error.place().file.as_ref().unwrap().ends_with("0.parquet") && error.remedy().is_some(), "{error}");
    }

    #[test]
    fn the_tokenizer_belongs_to_the_shards() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 100, &windows());
        let path = folder.path().join(Manifest::TOKENIZER);
        let other = std::fs::read_to_string(&path).unwrap().replace("99", "100");
        std::fs::write(&path, other).unwrap();
        assert!(Loader::open(folder.path(), 100).is_err_and(|e| e.to_string().contains("101 token ids")));
        std::fs::remove_file(&path).unwrap();
        assert!(Loader::open(folder.path(), 100).is_err());
    }

    #[test]
    fn no_token_is_lost_at_any_length_and_any_place_resumes() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 100, &windows());
        let once = [1, 2, 3, END, END, 4, END, 5, 6, 7, 8, 9, 10, 11, 12, END];
        let stream: Vec<u32> = once.iter().copied().cycle().take(60).collect();
        for time in [1, 2, 3, 5, 8, 20] {
            let mut loader = Loader::open(folder.path(), 100).unwrap();
            let mut batch = Batch::new(time);
            for _ in 0..60 / time {
                let mut copy = Loader::open(folder.path(), 100).unwrap();
                copy.seek(loader.position()).unwrap();
                let before = batch.clone();
                loader.next_sequence(&mut batch).unwrap();
                let mut resumed = before;
                copy.next_sequence(&mut resumed).unwrap();
                assert_eq!(resumed, batch);
            }
            let whole = 60 / time * time;
            assert_eq!(batch.targets, stream[..whole], "sequences of {time}");
            assert_eq!(batch.tokens[0], END);
            assert_eq!(batch.tokens[1..], stream[..whole - 1]);
            assert!(loader.position().epoch >= 2, "{:?}", loader.position());
        }
    }

    #[test]
    fn bad_folders_say_what_is_wrong() {
        let folder = tempfile::tempdir().unwrap();
        let read = |vocab| {
            let mut loader = Loader::open(folder.path(), vocab)?;
            loader.next_sequence(&mut Batch::new(4))
        };
        assert!(read(100).unwrap_err().message().contains("manifest"));
        write(folder.path(), 100, &[vec![vec![1], vec![250]]]);
        let error = read(100).unwrap_err();
        assert!(error.message().contains("token 250") && error.place().row == Some(1), "{error}");
        assert_eq!(read(50).unwrap_err().exit_code(), 2);
        write(folder.path(), 100, &[vec![]]);
        assert!(read(100).unwrap_err().message().contains("no windows"));
        std::fs::write(folder.path().join("0.parquet"), b"PAR1 truncated").unwrap();
        assert!(read(100).unwrap_err().message().contains("damaged"));
        std::fs::remove_file(folder.path().join("0.parquet")).unwrap();
        assert!(read(100).unwrap_err().message().contains("missing"));
    }
}
