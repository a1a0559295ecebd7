//! A run: every stage in the order of the data, each skipped where its outputs are there.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use serde::Serialize;
use trommel_core::error::{Error, Result};
use trommel_core::key::checksum_file;
use trommel_core::progress::{Interrupt, Progress};
use trommel_core::schema::CORPUS;
use trommel_core::storage::{lock, remove_temporaries, write_error};
use trommel_embed::Embedder;
use trommel_embed::static_table::{STATIC_TABLE, StaticTable};
use trommel_kernels::panels;
use trommel_spec::pipeline::{LEARNT, Precision, ShardBy};
use trommel_spec::plan::Plan;

use crate::embed::{Counts, Pass, counts};
use crate::engine::{Engine, Written, written};
use crate::outputs::{Outputs, Unit};
use crate::shard::{Sharding, checksum_of, finished};
use crate::table::{DIMENSIONS, Learning};
use crate::{assign, catalog, cluster, dsir, histogram, resample, tokenizer, weigh};

/// The stages of the pipeline, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Documents are cut.
    Windows,
    /// Windows become vectors.
    Embed,
    /// Clusters are fitted.
    Cluster,
    /// Windows find their cluster.
    Assign,
    /// Clusters are counted.
    Histogram,
    /// Counts become weights.
    Weigh,
    /// The tokenizer is trained.
    Tokenizer,
    /// Windows are drawn.
    Resample,
    /// Draws become shards.
    Shard,
}

impl Stage {
    /// Every stage, in order.
    pub const ALL: [Stage; 9] = [
        Stage::Windows,
        Stage::Embed,
        Stage::Cluster,
        Stage::Assign,
        Stage::Histogram,
        Stage::Weigh,
        Stage::Tokenizer,
        Stage::Resample,
        Stage::Shard,
    ];

    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Windows => "windows",
            Stage::Embed => "embed",
            Stage::Cluster => "cluster",
            Stage::Assign => "assign",
            Stage::Histogram => "histogram",
            Stage::Weigh => "weigh",
            Stage::Tokenizer => "tokenizer",
            Stage::Resample => "resample",
            Stage::Shard => "shard",
        }
    }
}

/// What one stage did.
#[derive(Debug, Clone, Default, Serialize)]
pub struct StageReport {
    /// The stage's name.
    pub stage: String,
    /// Whether all its outputs were there already.
    pub cached: bool,
    /// Wall time; windows are cut while they are embedded, so that time is under `embed`.
    pub seconds: f64,
    /// Rows of its outputs; of a stage that has not run, unknown.
    pub rows: Option<u64>,
    /// Bytes of its outputs.
    pub bytes: Option<u64>,
}

/// A run directory that is held by this process.
pub struct Run<'a> {
    plan: &'a Plan,
    outputs: Outputs,
    /// None if it is learnt from the corpus.
    embedder: Option<Arc<dyn Embedder>>,
    engine: Engine,
    reports: Vec<StageReport>,
    _lock: File,
}

/// Margins over the token budget: the first one nearly always suffices, the next ones serve when the sample misjudged how
/// many tokens a byte of the drawn text makes.
const MARGINS: [f64; 3] = [1.1, 1.6, 3.0];

