//! Fine-tuning on the documents of a domain, stopped early by held-out loss; and training on them from scratch.

use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Device;
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::progress::{Interrupt, Progress, Silent};
use trommel_core::storage::lock;
use trommel_core::tokenizer;

use crate::batch::{Dealer, Dealt};
use crate::checkpoint::{self, Model, Unfinished};
use crate::documents::{Documents, Position, tokenize};
use crate::engine::{Engine, Teacher};
use crate::evaluate::{mean_nll, scores};
use crate::log::{Entry, Log};
use crate::model::{Adapters, Config};
use crate::parameters::Layout;
use crate::projected::project;
use crate::recipe::Recipe;

/// Raised when the same plan would train to other weights, so that old checkpoints are not continued.
const VERSION: u32 = 3;
/// Evaluations over the whole budget.
const EVALUATIONS: u64 = 20;
/// Evaluations without a better one after which training stops. Three quarters of all: a model that was pretrained on text
/// like the domain's first loses by the rate's rise to its peak, and gains from its fall.
pub const PATIENCE: u64 = EVALUATIONS * 3 / 4;
/// The same for fresh weights, whose held-out loss is expected to fall until they learn the documents by heart, and then to rise.
pub const PATIENCE_FROM_SCRATCH: u64 = EVALUATIONS / 4;

/// Where fine-tuning begins.
#[derive(Debug, Clone, PartialEq)]
pub enum Start {
    /// A pretrained model.
    Checkpoint(PathBuf),
    /// Fresh weights: the baseline `slm-nopt`, which sees the domain only.
    Scratch {
        /// Shape of the model.
        model: Config,
        /// The id of the token that begins and ends a document.
        end_of_text: u32,
    },
}

/// What to fine-tune, on what, and where to.
#[derive(Debug, Clone, PartialEq)]
pub struct FinetunePlan {
    /// Where to begin.
    pub start: Start,
    /// Documents to train on.
    pub train: Vec<String>,
    /// Documents to choose the best weights by; disjoint from `train` and from any test set.
    pub validation: Vec<String>,
    /// The `tokenizer.json` of the model.
    pub tokenizer: PathBuf,
    /// Tokens per sequence, at most the model's context.
    pub context: usize,
    /// Tokens to train on at most; documents that hold fewer are read again.
    pub tokens: u64,
    /// Optimizer, schedule and batch.
    pub recipe: Recipe,
    /// Seed of the order of documents, and of the weights if they are fresh.
    pub seed: u64,
    /// Evaluations without a better one after which training stops; usually [`PATIENCE`] or [`PATIENCE_FROM_SCRATCH`].
    pub patience: u64,
    /// A model whose next-word distributions are learnt beside the documents.
    pub teacher: Option<TeacherPlan>,
    /// Low-rank adapters to train in place of the model, and to merge into it at the end.
    pub adapters: Option<Adapters>,
    /// Folder that gets `checkpoint/`, with the best weights, and `log.jsonl`.
    pub out: PathBuf,
}

/// Whom to learn from, and how much.
#[derive(Debug, Clone, PartialEq)]
pub struct TeacherPlan {
    /// A checkpoint of the same tokenizer: a larger model that was fine-tuned on the same documents, as a rule.
    pub checkpoint: PathBuf,
    /// The share of the loss against its distributions (0 to 1).
    pub weight: f64,
    /// What logits are divided by before both models' distributions are compared (above 0).
    pub temperature: f64,
}

/// What a fine-tuning run did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FinetuneReport {
    /// The model with the best weights.
    pub checkpoint: PathBuf,
    /// The step of the best weights; 0 if training did not improve on the start.
    pub best_step: u64,
    /// Held-out loss at the start, in nats per token.
    pub loss_before: f64,
    /// Held-out loss of the best weights.
    pub loss_after: f64,
    /// Steps of the optimizer until it stopped.
    pub steps: u64,
    /// Tokens trained on, repeats included.
    pub tokens: u64,
    /// Whole passes over the documents.
    pub epochs: u64,
    /// Time over all sittings, in seconds.
    pub seconds: f64,
    /// Floating-point operations of all steps, a teacher's and an adapter's included; see [`Config::training_flops_per_token`].
    pub flops: f64,
    /// Whether the run was found finished, and nothing was done.
    pub cached: bool,
}

