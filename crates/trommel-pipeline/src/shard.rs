//! Stage `shard`: the draws of each domain in a global pseudo-random order, tokenized, as Parquet files and a manifest.
//!
//! A draw's place is a 64-bit hash. A shard is a range of places, so it is made from a filter and a sort, and memory is
//! bounded by one shard. The draws hold a margin over the budget; the shards end with the window that meets it, which in
//! a random order takes nothing from any cluster in particular.
//!
//! By cluster, one folder holds the whole corpus: a file holds windows of one cluster, in the pseudo-random order within it.
//! One external sort serves all clusters, in bounded memory; a stopped one goes on with the cluster that it was at.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Schema, SchemaRef};
use trommel_core::error::{Error, Result};
use trommel_core::key::{checksum, checksum_file};
use trommel_core::manifest::{Manifest, Shard};
use trommel_core::schema::CORPUS;
use trommel_core::storage::{write_bytes, write_error};
use trommel_spec::plan::Plan;

use crate::engine::{Engine, ParquetSink, Written, footer};
use crate::outputs::Outputs;
use crate::tokenizer::Encoder;
use cluster_files::ClusterFiles;

/// The files of shards by cluster.
mod cluster_files;

const TOKENS: &str = "trommel.tokens";
const BYTES: &str = "trommel.bytes";

/// The shards of one domain.
pub struct Sharding<'a> {
    /// The engine.
    pub engine: &'a Engine,
    /// The names of the run's outputs.
    pub outputs: &'a Outputs,
    /// The plan of the run.
    pub plan: &'a Plan,
    /// Draws over budget, at least 1.
    pub margin: f64,
}

/// What one shard file holds.
struct Content {
    rows: u64,
    tokens: u64,
    bytes: u64,
}

/// Whether a folder holds the finished shards of this plan; their manifest if so.
pub fn finished(outputs: &Outputs, folder: &Path) -> Option<Manifest> {
    let manifest = Manifest::read(folder).ok()?;
    let suffix = suffix(outputs);
    let whole = |s: &Shard| s.path.ends_with(&suffix) && folder.join(&s.path).is_file();
    let all = !manifest.shards.is_empty() && manifest.shards.iter().all(whole) && folder.join(Manifest::TOKENIZER).is_file();
    all.then_some(manifest)
}

/// One checksum over a manifest's shards.
pub fn checksum_of(manifest: &Manifest) -> String {
    checksum(manifest.shards.iter().map(|s| s.checksum.as_str()).collect::<String>().as_bytes())
}

fn suffix(outputs: &Outputs) -> String {
    format!("-{}.parquet", outputs.shards_key.short())
}