impl<'a> Run<'a> {
    /// Takes the run directory, loads the model, and names every output.
    pub fn open(plan: &'a Plan, threads: usize, progress: Arc<dyn Progress>, interrupt: Interrupt) -> Result<Run<'a>> {
        let lock = lock(&plan.run_dir)?;
        let spill = plan.run_dir.join("spill");
        remove_temporaries(&plan.run_dir)?;
        remove_folder(&spill)?;
        let (outputs, embedder) = outputs(plan)?;
        let engine = Engine::new(threads, spill, progress, interrupt)?;
        Ok(Run { plan, outputs, embedder, engine, reports: Vec::new(), _lock: lock })
    }

    /// The names of the outputs.
    pub fn outputs(&self) -> &Outputs {
        &self.outputs
    }

    /// Runs the stages up to and including `until`.
    pub fn stages(&mut self, until: Stage) -> Result<Vec<StageReport>> {
        for stage in Stage::ALL.into_iter().filter(|&s| s <= until) {
            self.engine.interrupt.check()?;
            let start = Instant::now();
            let cached = is_done(&self.outputs, stage);
            let comes_with_embed = stage == Stage::Windows && until >= Stage::Embed;
            if !cached && !comes_with_embed {
                self.engine.progress.begin(stage.name(), self.amount(stage)?, unit_of(stage));
                let result = self.make(stage);
                self.engine.progress.end();
                result.map_err(|e| e.stage(stage.name()))?;
            }
            let made = if is_done(&self.outputs, stage) { Some(size_of(&self.outputs, stage)?) } else { None };
            self.reports.push(StageReport {
                stage: stage.name().to_owned(),
                cached,
                seconds: start.elapsed().as_secs_f64(),
                rows: made.map(|w| w.rows),
                bytes: made.map(|w| w.bytes),
            });
            catalog::write(self.plan, &self.outputs)?;
            let are_cut_now = match stage {
                Stage::Windows => made.is_some(),
                // They were not made by themselves before.
                Stage::Embed => self.reports.iter().any(|r| r.stage == Stage::Windows.name() && r.rows.is_none()),
                _ => false,
            };
            if are_cut_now {
                self.check_windows().map_err(|e| e.stage("windows"))?;
            }
        }
        // The first report was made before the pass that wrote the windows.
        if let Some(report) = self.reports.first_mut().filter(|r| r.rows.is_none()) {
            let made = size_of(&self.outputs, Stage::Windows)?;
            (report.rows, report.bytes) = (Some(made.rows), Some(made.bytes));
        }
        Ok(self.reports.clone())
    }

    fn make(&self, stage: Stage) -> Result<()> {
        let (engine, outputs, spec) = (&self.engine, &self.outputs, &self.plan.spec);
        match stage {
            Stage::Windows | Stage::Embed => {
                let embedder = (stage == Stage::Embed).then(|| self.embedder()).transpose()?;
                let pass = Pass { engine, embedder: embedder.as_ref(), window_bytes: spec.windows.bytes, seed: spec.seed };
                engine.for_each(&missing(outputs, stage), |unit| pass.run(unit))
            }
            Stage::Cluster => {
                let mut windows = 0;
                for unit in outputs.corpus() {
                    windows += counts(unit)?.windows;
                }
                cluster::stage::run(engine, outputs, spec, windows).map(|_| ())
            }
            Stage::Assign => {
                let tree = Arc::new(cluster::stage::read(engine, outputs)?);
                engine.for_each(&missing(outputs, stage), |unit| assign::run(engine, unit, &tree))
            }
            Stage::Histogram => histogram::run(engine, outputs, &self.plan.mixtures),
            Stage::Weigh => {
                if !is_done_without_dsir(outputs, stage) {
                    weigh::run(engine, outputs, spec)?;
                }
                outputs.dsir.as_ref().map_or(Ok(()), |dsir| dsir::weigh(engine, dsir, self.plan))
            }
            Stage::Tokenizer => tokenizer::run(engine, outputs, &spec.shard.tokenizer).map(|_| ()),
            Stage::Resample => {
                if !is_done_without_dsir(outputs, stage) {
                    self.draw(MARGINS[0])?;
                }
                outputs.dsir.as_ref().map_or(Ok(()), |dsir| dsir::resample(engine, dsir, self.plan))
            }
            Stage::Shard => {
                self.shard()?;
                outputs.dsir.as_ref().map_or(Ok(()), |dsir| dsir::shard(engine, dsir, self.plan))
            }
        }
    }

    /// Whether the embedding table is to be learnt and was not yet.
    fn must_learn(&self) -> bool {
        self.embedder.is_none() && !self.outputs.table.join(STATIC_TABLE).exists()
    }

    /// The model of `embed.model`, learnt now if it is to be learnt and was not yet.
    fn embedder(&self) -> Result<Arc<dyn Embedder>> {
        if let Some(embedder) = &self.embedder {
            return Ok(Arc::clone(embedder));
        }
        let (table, spec) = (&self.outputs.table, &self.plan.spec);
        if self.must_learn() {
            // Without its table, the folder of one is of no use.
            remove_folder(table)?;
            let source = &self.plan.corpus;
            let learning = Learning { source, window_bytes: spec.windows.bytes, dimensions: DIMENSIONS, seed: spec.seed };
            // What cannot be used is counted and listed when the windows are written.
            let learnt = learning.run(table, &*self.engine.progress, &self.engine.interrupt)?;
            self.engine.progress.line(&format!("learnt an embedding table from {}", learnt.describe()));
        }
        Ok(Arc::new(StaticTable::read(table)?))
    }

    fn draw(&self, margin: f64) -> Result<()> {
        let (engine, outputs) = (&self.engine, &self.outputs);
        if !outputs.rates.exists() {
            resample::write_rates(engine, outputs, self.plan, margin)?;
        }
        engine.for_each(&missing(outputs, Stage::Resample), |unit| resample::draw(engine, outputs, self.plan, unit))?;
        resample::write_diagnostics(engine, outputs, self.plan.spec.shard.by)
    }

    fn shard(&self) -> Result<()> {
        if self.plan.spec.shard.by == ShardBy::Cluster {
            let sharding = Sharding { engine: &self.engine, outputs: &self.outputs, plan: self.plan, margin: 1.0 };
            let mut open = self.outputs.shards.iter().filter(|(_, folder)| finished(&self.outputs, folder).is_none());
            return open.try_for_each(|(_, folder)| sharding.by_cluster(folder).map(|_| ()));
        }
        for (domain, folder) in &self.outputs.shards {
            if finished(&self.outputs, folder).is_some() {
                continue;
            }
            loop {
                let margin = resample::margin(&self.outputs)?;
                let sharding = Sharding { engine: &self.engine, outputs: &self.outputs, plan: self.plan, margin };
                if sharding.run(domain, folder)?.is_some() {
                    break;
                }
                let larger = MARGINS.into_iter().find(|&m| m > margin).ok_or_else(|| {
                    let budget = self.plan.spec.resample.tokens;
                    Error::data(format!("the corpus gives fewer than the {budget} tokens that are asked for `{domain}`"))
                        .hint("lower `resample.tokens`, raise `weigh.max_epochs`, or add to the corpus")
                })?;
                self.redraw(larger)?;
            }
        }
        Ok(())
    }

    /// Draws again with a larger margin, from nothing: what was drawn before stays drawn, so only more is added.
    fn redraw(&self, margin: f64) -> Result<()> {
        self.engine
            .progress
            .line(&format!("more tokens are needed than the sample foretold; drawing again with a margin of {margin}"));
        let remove = |path: &Path| match std::fs::remove_file(path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(write_error(path, e)),
            _ => Ok(()),
        };
        self.outputs.corpus().filter_map(|u| u.draws.as_deref()).try_for_each(remove)?;
        for (_, folder) in self.outputs.shards.iter().filter(|(_, folder)| finished(&self.outputs, folder).is_none()) {
            remove_folder(folder)?;
        }
        remove(&self.outputs.rates)?;
        remove(&self.outputs.diagnostics)?;
        self.draw(margin)
    }

    /// The work of a stage, for its progress.
    fn amount(&self, stage: Stage) -> Result<Option<u64>> {
        let units = missing(&self.outputs, stage);
        let dsir = self.outputs.dsir.as_deref();
        Ok(match stage {
            Stage::Windows | Stage::Embed => {
                let learns = stage == Stage::Embed && self.must_learn();
                let learnt_from = self.outputs.corpus().filter(|_| learns);
                Some(units.iter().chain(learnt_from).map(|u| u.bytes).sum())
            }
            Stage::Resample => Some(units.iter().map(|u| u.bytes).sum::<u64>() + dsir.map_or(0, dsir::resample_bytes)),
            Stage::Weigh => dsir.map(dsir::weigh_bytes),
            Stage::Assign => Some(units.iter().map(|u| counts(u).map(|c| c.windows)).sum::<Result<u64>>()?),
            Stage::Shard if self.plan.spec.shard.by == ShardBy::Cluster => None,
            Stage::Shard => {
                let sets: usize = self.outputs.shard_sets().map(|o| o.shards.len()).sum();
                Some(self.plan.spec.resample.tokens.0 * sets as u64)
            }
            _ => None,
        })
    }

    /// Refuses a source without windows, or with more rejects than allowed.
    fn check_windows(&self) -> Result<()> {
        let mut sums: BTreeMap<&str, Counts> = BTreeMap::new();
        for unit in &self.outputs.units {
            let found = counts(unit)?;
            let sum = sums.entry(&unit.source).or_default();
            sum.documents += found.documents;
            sum.windows += found.windows;
            sum.rejected += found.rejected;
        }
        let limit = self.plan.spec.corpus.max_reject_share;
        for (source, Counts { documents, windows, rejected }) in sums {
            if rejected > 0 {
                let files: Vec<&Path> =
                    self.outputs.units.iter().filter(|u| u.source == source).map(|u| u.rejects.as_path()).collect();
                let first = catalog::first_reject(&self.engine, &files)?;
                let share = rejected as f64 / (documents + rejected) as f64;
                let message =
                    format!("{rejected} rows of `{source}` cannot be used ({:.2}%), the first one is {first}", share * 100.0);
                if share > limit {
                    let run_dir = self.plan.run_dir.display();
                    return Err(Error::data(format!("{message}; {:.2}% are allowed", limit * 100.0)).hint(format!(
                        "mend the files, or raise `corpus.max_reject_share`; `trommel sql {run_dir} -c 'SELECT * FROM rejects'` lists every row",
                    )));
                }
                self.engine.progress.line(&message);
            }
            if windows == 0 {
                let kind = if source == CORPUS { "the corpus".to_owned() } else { format!("the domain `{source}`") };
                return Err(
                    Error::data(format!("{kind} holds no text")).hint("check the paths and the name of the text column")
                );
            }
        }
        Ok(())
    }

    /// The checksums of what the run is for: equal wherever the same plan ran.
    pub fn checksums(&self) -> Result<BTreeMap<String, String>> {
        let mut checksums = BTreeMap::new();
        if self.outputs.weights.exists() {
            checksums.insert("weights".to_owned(), checksum_file(&self.outputs.weights)?);
        }
        for outputs in self.outputs.shard_sets() {
            for (_, folder) in &outputs.shards {
                if let Some(manifest) = finished(outputs, folder) {
                    let name = folder.file_name().unwrap_or_default().to_string_lossy();
                    checksums.insert(format!("shards/{name}"), checksum_of(&manifest));
                }
            }
        }
        Ok(checksums)
    }
}

/// The names of a plan's outputs, and its embedding model, if that is not learnt by the run.
pub fn outputs(plan: &Plan) -> Result<(Outputs, Option<Arc<dyn Embedder>>)> {
    let embedder = if plan.spec.embed.model == LEARNT { None } else { Some(load_embedder(plan)?) };
    Ok((Outputs::of(plan, embedder.as_ref().map(|e| e.key()))?, embedder))
}

fn load_embedder(plan: &Plan) -> Result<Arc<dyn Embedder>> {
    let precision = match plan.spec.embed.precision {
        Precision::Bf16 => panels::Precision::Bf16,
        Precision::F32 => panels::Precision::F32,
    };
    Ok(Arc::from(trommel_embed::load::load(&plan.spec.embed.model, precision)?))
}

/// What a plan would do, without doing it: the state of every stage.
pub fn survey(plan: &Plan) -> Result<Vec<StageReport>> {
    let (outputs, _) = outputs(plan)?;
    let report = |stage: Stage| -> Result<StageReport> {
        let cached = is_done(&outputs, stage);
        let made = if cached { Some(size_of(&outputs, stage)?) } else { None };
        let (rows, bytes) = (made.map(|w| w.rows), made.map(|w| w.bytes));
        Ok(StageReport { stage: stage.name().to_owned(), cached, seconds: 0.0, rows, bytes })
    };
    Stage::ALL.into_iter().map(report).collect()
}

fn unit_of(stage: Stage) -> &'static str {
    match stage {
        Stage::Assign => "windows",
        Stage::Shard => "tokens",
        _ => "bytes",
    }
}

