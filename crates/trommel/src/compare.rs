//! The comparison that ends a run: models pretrained on each method's text, fine-tuned on the domain, and evaluated on
//! held-out documents.
//!
//! The test documents are read for the final evaluation only. What has to be chosen on the way, such as when to stop or
//! which expert to take, is chosen on a tenth of the training documents, picked by a hash of their text.

/// How a projected network, or a mixture of models, becomes one small model for a domain.
pub(crate) mod choose;
/// The figures, averaged and as a table.
pub(crate) mod outcome;
/// Which models a plan pretrains, on which text.
mod pretrainings;
/// Training on the documents of a domain.
pub(crate) mod tune;

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::manifest::Manifest;
use trommel_core::progress::{Interrupt, Progress, Silent};
use trommel_core::schema::CORPUS;
use trommel_core::seed::Stream;
use trommel_core::storage::write_bytes;
use trommel_kernels::panels;
use trommel_pipeline::outputs::Outputs;
use trommel_pipeline::proportions::Proportions;
use trommel_pipeline::results::{self, Cost, Outcome};
use trommel_pipeline::run::{StageReport, outputs};
use trommel_pipeline::source::read_texts;
use trommel_spec::pipeline::{Method, Precision, Schedule, ShardBy, Train};
use trommel_spec::plan::{DomainSources, Mixture, Plan, Source};
use trommel_trainer::checkpoint;
use trommel_trainer::evaluate::{Evaluation, evaluate};
use trommel_trainer::finetune::FinetuneReport;
use trommel_trainer::model::{Config, preset};
use trommel_trainer::pretrain::{Part, PretrainPlan, pretrain};
use trommel_trainer::recipe::{self, Recipe};

use crate::args::Until;
use crate::compare::pretrainings::{Phase, Pretraining, Text, pretrainings};
use crate::compare::tune::{Tuning, adaptations, distillations};

/// A model that was pretrained.
struct Trained {
    what: Pretraining,
    /// Folder of its training.
    out: PathBuf,
    cost: Cost,
}

/// A small model of the comparison, for one domain.
#[derive(Debug, Clone)]
struct Candidate {
    method: Method,
    variant: String,
    seed: u64,
    stage: &'static str,
    /// The folder that holds its checkpoint.
    out: PathBuf,
    cost: Cost,
    /// The part of the cost that all domains share.
    generic: Cost,
}

/// The documents of one domain.
struct DomainDocuments {
    name: String,
    train: Vec<String>,
    validation: Vec<String>,
    /// Empty for a domain without a test set.
    test: Vec<String>,
}

/// The methods of a plan, over the shards of its run.
pub(crate) struct Comparison<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) outputs: &'a Outputs,
    pub(crate) device: &'a Device,
    pub(crate) progress: &'a dyn Progress,
    pub(crate) interrupt: &'a Interrupt,
}

/// A pretraining of the plan that a run directory was last run with.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Listed {
    pub(crate) method: Method,
    pub(crate) variant: String,
    pub(crate) seed: u64,
    /// The folder of its training.
    pub(crate) out: PathBuf,
}

/// The file that lists them, in a run directory; folders of earlier plans may lie beside theirs.
const LIST: &str = "train/plan.json";

/// The pretrainings that are listed and finished; none without a list.
pub(crate) fn finished(run_dir: &Path) -> Result<Vec<Listed>> {
    let path = run_dir.join(LIST);
    let damaged = |e: Box<dyn std::error::Error + Send + Sync>| {
        let error = Error::data("the list of trainings cannot be read").file(path.display()).source(e);
        error.hint("run the pipeline again, which writes it")
    };
    let text = match std::fs::read(&path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        text => text.map_err(|e| damaged(e.into()))?,
    };
    let models: Vec<Listed> = serde_json::from_slice(&text).map_err(|e| damaged(e.into()))?;
    let mut finished = Vec::new();
    for mut model in models {
        model.out = run_dir.join("train").join(&model.out);
        if is_finished(&model.out)? {
            finished.push(model);
        }
    }
    Ok(finished)
}

/// Whether the training in the folder `out` is finished.
fn is_finished(out: &Path) -> Result<bool> {
    /// What every kind of training keeps of its progress.
    #[derive(Deserialize)]
    struct State {
        finished: bool,
    }
    let state: Option<State> = checkpoint::peek(&out.join(checkpoint::FOLDER))?;
    Ok(state.is_some_and(|s| s.finished))
}

