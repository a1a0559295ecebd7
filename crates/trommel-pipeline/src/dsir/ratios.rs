//! The bags of n-grams: counts per input file, then the probability of each bucket in each domain and in the corpus.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Int64Array, ListArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Float64Type, Int64Type, Schema, SchemaRef};
use datafusion::common::ScalarValue;
use datafusion::error::Result as QueryResult;
use datafusion::logical_expr::function::AccumulatorArgs;
use datafusion::logical_expr::{Accumulator, AggregateUDF, Volatility, create_udaf};
use trommel_core::error::{Error, Result};
use trommel_spec::plan::Mixture;

use super::ngrams::{BUCKETS, Featurizer};
use crate::embed::register_texts;
use crate::engine::Engine;
use crate::histogram::register_mixtures;
use crate::outputs::{Dsir, DsirUnit};

/// Counts the n-grams of one input file.
pub fn count(engine: &Engine, window_bytes: u32, unit: &DsirUnit) -> Result<()> {
    let session = engine.text_session(window_bytes, []);
    session.register_udaf(ngram_counts_function());
    register_texts(engine, &session, &unit.unit, window_bytes)?;
    let sql = include_str!("../sql/dsir_counts.sql").replace("{source}", &unit.unit.source);
    let frame = engine.query(&session, &sql)?;
    engine.write(frame, &counts_schema(), &unit.counts)?;
    engine.progress.advance(unit.unit.bytes);
    Ok(())
}

/// Writes the probabilities, when every file is counted.
pub fn write(engine: &Engine, dsir: &Dsir, mixtures: &[Mixture]) -> Result<()> {
    let session = engine.session([]);
    let files: Vec<&Path> = dsir.units.iter().map(|u| u.counts.as_path()).collect();
    engine.register(&session, "counts", &files)?;
    register_mixtures(&session, mixtures)?;
    let frame = engine.query(&session, include_str!("../sql/dsir_ratios.sql"))?;
    engine.write(frame, &ratios_schema(), &dsir.ratios).map(|_| ())
}

fn counts_schema() -> SchemaRef {
    let number = |name: &str| Field::new(name, DataType::Int64, false);
    Arc::new(Schema::new(vec![Field::new("domain", DataType::Utf8, false), number("bucket"), number("count")]))
}

fn ratios_schema() -> SchemaRef {
    let share = |name: &str| Field::new(name, DataType::Float64, false);
    let bucket = Field::new("bucket", DataType::Int64, false);
    Arc::new(Schema::new(vec![Field::new("domain", DataType::Utf8, false), bucket, share("p_domain"), share("p_corpus")]))
}

/// How much likelier each domain makes an n-gram of each bucket than the corpus does.
#[derive(Debug, Clone, PartialEq)]
pub struct LogRatios {
    /// The domains, in order.
    pub domains: Vec<String>,
    /// `ln((p_domain + 1e-8) / (p_corpus + 1e-8))`, `(BUCKETS, domains)`.
    pub values: Vec<f64>,
}

impl LogRatios {
    /// Reads them from the file that `write` has made.
    pub fn read(engine: &Engine, dsir: &Dsir) -> Result<LogRatios> {
        let session = engine.session([]);
        engine.register(&session, "ratios", &[&dsir.ratios])?;
        let sql = "SELECT domain, p_domain, p_corpus FROM ratios ORDER BY domain, bucket";
        let (mut domains, mut shares): (Vec<String>, Vec<[f64; 2]>) = (Vec::new(), Vec::new());
        for batch in engine.collect(&session, sql)? {
            let share = |i: usize| batch.column(i).as_primitive::<Float64Type>().values();
            for domain in batch.column(0).as_string_view().iter().flatten() {
                if domains.last().is_none_or(|last| last != domain) {
                    domains.push(domain.to_owned());
                }
            }
            shares.extend(share(1).iter().zip(share(2)).map(|(&p_domain, &p_corpus)| [p_domain, p_corpus]));
        }
        if domains.is_empty() || shares.len() != domains.len() * BUCKETS {
            return Err(Error::internal(format!("{} ratios for {} domains", shares.len(), domains.len())));
        }
        Ok(LogRatios::new(domains, &shares))
    }

    /// From the `[p_domain, p_corpus]` of every bucket of the first domain, then of the next ones.
    pub fn new(domains: Vec<String>, shares: &[[f64; 2]]) -> LogRatios {
        let of = |[p_domain, p_corpus]: [f64; 2]| log(p_domain + SMOOTHING) - log(p_corpus + SMOOTHING);
        let buckets = 0..shares.len() / domains.len().max(1);
        let row = |bucket: usize| shares[bucket..].iter().step_by(buckets.len()).map(|&pair| of(pair));
        let values = buckets.clone().flat_map(row).collect();
        LogRatios { domains, values }
    }
}

/// What is added to each probability, so that an n-gram that never occurs has a finite ratio.
const SMOOTHING: f64 = 1e-8;

/// The natural logarithm, with the same bits on every machine, which the system's need not have.
pub(super) fn log(x: f64) -> f64 {
    libm::log(x)
}

