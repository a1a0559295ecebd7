//! A directory with a small corpus and a pipeline file, and the command that runs in it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Arc;

use arrow::array::{ArrayRef, RecordBatch, StringArray};
use parquet::arrow::ArrowWriter;
use serde_json::Value;
use tempfile::TempDir;

/// Words of three kinds of text.
const TOPICS: [&[&str]; 3] = [
    &["psalm", "lord", "mercy", "prophet", "temple", "heaven", "praise", "covenant", "altar", "shepherd", "blessing", "faith"],
    &["query", "index", "table", "transaction", "schema", "column", "commit", "lock", "vacuum", "buffer", "planner", "join"],
    &["violin", "melody", "tempo", "chord", "rhythm", "soprano", "notation", "measure", "octave", "staff", "trill", "concerto"],
];
const COMMON: [&str; 8] = ["the", "of", "and", "in", "with", "a", "is", "for"];

/// A text of `words` words of a topic; every number gives another one.
pub(crate) fn text(topic: usize, number: usize, words: usize) -> String {
    let mut state = (topic as u64 + 1) * 1_000_003 + number as u64 * 7_919;
    let mut next = |n: usize| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as usize % n
    };
    let word = |_| if next(3) == 0 { COMMON[next(COMMON.len())] } else { TOPICS[topic][next(TOPICS[topic].len())] };
    (0..words).map(word).collect::<Vec<_>>().join(" ")
}

/// The documents of the test corpus.
pub(crate) fn corpus() -> Vec<String> {
    (0..600).map(|i| text([0, 1, 1, 2, 1, 2][i % 6], i, 60 + i % 90)).collect()
}

/// The result of one call.
pub(crate) struct Called {
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Called {
    /// The object that `--json` printed.
    pub(crate) fn json(&self) -> Value {
        assert_eq!(self.code, 0, "{}", self.stderr);
        serde_json::from_str(self.stdout.trim()).unwrap_or_else(|e| panic!("{e}: {}", self.stdout))
    }
}

/// A working directory.
pub(crate) struct Bench(TempDir);

impl Bench {
    /// A directory with `corpus.jsonl`, two domains, and `p.yaml`.
    pub(crate) fn new() -> Bench {
        let bench = Bench(tempfile::tempdir().unwrap());
        bench.write_lines("corpus/all.jsonl", &corpus());
        for (domain, topic) in [("sacred", 0), ("music", 2)] {
            let documents = |first: usize, count: usize| (first..first + count).map(|i| text(topic, i, 80)).collect::<Vec<_>>();
            bench.write_lines(&format!("{domain}/train.jsonl"), &documents(10_000, 30));
            bench.write_lines(&format!("{domain}/test.jsonl"), &documents(20_000, 8));
        }
        bench.write(
            "p.yaml",
            "name: small\nseed: 3\ncorpus: {paths: [corpus]}\ndomains:\n  sacred: {train: sacred/train.jsonl, test: sacred/test.jsonl}\n  \
             music: {train: music/train.jsonl, test: music/test.jsonl}\nwindows: {bytes: 512}\ncluster: {k: 8}\nresample: {tokens: 20k}\n\
             shard: {tokenizer: {train: {vocab: 400}}, shard_tokens: 8k}\n",
        );
        bench
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, content).unwrap();
    }

    pub(crate) fn write_lines(&self, name: &str, texts: &[String]) {
        let lines: String = texts.iter().map(|t| format!("{}\n", serde_json::json!({ "text": t }))).collect();
        self.write(name, lines);
    }

    pub(crate) fn write_parquet(&self, name: &str, columns: &[(&str, ArrayRef)]) {
        let batch = RecordBatch::try_from_iter(columns.iter().map(|(n, c)| (*n, Arc::clone(c)))).unwrap();
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let mut writer = ArrowWriter::try_new(fs::File::create(path).unwrap(), batch.schema(), None).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    pub(crate) fn write_texts(&self, name: &str, texts: &[String]) {
        self.write_parquet(name, &[("text", Arc::new(StringArray::from(texts.to_vec())))]);
    }

    /// The command, ready to be called with more arguments.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_trommel"));
        command.args(arguments).current_dir(self.0.path());
        command
    }

    pub(crate) fn call(&self, arguments: &[&str]) -> Called {
        let Output { status, stdout, stderr } = self.command(arguments).output().unwrap();
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        Called { code: status.code().unwrap_or(-1), stdout: text(stdout), stderr: text(stderr) }
    }

    /// `trommel run p.yaml --json` with more arguments; the checksums.
    pub(crate) fn checksums(&self, more: &[&str]) -> Value {
        self.call(&[&["run", "p.yaml", "--json"], more].concat()).json()["checksums"].clone()
    }

    /// The rows of a query, as JSON.
    pub(crate) fn query(&self, sql: &str) -> Vec<Value> {
        let called = self.call(&["sql", "runs/small", "-c", sql, "--format", "json"]);
        called.json().as_array().unwrap().clone()
    }
}

/// Files below a folder whose work was not finished.
pub(crate) fn unfinished(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.path().is_dir() {
            found.extend(unfinished(&entry.path()));
        } else if entry.file_name().to_string_lossy().starts_with(".unfinished") {
            found.push(entry.path());
        }
    }
    found
}