impl Sharding<'_> {
    /// Writes the shards and the manifest of one domain. `None` if the draws end before the budget is met.
    pub fn run(&self, domain: &str, folder: &Path) -> Result<Option<Written>> {
        let encoder = Encoder::read(&self.outputs.tokenizer)?;
        let session = self.engine.text_session(self.plan.spec.windows.bytes, [encoder.tokenize_function()]);
        let files: Vec<&Path> = self.outputs.corpus().filter_map(|u| u.draws.as_deref()).collect();
        self.engine.register(&session, "draws", &files)?;
        let budget = self.plan.spec.resample.tokens.0;
        let drawn = budget as f64 * self.margin;
        let count = (drawn / self.plan.spec.shard.shard_tokens.0 as f64).ceil().max(1.0) as u64;
        let mut manifest = empty_manifest(domain, &encoder);
        for number in 0..count {
            if manifest.tokens >= budget {
                break;
            }
            let path = folder.join(format!("{number:05}{}", suffix(self.outputs)));
            let content = match path.exists() {
                true => read_content(&path)?,
                false => {
                    let edge = |i: u64| ((u128::from(i) << 64) / u128::from(count)) as u64;
                    let last = if number + 1 == count { u64::MAX } else { edge(number + 1) - 1 };
                    let sql = include_str!("sql/shard.sql").replace("{domain}", domain);
                    let sql = sql.replace("{first}", &edge(number).to_string()).replace("{last}", &last.to_string());
                    let batches = self.engine.stream(self.engine.query(&session, &sql)?)?;
                    self.write(&path, &schema(encoder.tokens_type()), batches, budget - manifest.tokens)?
                }
            };
            if content.rows > 0 {
                manifest.tokens += content.tokens;
                manifest.shards.push(describe(number as u32, &path, &content, None)?);
            }
        }
        if manifest.tokens < budget {
            return Ok(None);
        }
        self.publish(&manifest, folder).map(Some)
    }

    /// Writes the shards of every cluster of the corpus, and the manifest.
    pub fn by_cluster(&self, folder: &Path) -> Result<Written> {
        let encoder = Encoder::read(&self.outputs.tokenizer)?;
        let session = self.engine.text_session(self.plan.spec.windows.bytes, [encoder.tokenize_function()]);
        let files: Vec<&Path> = self.outputs.corpus().filter_map(|u| u.draws.as_deref()).collect();
        self.engine.register(&session, "draws", &files)?;
        // Files are written in the order of their names, so the last one's cluster is the only one that may be incomplete.
        let done = self.cluster_files(folder);
        let first = done.last().map_or(0, |(cluster, _)| *cluster);
        let sql = include_str!("sql/shard_by_cluster.sql").replace("{first}", &first.to_string());
        let mut files = ClusterFiles {
            folder,
            suffix: &suffix(self.outputs),
            schema: schema(encoder.tokens_type()),
            shard_tokens: self.plan.spec.shard.shard_tokens.0,
            progress: self.engine.progress.as_ref(),
            made: done.into_iter().filter(|(cluster, _)| *cluster < first).collect(),
            slices: None,
            open: None,
            cluster: first,
        };
        for batch in self.engine.stream(self.engine.query(&session, &sql)?)? {
            files.write(&batch?)?;
        }
        let made = files.finish()?;
        let mut manifest = empty_manifest(CORPUS, &encoder);
        for (number, (cluster, path)) in made.iter().enumerate() {
            let content = read_content(path)?;
            manifest.tokens += content.tokens;
            manifest.shards.push(describe(number as u32, path, &content, Some(*cluster))?);
        }
        self.publish(&manifest, folder)
    }

    /// The files of this plan that are there, in the order of clusters.
    fn cluster_files(&self, folder: &Path) -> Vec<(u32, PathBuf)> {
        let suffix = suffix(self.outputs);
        let cluster = |path: PathBuf| {
            let name = path.file_name()?.to_str()?.strip_suffix(&suffix)?;
            Some((name.split('-').next()?.parse().ok()?, path.clone()))
        };
        let mut found: Vec<(u32, PathBuf)> = parquet_files(folder).into_iter().filter_map(cluster).collect();
        found.sort();
        found
    }

    /// Writes windows up to and including the one that brings their tokens to `budget`.
    fn write(
        &self,
        path: &Path,
        schema: &SchemaRef,
        batches: impl Iterator<Item = Result<RecordBatch>>,
        budget: u64,
    ) -> Result<Content> {
        let mut sink = ParquetSink::create(path, schema)?;
        let mut content = Content { rows: 0, tokens: 0, bytes: 0 };
        for batch in batches {
            let batch = batch?;
            let missing = || Error::internal("a shard lacks a column");
            let tokens = batch.column_by_name("tokens").ok_or_else(missing)?.as_list::<i32>().clone();
            let texts = batch.column_by_name("text").ok_or_else(missing)?.clone();
            let texts = arrow::compute::cast(&texts, &DataType::Utf8View).map_err(|e| Error::internal("no text").source(e))?;
            let before = content.tokens;
            let mut kept = 0;
            while kept < batch.num_rows() && content.tokens < budget {
                content.tokens += tokens.value_length(kept) as u64;
                content.bytes += texts.as_string_view().value(kept).len() as u64;
                kept += 1;
            }
            content.rows += kept as u64;
            sink.write(&batch.slice(0, kept))?;
            self.engine.progress.advance(content.tokens - before);
            if content.tokens >= budget {
                break;
            }
        }
        finish(sink, &content)?;
        Ok(content)
    }

    /// Writes tokenizer and manifest, then removes shards that an earlier plan has left.
    fn publish(&self, manifest: &Manifest, folder: &Path) -> Result<Written> {
        let read_error =
            |e: std::io::Error| Error::system("cannot read the tokenizer").file(self.outputs.tokenizer.display()).source(e);
        // A manifest must never stand beside another plan's tokenizer.
        match std::fs::remove_file(folder.join(Manifest::FILE)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(write_error(folder, e)),
            _ => {}
        }
        write_bytes(&folder.join(Manifest::TOKENIZER), &std::fs::read(&self.outputs.tokenizer).map_err(read_error)?)?;
        let text = serde_json::to_string_pretty(manifest).map_err(|e| Error::internal("no manifest").source(e))?;
        write_bytes(&folder.join(Manifest::FILE), text.as_bytes())?;
        for path in parquet_files(folder) {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if !manifest.shards.iter().any(|s| s.path == name) {
                std::fs::remove_file(&path).map_err(|e| write_error(&path, e))?;
            }
        }
        let bytes = manifest.shards.iter().map(|s| crate::source::size(&folder.join(&s.path))).sum();
        Ok(Written { rows: manifest.shards.iter().map(|s| s.rows).sum(), bytes })
    }
}

