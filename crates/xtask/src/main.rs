//! Developer commands: `cargo xtask generate`, `cargo xtask cuda-check` and `cargo xtask peers`.

/// Compiles the workspace for CUDA on a machine without a GPU.
mod cuda_check;
/// Files that are made from the code.
mod generate;
/// Us and our peers on the same work.
mod peers;

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

#[derive(Debug, Parser)]
#[command(name = "xtask", about = "Developer commands")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Write the JSON Schemas of the YAML files to `pipelines/`.
    Generate,
    /// Prove that the whole workspace compiles for CUDA; needs no GPU, and a gigabyte of packages from PyPI.
    CudaCheck,
    /// Measure us against our peers, side by side; see `tests/peers/README.md`.
    Peers {
        /// One row instead of all, such as `static_embedder`.
        #[arg(long, value_name = "ROW", value_parser = peers::ROWS)]
        only: Option<String>,
        /// A folder of Parquet files whose column `text` the rows take, instead of the quick start's: the test bed, say.
        #[arg(long, value_name = "DIR")]
        corpus: Option<PathBuf>,
        /// Write the records as a JSON list, anew after each row.
        #[arg(long, value_name = "FILE")]
        json: Option<PathBuf>,
    },
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Generate => generate::run(),
        Task::CudaCheck => cuda_check::run(),
        Task::Peers { only, corpus, json } => peers::run(only.as_deref(), corpus.as_deref(), json.as_deref()),
    }
}

/// The root of the workspace.
fn root() -> PathBuf {
    let mut root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.pop();
    root.pop();
    root
}

/// Runs a command and fails when it does.
fn call(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}
