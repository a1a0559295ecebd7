//! The name of every output, computed before anything runs.
//!
//! A name contains the key of what produces the file: the source's fingerprint, the settings and the code version of its
//! stage, and the keys of the stages before it. So a file that is there is done, and a changed setting changes the names
//! of exactly the files that depend on it:
//!
//! ```text
//!   source file -> windows, (table,) embed, sample --+-> cluster -> assign -> histogram -> weigh -> resample -> shard
//!                                                    +-> tokenizer -----------------------------------^
//! ```
//!
//! `Dsir` has the names of what only the method `dsir` makes.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

use serde::Serialize;
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::schema::CORPUS;
use trommel_spec::pipeline::{Method, ShardBy};
use trommel_spec::plan::{Plan, Source};

use crate::source::SourceFile;

/// The code version of each stage. Raise one when its stage's output changes for equal input.
mod version {
    pub(super) const WINDOWS: &str = "windows 1";
    pub(super) const TABLE: &str = "table 1";
    pub(super) const EMBED: &str = "embed 1";
    pub(super) const CLUSTER: &str = "cluster 3";
    pub(super) const ASSIGN: &str = "assign 2";
    pub(super) const HISTOGRAM: &str = "histogram 1";
    pub(super) const MIXTURE: &str = "mixture 1";
    pub(super) const WEIGH: &str = "weigh 2";
    pub(super) const TOKENIZER: &str = "tokenizer 1";
    pub(super) const RESAMPLE: &str = "resample 2";
    pub(super) const DIAGNOSTICS: &str = "diagnostics 2";
    pub(super) const SHARD: &str = "shard 1";
    pub(super) const SHARD_BY_CLUSTER: &str = "shard by cluster 2";
    pub(super) const DSIR: &str = "dsir 1";
}

/// The work and the outputs of one input file.
#[derive(Debug, Clone)]
pub struct Unit {
    /// `corpus` or the domain's name.
    pub source: String,
    /// The input file.
    pub file: SourceFile,
    /// Its size in bytes.
    pub bytes: u64,
    /// Rows that cannot be used.
    pub rejects: PathBuf,
    /// Where each window lies.
    pub windows: PathBuf,
    /// The windows of lowest priority with their text; only for the corpus.
    pub sample: Option<PathBuf>,
    /// The vector of each window.
    pub embeddings: PathBuf,
    /// The cluster of each window.
    pub assignments: PathBuf,
    /// The windows drawn from it, for every domain; only for the corpus.
    pub draws: Option<PathBuf>,
}

/// The name of every output of a run.
#[derive(Debug, Clone)]
pub struct Outputs {
    /// Corpus files, then the files of each domain's train set.
    pub units: Vec<Unit>,
    /// The folder of the embedding table, if it is to be learnt from the corpus.
    pub table: PathBuf,
    /// The tree of clusters.
    pub clusters: PathBuf,
    /// Size, mean distance and typical terms of each cluster.
    pub cluster_statistics: PathBuf,
    /// Domain x cluster counts.
    pub histograms: PathBuf,
    /// Mixture x cluster counts, if the plan has mixtures; by themselves, so that other proportions leave the rest alone.
    pub mixtures: Option<PathBuf>,
    /// Domain x cluster weights.
    pub weights: PathBuf,
    /// The tokenizer of the shards.
    pub tokenizer: PathBuf,
    /// Domain x cluster rates of drawing.
    pub rates: PathBuf,
    /// What the weights do to each domain.
    pub diagnostics: PathBuf,
    /// One folder of shards per domain, and one for the corpus if the unweighted model is wanted; only that for the corpus if
    /// they are written by cluster.
    pub shards: Vec<(String, PathBuf)>,
    /// The key of everything that the shards depend on; what is trained on them is named with it.
    pub shards_key: Key,
    /// What the compared models reached.
    pub results: PathBuf,
    /// The fingerprint of every source file, as these names were computed from it.
    pub sources: BTreeMap<PathBuf, Key>,
    /// What the method `dsir` makes, if it is wanted.
    pub dsir: Option<Box<Dsir>>,
}

/// The name of every output that only the method `dsir` makes.
#[derive(Debug, Clone)]
pub struct Dsir {
    /// The units of [`Outputs::units`].
    pub units: Vec<DsirUnit>,
    /// Domain x bucket probabilities.
    pub ratios: PathBuf,
    /// The lowest key that is selected for each domain.
    pub selection: PathBuf,
    /// The run as the stage `shard` is to see it: draws, shards and their key are DSIR's, and all else is the same.
    pub outputs: Outputs,
}

