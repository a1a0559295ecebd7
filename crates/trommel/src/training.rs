//! `trommel train`, `finetune`, `eval`, `generate`, `export`, `distill-embedder` and `fit-embedder`.

use std::io::Write;
use std::path::Path;

use serde::Serialize;
use trommel_core::error::{Error, Result};
use trommel_core::manifest::Manifest;
use trommel_core::progress::Interrupt;
use trommel_core::storage::refuse_existing;
use trommel_pipeline::source::size;
use trommel_pipeline::table::Learning;
use trommel_spec::plan::{self, Source};
use trommel_spec::training::Training;
use trommel_spec::validate;
use trommel_trainer::export::Format;
use trommel_trainer::finetune::{FinetunePlan, PATIENCE, Start, TeacherPlan};
use trommel_trainer::generate::Sampling;
use trommel_trainer::model::{Adapters, Config, preset};
use trommel_trainer::pretrain::{Part, PretrainPlan};
use trommel_trainer::recipe::Recipe;
use trommel_trainer::{checkpoint, device};

use crate::args::{
    DistillArguments, DocumentsArgument, EvalArguments, ExportArguments, ExportFormat, FinetuneArguments, FitArguments,
    GenerateArguments, TrainArguments,
};
use crate::compare::{recipe_of, split, usable_texts};
use crate::pipeline::Mistakes;
use crate::progress;

/// Pretrains a model on a folder of shards.
pub(crate) fn train(arguments: &TrainArguments, interrupt: &Interrupt) -> anyhow::Result<()> {
    let document = plan::read(&arguments.training, &arguments.overlays).map_err(Mistakes)?;
    let training: Training = validate::read(&document).map_err(Mistakes)?;
    let device = device::parse(&arguments.device.device)?;
    let context = training.context as usize;
    let vocab = Manifest::read(&training.shards)?.vocab as usize;
    let model = Config { context, ..preset(&training.model, vocab).map_err(|e| e.file(arguments.training.display()))? };
    let plan = PretrainPlan {
        recipe: recipe_of(training.schedule, training.precision, Recipe::pretraining(&model, training.tokens.0)),
        model,
        context,
        tokens: training.tokens.0,
        seed: training.seed,
        out: training.out.unwrap_or_else(|| Path::new("runs").join(&training.name)),
        shards: training.shards,
        mixture: None,
        part: Part::Whole,
    };
    let report = trommel_trainer::pretrain::pretrain(&plan, &device, &*progress::for_stderr(), interrupt)?;
    print(&report, arguments.json)
}

/// Fine-tunes a checkpoint.
pub(crate) fn finetune(arguments: &FinetuneArguments, interrupt: &Interrupt) -> anyhow::Result<()> {
    let device = device::parse(&arguments.device.device)?;
    let progress = progress::for_stderr();
    let (train, validation) = split(&source(&arguments.documents)?, arguments.seed, &*progress)?;
    let config = checkpoint::read_model(&arguments.checkpoint)?.config;
    let plan = FinetunePlan {
        start: Start::Checkpoint(arguments.checkpoint.clone()),
        train,
        validation,
        tokenizer: checkpoint::tokenizer(&arguments.checkpoint),
        context: config.context,
        tokens: arguments.tokens,
        recipe: Recipe::finetuning(&config, arguments.tokens, arguments.learning_rate_multiplier),
        seed: arguments.seed,
        patience: PATIENCE,
        teacher: arguments.teacher.clone().map(|checkpoint| TeacherPlan {
            checkpoint,
            weight: arguments.teacher_weight,
            temperature: arguments.temperature,
        }),
        adapters: arguments
            .lora
            .map(|rank| Adapters::for_tuning(&config, rank, arguments.lora_alpha, arguments.lora_targets.clone())),
        out: arguments.out.clone(),
    };
    let report = trommel_trainer::finetune::finetune(&plan, &device, &*progress, interrupt)?;
    print(&report, arguments.json)
}

