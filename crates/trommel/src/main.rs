//! The `trommel` command: arguments, progress, tables. What the commands do lives in the libraries.

/// The command line.
mod args;
/// The comparison of pretraining methods that ends a run.
mod compare;
/// `trommel run`, `check` and `plan`.
mod pipeline;
/// Progress bars on a terminal, plain lines elsewhere.
mod progress;
/// `trommel project`.
mod project;
/// `trommel report`.
mod report;
/// `trommel sql`.
mod sql;
/// Figures as tables.
mod table;
/// `trommel train`, `finetune`, `eval`, `generate`, `export`, `distill-embedder` and `fit-embedder`.
mod training;

use std::process::ExitCode;

use clap::Parser;
use trommel_core::error::Error;
use trommel_core::progress::Interrupt;

use crate::args::{Arguments, Command};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let interrupt = Interrupt::default();
    let request = interrupt.clone();
    let mut asked = false;
    // The second Ctrl-C does not wait for the next safe point; files are whole or absent all the same.
    let handler = ctrlc::set_handler(move || {
        if asked {
            std::process::exit(130);
        }
        asked = true;
        request.request();
    });
    let result = handler.map_err(anyhow::Error::from).and_then(|()| dispatch(arguments, interrupt));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => print_error(&error),
    }
}

fn dispatch(arguments: Arguments, interrupt: Interrupt) -> anyhow::Result<()> {
    let threads = arguments.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    rayon::ThreadPoolBuilder::new().num_threads(threads).build_global()?;
    trommel_kernels::isa::Isa::check().map_err(Error::config)?;
    match arguments.command {
        Command::Run(run) => pipeline::run(&run, threads, interrupt),
        Command::Check(check) => pipeline::check(&check),
        Command::Plan(plan) => pipeline::plan(&plan),
        Command::Sql(query) => sql::run(&query),
        Command::Report(report) => report::run(&report),
        Command::Train(train) => training::train(&train, &interrupt),
        Command::Finetune(finetune) => training::finetune(&finetune, &interrupt),
        Command::Project(project) => project::run(&project, &interrupt),
        Command::Eval(eval) => training::eval(&eval, &interrupt),
        Command::Generate(generate) => training::generate(&generate, &interrupt),
        Command::Export(export) => training::export(&export),
        Command::DistillEmbedder(distill) => training::distill_embedder(&distill),
        Command::FitEmbedder(fit) => training::fit_embedder(&fit, &interrupt),
        Command::Schema(schema) => pipeline::schema(&schema),
    }
}

/// Prints an error, or every mistake of a pipeline file, and gives the promised exit code.
fn print_error(error: &anyhow::Error) -> ExitCode {
    if let Some(pipeline::Mistakes(mistakes)) = error.downcast_ref() {
        mistakes.iter().for_each(|mistake| eprintln!("error: {mistake}\n"));
        return ExitCode::from(mistakes.iter().map(Error::exit_code).max().unwrap_or(2));
    }
    // `trommel ... | head` has seen enough; that is no failure.
    if error.downcast_ref::<std::io::Error>().is_some_and(|e| e.kind() == std::io::ErrorKind::BrokenPipe) {
        return ExitCode::SUCCESS;
    }
    eprintln!("error: {error:#}");
    ExitCode::from(error.downcast_ref::<Error>().map_or(1, Error::exit_code))
}
