//! The comparison that ends a run: the same model pretrained on each method's text, fine-tuned on the domain, and
//! evaluated on held-out documents.
//!
//! The test documents are read for the final evaluation only. What has to be chosen on the way, such as when to stop, is
//! chosen on a tenth of the training documents, picked by a hash of their text.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::manifest::Manifest;
use trommel_core::progress::{Interrupt, Progress};
use trommel_core::schema::CORPUS;
use trommel_core::seed::Stream;
use trommel_core::storage::write_bytes;
use trommel_kernels::panels;
use trommel_pipeline::outputs::Outputs;
use trommel_pipeline::run::{StageReport, load_embedder};
use trommel_pipeline::source::read_texts;
use trommel_spec::pipeline::{Finetune, Method, Precision, Schedule, Train};
use trommel_spec::plan::{DomainSources, Plan, Source};
use trommel_trainer::checkpoint;
use trommel_trainer::evaluate::{Evaluation, evaluate};
use trommel_trainer::finetune::{FinetunePlan, PATIENCE, Start, finetune};
use trommel_trainer::model::preset;
use trommel_trainer::pretrain::{PretrainPlan, pretrain};
use trommel_trainer::recipe::{self, Recipe};

use crate::args::Until;
use crate::table::table;

/// One row of the comparison. A contract.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Outcome {
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

/// The documents of one domain.
struct DomainDocuments {
    name: String,
    train: Vec<String>,
    validation: Vec<String>,
    /// Empty for a domain without a test set.
    test: Vec<String>,
}

/// What a model took to train.
#[derive(Debug, Clone, Copy, Default)]
struct Cost {
    tokens: u64,
    seconds: f64,
    flops: f64,
}

/// The methods of a plan, over the shards of its run.
pub(crate) struct Comparison<'a> {
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
            Method::Dsir => models.extend(domains().map(|d| (Method::Dsir, Some(d)))),
        }
    }
    models
}

/// What every kind of training keeps of its progress.
#[derive(Deserialize)]
struct State {
    finished: bool,
}

/// The state of the stages that follow the shards.
pub(crate) fn survey(plan: &Plan) -> Result<Vec<StageReport>> {
    let Some(train) = &plan.spec.train else { return Ok(Vec::new()) };
    let embedder = load_embedder(plan)?;
    let outputs = Outputs::of(plan, embedder.key())?;
    let whole = |out: PathBuf| -> Result<bool> {
        let state: Option<State> = checkpoint::read_state(&out.join(checkpoint::FOLDER))?;
        Ok(state.is_some_and(|s| s.finished))
    };
    let (mut trained, mut tuned, mut evaluated) = (true, true, true);
    let evaluations: Vec<String> = std::fs::read_dir(plan.run_dir.join("eval"))
        .map(|entries| entries.flatten().map(|e| e.file_name().to_string_lossy().into_owned()).collect())
        .unwrap_or_default();
    let mut expect = |stage: &str, out: &Path, domain: &str| {
        let start = format!("{stage}-{}-on-{domain}-", out.file_name().unwrap_or_default().to_string_lossy());
        evaluated &= evaluations.iter().any(|name| name.starts_with(&start));
    };
    for (method, domain) in pretrainings(plan, train) {
        let out = folder(plan, &outputs, "train", method, domain.as_deref());
        trained &= whole(out.clone())?;
        let served = plan.domains.iter().filter(|d| d.test.is_some() && domain.as_ref().is_none_or(|n| *n == d.train.name));
        served.for_each(|d| expect("pretrained", &out, &d.train.name));
    }
    let methods = train.methods.iter().filter(|&&m| m == Method::SlmNopt || plan.spec.finetune.is_some());
    for (method, domain) in methods.flat_map(|m| plan.domains.iter().map(move |d| (*m, d))) {
        let out = folder(plan, &outputs, "finetune", method, Some(&domain.train.name));
        tuned &= whole(out.clone())?;
        if domain.test.is_some() {
            expect("finetuned", &out, &domain.train.name);
        }
    }
    let report = |stage: &str, cached| StageReport { stage: stage.to_owned(), cached, seconds: 0.0, rows: None, bytes: None };
    Ok(vec![report("train", trained), report("finetune", tuned), report("eval", evaluated)])
}

/// The folder of one training: its name says what it is, its key says what it depends on.
fn folder(plan: &Plan, outputs: &Outputs, stage: &str, method: Method, domain: Option<&str>) -> PathBuf {
    let spec = &plan.spec;
    // Serializing plain data cannot fail; an empty text would only make the key coarser.
    let json = |train: &Option<Train>, finetune: &Option<Finetune>| {
        let train = train.as_ref().map(|t| (&t.model, t.context, t.tokens, t.schedule, t.precision));
        serde_json::to_vec(&(train, finetune)).unwrap_or_default()
    };
    let settings = json(&spec.train, if stage == "train" { &None } else { &spec.finetune });
    let key = Key::of([&outputs.shards_key_of(method).0.to_le_bytes()[..], &settings, &spec.seed.to_le_bytes()]);
    let name = [Some(method.name()), domain].into_iter().flatten().collect::<Vec<_>>().join("-");
    plan.run_dir.join(stage).join(format!("{name}-{}", key.short()))
}

