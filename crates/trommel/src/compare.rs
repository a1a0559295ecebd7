//! The comparison that ends a run: models pretrained on each method's text, fine-tuned on the domain, and evaluated on
//! held-out documents.
//!
//! The test documents are read for the final evaluation only. What has to be chosen on the way, such as when to stop or
//! which expert to take, is chosen on a tenth of the training documents, picked by a hash of their text.

/// How a projected network, or a mixture of models, becomes one small model for a domain.
pub(crate) mod choose;
/// The figures, as rows and as a table.
pub(crate) mod outcome;
/// Which models a plan pretrains, on which text.
mod pretrainings;

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use serde::Deserialize;
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::manifest::Manifest;
use trommel_core::progress::{Interrupt, Progress};
use trommel_core::schema::CORPUS;
use trommel_core::seed::Stream;
use trommel_core::storage::write_bytes;
use trommel_kernels::panels;
use trommel_pipeline::outputs::Outputs;
use trommel_pipeline::proportions::Proportions;
use trommel_pipeline::run::{StageReport, load_embedder};
use trommel_pipeline::source::read_texts;
use trommel_spec::pipeline::{Method, Precision, Schedule, ShardBy, Train};
use trommel_spec::plan::{DomainSources, Plan, Source};
use trommel_trainer::checkpoint;
use trommel_trainer::evaluate::{Evaluation, evaluate};
use trommel_trainer::finetune::{FinetunePlan, FinetuneReport, PATIENCE, Start, finetune};
use trommel_trainer::model::{Config, preset};
use trommel_trainer::pretrain::{Part, PretrainPlan, pretrain};
use trommel_trainer::recipe::{self, Recipe};

use crate::args::Until;
use crate::compare::outcome::{Cost, Outcome};
use crate::compare::pretrainings::{Phase, Pretraining, Text, folder, json, pretrainings};

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

/// What every kind of training keeps of its progress.
#[derive(Deserialize)]
struct State {
    finished: bool,
}

/// The state of the stages that follow the shards. What depends on a choice that only a run can make counts as done when the
/// rest is.
pub(crate) fn survey(plan: &Plan) -> Result<Vec<StageReport>> {
    let Some(train) = &plan.spec.train else { return Ok(Vec::new()) };
    let embedder = load_embedder(plan)?;
    let outputs = Outputs::of(plan, embedder.key())?;
    let proportions = Proportions::read(&plan.run_dir).ok();
    let whole = |out: &Path| -> Result<bool> {
        let state: Option<State> = checkpoint::read_state(&out.join(checkpoint::FOLDER))?;
        Ok(state.is_some_and(|s| s.finished))
    };
    let names = |stage: &str| -> Vec<String> {
        let entries = std::fs::read_dir(plan.run_dir.join(stage)).into_iter().flatten().flatten();
        entries.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
    };
    let (tuned_names, evaluations) = (names("finetune"), names("eval"));
    let mut trained = true;
    for what in pretrainings(plan, train, proportions.as_ref())? {
        trained &= whole(&what.folder(plan, train, &outputs))?;
    }
    let mut tuned = true;
    let methods = train.methods.iter().filter(|&&m| m == Method::SlmNopt || plan.spec.finetune.is_some());
    for (method, domain) in methods.flat_map(|m| plan.domains.iter().map(move |d| (m.name(), &d.train.name))) {
        let found = tuned_names.iter().find(|name| name.starts_with(method) && name.contains(&format!("-on-{domain}-")));
        tuned &= found.map(|name| whole(&plan.run_dir.join("finetune").join(name))).transpose()?.unwrap_or(false);
    }
    let tested = plan.domains.iter().filter(|d| d.test.is_some());
    let stages = [(true, "pretrained"), (plan.spec.finetune.is_some(), "finetuned")];
    let evaluated = trained
        && tuned
        && tested.flat_map(|d| stages.iter().filter(|s| s.0).map(move |s| (&d.train.name, s.1))).all(|(domain, stage)| {
            let nothing = stage == "pretrained" && train.methods == [Method::SlmNopt];
            nothing || evaluations.iter().any(|name| name.starts_with(stage) && name.contains(&format!("-on-{domain}-")))
        });
    let report = |stage: &str, cached| StageReport { stage: stage.to_owned(), cached, seconds: 0.0, rows: None, bytes: None };
    Ok(vec![report("train", trained), report("finetune", tuned), report("eval", evaluated)])
}

