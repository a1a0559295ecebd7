//! Pretraining: one pass of a model over a folder of shards.

use std::path::PathBuf;
use std::time::Instant;

use candle_core::Device;
use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::manifest::Manifest;
use trommel_core::progress::{Interrupt, Progress};

use crate::batch::{Dealer, Dealt};
use crate::checkpoint::{self, Model, Unfinished};
use crate::engine::Engine;
use crate::loader::{Loader, Position};
use crate::log::{Entry, Log};
use crate::model::Config;
use crate::parameters::Layout;
use crate::recipe::Recipe;

/// Raised when the same plan would train to other weights, so that old checkpoints are not continued.
const VERSION: u32 = 1;

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
    /// Whole passes over the shards.
    pub epochs: u64,
    /// Mean loss of the last tenth of the steps, in nats per token.
    pub loss: f64,
    /// Time of training over all sittings, in seconds.
    pub seconds: f64,
    /// Floating-point operations of all steps; see [`Config::training_flops_per_token`].
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
    last_losses: f64, // sum over the steps of the last tenth
    #[serde(with = "checkpoint::exact")]
    seconds: f64,
    finished: bool,
}

/// Trains `plan.model` on `plan.shards`, or continues where an earlier call stopped; the result has the same bits either way.
pub fn pretrain(plan: &PretrainPlan, device: &Device, progress: &dyn Progress, interrupt: &Interrupt) -> Result<TrainReport> {
    plan.check()?;
    let loader = Loader::open(&plan.shards, plan.model.vocab)?;
    let (fingerprint, end_of_text) = (plan.fingerprint(&loader)?, loader.manifest().end_of_text);
    let mut source = Dealer::new(loader, plan.context);
    let (folder, tokenizer) = (plan.out.join(checkpoint::FOLDER), plan.shards.join(Manifest::TOKENIZER));
    let steps = plan.recipe.steps(plan.tokens, plan.context);
    let sequences = plan.recipe.sequences(plan.context);
    let tokens_per_step = (sequences * plan.context) as u64;
    let last_tenth = steps - steps.div_ceil(10);

    // Start, or continue.
    let (mut state, mut engine) = match checkpoint::read_state::<State>(&folder)? {
        Some(state) if state.fingerprint != fingerprint => return Err(checkpoint::of_another_plan(&folder)),
        Some(state) if state.finished => return Ok(plan.report(&state, true)),
        Some(state) => {
            let mut engine =
                Engine::new(&plan.model, checkpoint::read_model(&folder)?.parameters, device, plan.recipe.precision)?;
            engine.set_moments(checkpoint::read_unfinished(&folder, &plan.model)?.moments)?;
            source.seek(state.position)?;
            progress.line(&format!("continuing at step {} of {steps}", state.step));
            (state, engine)
        }
        None => {
            let parameters = Layout::new(&plan.model).initial(plan.seed);
            let position = source.position();
            let state = State { fingerprint, step: 0, position, last_losses: 0.0, seconds: 0.0, finished: false };
            (state, Engine::new(&plan.model, parameters, device, plan.recipe.precision)?)
        }
    };
    let save = |engine: &Engine, state: &State| {
        let model = Model { config: plan.model.clone(), end_of_text, parameters: engine.parameters()? };
        let unfinished =
            (!state.finished).then(|| engine.moments().map(|moments| Unfinished { moments, best: None })).transpose()?;
        checkpoint::save(&folder, &model, &tokenizer, unfinished.as_ref(), state)
    };
    let mut log = Log::open(&plan.out, state.step)?;
    let micro_batch = engine.micro_batch(plan.context);
    let save_every = checkpoint_steps(plan.model.training_flops_per_token(plan.context) * tokens_per_step as f64, device);
    progress.begin("pretrain", Some(steps * tokens_per_step), "tokens");
    progress.advance(state.step * tokens_per_step);

    while state.step < steps {
        if let Err(stopped) = interrupt.check() {
            save(&engine, &state)?;
            return Err(stopped);
        }
        let start = Instant::now();

        // Add up the gradient of the step's mean loss, some sequences at a time.
        let mut loss = 0.0;
        for first in (0..sequences).step_by(micro_batch) {
            let batch = source.deal(micro_batch.min(sequences - first))?;
            loss += engine.accumulate(&batch, 1.0 / tokens_per_step as f32)? / tokens_per_step as f64;
        }
        let norm = engine.gradient_norm()?;
        if !loss.is_finite() || !norm.is_finite() {
            let message = format!("the loss of step {} is {loss}, and the gradient's norm {norm}", state.step + 1);
            let place = format!("{} ({})", plan.shards.display(), source.source().describe(source.position().start));
            let hint = "lower the learning rate, or look at these rows; the last checkpoint is kept";
            return Err(Error::data(message).file(place).hint(hint));
        }

        // Step.
        let rate = plan.recipe.rate(state.step, steps);
        engine.step(&plan.recipe, state.step, rate, norm)?;
        if state.step >= last_tenth {
            state.last_losses += loss;
        }
        let seconds = start.elapsed().as_secs_f64();
        state = State { step: state.step + 1, position: source.position(), seconds: state.seconds + seconds, ..state };
        state.finished = state.step == steps;

        // Log.
        let tokens_per_second = tokens_per_step as f64 / seconds;
        log.write(&Entry {
            step: state.step,
            tokens: state.step * tokens_per_step,
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

impl PretrainPlan {
    fn check(&self) -> Result<()> {
        self.model.check()?;
        if self.context == 0 || self.context > self.model.context {
            let (context, most) = (self.context, self.model.context);
            return Err(Error::config(format!("a context of {context} tokens is outside the model's 1 to {most}")));
        }
        if self.tokens == 0 {
            return Err(Error::config("the token budget is zero"));
        }
        Ok(())
    }

    /// A name of everything that the trained weights depend on.
    fn fingerprint(&self, loader: &Loader) -> Result<String> {
        let parts =
            (VERSION, &self.model, self.context, self.tokens, &self.recipe, self.seed, loader.fingerprint().to_string());
        let text = serde_json::to_string(&parts).map_err(|e| Error::internal("a plan cannot be written as JSON").source(e))?;
        Ok(Key::of([text]).to_string())
    }

    fn report(&self, state: &State, cached: bool) -> TrainReport {
        let tokens = state.step * (self.recipe.sequences(self.context) * self.context) as u64;
        TrainReport {
            checkpoint: self.out.join(checkpoint::FOLDER),
            parameters: self.model.parameters() as u64,
            steps: state.step,
            tokens,
            epochs: state.position.start.epoch,
            loss: state.last_losses / state.step.div_ceil(10) as f64,
            seconds: state.seconds,
            flops: self.model.training_flops_per_token(self.context) * tokens as f64,
            cached,
        }
    }
}
