//! The comparison that ends a run: the same model pretrained on each method's text, fine-tuned on the domain, and
//! evaluated on held-out documents.
//!
//! The test documents are read for the final evaluation only. What has to be chosen on the way, such as when to stop, is
//! chosen on a tenth of the training documents, picked by a hash of their text.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use serde::Serialize;
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::manifest::Manifest;
use trommel_core::progress::{Interrupt, Progress};
use trommel_core::schema::CORPUS;
use trommel_core::seed::Stream;
use trommel_core::storage::write_bytes;
use trommel_pipeline::outputs::Outputs;
use trommel_pipeline::run::StageReport;
use trommel_pipeline::source::read_texts;
use trommel_spec::pipeline::{Finetune, Method, Schedule, Train};
use trommel_spec::plan::{DomainSources, Plan, Source};
use trommel_trainer::checkpoint;
use trommel_trainer::evaluate::{Evaluation, evaluate};
use trommel_trainer::finetune::{FinetunePlan, Start, finetune};
use trommel_trainer::model::preset;
use trommel_trainer::pretrain::{PretrainPlan, pretrain};
use trommel_trainer::recipe::{self, Recipe};

use crate::args::Until;
use crate::table::table;

/// One row of the comparison. [contract]
#[derive(Debug, Clone, Serialize)]
pub struct Outcome {
    domain: String,
    method: &'static str,
    stage: &'static str,
    perplexity: f64,
    stderr: f64,
    bits_per_byte: f64,
    train_tokens: u64,
    seconds: f64,
    flops: f64,
}

/// A model of the comparison.
struct Candidate {
    method: Method,
    /// `None` for a model that serves every domain.
    domain: Option<String>,
    stage: &'static str,
    /// Folder of its training.
    out: PathBuf,
    cost: Cost,
}

/// What a model took to train.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    tokens: u64,
    seconds: f64,
    flops: f64,
}

/// The methods of a plan, over the shards of its run.
pub struct Comparison<'a> {
    pub(crate) plan: &'a Plan,
    pub(crate) outputs: &'a Outputs,
    pub(crate) device: &'a Device,
    pub(crate) progress: &'a dyn Progress,
    pub(crate) interrupt: &'a Interrupt,
}

/// Which models there will be: method, and the domain if it has only one.
fn pretrainings(plan: &Plan, train: &Train) -> Vec<(Method, Option<String>)> {
    let domains = || plan.spec.domains.keys().cloned();
    let mut models = Vec::new();
    for method in &train.methods {
        match method {
            Method::Slm => models.push((Method::Slm, None)),
            Method::SlmIs => models.extend(domains().map(|d| (Method::SlmIs, Some(d)))),
            Method::SlmNopt => {}
        }
    }
    models
}

/// The state of the stages that follow the shards.
pub fn survey(plan: &Plan) -> Result<Vec<StageReport>> {
    let Some(train) = &plan.spec.train else { return Ok(Vec::new()) };
    let embedder = trommel_embed::load::load(&plan.spec.embed.model)?;
    let outputs = Outputs::of(plan, embedder.key())?;
    let whole = |out: PathBuf| out.join(checkpoint::FOLDER).is_dir();
    let trained = pretrainings(plan, train).iter().all(|(m, d)| whole(folder(plan, &outputs, "train", *m, d.as_deref())));
    let mut finetunings = train.methods.iter().flat_map(|m| plan.spec.domains.keys().map(move |d| (*m, d)));
    let tuned = finetunings.all(|(m, d)| whole(folder(plan, &outputs, "finetune", m, Some(d))));
    let report = |stage: &str, cached| StageReport { stage: stage.to_owned(), cached, seconds: 0.0, rows: None, bytes: None };
    Ok(vec![report("train", trained), report("finetune", tuned), report("eval", trained && tuned)])
}

/// The folder of one training: its name says what it is, its key says what it depends on.
fn folder(plan: &Plan, outputs: &Outputs, stage: &str, method: Method, domain: Option<&str>) -> PathBuf {
    let spec = &plan.spec;
    // Serializing plain data cannot fail; an empty text would only make the key coarser.
    let json = |train: &Option<Train>, finetune: &Option<Finetune>| {
        let train = train.as_ref().map(|t| (&t.model, t.context, t.tokens, t.schedule));
        serde_json::to_vec(&(train, finetune)).unwrap_or_default()
    };
    let settings = json(&spec.train, if stage == "train" { &None } else { &spec.finetune });
    let key = Key::of([&outputs.shards_key.0.to_le_bytes()[..], &settings, &spec.seed.to_le_bytes()]);
    let name = [Some(method.name()), domain].into_iter().flatten().collect::<Vec<_>>().join("-");
    plan.run_dir.join(stage).join(format!("{name}-{}", key.short()))
}