impl Comparison<'_> {
    /// Trains, fine-tunes and evaluates, up to and including the stage `until`.
    pub(crate) fn run(&self, until: Until) -> Result<(Vec<StageReport>, Vec<Outcome>)> {
        let Some(train) = &self.plan.spec.train else { return Ok((Vec::new(), Vec::new())) };
        // Everything is read before the first model is trained: a mistake in a test set must not show hours later.
        let domains = self.plan.domains.iter().map(|d| self.documents(d)).collect::<Result<Vec<_>>>()?;
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
        for what in pretrainings(self.plan, train, proportions)? {
            let shards = match &what.text {
                Text::Shards(of) => self.shards(what.method, of)?,
                _ => self.shards(what.method, CORPUS)?,
            };
            let model = self.model(train, what.preset(train), shards)?;
            let model = Config { projection: what.projection(train, proportions)?, ..model };
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
                out: what.folder(self.plan, train, self.outputs),
            };
            self.progress.line(&format!("pretraining {}", what.name(train)));
            let report = pretrain(&plan, self.device, self.progress, self.interrupt)?;
            *cached &= report.cached;
            let cost = Cost { tokens: report.tokens, seconds: report.seconds, flops: report.flops };
            all.push(Trained { what, out: plan.out, cost });
        }
        Ok(all)
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
            if what.domain.as_ref().is_some_and(|d| *d != domain.name) || what.phase == Phase::Trunk {
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
                Text::Node { level, node } => {
                    let proportions = proportions.ok_or_else(|| Error::internal("a mixture without clusters"))?;
                    if choose::top(&proportions.histogram(&domain.name, *level)?) == *node {
                        let group = trained.iter().filter(|t| {
                            t.what.method == what.method && t.what.variant == what.variant && t.what.seed == what.seed
                        });
                        let generic = group.fold(Cost::default(), |sum, t| sum + t.cost);
                        starts.push(Candidate { cost: generic, generic, ..candidate });
                    }
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

    /// Fine-tunes every start, and trains the models that see the domain only.
    fn finetune_all(
        &self,
        train: &Train,
        domain: &DomainDocuments,
        starts: &[Candidate],
        cached: &mut bool,
    ) -> Result<Vec<Candidate>> {
        let mut tuned = Vec::new();
        if self.plan.spec.finetune.is_some() {
            for start in starts {
                let (out, report) = self.finetune(train, domain, start, cached)?;
                tuned.push(Candidate { stage: "finetuned", out, cost: start.cost + cost_of(&report), ..start.clone() });
            }
        }
        let alone = train.methods.iter().filter(|&&m| m == Method::SlmNopt).flat_map(|m| (0..train.seeds(*m)).map(u64::from));
        for offset in alone {
            let seed = self.plan.spec.seed + offset;
            let shards = self.shards(Method::SlmNopt, &domain.name)?;
            let model = self.model(train, &train.model, shards)?;
            let start = Start::Scratch { model, end_of_text: Manifest::read(shards)?.end_of_text };
            let seeds = if train.seeds(Method::SlmNopt) > 1 { format!("-seed-{seed}") } else { String::new() };
            let name = format!("{}{seeds}", Method::SlmNopt.name());
            // As many tokens as the others are pretrained on, unless it stops early.
            let recipe =
                |model: &Config| recipe_of(train.schedule, train.precision, Recipe::pretraining(model, train.tokens.0));
            let (out, report) = self.tune(train, domain, start, &name, (train.tokens.0, &recipe), seed, cached)?;
            tuned.push(Candidate {
                method: Method::SlmNopt,
                variant: String::new(),
                seed,
                stage: "finetuned",
                out,
                cost: cost_of(&report),
                generic: Cost::default(),
            });
        }
        Ok(tuned)
    }

    /// Fine-tunes one model on a domain.
    fn finetune(
        &self,
        train: &Train,
        domain: &DomainDocuments,
        start: &Candidate,
        cached: &mut bool,
    ) -> Result<(PathBuf, FinetuneReport)> {
        let tokens = self.plan.spec.finetune.as_ref().map_or(0, |f| f.tokens.0);
        let recipe = |model: &Config| recipe_of(Schedule::Cosine, train.precision, Recipe::finetuning(model, tokens));
        let name = start.out.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let checkpoint = Start::Checkpoint(start.out.join(checkpoint::FOLDER));
        self.tune(train, domain, checkpoint, &name, (tokens, &recipe), start.seed, cached)
    }

    #[expect(clippy::too_many_arguments, reason = "one training: on what, from where, how, and as which")]
    fn tune(
        &self,
        train: &Train,
        domain: &DomainDocuments,
        start: Start,
        name: &str,
        (tokens, recipe): (u64, &dyn Fn(&Config) -> Recipe),
        seed: u64,
        cached: &mut bool,
    ) -> Result<(PathBuf, FinetuneReport)> {
        let name = format!("{name}-on-{}", domain.name);
        let settings = (&train.model, train.context, train.schedule, train.precision, tokens);
        let model = FinetunePlan::model(&start)?;
        let plan = FinetunePlan {
            recipe: recipe(&model),
            start,
            train: domain.train.clone(),
            validation: domain.validation.clone(),
            tokenizer: self.shards(Method::SlmNopt, &domain.name)?.join(Manifest::TOKENIZER),
            context: train.context as usize,
            tokens,
            seed,
            patience: PATIENCE,
            out: folder(
                self.plan,
                "finetune",
                &name,
                &[&self.outputs.shards_key.0.to_le_bytes(), &json(&settings), &seed.to_le_bytes(), &domain.key()],
            ),
        };
        self.progress.line(&format!("fine-tuning {name}"));
        let report = finetune(&plan, self.device, self.progress, self.interrupt)?;
        *cached &= report.cached;
        Ok((plan.out, report))
    }

    fn outcome(&self, train: &Train, domain: &DomainDocuments, candidate: &Candidate, cached: &mut bool) -> Result<Outcome> {
        let found = self.evaluation(candidate, domain, train.context as usize, cached)?;
        Ok(Outcome {
            domain: domain.name.clone(),
            method: candidate.method.name(),
            variant: candidate.variant.clone(),
            seed: candidate.seed,
            stage: candidate.stage,
            perplexity: found.perplexity,
            stderr: found.stderr,
            bits_per_byte: found.bits_per_byte,
            train_tokens: candidate.cost.tokens,
            seconds: candidate.cost.seconds,
            flops: candidate.cost.flops,
            generic: candidate.generic,
        })
    }

    /// The documents of a domain; what cannot be used of them is said.
    fn documents(&self, domain: &DomainSources) -> Result<DomainDocuments> {
        let (train, validation) = split(&domain.train, self.plan.spec.seed, self.progress)?;
        let test = domain.test.as_ref().map(|test| usable_texts(test, self.progress)).transpose()?.unwrap_or_default();
        Ok(DomainDocuments { name: domain.train.name.clone(), train, validation, test })
    }

    /// The evaluation of one model, kept in a file that is named after the model and the documents.
    fn evaluation(
        &self,
        candidate: &Candidate,
        domain: &DomainDocuments,
        context: usize,
        cached: &mut bool,
    ) -> Result<Evaluation> {
        let trained = candidate.out.file_name().unwrap_or_default().to_string_lossy();
        let parts = [candidate.stage.as_bytes(), trained.as_bytes()];
        let key = Key::of(parts.into_iter().chain(domain.test.iter().map(String::as_bytes)));
        let path = self.plan.run_dir.join("eval").join(format!(
            "{}-{trained}-on-{}-{}.json",
            candidate.stage,
            domain.name,
            key.short()
        ));
        if let Some(found) = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
            return Ok(found);
        }
        *cached = false;
        self.progress.line(&format!("evaluating {trained} on {}", domain.name));
        let folder = candidate.out.join(checkpoint::FOLDER);
        let found = evaluate(&folder, &domain.test, context, self.device, self.progress, self.interrupt)?;
        let text = serde_json::to_vec_pretty(&found).map_err(|e| Error::internal("no report").source(e))?;
        write_bytes(&path, &text)?;
        Ok(found)
    }
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
