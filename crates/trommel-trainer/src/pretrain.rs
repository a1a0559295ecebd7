//! Pretraining: a model over a folder of shards.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::Device;
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::manifest::Manifest;
use trommel_core::progress::{Interrupt, Progress};
use trommel_core::storage::lock;

use crate::checkpoint::{self, Model, Unfinished};
use crate::engine::Engine;
use crate::log::{Entry, Log};
use crate::mixture::Share;
use crate::model::Config;
use crate::parameters::Layout;
use crate::recipe::{Recipe, Schedule};
use crate::training_data::{Place, TrainingData};

/// Raised when the same plan would train to other weights, so that old checkpoints are not continued.
const VERSION: u32 = 3;
/// The same for projected networks only.
const NETWORK_VERSION: u32 = 1;

/// Which steps of its schedule a pretraining takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Part {
    /// All of them.
    Whole,
    /// Those before the decay of [`Schedule::Wsd`]: a trunk that many domains share. Its checkpoint keeps the moments.
    Trunk,
    /// The decay only, from the trunk in this checkpoint on; each cluster goes on where the trunk has left it.
    Decay(PathBuf),
}

/// What to pretrain, on what, and where to.
#[derive(Debug, Clone, PartialEq)]
pub struct PretrainPlan {
    /// Shape of the model.
    pub model: Config,
    /// Tokens per sequence, at most the model's context.
    pub context: usize,
    /// Tokens to train on; the last step may go past it. Shards that hold fewer are read again.
    pub tokens: u64,
    /// Optimizer, schedule and batch.
    pub recipe: Recipe,
    /// Seed of the initial weights.
    pub seed: u64,
    /// Folder of the shards.
    pub shards: PathBuf,
    /// The shares of its clusters, if it was written by cluster; `None` reads the shards in order.
    pub mixture: Option<Vec<Share>>,
    /// Which steps to take.
    pub part: Part,
    /// Folder that gets `checkpoint/` and `log.jsonl`.
    pub out: PathBuf,
}

/// What a training run did.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct TrainReport {
    /// The trained model.
    pub checkpoint: PathBuf,
    /// Its parameters.
    pub parameters: u64,
    /// Steps of the optimizer.
    pub steps: u64,
    /// Tokens trained on, repeats included.
    pub tokens: u64,
    /// Whole passes over the shards; over the cluster that was read most often, if they are read by cluster, a trunk's passes
    /// included.
    pub epochs: u64,
    /// Mean loss of the last tenth of the steps, in nats per token.
    pub loss: f64,
    /// Time of training over all sittings, in seconds.
    pub seconds: f64,
    /// Floating-point operations of all steps; see [`Config::training_flops_per_token`] and [`Config::network_flops_per_step`].
    pub flops: f64,
    /// Whether the run was found finished, and nothing was done.
    pub cached: bool,
}

/// Where a run stands.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct State {
    fingerprint: String,
    step: u64,
    position: Place,
    #[serde(with = "checkpoint::exact")]
    last_losses: f64, // sum over the steps of the last tenth
    #[serde(with = "checkpoint::exact")]
    seconds: f64,
    finished: bool,
}