/// Where a run stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    fingerprint: String,
    step: u64,
    position: Dealt<Position>,
    #[serde(with = "checkpoint::exact")]
    seconds: f64,
    #[serde(with = "checkpoint::exact")]
    first_loss: f64,
    #[serde(with = "checkpoint::exact")]
    best_loss: f64,
    best_step: u64,
    /// Evaluations since the best one.
    since_best: u64,
    finished: bool,
}

/// Fine-tunes as `plan` says, or continues where an earlier call stopped, and leaves the weights of the best evaluation.
/// The start counts as an evaluation: a model that was pretrained on well-chosen text can lose by tuning.
pub fn finetune(
    plan: &FinetunePlan,
    device: &Device,
    progress: &dyn Progress,
    interrupt: &Interrupt,
) -> Result<FinetuneReport> {
    let start = plan.adapted(plan.read_start()?)?;
    let config = start.config.clone();
    let tokenizer = tokenizer::read(&plan.tokenizer)?;
    let teacher = plan.teacher.as_ref().map(|teacher| teacher.read(&plan.tokenizer, plan.context)).transpose()?;
    let config_of_teacher = teacher.as_ref().map(|teacher| teacher.config.clone());
    let fingerprint = plan.fingerprint(&start, teacher.as_ref())?;
    let folder = plan.out.join(checkpoint::FOLDER);
    let (train, validation) = (tokenize(&tokenizer, &plan.train)?, tokenize(&tokenizer, &plan.validation)?);
    plan.check(&config, &train, &validation)?;
    let mut source = Dealer::new(Documents::new(train, start.end_of_text, plan.seed)?, plan.context);

    let steps = plan.recipe.steps(plan.tokens, plan.context);
    let sequences = plan.recipe.sequences(plan.context);
    let tokens_per_step = (sequences * plan.context) as u64;
    let evaluate_every = steps.div_ceil(EVALUATIONS);
    let report = |state: &State, cached| plan.report(&config, config_of_teacher.as_ref(), state, cached);
    let evaluate = |engine: &mut Engine| {
        scores(engine, &validation, start.end_of_text, plan.context, &Silent, interrupt).map(|scores| mean_nll(&scores))
    };

    let new_engine = |parameters: Vec<f32>| {
        let mut engine = Engine::new(&config, parameters, device, plan.recipe.precision)?;
        if let Some(teacher) = teacher {
            engine.learn_from(teacher, plan.recipe.precision)?;
        }
        Ok::<_, Error>(engine)
    };

    let _lock = lock(&plan.out)?;

    // Start, or continue.
    let (mut state, mut engine, mut best) = match checkpoint::read_state::<State>(&folder)? {
        Some(state) if state.fingerprint != fingerprint => return Err(checkpoint::of_another_plan(&folder)),
        Some(state) if state.finished => return Ok(report(&state, true)),
        Some(state) => {
            let mut engine = new_engine(checkpoint::read_model(&folder)?.parameters)?;
            let unfinished = checkpoint::read_unfinished(&folder, &config)?;
            engine.set_moments(unfinished.moments)?;
            source.seek(state.position)?;
            progress.line(&format!("continuing at step {} of {steps}", state.step));
            (state, engine, unfinished.best.unwrap_or_default())
        }
        None => {
            let mut engine = new_engine(start.parameters.clone())?;
            let loss = evaluate(&mut engine)?;
            let state = State {
                fingerprint,
                step: 0,
                position: source.position(),
                seconds: 0.0,
                first_loss: loss,
                best_loss: loss,
                best_step: 0,
                since_best: 0,
                finished: false,
            };
            (state, engine, start.parameters.clone())
        }
    };
    let save = |engine: &Engine, best: &[f32], state: &State| {
        let (config, parameters) = match (state.finished, &plan.adapters) {
            (false, _) => (config.clone(), engine.parameters()?),
            (true, None) => (config.clone(), best.to_vec()),
            (true, Some(_)) => (config.plain(), project(&config, best, &[1.0])?),
        };
        let model = Model { config, end_of_text: start.end_of_text, parameters };
        let unfinished = |moments| Unfinished { moments, best: Some(best.to_vec()) };
        let unfinished = (!state.finished).then(|| engine.moments().map(unfinished)).transpose()?;
        checkpoint::save(&folder, &model, &plan.tokenizer, unfinished.as_ref(), state)
    };
    let mut log = Log::open(&plan.out, state.step)?;
    progress.begin("finetune", Some(steps * tokens_per_step), "tokens");
    progress.advance(state.step * tokens_per_step);

    while !state.finished {
        if let Err(stopped) = interrupt.check() {
            save(&engine, &best, &state)?;
            return Err(stopped);
        }
        let started = Instant::now();

        // Add up the gradient of the step's mean loss.
        engine.accumulate_all(&[(0, source.deal(sequences)?)], 1.0 / tokens_per_step as f32)?;
        let norm = engine.gradient_norm()?;
        let loss = engine.take_losses()? / tokens_per_step as f64;
        if !loss.is_finite() || !norm.is_finite() {
            let message = format!("the loss of step {} is {loss}, and the gradient's norm {norm}", state.step + 1);
            let hint = "lower the learning rate, or look at the domain's documents; the last checkpoint is kept";
            return Err(Error::data(message).stage("finetune").hint(hint));
        }

        // Step.
        let rate = plan.recipe.rate(state.step, steps);
        engine.step(&plan.recipe, state.step, rate, norm)?;
        state.step += 1;
        state.position = source.position();
        let tokens_per_second = tokens_per_step as f64 / started.elapsed().as_secs_f64();

        // Evaluate, and keep what is best.
        let mut validation_loss = None;
        if state.step.is_multiple_of(evaluate_every) || state.step == steps {
            let loss = evaluate(&mut engine)?;
            validation_loss = Some(loss);
            state.since_best += 1;
            if loss < state.best_loss {
                state = State { best_loss: loss, best_step: state.step, since_best: 0, ..state };
                best = engine.parameters()?;
            }
        }
        state.finished = state.step == steps || state.since_best >= plan.patience;
        state.seconds += started.elapsed().as_secs_f64();

        // Log.
        log.write(&Entry {
            step: state.step,
            tokens: state.step * tokens_per_step,
            loss,
            learning_rate: rate,
            gradient_norm: norm,
            tokens_per_second,
            validation_loss,
        })?;
        progress.advance(tokens_per_step);
        progress.note(&format!("loss {loss:.3}, held out {:.3}, {tokens_per_second:.0} tokens/s", state.best_loss));

        // Save: at the end, and where an evaluation has just paid for a look at all weights anyway.
        if state.finished || validation_loss.is_some() {
            save(&engine, &best, &state)?;
        }
    }
    progress.end();
    Ok(report(&state, false))
}

