//! The selection: for each domain, the windows of highest key until their tokens meet the budget.
//!
//! Keys are binned, which bounds memory by the spread of keys and not by the corpus. The bins give a bound above which there is
//! somewhat more text than the budget needs, by the tokens per byte of the corpus's sample. Those windows are tokenized, and
//! their exact tokens say where the selection ends; where they do not suffice, their tokens give a better bound.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, Float64Array, RecordBatch, StringArray};
use arrow::datatypes::{DataType, Field, Int64Type, Schema, SchemaRef};
use trommel_core::error::{Error, Result};
use trommel_core::storage::write_error;
use trommel_spec::plan::Plan;

use super::scores::WORDS_MIN;
use crate::assigned::register_assigned;
use crate::embed::{read_sample, register_texts};
use crate::engine::{Engine, register_batches};
use crate::outputs::{Dsir, DsirUnit};
use crate::resample::{draws_function, draws_schema};
use crate::tokenizer::Encoder;

/// Text that is tokenized over what the budget is thought to need.
const MARGIN: f64 = 1.1;
/// Windows of the sample that tokens per byte are measured on.
const SAMPLE_WINDOWS: usize = 512;

/// Finds where the selection of every domain ends, and writes that.
pub fn select(engine: &Engine, dsir: &Dsir, plan: &Plan) -> Result<()> {
    let encoder = Encoder::read(&dsir.outputs.tokenizer)?;
    let budget = plan.spec.resample.tokens.0;
    let bins = bins(engine, dsir)?;
    let tokens_per_byte = tokens_per_byte(engine, dsir, &encoder)?;
    let mut bytes: BTreeMap<&str, f64> =
        plan.spec.domains.keys().map(|d| (d.as_str(), budget as f64 / tokens_per_byte * MARGIN)).collect();
    loop {
        let none = Vec::new();
        let bounds: BTreeMap<&str, f64> =
            bytes.iter().map(|(&d, &wanted)| (d, bound(bins.get(d).unwrap_or(&none), wanted))).collect();
        let candidates = Candidates { engine, dsir, plan, encoder: &encoder, folder: plan.run_dir.join("spill/dsir") };
        let found = candidates.selection(&bounds, budget)?;
        candidates.remove()?;
        let mut met = true;
        for (domain, wanted) in &mut bytes {
            let (ends, tokens) = found.ends.get(*domain).copied().unwrap_or((false, 0));
            if !ends && bounds[domain] == f64::NEG_INFINITY {
                return Err(Error::data(format!(
                    "the corpus has {tokens} tokens that DSIR can select for `{domain}`, those of the windows of at least \
                     {WORDS_MIN} words, and {budget} are asked for; it selects no window twice"
                ))
                .hint(
                    "lower `resample.tokens`, add to the corpus, raise `windows.bytes`, or leave `dsir` out of `train.methods`",
                ));
            }
            met &= ends;
            if !ends {
                *wanted *= (budget as f64 / tokens.max(1) as f64).clamp(1.0, 8.0) * MARGIN;
            }
        }
        if met {
            return crate::engine::write_parquet(&dsir.selection, &selection_schema(), found.batches.into_iter().map(Ok))
                .map(|_| ());
        }
    }
}

/// The columns of the table `dsir_selection`.
fn selection_schema() -> SchemaRef {
    let number = |name: &str| Field::new(name, DataType::Int64, false);
    let (domain, key) = (Field::new("domain", DataType::Utf8, false), Field::new("key_min", DataType::Float64, false));
    Arc::new(Schema::new(vec![domain, key, number("windows"), number("tokens")]))
}

/// Bytes of text by key, from the highest key down, for each domain: (lowest key of the bin, bytes).
fn bins(engine: &Engine, dsir: &Dsir) -> Result<BTreeMap<String, Vec<(f64, f64)>>> {
    let session = engine.parallel_session([]);
    let files: Vec<&Path> = dsir.units.iter().filter_map(|u| u.scores.as_deref()).collect();
    engine.register(&session, "scores", &files)?;
    let mut bins: BTreeMap<String, Vec<(f64, f64)>> = BTreeMap::new();
    for batch in engine.collect(&session, include_str!("../sql/dsir_bins.sql"))? {
        let number = |i: usize| batch.column(i).as_primitive::<Int64Type>().values();
        for ((domain, &bin), &bytes) in batch.column(0).as_string_view().iter().flatten().zip(number(1)).zip(number(2)) {
            bins.entry(domain.to_owned()).or_default().push((bin as f64 / 16.0, bytes as f64));
        }
    }
    Ok(bins)
}

