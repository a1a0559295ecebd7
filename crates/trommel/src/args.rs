//! The command line. A contract.

use std::path::PathBuf;

use clap::builder::{StringValueParser, TypedValueParser};
use clap::{Args, Parser, Subcommand, ValueEnum};
use trommel_embed::distill::DEFAULT_DIMENSIONS;
use trommel_spec::pipeline::Distill;

use crate::project::ChoiceArgument;

/// Screens a generic corpus for the part that one domain needs, and trains the small model on it.
#[derive(Debug, Parser)]
#[command(name = "trommel", version, max_term_width = 110)]
pub(crate) struct Arguments {
    /// Threads to work with [default: one per core].
    #[arg(long, global = true, value_name = "N", value_parser = threads)]
    pub(crate) threads: Option<usize>,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// A path for outputs, which tables and reports name as text.
fn utf8_path() -> impl TypedValueParser<Value = PathBuf> {
    StringValueParser::new().map(PathBuf::from)
}

fn threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=4096) => Ok(n),
        _ => Err("a whole number from 1 to 4096".into()),
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a pipeline: window, embed, cluster, weigh, resample, shard, and compare models trained on the result.
    Run(RunArguments),
    /// Check a pipeline file and the files that it names, and print the mistakes with line and column.
    Check(PipelineArguments),
    /// Show the stages of a pipeline, and which of them are done; runs nothing.
    Plan(PlanArguments),
    /// Query the tables of a run; without -c, at a prompt.
    Sql(SqlArguments),
    /// Write what a run has found, with tables and charts, as one HTML file.
    Report(ReportArguments),
    /// Pretrain a model on a folder of shards.
    Train(TrainArguments),
    /// Fine-tune a checkpoint on the documents of a domain.
    Finetune(FinetuneArguments),
    /// Turn a projected network into the small model of one expert, or of a mixture of experts.
    Project(ProjectArguments),
    /// Measure a checkpoint's perplexity on held-out documents.
    Eval(EvalArguments),
    /// Continue a text.
    Generate(GenerateArguments),
    /// Write a checkpoint as a folder for `transformers` or a file for llama.cpp.
    Export(ExportArguments),
    /// Make a static embedding table from a sentence encoder.
    DistillEmbedder(DistillArguments),
    /// Make a static embedding table from a corpus, by latent semantic analysis: it sees the form of texts beside their topic.
    FitEmbedder(FitArguments),
    /// Print the JSON Schema of a file format, for editors.
    Schema(SchemaArguments),
}

/// A pipeline file and what replaces parts of it.
#[derive(Debug, Args)]
pub(crate) struct PipelineArguments {
    /// The pipeline file (YAML).
    pub(crate) pipeline: PathBuf,
    /// Replace a value of the file, such as `--set resample.tokens=5M`, or leave a key out, as `cluster.k=null`; may be given many
    /// times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overlays: Vec<String>,
    /// The directory of all outputs [default: runs/NAME].
    #[arg(long, value_name = "DIR", value_parser = utf8_path())]
    pub(crate) run_dir: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct RunArguments {
    #[command(flatten)]
    pub(crate) pipeline: PipelineArguments,
    /// Stop after this stage.
    #[arg(long, value_enum, value_name = "STAGE")]
    pub(crate) until: Option<Until>,
    #[command(flatten)]
    pub(crate) device: DeviceArgument,
    /// Print one JSON object instead of tables.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct PlanArguments {
    #[command(flatten)]
    pub(crate) pipeline: PipelineArguments,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// A stage to stop after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub(crate) enum Until {
    Windows,
    Embed,
    Cluster,
    Assign,
    Histogram,
    Weigh,
    Tokenizer,
    Resample,
    Shard,
    Train,
    Finetune,
    Eval,
}

#[derive(Debug, Args)]
pub(crate) struct DeviceArgument {
    /// Where to train: `auto`, `cpu` or `cuda:N`.
    #[arg(long, default_value = "auto", value_name = "DEVICE")]
    pub(crate) device: String,
}

#[derive(Debug, Args)]
pub(crate) struct SqlArguments {
    /// A run directory, or the pipeline file that made it in `runs/NAME`.
    pub(crate) run: PathBuf,
    /// The query, which may only read.
    #[arg(short = 'c', long = "command", value_name = "QUERY")]
    pub(crate) query: Option<String>,
    /// How to print the rows.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub(crate) format: Format,
}

/// How rows are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    Table,
    Csv,
    Json,
    Parquet,
}

