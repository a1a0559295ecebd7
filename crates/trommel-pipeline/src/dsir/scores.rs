//! The log importance weight of each window for each domain, and the key that it competes with.

use std::sync::{Arc, Mutex};

use arrow::array::{ArrayRef, AsArray, Float64Array, Int32Array, ListArray, StringViewArray, StructArray};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Schema, SchemaRef, UInt32Type};
use datafusion::error::DataFusionError;
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Volatility, create_udf};
use trommel_core::error::{Error, Result};
use trommel_core::seed::Stream;
use trommel_spec::plan::Plan;

use super::ngrams::Featurizer;
use super::ratios::{LogRatios, log};
use crate::embed::{register_texts, window_key};
use crate::engine::Engine;
use crate::outputs::DsirUnit;

/// Words of the shortest window that can be selected, as in the package.
pub const WORDS_MIN: usize = 100;

/// Scores the windows of one corpus file.
pub fn write(engine: &Engine, plan: &Plan, ratios: &Arc<LogRatios>, unit: &DsirUnit) -> Result<()> {
    let Some(path) = &unit.scores else { return Ok(()) };
    let session = engine.text_session(plan.spec.windows.bytes, [log_weights_function(ratios), gumbel_function(plan.spec.seed)]);
    register_texts(engine, &session, &unit.unit, plan.spec.windows.bytes)?;
    let sql = include_str!("../sql/dsir_scores.sql").replace("{words_min}", &WORDS_MIN.to_string());
    let frame = engine.query(&session, &sql)?;
    engine.write(frame, &schema(), path)?;
    engine.progress.advance(unit.unit.bytes);
    Ok(())
}

/// The columns of the table `dsir_scores`.
fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("document", DataType::Utf8, false),
        Field::new("window", DataType::UInt32, false),
        Field::new("row", DataType::Int64, false),
        Field::new("byte_len", DataType::Int32, false),
        Field::new("domain", DataType::Utf8, false),
        Field::new("words", DataType::Int32, false),
        Field::new("log_weight", DataType::Float64, false),
        Field::new("key", DataType::Float64, true),
    ]))
}

fn weight_fields() -> Fields {
    Fields::from(vec![
        Field::new("domain", DataType::Utf8View, false),
        Field::new("words", DataType::Int32, false),
        Field::new("log_weight", DataType::Float64, false),
    ])
}

/// SQL `log_weights(text)`: (domain, words, log_weight) for each domain.
pub fn log_weights_function(ratios: &Arc<LogRatios>) -> ScalarUDF {
    let ratios = Arc::clone(ratios);
    let featurizer = Mutex::new(Featurizer::default());
    let item = Arc::new(Field::new("item", DataType::Struct(weight_fields()), false));
    let returns = DataType::List(Arc::clone(&item));
    let compute = move |arguments: &[ColumnarValue]| {
        let texts = ColumnarValue::values_to_arrays(arguments)?;
        let mut featurizer =
            featurizer.lock().map_err(|_| DataFusionError::External(Box::new(Error::internal("a scorer panicked"))))?;
        let domains = ratios.domains.len();
        let (mut words, mut weights) = (Vec::new(), Vec::new());
        for text in texts[0].as_string_view().iter().map(Option::unwrap_or_default) {
            let count = log_weights(&mut featurizer, &ratios, text, &mut weights);
            words.extend(std::iter::repeat_n(count as i32, domains));
        }
        let names = ratios.domains.iter().cycle().take(weights.len());
        let columns: Vec<ArrayRef> = vec![
            Arc::new(StringViewArray::from_iter_values(names)),
            Arc::new(Int32Array::from(words)),
            Arc::new(Float64Array::from(weights)),
        ];
        let structs = StructArray::try_new(weight_fields(), columns, None)?;
        let offsets = OffsetBuffer::from_repeated_length(domains, texts[0].len());
        Ok(ColumnarValue::Array(Arc::new(ListArray::try_new(Arc::clone(&item), offsets, Arc::new(structs), None)?)))
    };
    create_udf("log_weights", vec![DataType::Utf8View], returns, Volatility::Immutable, Arc::new(compute))
}

/// Appends the text's log weight for each domain, the sum of the log ratios of its n-grams; returns its words.
///
/// The package sums over all n-grams too: long windows have the largest weights, either way. \[DS\]
fn log_weights(featurizer: &mut Featurizer, ratios: &LogRatios, text: &str, weights: &mut Vec<f64>) -> usize {
    let (first, domains) = (weights.len(), ratios.domains.len());
    weights.resize(first + domains, 0.0);
    let sums = &mut weights[first..];
    featurizer.ngrams(text, |bucket| {
        let row = &ratios.values[usize::from(bucket) * domains..][..domains];
        sums.iter_mut().zip(row).for_each(|(sum, ratio)| *sum += ratio);
    })
}