/// The lowest key of the bins that hold the `wanted` bytes; minus infinity if all of them are needed.
fn bound(bins: &[(f64, f64)], wanted: f64) -> f64 {
    let mut bytes = 0.0;
    for (key, more) in bins {
        bytes += more;
        if bytes >= wanted {
            return *key;
        }
    }
    f64::NEG_INFINITY
}

/// Tokens per byte of the beginning of the corpus's sample, which is in pseudo-random order.
fn tokens_per_byte(engine: &Engine, dsir: &Dsir, encoder: &Encoder) -> Result<f64> {
    let sample = read_sample(engine, &dsir.outputs)?;
    let texts: Vec<&str> = sample.iter().take(SAMPLE_WINDOWS).map(|s| s.text.as_str()).collect();
    let bytes: usize = texts.iter().map(|t| t.len()).sum();
    let tokens: usize = encoder.encode(texts)?.iter().map(Vec::len).sum();
    Ok(tokens.max(1) as f64 / bytes.max(1) as f64)
}

/// The windows that are tokenized to find the selection.
struct Candidates<'a> {
    engine: &'a Engine,
    dsir: &'a Dsir,
    plan: &'a Plan,
    encoder: &'a Encoder,
    /// Where their keys and tokens lie meanwhile.
    folder: PathBuf,
}

/// What was found among the candidates.
struct Found {
    /// Columns of `selection`.
    batches: Vec<RecordBatch>,
    /// For each domain with candidates, whether they meet the budget, and the tokens selected or else all of them.
    ends: BTreeMap<String, (bool, i64)>,
}

impl Candidates<'_> {
    /// The selection among the windows whose keys are at least the domain's bound.
    fn selection(&self, bounds: &BTreeMap<&str, f64>, budget: u64) -> Result<Found> {
        let units: Vec<(usize, &DsirUnit)> = self.dsir.units.iter().filter(|u| u.scores.is_some()).enumerate().collect();
        self.engine.for_each(&units, |(number, unit)| self.count(unit, *number, bounds))?;
        let session = self.engine.parallel_session([]);
        let files: Vec<PathBuf> = units.iter().map(|(number, _)| self.file(*number)).collect();
        self.engine.register(&session, "candidates", &files.iter().map(PathBuf::as_path).collect::<Vec<_>>())?;
        let sql = include_str!("../sql/dsir_selection.sql").replace("{budget}", &budget.to_string());
        let batches = self.engine.collect(&session, &sql)?;
        let mut ends = BTreeMap::new();
        for batch in &batches {
            let (keys, tokens) = (batch.column(1), batch.column(3).as_primitive::<Int64Type>());
            for (row, domain) in batch.column(0).as_string_view().iter().flatten().enumerate() {
                ends.insert(domain.to_owned(), (keys.is_valid(row), tokens.value(row)));
            }
        }
        Ok(Found { batches, ends })
    }

    /// Tokenizes the candidates of one corpus file.
    fn count(&self, unit: &DsirUnit, number: usize, bounds: &BTreeMap<&str, f64>) -> Result<()> {
        let Some(scores) = &unit.scores else { return Ok(()) };
        let session = self.engine.text_session(self.plan.spec.windows.bytes, [self.encoder.tokenize_function()]);
        register_texts(self.engine, &session, &unit.unit, self.plan.spec.windows.bytes)?;
        self.engine.register(&session, "scores", &[scores])?;
        register_batches(&session, "bounds", vec![bounds_batch(bounds)?], &bounds_schema())?;
        let frame = self.engine.query(&session, include_str!("../sql/dsir_candidates.sql"))?;
        self.engine.write(frame, &candidates_schema(), &self.file(number)).map(|_| ())
    }

    fn file(&self, number: usize) -> PathBuf {
        self.folder.join(format!("candidates-{number}.parquet"))
    }

    fn remove(&self) -> Result<()> {
        std::fs::remove_dir_all(&self.folder).map_err(|e| write_error(&self.folder, e))
    }
}