/// The state of the stages that follow the shards: what a run would find done.
pub(crate) fn survey(plan: &Plan) -> Result<Vec<StageReport>> {
    let Some(train) = &plan.spec.train else { return Ok(Vec::new()) };
    let (outputs, _) = outputs(plan)?;
    let by_cluster = plan.spec.shard.by == ShardBy::Cluster;
    // The directory may hold the tables of an earlier plan.
    let of_plan = |p: &Proportions| {
        let known = plan.spec.domains.keys().all(|d| p.histogram(d, 1).is_ok());
        known && outputs.weights.exists() && p.levels() as usize == plan.spec.cluster.levels().len()
    };
    let proportions = Proportions::read(&plan.run_dir).ok().filter(|p| by_cluster && of_plan(p));
    let domains = all_documents(plan, &Silent)?;
    let mut models = Vec::new();
    for what in pretrainings(plan, train, proportions.as_ref())? {
        let out = what.folder(plan, train, &outputs, proportions.as_ref())?;
        if !is_finished(&out)? {
            let report = |stage: &str| StageReport { stage: stage.to_owned(), ..StageReport::default() };
            return Ok(["train", "finetune", "eval"].map(report).into());
        }
        models.push((what, out));
    }
    let (mut tuned, mut evaluated) = (true, true);
    for domain in &domains {
        let measured =
            |stage: &str, model: &Path| domain.test.is_empty() || evaluation_file(plan, stage, model, domain).exists();
        let folder = |tuning: &Tuning| tuning.folder(plan, &outputs, train, domain);
        let mut trainings: Vec<PathBuf> = Tuning::alone(plan, train).iter().map(folder).collect();
        for (what, out) in &models {
            if !what.serves(&domain.name, proportions.as_ref())? {
                continue;
            }
            let starts = what.starts(plan, train, domain, out, proportions.as_ref())?;
            (tuned, evaluated) = (tuned && starts.is_some(), evaluated && starts.is_some());
            for choice in starts.unwrap_or_default() {
                let mut measured_one = false;
                for start in choice {
                    let model = plan.spec.finetune.as_ref().map(|finetune| folder(&Tuning::of(&start, what.seed, finetune)));
                    tuned &= model.as_deref().map_or(Ok(true), is_finished)?;
                    let after = model.is_none_or(|model| measured("finetuned", &model));
                    measured_one |= after && measured("pretrained", &start);
                }
                evaluated &= measured_one;
            }
        }
        if let Some(finetune) = &plan.spec.finetune {
            let kinds: Vec<_> = models.iter().map(|(what, _)| (what.method, what.seed)).collect();
            for (student, teacher) in distillations(train, &kinds) {
                let teacher = folder(&Tuning::of(&models[teacher].1, models[teacher].0.seed, finetune));
                let (what, start) = &models[student];
                trainings.push(folder(&Tuning::distilled(start, &teacher, what.seed, finetune)));
            }
            for (what, start) in adaptations(train, finetune, &kinds).into_iter().map(|place| &models[place]) {
                trainings.push(folder(&Tuning::adapted(start, what.seed, finetune)));
            }
        }
        for model in trainings {
            tuned &= is_finished(&model)?;
            evaluated &= measured("finetuned", &model);
        }
    }
    let report = |(stage, cached): (&str, bool)| StageReport { stage: stage.to_owned(), cached, ..StageReport::default() };
    Ok([("train", true), ("finetune", tuned), ("eval", evaluated)].map(report).into())
}