/// Trains `plan.model` on `plan.shards`, or continues where an earlier call stopped; the result has the same bits either way.
pub fn pretrain(plan: &PretrainPlan, device: &Device, progress: &dyn Progress, interrupt: &Interrupt) -> Result<TrainReport> {
    plan.check()?;
    let mut data = TrainingData::open(plan)?;
    let (fingerprint, end_of_text) = (plan.fingerprint(&data)?, data.end_of_text());
    let (folder, tokenizer) = (plan.out.join(checkpoint::FOLDER), plan.shards.join(Manifest::TOKENIZER));
    let all_steps = plan.recipe.steps(plan.tokens, plan.context);
    let (first, steps) = plan.part.steps(all_steps);
    let sequences = plan.recipe.sequences(plan.context);
    let tokens_per_step = (sequences * plan.context) as u64;
    let last_tenth = steps - (steps - first).div_ceil(10);

    let _lock = lock(&plan.out)?;

    // Start, or continue.
    let (mut state, mut engine) = match checkpoint::read_state::<State>(&folder)? {
        Some(state) if state.fingerprint != fingerprint => return Err(checkpoint::of_another_plan(&folder)),
        Some(state) if state.finished => return Ok(plan.report(&state, true)),
        Some(state) => {
            let mut engine =
                Engine::new(&plan.model, checkpoint::read_model(&folder)?.parameters, device, plan.recipe.precision)?;
            engine.set_moments(checkpoint::read_unfinished(&folder, &plan.model)?.moments)?;
            data.seek(state.position.clone())?;
            progress.line(&format!("continuing at step {} of {steps}", state.step));
            (state, engine)
        }
        None => {
            if let Part::Decay(trunk) = &plan.part {
                let state = checkpoint::read_state::<State>(trunk)?.filter(|state| state.finished);
                let unfinished = || Error::config("the trunk is not finished").file(trunk.display());
                data.follow(&state.ok_or_else(unfinished)?.position)?;
            }
            let position = data.place();
            let state = State { fingerprint, step: first, position, last_losses: 0.0, seconds: 0.0, finished: false };
            (state, plan.start(device)?)
        }
    };
    let save = |engine: &Engine, state: &State| {
        let model = Model { config: plan.model.clone(), end_of_text, parameters: engine.parameters()? };
        let unfinished = (!state.finished || plan.part == Part::Trunk)
            .then(|| engine.moments().map(|moments| Unfinished { moments, best: None }))
            .transpose()?;
        checkpoint::save(&folder, &model, &tokenizer, unfinished.as_ref(), state)
    };
    let mut log = Log::open(&plan.out, state.step)?;
    let save_every = checkpoint_steps(plan.model.training_flops_per_token(plan.context) * tokens_per_step as f64, device);
    progress.begin("pretrain", Some((steps - first) * tokens_per_step), "tokens");
    progress.advance((state.step - first) * tokens_per_step);

    let mut ahead = None;
    while state.step < steps {
        if let Err(stopped) = interrupt.check() {
            save(&engine, &state)?;
            return Err(stopped);
        }
        let start = Instant::now();

        // Add up the gradient of the step's mean loss; while a GPU is at it, read what the next step needs.
        let batches = ahead.take().map_or_else(|| data.deal(sequences, plan.context), Ok)?;
        engine.accumulate_all(&batches, 1.0 / tokens_per_step as f32)?;
        let position = data.place();
        if state.step + 1 < steps {
            ahead = Some(data.deal(sequences, plan.context)?);
        }
        let norm = engine.gradient_norm()?;
        let loss = engine.take_losses()? / tokens_per_step as f64;
        if !loss.is_finite() || !norm.is_finite() {
            let message = format!("the loss of step {} is {loss}, and the gradient's norm {norm}", state.step + 1);
            let place = format!("{} ({})", plan.shards.display(), data.describe(&position));
            let hint = "lower the learning rate, or look at these rows; the last checkpoint is kept";
            return Err(Error::data(message).file(place).hint(hint));
        }

        // Step.
        let rate = plan.recipe.rate(state.step, all_steps);
        engine.step(&plan.recipe, state.step, rate, norm)?;
        if state.step >= last_tenth {
            state.last_losses += loss;
        }
        let seconds = start.elapsed().as_secs_f64();
        state = State { step: state.step + 1, position, seconds: state.seconds + seconds, ..state };
        state.finished = state.step == steps;

        // Log.
        let tokens_per_second = tokens_per_step as f64 / seconds;
        log.write(&Entry {
            step: state.step,
            tokens: (state.step - first) * tokens_per_step,
            loss,
            learning_rate: rate,
            gradient_norm: norm,
            tokens_per_second,
            validation_loss: None,
        })?;
        progress.advance(tokens_per_step);
        progress.note(&format!("loss {loss:.3}, {tokens_per_second:.0} tokens/s"));

        // Save.
        if state.finished || state.step.is_multiple_of(save_every) {
            save(&engine, &state)?;
        }
    }
    progress.end();
    Ok(plan.report(&state, false))
}

/// Steps between two checkpoints: about a minute of work, at 100 GFLOP/s on a CPU and 100 TFLOP/s on a GPU. `flops` is the
/// cost of one step.
fn checkpoint_steps(flops: f64, device: &Device) -> u64 {
    let per_minute = 60.0 * if device.is_cpu() { 1e11 } else { 1e14 };
    (per_minute / flops).ceil().max(1.0) as u64
}

