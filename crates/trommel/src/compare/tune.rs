//! Training on the documents of a domain: fine-tuning, distilling, and the models that see nothing else.

use std::path::{Path, PathBuf};

use trommel_core::error::{Error, Result};
use trommel_core::manifest::Manifest;
use trommel_pipeline::outputs::Outputs;
use trommel_pipeline::results::Cost;
use trommel_spec::pipeline::{Distill, Finetune, Lora, LoraBase, Method, Pipeline, Schedule, Train};
use trommel_spec::plan::Plan;
use trommel_trainer::checkpoint;
use trommel_trainer::finetune::{FinetunePlan, FinetuneReport, PATIENCE, PATIENCE_FROM_SCRATCH, Start, TeacherPlan, finetune};
use trommel_trainer::model::{Adapters, Config, preset};
use trommel_trainer::recipe::Recipe;

use super::pretrainings::{folder, json};
use super::{Candidate, Comparison, DomainDocuments, cost_of, recipe_of, stem};

/// One training on a domain.
pub(super) struct Tuning {
    /// Names its folder: the model that it starts from, or its method.
    name: String,
    tokens: u64,
    /// What the learning rate is multiplied by, unless it starts from fresh weights.
    multiplier: f64,
    seed: u64,
    teacher: Option<(PathBuf, Distill)>,
    lora: Option<Lora>,
    /// Whether it starts from fresh weights.
    scratch: bool,
}

impl Tuning {
    /// The fine-tuning of the model in `start`.
    pub(super) fn of(start: &Path, seed: u64, finetune: &Finetune) -> Tuning {
        let (tokens, multiplier) = (finetune.tokens.0, finetune.learning_rate_multiplier);
        Tuning { name: stem(start), tokens, multiplier, seed, teacher: None, lora: None, scratch: false }
    }

    /// The fine-tuning of the model in `start`, which the fine-tuned model in `teacher` teaches.
    pub(super) fn distilled(start: &Path, teacher: &Path, seed: u64, finetune: &Finetune) -> Tuning {
        let teacher = Some((teacher.to_owned(), finetune.distill));
        Tuning { name: format!("{}-from-{}", Method::SlmD.name(), stem(start)), teacher, ..Tuning::of(start, seed, finetune) }
    }

    /// The fine-tuning of the model in `start` through adapters.
    pub(super) fn adapted(start: &Path, seed: u64, finetune: &Finetune) -> Tuning {
        let lora = Some(finetune.lora.clone());
        Tuning { name: format!("{}-from-{}", Method::Lora.name(), stem(start)), lora, ..Tuning::of(start, seed, finetune) }
    }

    /// The trainings of the models that see the domain only, for as many tokens as the others are pretrained on.
    pub(super) fn alone(plan: &Plan, train: &Train) -> Vec<Tuning> {
        let method = Method::SlmNopt;
        let seeds = if train.methods.contains(&method) { train.seeds(method) } else { 0 };
        let tuning = |offset: u32| {
            let seed = plan.spec.seed + u64::from(offset);
            Tuning {
                name: format!("{}-seed-{seed}", method.name()),
                tokens: train.tokens.0,
                multiplier: 1.0,
                seed,
                teacher: None,
                lora: None,
                scratch: true,
            }
        };
        (0..seeds).map(tuning).collect()
    }

    /// The folder of its training: the name says what it is, the key what it depends on.
    pub(super) fn folder(&self, plan: &Plan, outputs: &Outputs, train: &Train, domain: &DomainDocuments) -> PathBuf {
        let teacher = self.teacher.as_ref().map(|(folder, distill)| (stem(folder), distill));
        let lora = self.lora.as_ref().map(|lora| (lora.rank, lora.alpha, &lora.targets));
        // The name of a start says which model it is; one that sees the domain only has no start.
        let scratch = self.scratch.then_some((&train.model, train.schedule));
        let settings = json(&(scratch, train.context, train.precision, self.tokens, self.multiplier, teacher, lora));
        let depends_on = [&outputs.shards_key.0.to_le_bytes()[..], &settings, &self.seed.to_le_bytes(), &domain.key()];
        folder(plan, "finetune", &format!("{}-on-{}", self.name, domain.name), &depends_on)
    }
}