/// The outputs of one input file.
#[derive(Debug, Clone)]
pub struct DsirUnit {
    /// The unit, with DSIR's draws.
    pub unit: Unit,
    /// How many n-grams fall into each bucket.
    pub counts: PathBuf,
    /// Weight and key of each window for each domain; only for the corpus.
    pub scores: Option<PathBuf>,
}

/// An input file and the key of its windows.
struct Input<'a> {
    source: &'a Source,
    path: &'a Path,
    bytes: u64,
    fingerprint: Key,
    windows: Key,
}

impl Outputs {
    /// Names every output. `embedder` is the key of the embedding model, or `None` if the run learns it from the corpus. Reads no
    /// more of the sources than their ends.
    pub fn of(plan: &Plan, embedder: Option<Key>) -> Result<Outputs> {
        let spec = &plan.spec;
        let seed = spec.seed.to_le_bytes();
        let inputs = inputs(plan)?;
        let table = Key::of([version::TABLE.as_bytes(), &joined(corpus(&inputs).map(|i| i.windows)), &seed]);
        let embedder = embedder.unwrap_or(table);
        let embed =
            |input: &Input| Key::of([version::EMBED.as_bytes(), &input.windows.0.to_le_bytes(), &embedder.0.to_le_bytes()]);
        let of_corpus = joined(corpus(&inputs).map(embed));
        let after =
            |version: &str, before: Key, settings: &[u8]| Key::of([version.as_bytes(), &before.0.to_le_bytes(), settings]);

        let cluster_settings =
            (spec.cluster.levels(), spec.cluster.balance(), spec.cluster.sample(), spec.cluster.iterations());
        let cluster = Key::of([version::CLUSTER.as_bytes(), &of_corpus, &json(&cluster_settings)?, &seed]);
        let histogram = after(version::HISTOGRAM, cluster, &joined(inputs.iter().map(embed)));
        let mixtures = mixtures(plan)?;
        let mixed = if mixtures.is_empty() { histogram } else { after(version::MIXTURE, histogram, &mixtures) };
        let weigh = after(version::WEIGH, mixed, &json(&spec.weigh)?);
        let tokenizer = match &spec.shard.tokenizer.path {
            Some(path) => {
                Key::of_bytes(&std::fs::read(path).map_err(|e| Error::config("cannot read it").file(path.display()).source(e))?)
            }
            None => Key::of([version::TOKENIZER.as_bytes(), &of_corpus, &spec.shard.tokenizer.vocab().to_le_bytes(), &seed]),
        };
        let (streams, drawn) = (streams(plan), drawn(plan));
        let resample_settings = json(&(&spec.resample, &streams, spec.seed, tokenizer.to_string()))?;
        let resample = after(version::RESAMPLE, weigh, &resample_settings);
        // By cluster, draws of the domains are planned only.
        let planned = match spec.shard.by {
            ShardBy::Domain => resample,
            ShardBy::Cluster => after("planned", resample, &[]),
        };
        // Shards by cluster hold the corpus whatever the domains are, so a new domain finds them done.
        let draws = match spec.shard.by {
            ShardBy::Domain => resample,
            ShardBy::Cluster => Key::of([b"by cluster", &seed[..]]),
        };
        let shards_key = match spec.shard.by {
            ShardBy::Domain => after(version::SHARD, resample, &json(&spec.shard.shard_tokens)?),
            ShardBy::Cluster => {
                let settings = json(&(spec.shard.shard_tokens, tokenizer.to_string(), spec.seed))?;
                after(version::SHARD_BY_CLUSTER, cluster, &settings)
            }
        };

        let test_files = plan.domains.iter().flat_map(|d| &d.test).flat_map(|test| &test.files);
        let tests = test_files.map(|file| Ok((file.clone(), fingerprint(file)?.1))).collect::<Result<Vec<_>>>()?;
        let test_keys: Vec<String> = tests.iter().map(|(_, key)| key.to_string()).collect();
        let results_settings = json(&(shards_key.to_string(), &spec.train, &spec.finetune, test_keys))?;

        let path = |stage: &str, name: &str, key: Key| plan.run_dir.join(stage).join(format!("{name}-{}.parquet", key.short()));
        let units = inputs.iter().map(|input| {
            let name = &input.source.name;
            let is_corpus = name == CORPUS;
            let embed = embed(input);
            let assign = after(version::ASSIGN, embed, &cluster.0.to_le_bytes());
            Unit {
                source: name.clone(),
                file: SourceFile { path: input.path.to_owned(), text: input.source.text.clone(), id: input.source.id.clone() },
                bytes: input.bytes,
                rejects: path("windows", &format!("{name}-rejects"), input.windows),
                windows: path("windows", name, input.windows),
                sample: is_corpus.then(|| path("embed", "sample", after("sample", embed, &seed))),
                embeddings: path("embed", name, embed),
                assignments: path("assign", name, assign),
                draws: is_corpus.then(|| path("resample", "draws", after("draws", assign, &draws.0.to_le_bytes()))),
            }
        });
        let mut outputs = Outputs {
            units: units.collect(),
            table: plan.run_dir.join("embed").join(format!("table-{}", table.short())),
            clusters: path("cluster", "clusters", cluster),
            cluster_statistics: path("histogram", "clusters", histogram),
            histograms: path("histogram", "histograms", histogram),
            mixtures: (!mixtures.is_empty()).then(|| path("histogram", "mixtures", mixed)),
            weights: path("weigh", "weights", weigh),
            tokenizer: plan.run_dir.join("tokenizer").join(format!("{}.json", tokenizer.short())),
            rates: path("resample", "rates", planned),
            diagnostics: path("resample", "diagnostics", after(version::DIAGNOSTICS, planned, &[])),
            shards: drawn.iter().map(|s| (s.clone(), plan.run_dir.join("shards").join(s))).collect(),
            shards_key,
            results: path("eval", "results", after("results", resample, &results_settings)),
            sources: inputs.iter().map(|i| (i.path.to_owned(), i.fingerprint)).chain(tests).collect(),
            dsir: None,
        };
        if plan.spec.train.as_ref().is_some_and(|t| t.methods.contains(&Method::Dsir)) {
            outputs.dsir = Some(Box::new(dsir(plan, &outputs, &inputs, cluster, tokenizer)?));
        }
        Ok(outputs)
    }