fn bounds_schema() -> SchemaRef {
    let key = Field::new("key_min", DataType::Float64, false);
    Arc::new(Schema::new(vec![Field::new("domain", DataType::Utf8, false), key]))
}

fn bounds_batch(bounds: &BTreeMap<&str, f64>) -> Result<RecordBatch> {
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(bounds.keys())),
        Arc::new(Float64Array::from_iter_values(bounds.values().copied())),
    ];
    RecordBatch::try_new(bounds_schema(), columns).map_err(|e| Error::internal("bounds do not form a table").source(e))
}

fn candidates_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("domain", DataType::Utf8, false),
        Field::new("key", DataType::Float64, false),
        Field::new("tokens", DataType::Int64, false),
    ]))
}

/// Writes the selected windows of one corpus file.
pub fn draw(engine: &Engine, dsir: &Dsir, plan: &Plan, unit: &DsirUnit) -> Result<()> {
    let (Some(scores), Some(path)) = (&unit.scores, &unit.unit.draws) else { return Ok(()) };
    let session = engine.text_session(plan.spec.windows.bytes, [draws_function(plan.spec.seed)]);
    register_assigned(engine, &session, &unit.unit, plan.spec.windows.bytes)?;
    for (table, path) in [("scores", scores), ("selection", &dsir.selection)] {
        engine.register(&session, table, &[path])?;
    }
    let frame = engine.query(&session, include_str!("../sql/dsir_draw.sql"))?;
    engine.write(frame, &draws_schema(), path)?;
    engine.progress.advance(unit.unit.bytes);
    Ok(())
}

#[cfg(test)]
mod tests {
    use arrow::datatypes::Float64Type;

    use super::*;

    #[test]
    fn the_bound_is_the_lowest_key_that_is_needed() {
        let bins = [(2.0, 10.0), (1.0, 20.0), (-3.0, 30.0)];
        let found = [5.0, 10.0, 11.0, 60.0, 61.0].map(|wanted| bound(&bins, wanted));
        assert_eq!(found, [2.0, 2.0, 1.0, -3.0, f64::NEG_INFINITY]);
        assert_eq!(bound(&[], 1.0), f64::NEG_INFINITY);
    }

    #[tokio::test]
    async fn a_selection_ends_with_the_window_that_meets_the_budget() {
        let session = datafusion::prelude::SessionContext::new();
        // Two windows of equal text and key stay together; `music` has too little.
        let rows = "('law', 9.5, 10), ('law', 7.0, 5), ('law', 7.0, 5), ('law', 6.0, 30), ('music', 1.0, 3)";
        let table = format!("SELECT * FROM (VALUES {rows}) AS t (domain, key, tokens)");
        session.register_table("candidates", session.sql(&table).await.unwrap().into_view()).unwrap();
        let mut found = Vec::new();
        for budget in ["10", "11", "20", "21"] {
            let sql = include_str!("../sql/dsir_selection.sql").replace("{budget}", budget);
            let sql = format!("SELECT CAST(key_min AS DOUBLE), windows, CAST(tokens AS BIGINT) FROM ({sql}) ORDER BY domain");
            for batch in session.sql(&sql).await.unwrap().collect().await.unwrap() {
                let number = |i: usize, row: usize| batch.column(i).as_primitive::<Int64Type>().value(row);
                let keys = batch.column(0).as_primitive::<Float64Type>();
                found.extend((0..batch.num_rows()).map(|row| (keys.iter().nth(row).flatten(), number(1, row), number(2, row))));
            }
        }
        let music = (None, 1, 3);
        let law = [(Some(9.5), 1, 10), (Some(7.0), 3, 20), (Some(7.0), 3, 20), (Some(6.0), 4, 50)];
        assert_eq!(found, law.into_iter().flat_map(|law| [law, music]).collect::<Vec<_>>());
    }
}