impl Comparison<'_> {
    /// Trains, fine-tunes and evaluates, up to and including the stage `until`.
    pub(crate) fn run(&self, until: Until) -> Result<(Vec<StageReport>, Vec<Outcome>)> {
        let Some(train) = &self.plan.spec.train else { return Ok((Vec::new(), Vec::new())) };
        // Everything is read before the first model is trained: a mistake in a test set must not show hours later.
        let domains = all_documents(self.plan, self.progress)?;
        let by_cluster = self.plan.spec.shard.by == ShardBy::Cluster;
        let proportions = by_cluster.then(|| Proportions::read(&self.plan.run_dir)).transpose()?;
        let proportions = proportions.as_ref();
        let mut reports = Vec::new();
        let (trained, report) = self.timed("train", |cached| self.pretrain(train, proportions, cached))?;
        reports.push(report);
        let mut candidates: Vec<(usize, Candidate)> = Vec::new();
        if until >= Until::Finetune {
            let ((), report) = self.timed("finetune", |cached| {
                for (index, domain) in domains.iter().enumerate() {
                    let starts = self.starts(train, domain, &trained, proportions, cached)?;
                    let tuned = self.finetune_all(train, domain, &starts, cached)?;
                    candidates.extend(starts.into_iter().chain(tuned).map(|candidate| (index, candidate)));
                }
                Ok(())
            })?;
            reports.push(StageReport { rows: Some(candidates.len() as u64), ..report });
        }
        let mut outcomes = Vec::new();
        if until >= Until::Eval {
            let (found, report) = self.timed("eval", |cached| {
                let tested = candidates.iter().filter(|(domain, _)| !domains[*domain].test.is_empty());
                tested.map(|(domain, candidate)| self.outcome(train, &domains[*domain], candidate, cached)).collect()
            })?;
            reports.push(report);
            outcomes = found;
            results::write(self.plan, self.outputs, &outcomes)?;
        }
        Ok((reports, outcomes))
    }

    /// Runs one stage; `work` clears the flag when it finds something to do.
    fn timed<T>(&self, stage: &str, work: impl FnOnce(&mut bool) -> Result<T>) -> Result<(T, StageReport)> {
        let start = Instant::now();
        let mut cached = true;
        let made = work(&mut cached).map_err(|e| e.stage(stage))?;
        let seconds = start.elapsed().as_secs_f64();
        Ok((made, StageReport { stage: stage.to_owned(), cached, seconds, rows: None, bytes: None }))
    }

    /// The shards of a domain, or of the corpus; by cluster, one folder serves all.
    fn shards(&self, method: Method, of: &str) -> Result<&Path> {
        let found = self.outputs.shards_of(method, of).or_else(|| self.outputs.shards_of(method, CORPUS));
        found.ok_or_else(|| Error::internal(format!("there are no shards for `{of}`")))
    }

    fn model(&self, train: &Train, preset_name: &str, shards: &Path) -> Result<Config> {
        let vocab = Manifest::read(shards)?.vocab as usize;
        Ok(Config { context: train.context as usize, ..preset(preset_name, vocab)? })
    }

    fn pretrain(&self, train: &Train, proportions: Option<&Proportions>, cached: &mut bool) -> Result<Vec<Trained>> {
        let mut all: Vec<Trained> = Vec::new();
        let wanted = pretrainings(self.plan, train, proportions)?;
        self.list(train, &wanted, proportions)?;
        for what in wanted {
            let shards = match &what.text {
                Text::Shards(of) => self.shards(what.method, of)?,
                _ => self.shards(what.method, CORPUS)?,
            };
            let model = self.model(train, what.preset(train), shards)?;
            let model = what.network(model, train, proportions)?;
            let tokens = what.tokens(train, proportions)?;
            let schedule = if what.phase == Phase::Whole { train.schedule } else { Schedule::Wsd };
            let trunk = || all.iter().find(|t| t.what.phase == Phase::Trunk && t.what.seed == what.seed);
            let part = match what.phase {
                Phase::Whole => Part::Whole,
                Phase::Trunk => Part::Trunk,
                Phase::Decay => {
                    let trunk = trunk().ok_or_else(|| Error::internal("a decay comes before its trunk"))?;
                    Part::Decay(trunk.out.join(checkpoint::FOLDER))
                }
            };
            let plan = PretrainPlan {
                recipe: recipe_of(schedule, train.precision, Recipe::pretraining(&model, tokens)),
                model,
                context: train.context as usize,
                tokens,
                seed: what.seed,
                shards: shards.to_owned(),
                mixture: what.mixture(proportions)?,
                part,
                out: what.folder(self.plan, train, self.outputs, proportions)?,
            };
            self.progress.line(&format!("pretraining {}", what.name()));
            let report = pretrain(&plan, self.device, self.progress, self.interrupt)?;
            *cached &= report.cached;
            let cost = Cost { tokens: report.tokens, seconds: report.seconds, flops: report.flops };
            all.push(Trained { what, out: plan.out, cost });
        }
        Ok(all)
    }

    /// Writes which trainings are this plan's.
    fn list(&self, train: &Train, wanted: &[Pretraining], proportions: Option<&Proportions>) -> Result<()> {
        let listed = |what: &Pretraining| {
            let out = PathBuf::from(stem(&what.folder(self.plan, train, self.outputs, proportions)?));
            Ok(Listed { method: what.method, variant: what.variant.clone(), seed: what.seed, out })
        };
        let listed = wanted.iter().map(listed).collect::<Result<Vec<_>>>()?;
        let text = serde_json::to_vec_pretty(&listed).map_err(|e| Error::internal("no list of trainings").source(e))?;
        write_bytes(&self.plan.run_dir.join(LIST), &text)
    }

    /// The models that a domain starts from, one per method, variant and seed.
    fn starts(
        &self,
        train: &Train,
        domain: &DomainDocuments,
        trained: &[Trained],
        proportions: Option<&Proportions>,
        cached: &mut bool,
    ) -> Result<Vec<Candidate>> {
        let mut starts: Vec<Candidate> = Vec::new();
        for model in trained {
            let what = &model.what;
            if !what.serves(&domain.name, proportions)? {
                continue;
            }
            let shared = if what.domain.is_none() { model.cost } else { Cost::default() };
            let candidate = Candidate {
                method: what.method,
                variant: what.variant.clone(),
                seed: what.seed,
                stage: "pretrained",
                out: model.out.clone(),
                cost: model.cost,
                generic: shared,
            };
            match &what.text {
                Text::Experts { level } => {
                    let proportions = proportions.ok_or_else(|| Error::internal("a network without clusters"))?;
                    let network = choose::Network { model, level: *level, proportions };
                    starts.extend(self.projections(train, domain, &network, &candidate, cached)?);
                }
                Text::Node { .. } => {
                    let group = trained
                        .iter()
                        .filter(|t| t.what.method == what.method && t.what.variant == what.variant && t.what.seed == what.seed);
                    let generic = group.fold(Cost::default(), |sum, t| sum + t.cost);
                    starts.push(Candidate { cost: generic, generic, ..candidate });
                }
                _ if what.phase == Phase::Decay => {
                    let trunk = trained.iter().find(|t| t.what.phase == Phase::Trunk && t.what.seed == what.seed);
                    let generic = trunk.map(|t| t.cost).unwrap_or_default();
                    starts.push(Candidate { cost: generic + model.cost, generic, ..candidate });
                }
                _ => starts.push(candidate),
            }
        }
        Ok(starts)
    }

    fn outcome(&self, train: &Train, domain: &DomainDocuments, candidate: &Candidate, cached: &mut bool) -> Result<Outcome> {
        let found = self.evaluation(candidate, domain, train.context as usize, cached)?;
        Ok(Outcome {
            domain: domain.name.clone(),
            method: candidate.method.name().to_owned(),
            variant: candidate.variant.clone(),
            seed: candidate.seed,
            stage: candidate.stage.to_owned(),
            perplexity: found.perplexity,
            stderr: found.stderr,
            bits_per_byte: found.bits_per_byte,
            train_tokens: candidate.cost.tokens,
            seconds: candidate.cost.seconds,
            flops: candidate.cost.flops,
            generic: candidate.generic,
        })
    }

    /// The evaluation of one model, kept in a file that is named after the model and the documents.
    fn evaluation(
        &self,
        candidate: &Candidate,
        domain: &DomainDocuments,
        context: usize,
        cached: &mut bool,
    ) -> Result<Evaluation> {
        let path = evaluation_file(self.plan, candidate.stage, &candidate.out, domain);
        if let Some(found) = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
            return Ok(found);
        }
        *cached = false;
        self.progress.line(&format!("evaluating {} on {}", stem(&candidate.out), domain.name));
        let folder = candidate.out.join(checkpoint::FOLDER);
        let found = evaluate(&folder, &domain.test, context, self.device, self.progress, self.interrupt)?;
        let text = serde_json::to_vec_pretty(&found).map_err(|e| Error::internal("no report").source(e))?;
        write_bytes(&path, &text)?;
        Ok(found)
    }
}