    /// The shards that a method pretrains on: a domain's, or the corpus's.
    pub fn shards_of(&self, method: Method, domain: &str) -> Option<&Path> {
        let shards = self.of_method(method).shards.iter().find(|(name, _)| name == domain);
        shards.map(|(_, folder)| folder.as_path())
    }

    /// The key of everything that the shards of a method depend on.
    pub fn shards_key_of(&self, method: Method) -> Key {
        self.of_method(method).shards_key
    }

    fn of_method(&self, method: Method) -> &Outputs {
        self.dsir.as_ref().filter(|_| method == Method::Dsir).map_or(self, |dsir| &dsir.outputs)
    }

    /// The files of the table `histograms`.
    pub fn histogram_files(&self) -> Vec<&Path> {
        std::iter::once(&self.histograms).chain(&self.mixtures).map(PathBuf::as_path).collect()
    }

    /// The outputs that hold shards: our own, and DSIR's if they are wanted.
    pub fn shard_sets(&self) -> impl Iterator<Item = &Outputs> {
        std::iter::once(self).chain(self.dsir.as_ref().map(|dsir| &dsir.outputs))
    }

    /// The units of the corpus.
    pub fn corpus(&self) -> impl Iterator<Item = &Unit> {
        self.units.iter().filter(|u| u.source == CORPUS)
    }
}

/// Names the outputs of DSIR, which depend on no embedding or weight, but carry the cluster of each window.
fn dsir(plan: &Plan, outputs: &Outputs, inputs: &[Input], cluster: Key, tokenizer: Key) -> Result<Dsir> {
    let spec = &plan.spec;
    let key = |step: &str, before: &[Key], settings: &[u8]| {
        let before: Vec<u8> = before.iter().flat_map(|k| k.0.to_le_bytes()).collect();
        Key::of([version::DSIR.as_bytes(), step.as_bytes(), &before, settings])
    };
    let path =
        |stage: &str, name: &str, key: Key| plan.run_dir.join(stage).join(format!("dsir-{name}-{}.parquet", key.short()));
    let mut windows: Vec<Key> = inputs.iter().map(|i| i.windows).collect();
    windows.sort();
    let ratios = key("ratios", &windows, &mixtures(plan)?);
    let selection = key("selection", &[ratios, tokenizer], &json(&(&spec.resample, spec.seed))?);
    let shards_key = key("shards", &[selection, cluster], &json(&spec.shard.shard_tokens)?);
    let unit = |(unit, input): (&Unit, &Input)| {
        let scores = key("scores", &[input.windows, ratios], &spec.seed.to_le_bytes());
        let draws = key("draws", &[input.windows, selection, cluster], &[]);
        let is_corpus = unit.source == CORPUS;
        DsirUnit {
            unit: Unit { draws: is_corpus.then(|| path("resample", "draws", draws)), ..unit.clone() },
            counts: path("weigh", &format!("counts-{}", unit.source), key("counts", &[input.windows], &[])),
            scores: is_corpus.then(|| path("resample", "scores", scores)),
        }
    };
    let units: Vec<DsirUnit> = outputs.units.iter().zip(inputs).map(unit).collect();
    // No domain has a name with a point in it.
    let folder = |domain: &String| (domain.clone(), plan.run_dir.join("shards").join(format!("{domain}.dsir")));
    let outputs = Outputs {
        units: units.iter().map(|u| u.unit.clone()).collect(),
        shards: spec.domains.keys().map(folder).collect(),
        shards_key,
        ..outputs.clone()
    };
    let (ratios, selection) = (path("weigh", "ratios", ratios), path("resample", "selection", selection));
    Ok(Dsir { units, ratios, selection, outputs })
}