impl FinetunePlan {
    /// The shape of the model that `start` names.
    pub fn model(start: &Start) -> Result<Config> {
        match start {
            Start::Checkpoint(folder) => checkpoint::read_model(folder).map(|model| model.config),
            Start::Scratch { model, .. } => Ok(model.clone()),
        }
    }

    fn read_start(&self) -> Result<Model> {
        match &self.start {
            Start::Checkpoint(folder) => {
                let model = checkpoint::read_model(folder)?;
                model.config.check_plain().map_err(|e| e.file(folder.display()))?;
                Ok(model)
            }
            Start::Scratch { model, end_of_text } => {
                model.check()?;
                let parameters = Layout::new(model).initial(self.seed);
                Ok(Model { config: model.clone(), end_of_text: *end_of_text, parameters })
            }
        }
    }

    /// The start with its adapters, if there are any, which change nothing yet.
    fn adapted(&self, start: Model) -> Result<Model> {
        let Some(adapters) = &self.adapters else { return Ok(start) };
        if self.teacher.is_some() {
            return Err(Error::config("adapters are not trained with a teacher").hint("leave out one of them"));
        }
        let config = Config { adapters: Some(adapters.clone()), ..start.config };
        config.check()?;
        let mut parameters = Layout::new(&config).initial(self.seed);
        parameters[..start.parameters.len()].copy_from_slice(&start.parameters);
        Ok(Model { config, parameters, ..start })
    }