impl Comparison<'_> {
    /// Trains, fine-tunes and evaluates, up to and including the stage `until`.
    pub(crate) fn run(&self, until: Until) -> Result<(Vec<StageReport>, Vec<Outcome>)> {
        let Some(train) = &self.plan.spec.train else { return Ok((Vec::new(), Vec::new())) };
        let mut reports = Vec::new();
        let (candidates, report) = self.timed("train", |cached| self.pretrain(train, cached))?;
        reports.push(report);
        let mut all = candidates;
        if until >= Until::Finetune {
            let (tuned, report) = self.timed("finetune", |cached| self.finetune(train, &all, cached))?;
            reports.push(report);
            all.extend(tuned);
        }
        let mut outcomes = Vec::new();
        if until >= Until::Eval {
            let (found, report) = self.timed("eval", |cached| self.evaluate(train, &all, cached))?;
            reports.push(report);
            outcomes = found;
        }
        Ok((reports, outcomes))
    }

    /// Runs one stage; `work` clears the flag when it finds something to do.
    fn timed<T>(&self, stage: &str, work: impl FnOnce(&mut bool) -> Result<Vec<T>>) -> Result<(Vec<T>, StageReport)> {
        let start = Instant::now();
        let mut cached = true;
        let made = work(&mut cached).map_err(|e| e.stage(stage))?;
        let rows = Some(made.len() as u64);
        let seconds = start.elapsed().as_secs_f64();
        Ok((made, StageReport { stage: stage.to_owned(), cached, seconds, rows, bytes: None }))
    }

    fn shards(&self, domain: &str) -> Result<&Path> {
        let found = self.outputs.shards.iter().find(|(name, _)| name == domain);
        Ok(&found.ok_or_else(|| Error::internal(format!("there are no shards for `{domain}`")))?.1)
    }

    fn pretrain(&self, train: &Train, cached: &mut bool) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        for (method, domain) in pretrainings(self.plan, train) {
            let shards = self.shards(domain.as_deref().unwrap_or(CORPUS))?;
            let model = trommel_trainer::model::Config { context: train.context as usize, ..preset(&train.model, Manifest::read(shards)?.vocab as usize)? };
            let plan = PretrainPlan {
                recipe: Recipe { schedule: schedule(train.schedule), ..Recipe::pretraining(&model, train.tokens.0) },
                model,
                context: train.context as usize,
                tokens: train.tokens.0,
                seed: self.plan.spec.seed,
                shards: shards.to_owned(),
                out: folder(self.plan, self.outputs, "train", method, domain.as_deref()),
            };
            let name = domain.as_ref().map_or(method.name().to_owned(), |d| format!("{} {d}", method.name()));
            self.progress.line(&format!("pretraining {name}"));
            let report = pretrain(&plan, self.device, self.progress, self.interrupt)?;
            *cached &= report.cached;
            let cost = Cost { tokens: report.tokens, seconds: report.seconds, flops: report.flops };
            candidates.push(Candidate { method, domain, stage: "pretrained", out: plan.out, cost });
        }
        Ok(candidates)
    }

    fn finetune(&self, train: &Train, pretrained: &[Candidate], cached: &mut bool) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        for domain in &self.plan.domains {
            let name = &domain.train.name;
            let (documents, validation) = split(&domain.train, self.plan.spec.seed)?;
            for &method in &train.methods {
                let before = pretrained.iter().find(|c| c.method == method && c.domain.as_ref().is_none_or(|d| d == name));
                let tokenizer = self.shards(name)?.join(Manifest::TOKENIZER);
                let manifest = Manifest::read(self.shards(name)?)?;
                let model = trommel_trainer::model::Config { context: train.context as usize, ..preset(&train.model, manifest.vocab as usize)? };
                let (start, tokens, recipe) = match (before, &self.plan.spec.finetune) {
                    (Some(before), Some(finetune)) => {
                        let recipe = Recipe::finetuning(&model, finetune.tokens.0);
                        (Start::Checkpoint(before.out.join(checkpoint::FOLDER)), finetune.tokens.0, recipe)
                    }
                    // Pretrained, and there is no fine-tuning to do.
                    (Some(_), None) => continue,
                    // The domain only: as many tokens as the others are pretrained on, unless it stops early.
                    (None, _) => {
                        let recipe = Recipe::pretraining(&model, train.tokens.0);
                        (Start::Scratch { model, end_of_text: manifest.end_of_text }, train.tokens.0, recipe)
                    }
                };
                let plan = FinetunePlan {
                    start,
                    train: documents.clone(),
                    validation: validation.clone(),
                    tokenizer,
                    context: train.context as usize,
                    tokens,
                    recipe,
                    seed: self.plan.spec.seed,
                    patience: 4,
                    out: folder(self.plan, self.outputs, "finetune", method, Some(name)),
                };
                self.progress.line(&format!("fine-tuning {} on {name}", method.name()));
                let report = finetune(&plan, self.device, self.progress, self.interrupt)?;
                *cached &= report.cached;
                let earlier = before.map(|b| b.cost).unwrap_or_default();
                let cost = Cost {
                    tokens: earlier.tokens + report.tokens,
                    seconds: earlier.seconds + report.seconds,
                    flops: earlier.flops + report.flops,
                };
                candidates.push(Candidate { method, domain: Some(name.clone()), stage: "finetuned", out: plan.out, cost });
            }
        }
        Ok(candidates)
    }

    fn evaluate(&self, train: &Train, candidates: &[Candidate], cached: &mut bool) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        for domain in &self.plan.domains {
            let Some(test) = &domain.test else { continue };
            let name = &test.name;
            let documents = read_texts(test)?;
            for candidate in candidates.iter().filter(|c| c.domain.as_ref().is_none_or(|d| d == name)) {
                let found = self.evaluation(candidate, domain, &documents, train.context as usize, cached)?;
                outcomes.push(Outcome {
                    domain: name.clone(),
                    method: candidate.method.name(),
                    stage: candidate.stage,
                    perplexity: found.perplexity,
                    stderr: found.stderr,
                    bits_per_byte: found.bits_per_byte,
                    train_tokens: candidate.cost.tokens,
                    seconds: candidate.cost.seconds,
                    flops: candidate.cost.flops,
                });
            }
        }
        Ok(outcomes)
    }

    /// The evaluation of one model, kept in a file that is named after the model and the documents.
    fn evaluation(
        &self,
        candidate: &Candidate,
        domain: &DomainSources,
        documents: &[String],
        context: usize,
        cached: &mut bool,
    ) -> Result<Evaluation> {
        let trained = candidate.out.file_name().unwrap_or_default().to_string_lossy();
        let parts = [candidate.stage.as_bytes(), trained.as_bytes()];
        let key = Key::of(parts.into_iter().chain(documents.iter().map(String::as_bytes)));
        let path = self.plan.run_dir.join("eval").join(format!("{trained}-on-{}-{}.json", domain.train.name, key.short()));
        if let Some(found) = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()) {
            return Ok(found);
        }
        *cached = false;
        self.progress.line(&format!("evaluating {trained} on {}", domain.train.name));
        let folder = candidate.out.join(checkpoint::FOLDER);
        let found = evaluate(&folder, documents, context, self.device, self.progress, self.interrupt)?;
        let text = serde_json::to_vec_pretty(&found).map_err(|e| Error::internal("no report").source(e))?;
        write_bytes(&path, &text)?;
        Ok(found)
    }
}