/// SQL `ngram_counts(text)`: a list of [`BUCKETS`] pairs (bucket, count) over all rows.
pub fn ngram_counts_function() -> AggregateUDF {
    let pairs = DataType::List(Arc::new(pair_item()));
    let start = |_: AccumulatorArgs<'_>| -> QueryResult<Box<dyn Accumulator>> {
        Ok(Box::new(Counts { featurizer: Featurizer::default(), counts: vec![0; BUCKETS] }))
    };
    let state = Arc::new(vec![pairs.clone()]);
    create_udaf("ngram_counts", vec![DataType::Utf8View], Arc::new(pairs), Volatility::Immutable, Arc::new(start), state)
}

fn pair_fields() -> Fields {
    Fields::from(["bucket", "count"].map(|name| Field::new(name, DataType::Int64, false)).to_vec())
}

fn pair_item() -> Field {
    Field::new("item", DataType::Struct(pair_fields()), true)
}

#[derive(Debug)]
struct Counts {
    featurizer: Featurizer,
    counts: Vec<i64>,
}

impl Accumulator for Counts {
    fn update_batch(&mut self, values: &[ArrayRef]) -> QueryResult<()> {
        for text in values[0].as_string_view().iter().flatten() {
            self.featurizer.ngrams(text, |bucket| self.counts[usize::from(bucket)] += 1);
        }
        Ok(())
    }

    fn evaluate(&mut self) -> QueryResult<ScalarValue> {
        let buckets = Int64Array::from_iter_values(0..BUCKETS as i64);
        let columns: Vec<ArrayRef> = vec![Arc::new(buckets), Arc::new(Int64Array::from(self.counts.clone()))];
        let pairs = Arc::new(StructArray::try_new(pair_fields(), columns, None)?);
        let list = ListArray::try_new(Arc::new(pair_item()), OffsetBuffer::from_lengths([BUCKETS]), pairs, None)?;
        Ok(ScalarValue::List(Arc::new(list)))
    }

    fn size(&self) -> usize {
        size_of_val(self) + size_of_val(&self.counts[..]) + self.featurizer.bytes()
    }

    fn state(&mut self) -> QueryResult<Vec<ScalarValue>> {
        Ok(vec![self.evaluate()?])
    }

    fn merge_batch(&mut self, states: &[ArrayRef]) -> QueryResult<()> {
        for pairs in states[0].as_list::<i32>().iter().flatten() {
            let counts = pairs.as_struct().column(1).as_primitive::<Int64Type>();
            self.counts.iter_mut().zip(counts.values()).for_each(|(sum, n)| *sum += n);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::register_batches;

    #[test]
    fn ratios_are_logs_of_smoothed_probabilities_by_bucket() {
        let shares = [[0.5, 0.25], [0.5, 0.75], [0.0, 0.25], [1.0, 0.75]];
        let found = LogRatios::new(vec!["law".into(), "music".into()], &shares);
        let expected = [2.0_f64, 1e-8 / 0.25, 2.0 / 3.0, 4.0 / 3.0].map(f64::ln);
        assert!(found.values.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-6), "{found:?}");
    }

    #[test]
    fn a_query_counts_every_ngram_and_sums_files() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let sql = include_str!("../sql/dsir_counts.sql");
        let count = |domain: &str| sql.replace("{source}", domain).replace("texts", &format!("{domain}_texts"));
        let batches = runtime.block_on(async {
            let session = datafusion::prelude::SessionContext::new();
            session.register_udaf(ngram_counts_function());
            for (table, rows) in [("corpus_texts", "('a b'), ('a a')"), ("law_texts", "('A')")] {
                let text = format!("SELECT arrow_cast(text, 'Utf8View') AS text FROM (VALUES {rows}) AS t (text)");
                session.register_table(table, session.sql(&text).await.unwrap().into_view()).unwrap();
            }
            let mut counts = Vec::new();
            for sql in [count("corpus"), count("corpus"), count("law")] {
                counts.extend(session.sql(&sql).await.unwrap().collect().await.unwrap());
            }
            register_batches(&session, "counts", counts, &counts_schema()).unwrap();
            register_mixtures(&session, &[]).unwrap();
            let sql = format!(
                "SELECT p_domain, p_corpus FROM ({}) WHERE p_domain > 0 OR p_corpus > 0 ORDER BY p_corpus DESC",
                include_str!("../sql/dsir_ratios.sql")
            );
            session.sql(&sql).await.unwrap().collect().await.unwrap()
        });
        let rows: Vec<[f64; 2]> = batches
            .iter()
            .flat_map(|b| {
                let number = |i: usize| b.column(i).as_primitive::<Float64Type>().values().to_vec();
                number(0).into_iter().zip(number(1)).map(|(d, c)| [d, c]).collect::<Vec<_>>()
            })
            .collect();
        // a, b, `a b`, a, a, `a a`: 6 n-grams; of the domain, the one `a`.
        assert_eq!(rows, [[1.0, 0.5], [0.0, 1.0 / 6.0], [0.0, 1.0 / 6.0], [0.0, 1.0 / 6.0]]);
    }
}