/// The files of a stage that are one for the whole run.
fn tables(outputs: &Outputs, stage: Stage) -> Vec<&Path> {
    match stage {
        Stage::Cluster => vec![&outputs.clusters],
        Stage::Histogram => [vec![outputs.cluster_statistics.as_path()], outputs.histogram_files()].concat(),
        Stage::Weigh => vec![&outputs.weights],
        Stage::Tokenizer => vec![&outputs.tokenizer],
        Stage::Resample => vec![&outputs.rates, &outputs.diagnostics],
        Stage::Windows | Stage::Embed | Stage::Assign | Stage::Shard => Vec::new(),
    }
}

/// Whether all outputs of a stage are there.
pub(crate) fn is_done(outputs: &Outputs, stage: Stage) -> bool {
    let dsir = outputs.dsir.as_deref();
    match stage {
        Stage::Weigh => dsir.is_none_or(dsir::is_weighed) && is_done_without_dsir(outputs, stage),
        Stage::Resample => dsir.is_none_or(dsir::is_resampled) && is_done_without_dsir(outputs, stage),
        Stage::Shard => outputs.shard_sets().all(|o| o.shards.iter().all(|(_, folder)| finished(o, folder).is_some())),
        _ => is_done_without_dsir(outputs, stage),
    }
}

