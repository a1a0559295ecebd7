//! The outer tests: the `trommel` command as its users meet it. One binary, a fresh directory per test.

#![expect(clippy::unwrap_used, reason = "a failed step of a test may panic")]

/// A directory with a small corpus and a pipeline file, and the command that runs in it.
mod bench;
/// Shards by cluster, and what is trained on them.
mod clusters;
/// Equal plans give equal bytes: at any thread count, any split of the corpus, after any number of kills.
mod determinism;
/// The method `dsir`: its windows are those of highest key, and the same wherever the plan runs.
mod dsir;
/// Files that are made from the code, and files that must pass it.
mod generated;
/// Broken inputs: each has a clear error and leaves nothing half-written.
mod hostile;
/// Other programs open what we export, and we open what they save.
mod interop;
/// What `crates/README.md` promises of the crates.
mod invariants;
/// Mixtures of domains.
mod mixtures;
/// The report of a run: one page that says what the run's tables say.
mod report;
/// The tables of a run directory, as SQL sees them.
mod tables;
/// Training, fine-tuning, evaluation and generation from the command line.
mod training;