/// The documents of every domain, then of every mixture.
fn all_documents(plan: &Plan, progress: &dyn Progress) -> Result<Vec<DomainDocuments>> {
    let mut domains = plan.domains.iter().map(|d| documents(plan, d, progress)).collect::<Result<Vec<_>>>()?;
    let mixtures: Vec<_> = plan.mixtures.iter().map(|mixture| mixed(mixture, &domains)).collect();
    domains.extend(mixtures);
    Ok(domains)
}

/// The documents of the domains in a mixture, together, whatever their proportions.
fn mixed(mixture: &Mixture, domains: &[DomainDocuments]) -> DomainDocuments {
    let members: Vec<_> = domains.iter().filter(|d| mixture.shares.contains_key(&d.name)).collect();
    let all = |set: fn(&DomainDocuments) -> &Vec<String>| members.iter().flat_map(|d| set(d)).cloned().collect();
    // The test set of one of them would say little about the mixture.
    let test = if members.iter().any(|d| d.test.is_empty()) { Vec::new() } else { all(|d| &d.test) };
    DomainDocuments { name: mixture.name.clone(), train: all(|d| &d.train), validation: all(|d| &d.validation), test }
}

/// The documents of a domain; what cannot be used of them is said.
fn documents(plan: &Plan, domain: &DomainSources, progress: &dyn Progress) -> Result<DomainDocuments> {
    let (train, validation) = split(&domain.train, plan.spec.seed, progress)?;
    let test = domain.test.as_ref().map(|test| usable_texts(test, progress)).transpose()?.unwrap_or_default();
    Ok(DomainDocuments { name: domain.train.name.clone(), train, validation, test })
}