fn is_done_without_dsir(outputs: &Outputs, stage: Stage) -> bool {
    missing(outputs, stage).is_empty() && tables(outputs, stage).iter().all(|f| f.exists())
}

/// The units whose output of a stage is missing.
fn missing(outputs: &Outputs, stage: Stage) -> Vec<Unit> {
    let lacks = |u: &&Unit| match stage {
        Stage::Windows => !u.windows.exists() || !u.rejects.exists(),
        Stage::Embed => !u.windows.exists() || !u.embeddings.exists() || u.sample.as_ref().is_some_and(|s| !s.exists()),
        Stage::Assign => !u.assignments.exists(),
        Stage::Resample => u.draws.as_ref().is_some_and(|d| !d.exists()),
        _ => false,
    };
    outputs.units.iter().filter(lacks).cloned().collect()
}

/// Rows and bytes of a stage's main table.
fn size_of(outputs: &Outputs, stage: Stage) -> Result<Written> {
    let units = outputs.units.iter();
    match stage {
        Stage::Windows => written(units.map(|u| u.windows.as_path())),
        Stage::Embed => written(units.map(|u| u.embeddings.as_path())),
        Stage::Resample => written(units.filter_map(|u| u.draws.as_deref())),
        Stage::Tokenizer => Ok(Written { rows: 1, bytes: crate::source::size(&outputs.tokenizer) }),
        Stage::Shard => {
            let folders = outputs.shard_sets().flat_map(|o| o.shards.iter().map(move |(_, folder)| (o, folder)));
            let manifests = folders.filter_map(|(outputs, folder)| finished(outputs, folder).map(|m| (m, folder)));
            Ok(manifests.fold(Written::default(), |sum, (manifest, folder)| Written {
                rows: sum.rows + manifest.shards.iter().map(|s| s.rows).sum::<u64>(),
                bytes: sum.bytes + manifest.shards.iter().map(|s| crate::source::size(&folder.join(&s.path))).sum::<u64>(),
            }))
        }
        Stage::Assign => written(units.map(|u| u.assignments.as_path())),
        _ => written(tables(outputs, stage)),
    }
}

/// Removes a folder, if it is there, with what is in it.
fn remove_folder(folder: &Path) -> Result<()> {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(write_error(folder, e)),
        _ => Ok(()),
    }
}