#[derive(Debug, Args)]
pub(crate) struct ReportArguments {
    /// The run directory.
    #[arg(value_name = "RUN_DIR")]
    pub(crate) run: PathBuf,
    /// The file to write, in place of the one before [default: RUN_DIR/report.html].
    #[arg(long, value_name = "FILE", value_parser = utf8_path())]
    pub(crate) out: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(crate) struct TrainArguments {
    /// The training file (YAML).
    pub(crate) training: PathBuf,
    /// Replace a value of the file; may be given many times.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overlays: Vec<String>,
    #[command(flatten)]
    pub(crate) device: DeviceArgument,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// Documents of a domain or a corpus.
#[derive(Debug, Args)]
pub(crate) struct DocumentsArgument {
    /// File, folder or glob of documents (Parquet or JSON lines).
    pub(crate) documents: String,
    /// The column that holds the text.
    #[arg(long, default_value = "text", value_name = "COLUMN")]
    pub(crate) text: String,
}

#[derive(Debug, Args)]
pub(crate) struct FinetuneArguments {
    /// The checkpoint to start from, such as `runs/NAME/checkpoint`, or a Llama model that `transformers` saved.
    pub(crate) checkpoint: PathBuf,
    #[command(flatten)]
    pub(crate) documents: DocumentsArgument,
    /// Tokens to train on at most, such as `250k`; stops early when the held-out loss no longer falls.
    #[arg(long, default_value = "1M", value_parser = count)]
    pub(crate) tokens: u64,
    /// The peak learning rate, as a multiple of pretraining's (above 0).
    #[arg(long, default_value_t = 1.0, value_name = "FACTOR", value_parser = above_zero)]
    pub(crate) learning_rate_multiplier: f64,
    /// Folder of the new checkpoint.
    #[arg(long, value_name = "DIR", value_parser = utf8_path())]
    pub(crate) out: PathBuf,
    /// Seed of the order of the documents.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    /// A checkpoint of the same tokenizer to learn from as well: a larger model, fine-tuned on the same documents.
    #[arg(long, value_name = "CHECKPOINT")]
    pub(crate) teacher: Option<PathBuf>,
    /// Share of the loss against the teacher's next-word distributions (0 to 1).
    #[arg(long, default_value_t = Distill::default().weight, requires = "teacher")]
    pub(crate) teacher_weight: f64,
    /// What logits are divided by before both models' distributions are compared (above 0).
    #[arg(long, default_value_t = Distill::default().temperature, requires = "teacher")]
    pub(crate) temperature: f64,
    /// Train low-rank adapters of this rank instead of the model, and merge them into it at the end.
    #[arg(long, value_name = "RANK", conflicts_with = "teacher")]
    pub(crate) lora: Option<usize>,
    /// What an adapter is multiplied by, times its rank [default: twice the rank].
    #[arg(long, value_name = "ALPHA", requires = "lora")]
    pub(crate) lora_alpha: Option<f64>,
    /// The matrices that have adapters, such as `q_proj,v_proj` [default: all].
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "lora")]
    pub(crate) lora_targets: Option<Vec<String>>,
    #[command(flatten)]
    pub(crate) device: DeviceArgument,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

fn above_zero(text: &str) -> Result<f64, String> {
    let value = text.parse().ok().filter(|x: &f64| x.is_finite() && *x > 0.0);
    value.ok_or_else(|| "a number above 0, such as `0.33`".into())
}

fn count(text: &str) -> Result<u64, String> {
    let value = trommel_spec::count::Count::parse(text).map(|c| c.0).filter(|&n| n > 0);
    value.ok_or_else(|| "a whole number above 0, such as `250000`, `250k` or `20M`".into())
}

#[derive(Debug, Args)]
pub(crate) struct ProjectArguments {
    /// The checkpoint of a projected network.
    pub(crate) checkpoint: PathBuf,
    /// Folder that gets `checkpoint/`, an ordinary small model.
    #[arg(long, value_name = "DIR", value_parser = utf8_path())]
    pub(crate) out: PathBuf,
    /// The expert to take, from 0, instead of a choice.
    #[arg(long, value_name = "N", conflicts_with_all = ["choice", "run", "domain"])]
    pub(crate) expert: Option<usize>,
    /// How to choose for a domain.
    #[arg(long, value_enum, default_value_t = ChoiceArgument::TopCluster)]
    pub(crate) choice: ChoiceArgument,
    /// The run directory that holds the domain's histogram.
    #[arg(long, value_name = "DIR")]
    pub(crate) run: Option<PathBuf>,
    /// The domain, as the run names it.
    #[arg(long, value_name = "NAME")]
    pub(crate) domain: Option<String>,
    /// File, folder or glob of documents to try the experts on, for `lowest-loss`; not those to evaluate on later.
    #[arg(long, value_name = "PATH")]
    pub(crate) documents: Option<String>,
    /// The column of the documents that holds the text.
    #[arg(long, default_value = "text", value_name = "COLUMN")]
    pub(crate) text: String,
    #[command(flatten)]
    pub(crate) device: DeviceArgument,
    /// Print one JSON object instead of a line.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct EvalArguments {
    /// The checkpoint, or a Llama model that `transformers` saved.
    pub(crate) checkpoint: PathBuf,
    #[command(flatten)]
    pub(crate) documents: DocumentsArgument,
    #[command(flatten)]
    pub(crate) device: DeviceArgument,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

#[derive(Debug, Args)]
pub(crate) struct GenerateArguments {
    /// The checkpoint, or a Llama model that `transformers` saved.
    pub(crate) checkpoint: PathBuf,
    /// The text to continue.
    #[arg(long, default_value = "")]
    pub(crate) prompt: String,
    /// Tokens to add at most.
    #[arg(long, default_value_t = 128, value_name = "N")]
    pub(crate) max_tokens: usize,
    /// 0 takes the likeliest token, 1 follows the model.
    #[arg(long, default_value_t = 0.8, value_parser = temperature)]
    pub(crate) temperature: f64,
    /// Choose among this many of the likeliest tokens only.
    #[arg(long, value_name = "N")]
    pub(crate) top_k: Option<usize>,
    /// Seed of the choices.
    #[arg(long, default_value_t = 0)]
    pub(crate) seed: u64,
    #[command(flatten)]
    pub(crate) device: DeviceArgument,
}

fn temperature(text: &str) -> Result<f64, String> {
    text.parse().ok().filter(|t: &f64| t.is_finite() && *t >= 0.0).ok_or_else(|| "a number of at least 0".into())
}

#[derive(Debug, Args)]
pub(crate) struct ExportArguments {
    /// The checkpoint, or a Llama model that `transformers` saved.
    pub(crate) checkpoint: PathBuf,
    /// The format to write.
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub(crate) format: ExportFormat,
    /// The new folder (hf) or file (gguf); nothing that exists is overwritten.
    #[arg(long, value_name = "DIR_OR_FILE", value_parser = utf8_path())]
    pub(crate) out: PathBuf,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
}

/// The formats of other programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ExportFormat {
    /// A folder that `transformers` opens, with the tokenizer.
    Hf,
    /// One file that llama.cpp opens, with the tokenizer; not for the GELU of `slm-126m`.
    Gguf,
}

#[derive(Debug, Args)]
pub(crate) struct DistillArguments {
    /// Folder of a sentence-transformers model of the BERT family.
    pub(crate) encoder: PathBuf,
    /// Folder of the new table; use it as `embed.model`.
    #[arg(value_parser = utf8_path())]
    pub(crate) out: PathBuf,
    /// Length of a vector.
    #[arg(long, default_value_t = DEFAULT_DIMENSIONS, value_name = "N")]
    pub(crate) dimensions: usize,
}

#[derive(Debug, Args)]
pub(crate) struct FitArguments {
    #[command(flatten)]
    pub(crate) documents: DocumentsArgument,
    /// Folder of the new table; use it as `embed.model`.
    #[arg(value_parser = utf8_path())]
    pub(crate) out: PathBuf,
    /// Length of a vector, at most: no more than different tokens in the text.
    #[arg(long, default_value_t = trommel_pipeline::table::DIMENSIONS, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub(crate) dimensions: u32,
    /// Longest window in bytes, as `windows.bytes` of the pipeline.
    #[arg(long, default_value_t = 4096, value_name = "BYTES", value_parser = clap::value_parser!(u32).range(16..=1_000_000))]
    pub(crate) window_bytes: u32,
}

#[derive(Debug, Args)]
pub(crate) struct SchemaArguments {
    /// Which file format.
    #[arg(value_enum, default_value_t = SchemaKind::Pipeline)]
    pub(crate) kind: SchemaKind,
}

/// The file formats.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum SchemaKind {
    /// What `trommel run` reads.
    Pipeline,
    /// What `trommel train` reads.
    Training,
}
