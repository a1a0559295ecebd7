//! DSIR: windows selected by importance resampling on hashed n-grams, the peer of our cluster weights. \[DS\]
//!
//! \[DS\] is Xie, Santurkar, Ma, Liang, *Data Selection for Language Models via Importance Resampling* (arXiv 2302.03169); where
//! it leaves something open we do as its authors' package `data-selection` 1.0.3 does, by default. A text's features are the
//! counts of its words and pairs of words, hashed into 10,000 buckets. The corpus and each domain are bags of them; a window
//! weighs as much as the domain's bag makes it likelier than the corpus's does. Windows are drawn without replacement, in
//! proportion to their weights, until they hold the token budget.
//!
//! ```text
//!   each file   -> counts per bucket --(sum)-> ratios: p_domain, p_corpus             in the stage `weigh`
//!   corpus file -> scores: log weight and key of each window and domain --+           in the stage `resample`
//!   scores -> the lowest key that meets the budget -> draws -> shards     <+          `shard` knows no difference
//! ```
//!
//! Ours differs from the package in this: an example is a window, also of the domain; the corpus's bag is fitted on all of it,
//! where the package stops after a billion n-grams; the budget is in tokens; and noise is a hash of (seed, domain, window), so
//! that the selection depends on no order. None of this runs unless `train.methods` has `dsir`.

use std::path::Path;
use std::sync::Arc;

use trommel_core::error::{Error, Result};
use trommel_spec::plan::Plan;

use crate::engine::Engine;
use crate::outputs::{Dsir, DsirUnit};
use crate::shard::{Sharding, finished};
use ratios::LogRatios;

/// A text becomes words, and the buckets of their n-grams.
pub mod ngrams;
/// Buckets are counted, and counts become two probabilities for each domain and bucket.
pub mod ratios;
/// Windows get a log weight and a key for each domain.
pub mod scores;
/// Keys become draws that meet the token budget.
pub mod draws;

/// Writes the missing counts, and the ratios.
pub fn weigh(engine: &Engine, dsir: &Dsir, plan: &Plan) -> Result<()> {
    if is_weighed(dsir) {
        return Ok(());
    }
    engine.for_each(&without(dsir, |u| Some(&u.counts)), |unit| ratios::count(engine, plan.spec.windows.bytes, unit))?;
    ratios::write(engine, dsir, &plan.mixtures)
}

/// Writes the missing scores, then the selection and what it draws.
pub fn resample(engine: &Engine, dsir: &Dsir, plan: &Plan) -> Result<()> {
    let log_ratios = Arc::new(LogRatios::read(engine, dsir)?);
    engine.for_each(&without(dsir, |u| u.scores.as_deref()), |unit| scores::write(engine, plan, &log_ratios, unit))?;
    if !dsir.selection.exists() {
        draws::select(engine, dsir, plan)?;
    }
    engine.for_each(&without(dsir, |u| u.unit.draws.as_deref()), |unit| draws::draw(engine, dsir, plan, unit))
}

/// Writes the missing shards.
pub fn shard(engine: &Engine, dsir: &Dsir, plan: &Plan) -> Result<()> {
    // The draws meet the budget exactly, so there is no margin.
    let sharding = Sharding { engine, outputs: &dsir.outputs, plan, margin: 1.0 };
    for (domain, folder) in dsir.outputs.shards.iter().filter(|(_, folder)| finished(&dsir.outputs, folder).is_none()) {
        let written = sharding.run(domain, folder)?;
        written.ok_or_else(|| Error::internal(format!("the windows that DSIR selected for `{domain}` are too few")))?;
    }
    Ok(())
}

/// Whether [`weigh`] has nothing to do.
pub fn is_weighed(dsir: &Dsir) -> bool {
    dsir.ratios.exists()
}

/// Whether [`resample`] has nothing to do.
pub fn is_resampled(dsir: &Dsir) -> bool {
    let files = dsir.units.iter().flat_map(|u| [u.scores.as_deref(), u.unit.draws.as_deref()]);
    files.flatten().chain([dsir.selection.as_path()]).all(Path::exists)
}

/// What [`weigh`] reports as its progress.
pub fn weigh_bytes(dsir: &Dsir) -> u64 {
    bytes(without(dsir, |u| Some(&u.counts)))
}

/// What [`resample`] reports as its progress.
pub fn resample_bytes(dsir: &Dsir) -> u64 {
    bytes(without(dsir, |u| u.scores.as_deref())) + bytes(without(dsir, |u| u.unit.draws.as_deref()))
}

fn bytes(units: Vec<&DsirUnit>) -> u64 {
    units.iter().map(|u| u.unit.bytes).sum()
}

/// The units that lack a file that they should have.
fn without(dsir: &Dsir, file: impl Fn(&DsirUnit) -> Option<&Path>) -> Vec<&DsirUnit> {
    dsir.units.iter().filter(|u| file(u).is_some_and(|f| !f.exists())).collect()
}