/// Student and teacher of each distillation, as places in a list of pretrained models: `slm` learns from the `llm` of its seed, or
/// from the first one.
pub(super) fn distillations(train: &Train, models: &[(Method, u64)]) -> Vec<(usize, usize)> {
    let wanted = if train.methods.contains(&Method::SlmD) { train.seeds(Method::SlmD) } else { 0 };
    let teacher = |seed: u64| {
        let of_seed = models.iter().position(|model| *model == (Method::Llm, seed));
        of_seed.or_else(|| models.iter().position(|model| model.0 == Method::Llm))
    };
    let students = models.iter().enumerate().filter(|(_, model)| model.0 == Method::Slm).take(wanted as usize);
    students.filter_map(|(place, model)| Some((place, teacher(model.1)?))).collect()
}

/// The pretrained models that `lora` adapts, as places in a list of them.
pub(super) fn adaptations(train: &Train, finetune: &Finetune, models: &[(Method, u64)]) -> Vec<usize> {
    let wanted = if train.methods.contains(&Method::Lora) { train.seeds(Method::Lora) } else { 0 };
    let of_base = |base: &LoraBase| {
        let places = models.iter().enumerate().filter(|(_, model)| model.0 == base.method()).map(|(place, _)| place);
        places.take(wanted as usize).collect::<Vec<_>>()
    };
    finetune.lora.of.iter().flat_map(of_base).collect()
}