/// The sets that windows are drawn for: all of [`streams`], or the corpus only if shards are written by cluster.
pub fn drawn(plan: &Plan) -> Vec<String> {
    match plan.spec.shard.by {
        ShardBy::Domain => streams(plan),
        ShardBy::Cluster => vec![CORPUS.to_owned()],
    }
}

/// The sets that rates are planned for: the domains, and `corpus` if a model is to be trained on the unweighted corpus or its
/// clusters.
pub fn streams(plan: &Plan) -> Vec<String> {
    let by_cluster = plan.spec.shard.by == ShardBy::Cluster;
    let generic = |method: &Method| matches!(method, Method::Slm | Method::Llm);
    let generic = by_cluster || plan.spec.train.as_ref().is_some_and(|t| t.methods.iter().any(generic));
    plan.spec.domains.keys().cloned().chain(generic.then(|| CORPUS.to_owned())).collect()
}

fn inputs(plan: &Plan) -> Result<Vec<Input<'_>>> {
    let mut inputs = Vec::new();
    for source in std::iter::once(&plan.corpus).chain(plan.domains.iter().map(|d| &d.train)) {
        for path in &source.files {
            let (bytes, fingerprint) = fingerprint(path)?;
            let settings = json(&(&source.name, &source.text, &source.id, &plan.spec.windows))?;
            let parts =
                [version::WINDOWS.as_bytes(), path.as_os_str().as_encoded_bytes(), &fingerprint.0.to_le_bytes(), &settings];
            inputs.push(Input { source, path, bytes, fingerprint, windows: Key::of(parts) });
        }
    }
    Ok(inputs)
}

fn corpus<'a, 'b>(inputs: &'b [Input<'a>]) -> impl Iterator<Item = &'b Input<'a>> {
    inputs.iter().filter(|i| i.source.name == CORPUS)
}

/// Keys as a part of another one, in whatever order they come.
fn joined(keys: impl Iterator<Item = Key>) -> Vec<u8> {
    let mut keys: Vec<Key> = keys.collect();
    keys.sort();
    keys.iter().flat_map(|k| k.0.to_le_bytes()).collect()
}

/// Size of a file, and the key of its size, its time of change, and the 64 KB at either end (a Parquet file's footer).
pub(crate) fn fingerprint(path: &Path) -> Result<(u64, Key)> {
    const END: u64 = 64 << 10;
    let read = || -> std::io::Result<(u64, Key)> {
        let mut file = File::open(path)?;
        let metadata = file.metadata()?;
        let changed = metadata.modified()?.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
        let mut ends = Vec::new();
        file.by_ref().take(END).read_to_end(&mut ends)?;
        file.seek(SeekFrom::Start(metadata.len().saturating_sub(END)))?;
        file.take(END).read_to_end(&mut ends)?;
        Ok((metadata.len(), Key::of([&metadata.len().to_le_bytes()[..], &changed.to_le_bytes(), &ends])))
    };
    read().map_err(|e| {
        Error::data("cannot read the file").file(path.display()).source(e).hint("check the path and its permissions")
    })
}

/// The mixtures of a plan as a part of keys; nothing if there are none.
fn mixtures(plan: &Plan) -> Result<Vec<u8>> {
    if plan.mixtures.is_empty() { Ok(Vec::new()) } else { json(&plan.mixtures) }
}

fn json(value: &impl Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(value).map_err(|e| Error::internal("a setting cannot be written").source(e))
}