impl Comparison<'_> {
    /// Trains, fine-tunes and evaluates, up to and including the stage `until`.
    pub(crate) fn run(&self, until: Until) -> Result<(Vec<StageReport>, Vec<Outcome>)> {
        let Some(train) = &self.plan.spec.train else { return Ok((Vec::new(), Vec::new())) };
        // Everything is read before the first model is trained: a mistake in a test set must not show hours later.
        let domains = self.plan.domains.iter().map(|d| self.documents(d)).collect::<Result<Vec<_>>>()?;
        let mut reports = Vec::new();
        let (candidates, report) = self.timed("train", |cached| self.pretrain(train, cached))?;
        reports.push(report);
        let mut all = candidates;
        if until >= Until::Finetune {
            let (tuned, report) = self.timed("finetune", |cached| self.finetune(train, &domains, &all, cached))?;
            reports.push(report);
            all.extend(tuned);
        }
        let mut outcomes = Vec::new();
        if until >= Until::Eval {
            let (found, report) = self.timed("eval", |cached| self.evaluate(train, &domains, &all, cached))?;
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

    fn shards(&self, method: Method, domain: &str) -> Result<&Path> {
        let found = self.outputs.shards_of(method, domain);
        found.ok_or_else(|| Error::internal(format!("there are no shards for `{domain}`")))
    }

    fn pretrain(&self, train: &Train, cached: &mut bool) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        for (method, domain) in pretrainings(self.plan, train) {
            let shards = self.shards(method, domain.as_deref().unwrap_or(CORPUS))?;
            let model = trommel_trainer::model::Config {
                context: train.context as usize,
                ..preset(&train.model, Manifest::read(shards)?.vocab as usize)?
            };
            let plan = PretrainPlan {
                recipe: recipe_of(train.schedule, train.precision, Recipe::pretraining(&model, train.tokens.0)),
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

    fn finetune(
        &self,
        train: &Train,
        domains: &[DomainDocuments],
        pretrained: &[Candidate],
        cached: &mut bool,
    ) -> Result<Vec<Candidate>> {
        let mut candidates = Vec::new();
        for domain in domains {
            let name = &domain.name;
            for &method in &train.methods {
                let before = pretrained.iter().find(|c| c.method == method && c.domain.as_ref().is_none_or(|d| d == name));
                let tokenizer = self.shards(method, name)?.join(Manifest::TOKENIZER);
                let manifest = Manifest::read(self.shards(method, name)?)?;
                let model = trommel_trainer::model::Config {
                    context: train.context as usize,
                    ..preset(&train.model, manifest.vocab as usize)?
                };
                let (start, tokens, recipe) = match (before, &self.plan.spec.finetune) {
                    (Some(before), Some(finetune)) => {
                        let recipe = Recipe::finetuning(&model, finetune.tokens.0);
                        let recipe = recipe_of(Schedule::Cosine, train.precision, recipe);
                        (Start::Checkpoint(before.out.join(checkpoint::FOLDER)), finetune.tokens.0, recipe)
                    }
                    // Pretrained, and there is no fine-tuning to do.
                    (Some(_), None) => continue,
                    // The domain only: as many tokens as the others are pretrained on, unless it stops early.
                    (None, _) => {
                        let recipe = Recipe::pretraining(&model, train.tokens.0);
                        let recipe = recipe_of(train.schedule, train.precision, recipe);
                        (Start::Scratch { model, end_of_text: manifest.end_of_text }, train.tokens.0, recipe)
                    }
                };
                let plan = FinetunePlan {
                    start,
                    train: domain.train.clone(),
                    validation: domain.validation.clone(),
                    tokenizer,
                    context: train.context as usize,
                    tokens,
                    recipe,
                    seed: self.plan.spec.seed,
                    patience: PATIENCE,
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

    fn evaluate(
        &self,
        train: &Train,
        domains: &[DomainDocuments],
        candidates: &[Candidate],
        cached: &mut bool,
    ) -> Result<Vec<Outcome>> {
        let mut outcomes = Vec::new();
        for domain in domains.iter().filter(|d| !d.test.is_empty()) {
            let name = &domain.name;
            for candidate in candidates.iter().filter(|c| c.domain.as_ref().is_none_or(|d| d == name)) {
                let found = self.evaluation(candidate, domain, train.context as usize, cached)?;
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

/// One row per domain and method.
pub(crate) fn result_table(outcomes: &[Outcome]) -> String {
    let meaning = |method: &str| match method {
        "slm" => "slm (generic)",
        "slm-is" => "slm-is (resampled)",
        "dsir" => "dsir (resampled by DSIR)",
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
