//! Developer commands: `cargo xtask generate` and `cargo xtask cuda-check`.

/// Compiles the workspace for CUDA on a machine without a GPU.
mod cuda_check;
/// Files that are made from the code.
mod generate;

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
}

fn main() -> anyhow::Result<()> {
    match Arguments::parse().task {
        Task::Generate => generate::run(),
        Task::CudaCheck => cuda_check::run(),
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