    fn check(&self, config: &Config, train: &[Vec<u32>], validation: &[Vec<u32>]) -> Result<()> {
        if self.context == 0 || self.context > config.context {
            let (context, most) = (self.context, config.context);
            return Err(Error::config(format!("a context of {context} tokens is outside the model's 1 to {most}")));
        }
        if self.tokens == 0 {
            return Err(Error::config("the token budget is zero"));
        }
        if validation.iter().all(Vec::is_empty) {
            let hint = "give the domain more `train` documents; a part of them is held out";
            return Err(Error::data("there are no held-out documents to choose the best weights by").hint(hint));
        }
        if let Some(token) = train.iter().chain(validation).flatten().find(|token| **token as usize >= config.vocab) {
            let message = format!("the tokenizer makes token {token}, and the model has only {}", config.vocab);
            return Err(Error::config(message).file(self.tokenizer.display()).hint("use the tokenizer of the model's shards"));
        }
        Ok(())
    }

    /// A name of everything that the trained weights depend on.
    fn fingerprint(&self, start: &Model, teacher: Option<&Teacher>) -> Result<String> {
        let weights = key_of(&start.parameters);
        let teacher = teacher.map(|t| (&t.config, key_of(&t.parameters), t.weight, t.temperature));
        let documents = Key::of(self.train.iter().chain([&String::new()]).chain(&self.validation)).to_string();
        let tokenizer = trommel_core::key::checksum_file(&self.tokenizer)?;
        let settings = (self.context, self.tokens, &self.recipe, self.seed, self.patience);
        let parts = (VERSION, &start.config, start.end_of_text, weights, documents, tokenizer, settings, teacher);
        let text = serde_json::to_string(&parts).map_err(|e| Error::internal("a plan cannot be written as JSON").source(e))?;
        Ok(Key::of([text]).to_string())
    }

    fn report(&self, config: &Config, teacher: Option<&Config>, state: &State, cached: bool) -> FinetuneReport {
        let of_teacher = teacher.map_or(0.0, |teacher| teacher.forward_flops_per_token(self.context));
        let tokens = state.step * (self.recipe.sequences(self.context) * self.context) as u64;
        FinetuneReport {
            checkpoint: self.out.join(checkpoint::FOLDER),
            best_step: state.best_step,
            loss_before: state.first_loss,
            loss_after: state.best_loss,
            steps: state.step,
            tokens,
            epochs: state.position.start.epoch,
            seconds: state.seconds,
            flops: (config.training_flops_per_token(self.context) + of_teacher) * tokens as f64
                + config.network_flops_per_step() * state.step as f64,
            cached,
        }
    }
}

/// A name of some weights.
fn key_of(parameters: &[f32]) -> String {
    Key::of_bytes(&parameters.iter().flat_map(|p| p.to_le_bytes()).collect::<Vec<u8>>()).to_string()
}

impl TeacherPlan {
    fn read(&self, tokenizer: &Path, context: usize) -> Result<Teacher> {
        let place = self.checkpoint.display();
        let temperature = self.temperature > 0.0 && self.temperature.is_finite();
        if !((0.0..=1.0).contains(&self.weight) && temperature) {
            let (weight, temperature) = (self.weight, self.temperature);
            let message = format!("a teacher of weight {weight} and temperature {temperature}");
            return Err(Error::config(message).hint("the weight is 0 to 1, and the temperature above 0"));
        }
        let model = checkpoint::read_model(&self.checkpoint)?;
        model.config.check_plain().map_err(|e| e.file(place))?;
        if model.config.context < context {
            let message = format!("the teacher sees {} tokens, and the student {context}", model.config.context);
            return Err(Error::config(message).file(self.checkpoint.display()).hint("take a teacher of as long a context"));
        }
        let theirs = checkpoint::tokenizer(&self.checkpoint);
        if trommel_core::key::checksum_file(&theirs)? != trommel_core::key::checksum_file(tokenizer)? {
            let hint = "train teacher and student on shards of one tokenizer";
            return Err(Error::config("the teacher has another tokenizer").file(theirs.display()).hint(hint));
        }
        Ok(Teacher { config: model.config, parameters: model.parameters, weight: self.weight, temperature: self.temperature })
    }
}