impl Part {
    /// The first step to take and the end, of `all`.
    fn steps(&self, all: u64) -> (u64, u64) {
        match self {
            Part::Whole => (0, all),
            Part::Trunk => (0, Recipe::decay_begins(all)),
            Part::Decay(_) => (Recipe::decay_begins(all), all),
        }
    }
}

impl PretrainPlan {
    /// The model at the first step.
    fn start(&self, device: &Device) -> Result<Engine> {
        let Part::Decay(trunk) = &self.part else {
            let parameters = Layout::new(&self.model).initial(self.seed);
            return Engine::new(&self.model, parameters, device, self.recipe.precision);
        };
        let model = checkpoint::read_model(trunk)?;
        if model.config != self.model {
            return Err(Error::config("the trunk is a model of another shape").file(trunk.display()));
        }
        let mut engine = Engine::new(&self.model, model.parameters, device, self.recipe.precision)?;
        engine.set_moments(checkpoint::read_unfinished(trunk, &self.model)?.moments)?;
        Ok(engine)
    }

    fn check(&self) -> Result<()> {
        self.model.check()?;
        if self.context == 0 || self.context > self.model.context {
            let (context, most) = (self.context, self.model.context);
            return Err(Error::config(format!("a context of {context} tokens is outside the model's 1 to {most}")));
        }
        if self.tokens == 0 {
            return Err(Error::config("the token budget is zero"));
        }
        if self.part != Part::Whole && self.recipe.schedule != Schedule::Wsd {
            return Err(Error::config("a trunk needs the schedule `wsd`, whose rate is constant before its decay"));
        }
        let steps = self.recipe.steps(self.tokens, self.context);
        let (first, last) = self.part.steps(steps);
        if first == last {
            let message = format!("{} tokens are {steps} steps, too few for a decay over the last fifth of them", self.tokens);
            return Err(Error::config(message).hint("train on more tokens, or leave `trunk-decay` out"));
        }
        let experts = self.model.experts();
        if let Some(share) = self.mixture.iter().flatten().find(|share| share.share > 0.0 && share.expert >= experts) {
            let message =
                format!("cluster {} belongs to expert {}, and the model has {experts}", share.cluster_id, share.expert);
            return Err(Error::config(message).hint("give the model one expert for each cluster of the level it is trained on"));
        }
        if self.model.check_plain().is_err() && self.mixture.is_none() {
            return Err(Error::config("a network of experts needs shards by cluster")
                .file(self.shards.display())
                .hint("set `shard: {by: cluster}` in the pipeline file"));
        }
        Ok(())
    }

    /// A name of everything that the trained weights depend on.
    fn fingerprint(&self, data: &TrainingData) -> Result<String> {
        let parts = (VERSION, &self.model, self.context, self.tokens, &self.recipe, self.seed, data.fingerprint().to_string());
        let mut parts =
            vec![serde_json::to_string(&parts).map_err(|e| Error::internal("a plan cannot be written as JSON").source(e))?];
        if self.model.projection.is_some() {
            parts.push(format!("network {NETWORK_VERSION}"));
        }
        match &self.part {
            Part::Whole => {}
            Part::Trunk => parts.push("trunk".to_owned()),
            Part::Decay(trunk) => {
                let model = checkpoint::read_model(trunk)?;
                let bytes: Vec<u8> = model.parameters.iter().flat_map(|p| p.to_le_bytes()).collect();
                parts.push(format!("decay {}", Key::of_bytes(&bytes)));
            }
        }
        Ok(Key::of(parts).to_string())
    }

    fn report(&self, state: &State, cached: bool) -> TrainReport {
        let first = self.part.steps(self.recipe.steps(self.tokens, self.context)).0;
        let steps = state.step - first;
        let tokens = steps * (self.recipe.sequences(self.context) * self.context) as u64;
        TrainReport {
            checkpoint: self.out.join(checkpoint::FOLDER),
            parameters: self.model.parameters() as u64,
            steps,
            tokens,
            epochs: state.position.epochs(),
            loss: state.last_losses / steps.div_ceil(10) as f64,
            seconds: state.seconds,
            flops: self.model.training_flops_per_token(self.context) * tokens as f64
                + self.model.network_flops_per_step() * steps as f64,
            cached,
        }
    }
}