fn empty_manifest(domain: &str, encoder: &Encoder) -> Manifest {
    let (vocab, end_of_text) = (encoder.vocab, encoder.end_of_text);
    Manifest { domain: domain.to_owned(), vocab, end_of_text, tokens: 0, shards: Vec::new() }
}

fn describe(shard: u32, path: &Path, content: &Content, cluster_id: Option<u32>) -> Result<Shard> {
    Ok(Shard {
        shard,
        path: path.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        rows: content.rows,
        tokens: content.tokens,
        bytes: content.bytes,
        checksum: checksum_file(path)?,
        cluster_id,
    })
}

/// Closes a shard, with what it holds in its footer.
fn finish(mut sink: ParquetSink, content: &Content) -> Result<PathBuf> {
    let path = sink.path().to_owned();
    sink.note(TOKENS, &content.tokens.to_string());
    sink.note(BYTES, &content.bytes.to_string());
    sink.finish()?;
    Ok(path)
}

/// What a batch of windows holds.
fn count(batch: &RecordBatch) -> Result<Content> {
    let missing = || Error::internal("a shard lacks a column");
    let tokens = batch.column_by_name("tokens").ok_or_else(missing)?.as_list::<i32>();
    let offsets = tokens.value_offsets();
    let texts = arrow::compute::cast(batch.column_by_name("text").ok_or_else(missing)?, &DataType::Utf8View);
    let texts = texts.map_err(|e| Error::internal("no text").source(e))?;
    let bytes = texts.as_string_view().iter().map(|text| text.map_or(0, str::len) as u64).sum();
    let tokens = (offsets[offsets.len() - 1] - offsets[0]) as u64;
    Ok(Content { rows: batch.num_rows() as u64, tokens, bytes })
}

fn parquet_files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|e| e.path());
    entries.filter(|p| p.extension().is_some_and(|e| e == "parquet")).collect()
}

fn read_content(path: &Path) -> Result<Content> {
    let note = |key: &str| -> Result<u64> {
        let damaged =
            || Error::data("the shard is damaged").file(path.display()).hint("remove it and run the same command again");
        footer(path, key)?.1.and_then(|v| v.parse().ok()).ok_or_else(damaged)
    };
    Ok(Content { rows: footer(path, TOKENS)?.0, tokens: note(TOKENS)?, bytes: note(BYTES)? })
}

fn schema(tokens: DataType) -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("document", DataType::Utf8, false),
        Field::new("window", DataType::UInt32, false),
        Field::new("text", DataType::Utf8, false),
        Field::new("tokens", tokens, false),
        Field::new("cluster_id", DataType::UInt32, false),
    ]))
}