/// The file that keeps the evaluation of the model in `out`, named after it and the documents.
fn evaluation_file(plan: &Plan, stage: &str, out: &Path, domain: &DomainDocuments) -> PathBuf {
    let model = stem(out);
    let parts = [stage.as_bytes(), model.as_bytes()];
    let key = Key::of(parts.into_iter().chain(domain.test.iter().map(String::as_bytes)));
    plan.run_dir.join("eval").join(format!("{stage}-{model}-on-{}-{}.json", domain.name, key.short()))
}

/// The last part of a folder's name.
fn stem(folder: &Path) -> String {
    folder.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

impl DomainDocuments {
    /// A name of what is trained and chosen on.
    fn key(&self) -> [u8; 16] {
        Key::of(self.train.iter().chain([&String::new()]).chain(&self.validation)).0.to_le_bytes()
    }
}

fn cost_of(report: &FinetuneReport) -> Cost {
    Cost { tokens: report.tokens, seconds: report.seconds, flops: report.flops }
}

/// `recipe` with what a file says about it.
pub(crate) fn recipe_of(schedule: Schedule, precision: Precision, recipe: Recipe) -> Recipe {
    let schedule = match schedule {
        Schedule::Cosine => recipe::Schedule::Cosine,
        Schedule::Wsd => recipe::Schedule::Wsd,
    };
    let precision = match precision {
        Precision::Bf16 => panels::Precision::Bf16,
        Precision::F32 => panels::Precision::F32,
    };
    Recipe { schedule, precision, ..recipe }
}

/// The usable documents of a source; says how many rows are not.
pub(crate) fn usable_texts(source: &Source, progress: &dyn Progress) -> Result<Vec<String>> {
    let found = read_texts(source)?;
    if let Some((file, first)) = found.rejects.first() {
        let (count, file) = (found.rejects.len(), file.display());
        progress.line(&format!(
            "{count} rows of `{}` are left out, the first one is row {} of `{file}`: {}",
            source.name, first.row, first.reason
        ));
    }
    Ok(found.texts)
}

/// The documents to train on, and the tenth of them that early stopping looks at.
pub(crate) fn split(source: &Source, seed: u64, progress: &dyn Progress) -> Result<(Vec<String>, Vec<String>)> {
    let stream = Stream::new(seed, "validation");
    let mut documents = usable_texts(source, progress)?;
    documents.sort_by_key(|text| stream.bits(text.as_bytes()));
    let held_out = documents.len().div_ceil(10);
    if documents.len() < 2 {
        let message = format!("`{}` has one document, and fine-tuning needs one to train on and one to stop by", source.name);
        return Err(Error::data(message).hint("give the domain more training documents, or split a long one"));
    }
    let train = documents.split_off(held_out);
    Ok((train, documents))
}
