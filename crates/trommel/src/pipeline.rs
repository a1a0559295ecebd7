//! `trommel run`, `check`, `plan` and `schema`.

use std::collections::BTreeMap;
use std::fmt;
use std::io::Write;
use std::path::PathBuf;

use serde::Serialize;
use trommel_core::error::Error;
use trommel_core::progress::Interrupt;
use trommel_pipeline::results::Outcome;
use trommel_pipeline::run::{Run, Stage, StageReport, survey};
use trommel_pipeline::source;
use trommel_spec::pipeline::Pipeline;
use trommel_spec::plan::{self, Plan};
use trommel_spec::training::Training;
use trommel_spec::validate;
use trommel_trainer::{device, model};

use crate::args::{PipelineArguments, PlanArguments, RunArguments, SchemaArguments, SchemaKind, Until};
use crate::compare::Comparison;
use crate::compare::outcome::{legend, result_table};
use crate::compare::tune::wrong_adapters;
use crate::progress;
use crate::table::{bytes, known, table};

/// Every mistake of a pipeline file.
#[derive(Debug)]
pub(crate) struct Mistakes(pub(crate) Vec<Error>);

impl fmt::Display for Mistakes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} mistakes", self.0.len())
    }
}

impl std::error::Error for Mistakes {}

/// What is wrong with the models of a pipeline, which the trainer knows, and not the spec.
fn wrong_models(spec: &Pipeline) -> Vec<(&'static str, Error)> {
    let names = spec.train.iter().flat_map(|t| [("/train/model", Some(&t.model)), ("/train/llm", t.llm.as_ref())]);
    let unknown = names.filter_map(|(pointer, name)| Some((pointer, model::preset(name?, 8192).err()?)));
    unknown.chain(wrong_adapters(spec).into_iter().map(|error| ("/finetune/lora", error))).collect()
}

/// Reads, checks and resolves a pipeline file.
fn load(arguments: &PipelineArguments) -> Result<Plan, Mistakes> {
    plan::load(&arguments.pipeline, &arguments.overlays, arguments.run_dir.as_deref(), wrong_models).map_err(Mistakes)
}

fn check_sources(plan: &Plan) -> Result<(), Mistakes> {
    let mistakes = source::check::check(plan);
    if mistakes.is_empty() { Ok(()) } else { Err(Mistakes(mistakes)) }
}

/// The object that `trommel run --json` prints. A contract.
#[derive(Debug, Serialize)]
struct RunReport {
    name: String,
    run_dir: PathBuf,
    stages: Vec<StageReport>,
    checksums: BTreeMap<String, String>,
    results: Vec<Outcome>,
}

/// Runs a pipeline.
pub(crate) fn run(arguments: &RunArguments, threads: usize, interrupt: Interrupt) -> anyhow::Result<()> {
    let plan = load(&arguments.pipeline)?;
    check_sources(&plan)?;
    let device = device::parse(&arguments.device.device)?;
    let until = arguments.until.unwrap_or(Until::Eval);
    let progress = progress::for_stderr();
    let mut run = Run::open(&plan, threads, progress.clone(), interrupt.clone())?;
    let mut stages = run.stages(last_stage(until))?;
    let mut results = Vec::new();
    if until >= Until::Train && plan.spec.train.is_some() {
        let comparison =
            Comparison { plan: &plan, outputs: run.outputs(), device: &device, progress: &*progress, interrupt: &interrupt };
        let (reports, outcomes) = comparison.run(until)?;
        stages.extend(reports);
        results = outcomes;
    }
    let checksums = run.checksums()?;
    let report = RunReport { name: plan.spec.name.clone(), run_dir: plan.run_dir.clone(), stages, checksums, results };
    let mut out = std::io::stdout().lock();
    if arguments.json {
        serde_json::to_writer(&mut out, &report)?;
        writeln!(out)?;
        return Ok(());
    }
    writeln!(out, "{}", stage_table(&report.stages))?;
    if !report.results.is_empty() {
        writeln!(out, "\nHeld-out perplexity, {}:\n{}", legend(&report.results), result_table(&report.results))?;
    }
    if report.stages.iter().all(|s| s.cached) {
        writeln!(out, "Everything was done already.")?;
    }
    writeln!(out, "Outputs are in {}; `trommel sql {0}` queries them.", report.run_dir.display())?;
    Ok(())
}

fn last_stage(until: Until) -> Stage {
    match until {
        Until::Windows => Stage::Windows,
        Until::Embed => Stage::Embed,
        Until::Cluster => Stage::Cluster,
        Until::Assign => Stage::Assign,
        Until::Histogram => Stage::Histogram,
        Until::Weigh => Stage::Weigh,
        Until::Tokenizer => Stage::Tokenizer,
        Until::Resample => Stage::Resample,
        Until::Shard | Until::Train | Until::Finetune | Until::Eval => Stage::Shard,
    }
}

fn stage_table(stages: &[StageReport]) -> String {
    let state = |s: &StageReport| if s.cached { "cached" } else { "done" }.to_owned();
    let row = |s: &StageReport| vec![s.stage.clone(), state(s), format!("{:.1}", s.seconds), known(s.rows), bytes(s.bytes)];
    table(&["stage", "state", "seconds", "rows", "bytes"], 2, stages.iter().map(row))
}

/// Checks a pipeline file, and the files that it names.
pub(crate) fn check(arguments: &PipelineArguments) -> anyhow::Result<()> {
    let plan = load(arguments)?;
    check_sources(&plan)?;
    let files = plan.corpus.files.len();
    writeln!(
        std::io::stdout(),
        "{}: no mistakes; {files} corpus files, {} domains",
        arguments.pipeline.display(),
        plan.spec.domains.len()
    )?;
    Ok(())
}

/// Shows what a run would do.
pub(crate) fn plan(arguments: &PlanArguments) -> anyhow::Result<()> {
    let plan = load(&arguments.pipeline)?;
    let mut stages = survey(&plan)?;
    stages.extend(crate::compare::survey(&plan)?);
    let mut out = std::io::stdout().lock();
    if arguments.json {
        let report = serde_json::json!({ "name": plan.spec.name, "run_dir": plan.run_dir, "stages": stages });
        writeln!(out, "{report}")?;
        return Ok(());
    }
    let state = |s: &StageReport| if s.cached { "cached" } else { "to do" }.to_owned();
    let rows = stages.iter().map(|s| vec![s.stage.clone(), state(s), known(s.rows), bytes(s.bytes)]);
    writeln!(out, "{}", table(&["stage", "state", "rows", "bytes"], 2, rows))?;
    Ok(())
}

/// Prints a JSON Schema.
pub(crate) fn schema(arguments: &SchemaArguments) -> anyhow::Result<()> {
    let schema = match arguments.kind {
        SchemaKind::Pipeline => validate::schema::<Pipeline>(),
        SchemaKind::Training => validate::schema::<Training>(),
    };
    writeln!(std::io::stdout(), "{}", serde_json::to_string_pretty(&schema)?)?;
    Ok(())
}