/// SQL `gumbel(domain, document, window)`: noise from the standard Gumbel distribution, a hash of the seed and the arguments.
///
/// The k highest of `log w + noise` are k draws without replacement in proportion to w (the Gumbel top-k trick). \[DS\]
pub fn gumbel_function(seed: u64) -> ScalarUDF {
    let stream = Stream::new(seed, "dsir");
    let compute = move |arguments: &[ColumnarValue]| {
        let columns = ColumnarValue::values_to_arrays(arguments)?;
        let (domains, documents) = (columns[0].as_string_view(), columns[1].as_string_view());
        let windows = columns[2].as_primitive::<UInt32Type>();
        let noise = |row: usize| {
            let key = window_key(documents.value(row), windows.value(row));
            gumbel(stream.bits(&[domains.value(row).as_bytes(), b"\0", &key].concat()))
        };
        Ok(ColumnarValue::Array(Arc::new(Float64Array::from_iter_values((0..windows.len()).map(noise)))))
    };
    let arguments = vec![DataType::Utf8View, DataType::Utf8View, DataType::UInt32];
    create_udf("gumbel", arguments, DataType::Float64, Volatility::Immutable, Arc::new(compute))
}

/// `-ln(-ln u)` for the uniform number u in (0, 1), neither end included, that the bits' upper 52 make.
fn gumbel(bits: u64) -> f64 {
    let u = ((bits >> 12) as f64 + 0.5) * (1.0 / (1u64 << 52) as f64);
    -log(-log(u))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde::Deserialize;

    use super::*;
    use crate::dsir::ngrams::BUCKETS;

    /// What `tests/peers/dsir_weights.py` has written: texts, and what `data-selection` 1.0.3 makes of them.
    #[derive(Deserialize)]
    struct Fixture {
        raw: Vec<String>,
        targets: BTreeMap<String, Vec<String>>,
        words: Vec<usize>,
        log_weights: BTreeMap<String, Vec<f64>>,
        noise: BTreeMap<String, Vec<f64>>,
        picked: BTreeMap<String, Vec<usize>>,
    }

    /// The share of each bucket in some texts.
    fn shares(texts: &[String]) -> Vec<f64> {
        let (mut featurizer, mut counts) = (Featurizer::default(), vec![0.0; BUCKETS]);
        texts.iter().for_each(|text| {
            featurizer.ngrams(text, |bucket| counts[usize::from(bucket)] += 1.0);
        });
        let sum: f64 = counts.iter().sum();
        counts.into_iter().map(|n| n / sum).collect()
    }

    #[test]
    fn weights_and_selections_are_those_of_the_package() {
        let fixture: Fixture = serde_json::from_str(include_str!("../../tests/fixtures/dsir.json")).unwrap();
        let corpus = shares(&fixture.raw);
        let pairs = |texts: &Vec<String>| {
            shares(texts).into_iter().zip(corpus.clone()).map(|(p_domain, p_corpus)| [p_domain, p_corpus])
        };
        let domains: Vec<String> = fixture.targets.keys().cloned().collect();
        let ratios = LogRatios::new(domains.clone(), &fixture.targets.values().flat_map(pairs).collect::<Vec<_>>());
        let (mut featurizer, mut weights) = (Featurizer::default(), Vec::new());
        let words: Vec<usize> =
            fixture.raw.iter().map(|text| log_weights(&mut featurizer, &ratios, text, &mut weights)).collect();
        assert_eq!(words, fixture.words);
        for (i, domain) in domains.iter().enumerate() {
            let ours: Vec<f64> = weights.iter().copied().skip(i).step_by(domains.len()).collect();
            for (a, b) in ours.iter().zip(&fixture.log_weights[domain]) {
                assert!((a - b).abs() < 1e-10 * b.abs(), "{a} and {b}");
            }
            let mut picked: Vec<usize> = (0..ours.len()).filter(|&i| words[i] >= WORDS_MIN).collect();
            picked.sort_by(|&a, &b| (ours[b] + fixture.noise[domain][b]).total_cmp(&(ours[a] + fixture.noise[domain][a])));
            picked.truncate(fixture.picked[domain].len());
            picked.sort();
            assert_eq!(picked, fixture.picked[domain], "{domain}");
        }
    }

    #[test]
    fn noise_is_finite_and_follows_the_gumbel_distribution() {
        assert!([0, u64::MAX].map(gumbel).iter().all(|x| x.is_finite()));
        let stream = Stream::new(3, "dsir");
        let n = 20_000u32;
        let noise: Vec<f64> = (0..n).map(|i| gumbel(stream.bits(&i.to_le_bytes()))).collect();
        let mean = noise.iter().sum::<f64>() / f64::from(n);
        let variance = noise.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / f64::from(n);
        // Euler's constant and pi^2 / 6; the standard errors are 0.009 and 0.024.
        assert!((mean - 0.5772).abs() < 0.045, "{mean}");
        assert!((variance - 1.6449).abs() < 0.12, "{variance}");
    }

    #[test]
    fn the_highest_keys_are_draws_in_proportion_to_the_weights() {
        // Two of three windows of weights 4, 2, 1; the last one is in both places with 1/7, 4/7 * 1/3 and 2/7 * 1/5.
        let stream = Stream::new(5, "dsir");
        let n = 20_000u32;
        let drawn = (0..n).filter(|trial| {
            let key = |i: u32, w: f64| w.ln() + gumbel(stream.bits(&[trial.to_le_bytes(), i.to_le_bytes()].concat()));
            let [a, b, c] = [key(0, 4.0), key(1, 2.0), key(2, 1.0)];
            c > a.min(b)
        });
        let share = drawn.count() as f64 / f64::from(n);
        let expected = 1.0 / 7.0 + 4.0 / 7.0 / 3.0 + 2.0 / 7.0 / 5.0;
        // The standard error is 0.0035.
        assert!((share - expected).abs() < 0.0175, "{share} for {expected}");
    }
}