fn schedule(schedule: Schedule) -> recipe::Schedule {
    match schedule {
        Schedule::Cosine => recipe::Schedule::Cosine,
        Schedule::Wsd => recipe::Schedule::Wsd,
    }
}

/// The documents to train on, and the tenth of them that early stopping looks at.
pub fn split(source: &Source, seed: u64) -> Result<(Vec<String>, Vec<String>)> {
    let stream = Stream::new(seed, "validation");
    let mut documents = read_texts(source)?;
    documents.sort_by_key(|text| stream.bits(text.as_bytes()));
    let held_out = documents.len().div_ceil(10);
    if documents.len() < 2 {
        let error = Error::data(format!("`{}` has {} documents, and fine-tuning needs one to train on and one to stop by", source.name, documents.len()));
        return Err(error.hint("give the domain more training documents, or split a long one"));
    }
    let train = documents.split_off(held_out);
    Ok((train, documents))
}

/// One row per domain and method.
pub fn result_table(outcomes: &[Outcome]) -> String {
    let meaning = |method: &str| match method {
        "slm" => "slm (generic)",
        "slm-is" => "slm-is (resampled)",
        _ => "slm-nopt (domain only)",
    };
    let mut rows: Vec<(&str, &str)> = outcomes.iter().map(|o| (o.domain.as_str(), o.method)).collect();
    rows.sort();
    rows.dedup();
    let cells = rows.into_iter().map(|(domain, method)| {
        let find = |stage: &str| outcomes.iter().find(|o| o.domain == domain && o.method == method && o.stage == stage);
        let perplexity = |o: Option<&Outcome>| o.map_or("-".to_owned(), |o| format!("{:.2} ± {:.2}", o.perplexity, o.stderr));
        let last = find("finetuned").or(find("pretrained"));
        let number = |get: fn(&Outcome) -> String| last.map_or("-".to_owned(), get);
        vec![
            domain.to_owned(),
            meaning(method).to_owned(),
            perplexity(find("pretrained")),
            perplexity(find("finetuned")),
            number(|o| format!("{:.3}", o.bits_per_byte)),
            number(|o| format!("{:.2}M", o.train_tokens as f64 / 1e6)),
            number(|o| format!("{:.0}", o.seconds)),
        ]
    });
    table(&["domain", "pretrained on", "before tuning", "fine-tuned", "bits/byte", "tokens", "seconds"], 2, cells)
}