impl Comparison<'_> {
    /// Fine-tunes every start, distils, and trains the models that see the domain only.
    pub(super) fn finetune_all(
        &self,
        train: &Train,
        domain: &DomainDocuments,
        starts: &[Candidate],
        cached: &mut bool,
    ) -> Result<Vec<Candidate>> {
        let mut tuned = Vec::new();
        if let Some(finetune) = &self.plan.spec.finetune {
            for start in starts {
                let (out, report) = self.finetune(train, domain, start, cached)?;
                tuned.push(Candidate { stage: "finetuned", out, cost: start.cost + cost_of(&report), ..start.clone() });
            }
            let models: Vec<(Method, u64)> = starts.iter().map(|start| (start.method, start.seed)).collect();
            for (student, teacher) in distillations(train, &models) {
                let (student, teacher) = (&starts[student], tuned[teacher].clone());
                let tuning = Tuning::distilled(&student.out, &teacher.out, student.seed, finetune);
                let (out, report) = self.tune(train, domain, &tuning, from(student), cached)?;
                tuned.push(Candidate {
                    method: Method::SlmD,
                    stage: "finetuned",
                    out,
                    cost: student.cost + teacher.cost + cost_of(&report),
                    generic: student.generic + teacher.generic,
                    ..student.clone()
                });
            }
            for start in adaptations(train, finetune, &models).into_iter().map(|place| &starts[place]) {
                let tuning = Tuning::adapted(&start.out, start.seed, finetune);
                let (out, report) = self.tune(train, domain, &tuning, from(start), cached)?;
                let cost = start.cost + cost_of(&report);
                let variant = if finetune.lora.of.len() > 1 { format!("on {}", start.method.name()) } else { String::new() };
                tuned.push(Candidate { method: Method::Lora, variant, stage: "finetuned", out, cost, ..start.clone() });
            }
        }
        for tuning in Tuning::alone(self.plan, train) {
            let shards = self.shards(Method::SlmNopt, &domain.name)?;
            let model = self.model(train, &train.model, shards)?;
            let start = Start::Scratch { model, end_of_text: Manifest::read(shards)?.end_of_text };
            let (out, report) = self.tune(train, domain, &tuning, start, cached)?;
            tuned.push(Candidate {
                method: Method::SlmNopt,
                variant: String::new(),
                seed: tuning.seed,
                stage: "finetuned",
                out,
                cost: cost_of(&report),
                generic: Cost::default(),
            });
        }
        Ok(tuned)
    }

    /// Fine-tunes one model on a domain.
    pub(super) fn finetune(
        &self,
        train: &Train,
        domain: &DomainDocuments,
        start: &Candidate,
        cached: &mut bool,
    ) -> Result<(PathBuf, FinetuneReport)> {
        let finetune = self.plan.spec.finetune.as_ref().ok_or_else(|| Error::internal("nothing is fine-tuned"))?;
        self.tune(train, domain, &Tuning::of(&start.out, start.seed, finetune), from(start), cached)
    }

    fn tune(
        &self,
        train: &Train,
        domain: &DomainDocuments,
        tuning: &Tuning,
        start: Start,
        cached: &mut bool,
    ) -> Result<(PathBuf, FinetuneReport)> {
        let model = FinetunePlan::model(&start)?;
        let recipe = match start {
            Start::Checkpoint(_) => {
                let recipe = Recipe::finetuning(&model, tuning.tokens, tuning.multiplier);
                recipe_of(Schedule::Cosine, train.precision, recipe)
            }
            Start::Scratch { .. } => recipe_of(train.schedule, train.precision, Recipe::pretraining(&model, tuning.tokens)),
        };
        let teacher = tuning.teacher.as_ref().map(|(folder, distill)| TeacherPlan {
            checkpoint: folder.join(checkpoint::FOLDER),
            weight: distill.weight,
            temperature: distill.temperature,
        });
        let plan = FinetunePlan {
            recipe,
            start,
            train: domain.train.clone(),
            validation: domain.validation.clone(),
            tokenizer: self.shards(Method::SlmNopt, &domain.name)?.join(Manifest::TOKENIZER),
            context: train.context as usize,
            tokens: tuning.tokens,
            seed: tuning.seed,
            patience: if tuning.scratch { PATIENCE_FROM_SCRATCH } else { PATIENCE },
            teacher,
            adapters: tuning.lora.as_ref().map(|lora| adapters(lora, &model)),
            out: tuning.folder(self.plan, self.outputs, train, domain),
        };
        self.progress.line(&format!("fine-tuning {} on {}", tuning.name, domain.name));
        let report = finetune(&plan, self.device, self.progress, self.interrupt)?;
        *cached &= report.cached;
        Ok((plan.out, report))
    }
}

/// What is wrong with the adapters that a plan asks for.
pub(crate) fn wrong_adapters(spec: &Pipeline) -> Vec<Error> {
    let (Some(train), Some(finetune)) = (&spec.train, &spec.finetune) else { return Vec::new() };
    let wanted = finetune.lora.of.iter().filter(|_| train.methods.contains(&Method::Lora));
    let names = wanted.filter_map(|base| if *base == LoraBase::Llm { train.llm.as_ref() } else { Some(&train.model) });
    // The vocabulary is not known yet, and adapters do not depend on it.
    let models = names.filter_map(|name| preset(name, 8192).ok());
    let check = |model: Config| Config { adapters: Some(adapters(&finetune.lora, &model)), ..model }.check();
    models.filter_map(|model| check(model).err()).collect()
}

/// The adapters that a file asks for, of one model.
fn adapters(lora: &Lora, model: &Config) -> Adapters {
    let targets = lora.targets.as_ref().map(|targets| targets.iter().map(|target| target.name().to_owned()).collect());
    Adapters::for_tuning(model, lora.rank as usize, lora.alpha, targets)
}

fn from(start: &Candidate) -> Start {
    Start::Checkpoint(start.out.join(checkpoint::FOLDER))
}