/// Evaluates a checkpoint.
pub(crate) fn eval(arguments: &EvalArguments, interrupt: &Interrupt) -> anyhow::Result<()> {
    let device = device::parse(&arguments.device.device)?;
    let progress = progress::for_stderr();
    let documents = usable_texts(&source(&arguments.documents)?, &*progress)?;
    let context = checkpoint::read_model(&arguments.checkpoint)?.config.context;
    let report =
        trommel_trainer::evaluate::evaluate(&arguments.checkpoint, &documents, context, &device, &*progress, interrupt)?;
    print(&report, arguments.json)
}

/// Continues a text.
pub(crate) fn generate(arguments: &GenerateArguments, interrupt: &Interrupt) -> anyhow::Result<()> {
    let device = device::parse(&arguments.device.device)?;
    let sampling = Sampling {
        max_tokens: arguments.max_tokens,
        temperature: arguments.temperature,
        top_k: arguments.top_k,
        seed: arguments.seed,
    };
    let text = trommel_trainer::generate::generate(&arguments.checkpoint, &arguments.prompt, &sampling, &device, interrupt)?;
    writeln!(std::io::stdout(), "{}{text}", arguments.prompt)?;
    Ok(())
}

/// Writes a checkpoint in the format of another program.
pub(crate) fn export(arguments: &ExportArguments) -> anyhow::Result<()> {
    let format = match arguments.format {
        ExportFormat::Hf => Format::Hf,
        ExportFormat::Gguf => Format::Gguf,
    };
    let exported = trommel_trainer::export::export(&arguments.checkpoint, format, &arguments.out)?;
    print(&exported, arguments.json)
}

/// Makes a static embedding table.
pub(crate) fn distill_embedder(arguments: &DistillArguments) -> anyhow::Result<()> {
    let progress = progress::for_stderr();
    let made = trommel_embed::distill::distill(&arguments.encoder, &arguments.out, arguments.dimensions, &*progress)?;
    let share = made.explained_variance * 100.0;
    let size = bytesize::ByteSize(made.bytes).display().si();
    writeln!(
        std::io::stdout(),
        "{} tokens x {} dimensions, {share:.1}% of the variance, {size}",
        made.tokens,
        made.dimensions
    )?;
    Ok(())
}

/// Makes a static embedding table from a corpus.
pub(crate) fn fit_embedder(arguments: &FitArguments, interrupt: &Interrupt) -> anyhow::Result<()> {
    const SEED: u64 = 0;
    refuse_existing(&arguments.out)?;
    let source = source(&arguments.documents)?;
    let progress = progress::for_stderr();
    let bytes = source.files.iter().map(|file| size(file)).sum();
    progress.begin("learn", Some(bytes), "bytes");
    let (window_bytes, dimensions) = (arguments.window_bytes, arguments.dimensions);
    let learning = Learning { source: &source, window_bytes, dimensions, seed: SEED };
    let learnt = learning.run(&arguments.out, &*progress, interrupt);
    progress.end();
    let learnt = learnt?;
    for (file, reject) in &learnt.rejects {
        progress.line(&format!("{}: row {} is left out: {}", file.display(), reject.row, reject.reason));
    }
    writeln!(std::io::stdout(), "learnt from {}", learnt.describe())?;
    Ok(())
}

/// The documents that an argument names.
pub(crate) fn source(argument: &DocumentsArgument) -> Result<Source> {
    let files = plan::find(&argument.documents).map_err(|(message, hint)| Error::config(message).hint(hint))?;
    Ok(Source { name: argument.documents.clone(), files, text: argument.text.clone(), id: None })
}

/// Prints a report as JSON, or as a line per figure.
fn print(report: &impl Serialize, json: bool) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    let value = serde_json::to_value(report)?;
    if json {
        writeln!(out, "{value}")?;
        return Ok(());
    }
    for (name, value) in value.as_object().into_iter().flatten() {
        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        writeln!(out, "{:<18} {value}", name.replace('_', " "))?;
    }
    Ok(())
}
