//! Stage `resample`: how often each window of the corpus is drawn for each domain. [PE 2.4]
//!
//! Cluster c is drawn at a rate of `s * w_c` copies per window, with one scale `s` per domain that meets the token budget.
//! A window whose hash gives the uniform number u has as many copies as there are integers j >= 0 with
//! `j + u < rate`: the rate on average, and never off by a whole copy. The copies depend on the seed, the domain and the
//! window's key, so they are the same on one core and on a thousand.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::sync::Arc;

use arrow::array::{
    ArrayRef, AsArray, Float64Array, ListArray, RecordBatch, StringArray, StructArray, UInt32Array, UInt64Array,
};
use arrow::buffer::OffsetBuffer;
use arrow::datatypes::{DataType, Field, Fields, Float64Type, Schema, SchemaRef, UInt32Type};
use datafusion::logical_expr::{ColumnarValue, ScalarUDF, Volatility, create_udf};
use trommel_core::error::{Error, Result};
use trommel_core::schema::CORPUS;
use trommel_core::seed::{Stream, unit};
use trommel_spec::pipeline::ShardBy;
use trommel_spec::plan::Plan;

use crate::assigned::register_assigned;
use crate::embed::{read_sample, window_key};
use crate::engine::{Engine, ParquetSink, footer, register_batches};
use crate::histogram::{self, Bin};
use crate::outputs::{Outputs, Unit, drawn, streams};
use crate::tokenizer::Encoder;
use crate::{cluster, weigh};

/// Windows of the sample that are tokenized to learn how many tokens a byte of text has, as many in each cluster.
const TOKENIZED_WINDOWS: usize = 2048;
/// Epochs over a cluster beyond which a plan is taken for a mistake.
const EPOCHS_MAX: f64 = 1000.0;

/// The rate of one cluster for one domain.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// The cluster.
    pub cluster_id: u32,
    /// Copies per window that are drawn, a margin over the budget included; 0 for a domain, and 1 for the corpus, if shards are
    /// written by cluster.
    pub rate: f64,
    /// Copies per window at the budget.
    pub epochs: f64,
    /// Draws at the budget.
    pub expected_draws: f64,
    /// Draws at the budget without `max_epochs`.
    pub wanted_draws: f64,
}

/// What a cluster of the corpus has, and how much it is wanted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Supply {
    /// The cluster.
    pub cluster_id: u32,
    /// Windows in it.
    pub windows: f64,
    /// Bytes of text in it.
    pub bytes: f64,
    /// Its importance weight.
    pub weight: f64,
}

/// The rates that draw `bytes` of text, and `margin` times as much (at least 1), under a cap on the epochs of a cluster.
/// Returns the bytes that the corpus can give if those are too few.
pub fn rates(supply: &[Supply], bytes: f64, margin: f64, max_epochs: Option<f64>) -> Result<Vec<Rate>, f64> {
    let cap = max_epochs.unwrap_or(f64::INFINITY);
    let total: f64 = supply.iter().filter(|s| s.weight > 0.0).map(|s| s.bytes).sum();
    if total <= 0.0 || total * cap < bytes {
        return Err(if total <= 0.0 { 0.0 } else { total * cap });
    }
    let at_budget = scale(supply, bytes, cap);
    let uncapped = scale(supply, bytes, f64::INFINITY);
    let rate = |s: &Supply| {
        let epochs = (at_budget * s.weight).min(cap);
        Rate {
            cluster_id: s.cluster_id,
            rate: epochs * margin,
            epochs,
            expected_draws: epochs * s.windows,
            wanted_draws: uncapped * s.weight * s.windows,
        }
    };
    Ok(supply.iter().map(rate).collect())
}

/// The scale `s` at which `sum_c min(s * w_c, cap) * bytes_c` is `bytes`; infinite if every cluster is at its cap.
fn scale(supply: &[Supply], bytes: f64, cap: f64) -> f64 {
    // From the heaviest cluster down: those at their cap give all they may, and the scale serves the rest.
    let mut open: Vec<&Supply> = supply.iter().filter(|s| s.weight > 0.0).collect();
    open.sort_by(|a, b| b.weight.total_cmp(&a.weight).then(a.cluster_id.cmp(&b.cluster_id)));
    let mut rest: f64 = open.iter().map(|s| s.weight * s.bytes).sum();
    let mut left = bytes;
    for s in open {
        let scale = left / rest;
        if scale * s.weight <= cap {
            return scale;
        }
        left -= cap * s.bytes;
        rest -= s.weight * s.bytes;
    }
    f64::INFINITY
}

/// Plans the rates of every domain, and of the unweighted corpus if it is wanted, and writes them.
pub fn write_rates(engine: &Engine, outputs: &Outputs, plan: &Plan, margin: f64) -> Result<()> {
    let bins = histogram::read(engine, outputs)?;
    let weights = weigh::read(engine, outputs)?;
    let weight: HashMap<(&str, u32), f64> = weights.iter().map(|w| ((w.domain.as_str(), w.cluster_id), w.weight)).collect();
    let density = Density::measure(engine, outputs)?;
    let budget = plan.spec.resample.tokens;
    let (mut domains, mut rows) = (Vec::new(), Vec::new());
    for domain in streams(plan) {
        let of = |cluster_id: u32| {
            if domain == CORPUS { 1.0 } else { weight.get(&(domain.as_str(), cluster_id)).copied().unwrap_or(0.0) }
        };
        let supply: Vec<Supply> = bins
            .iter()
            .filter(|b| b.domain == CORPUS)
            .map(|b: &Bin| Supply {
                cluster_id: b.cluster_id,
                windows: b.windows as f64,
                bytes: b.bytes as f64,
                weight: of(b.cluster_id),
            })
            .collect();
        let tokens_per_byte = density.tokens_per_byte(of);
        let max_epochs = plan.spec.weigh.max_epochs.filter(|_| domain != CORPUS);
        let mut found = rates(&supply, budget.0 as f64 / tokens_per_byte, margin, max_epochs).map_err(|bytes| {
            let most = (bytes * tokens_per_byte) as u64;
            Error::data(format!(
                "the corpus has about {most} tokens for `{domain}` under `weigh.max_epochs`, and {budget} are asked for"
            ))
            .hint("lower `resample.tokens`, raise `weigh.max_epochs`, or add to the corpus")
        })?;
        if let Some(most) = found.iter().map(|r| r.epochs).filter(|&e| e > EPOCHS_MAX).reduce(f64::max) {
            let error = Error::data(format!("{budget} tokens for `{domain}` would repeat a cluster {most:.0} times"));
            return Err(error.hint("lower `resample.tokens` or `cluster.k`, set `weigh.max_epochs`, or add to the corpus"));
        }
        if plan.spec.shard.by == ShardBy::Cluster {
            // Every window once; the domains' draws are only planned.
            let rate = if drawn(plan).contains(&domain) { 1.0 } else { 0.0 };
            found.iter_mut().for_each(|planned| planned.rate = rate);
        }
        domains.extend(std::iter::repeat_n(domain, found.len()));
        rows.extend(found);
    }
    let number = |get: fn(&Rate) -> f64| Arc::new(Float64Array::from_iter_values(rows.iter().map(get))) as ArrayRef;
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(&domains)),
        Arc::new(UInt32Array::from_iter_values(rows.iter().map(|r| r.cluster_id))),
        number(|r| r.rate),
        number(|r| r.epochs),
        number(|r| r.expected_draws),
        number(|r| r.wanted_draws),
    ];
    let batch = RecordBatch::try_new(rates_schema(), columns);
    let batch = batch.map_err(|e| Error::internal("rates do not form a table").source(e))?;
    let mut sink = ParquetSink::create(&outputs.rates, &rates_schema())?;
    sink.write(&batch)?;
    sink.note(MARGIN, &margin.to_string());
    sink.finish().map(|_| ())
}

const MARGIN: &str = "trommel.margin";

/// The margin over the token budget that the rates were planned with.
pub fn margin(outputs: &Outputs) -> Result<f64> {
    let noted = footer(&outputs.rates, MARGIN)?.1.and_then(|text| text.parse().ok());
    noted.ok_or_else(|| {
        Error::data("the rates are damaged").file(outputs.rates.display()).hint("remove this file and run again")
    })
}

fn rates_schema() -> SchemaRef {
    let number = |name: &str| Field::new(name, DataType::Float64, false);
    let mut fields = vec![Field::new("domain", DataType::Utf8, false), Field::new("cluster_id", DataType::UInt32, false)];
    fields.extend(["rate", "epochs", "expected_draws", "wanted_draws"].map(number));
    Arc::new(Schema::new(fields))
}

/// By cluster: the bytes of the sample's windows in it, and the tokens per byte of the first ones.
struct Density(BTreeMap<u32, (f64, f64)>);

impl Density {
    fn measure(engine: &Engine, outputs: &Outputs) -> Result<Density> {
        let sample = read_sample(engine, outputs)?;
        let tree = cluster::stage::read(engine, outputs)?;
        let vectors: Vec<f32> = sample.iter().flat_map(|s| &s.embedding).copied().collect();
        let found = tree.assign(&vectors);
        let mut windows: BTreeMap<u32, Vec<&str>> = BTreeMap::new();
        for (window, found) in sample.iter().zip(&found) {
            windows.entry(found.cluster_id).or_default().push(&window.text);
        }
        let encoder = Encoder::read(&outputs.tokenizer)?;
        let each = TOKENIZED_WINDOWS.div_ceil(windows.len().max(1));
        let chosen: Vec<&str> = windows.values().flat_map(|texts| texts.iter().take(each)).copied().collect();
        let mut tokens = encoder.encode(chosen)?.into_iter();
        let bytes = |texts: &[&str]| texts.iter().map(|text| text.len()).sum::<usize>() as f64;
        let density = windows.into_iter().map(|(cluster_id, texts)| {
            let first = &texts[..each.min(texts.len())];
            let tokens: usize = tokens.by_ref().take(first.len()).map(|tokens| tokens.len()).sum();
            (cluster_id, (bytes(&texts), tokens as f64 / bytes(first).max(1.0)))
        });
        Ok(Density(density.collect()))
    }

    /// Tokens per byte of the text that is drawn with the given weights, estimated by importance sampling.
    fn tokens_per_byte(&self, weight: impl Fn(u32) -> f64) -> f64 {
        let weighted = |weight: &dyn Fn(u32) -> f64| {
            self.0.iter().fold((0.0, 0.0), |(tokens, drawn), (cluster_id, (bytes, tokens_per_byte))| {
                let bytes = weight(*cluster_id) * bytes;
                (tokens + bytes * tokens_per_byte, drawn + bytes)
            })
        };
        // The sample may miss every cluster of a rare domain.
        let (tokens, bytes) = Some(weighted(&weight)).filter(|(_, b)| *b > 0.0).unwrap_or_else(|| weighted(&|_| 1.0));
        tokens.max(1.0) / bytes.max(1.0)
    }
}

/// Draws from one corpus unit, for every domain at once.
pub fn draw(engine: &Engine, outputs: &Outputs, plan: &Plan, unit: &Unit) -> Result<()> {
    let Some(path) = &unit.draws else { return Ok(()) };
    let session = engine.text_session(plan.spec.windows.bytes, [draws_function(plan.spec.seed)]);
    register_assigned(engine, &session, unit, plan.spec.windows.bytes)?;
    engine.register(&session, "rates", &[&outputs.rates])?;
    let frame = engine.query(&session, include_str!("sql/draw.sql"))?;
    engine.write(frame, &draws_schema(), path)?;
    engine.progress.advance(unit.bytes);
    Ok(())
}

/// The columns of the table `draws`.
pub fn draws_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("domain", DataType::Utf8, false),
        Field::new("shuffle", DataType::UInt64, false),
        Field::new("document", DataType::Utf8, false),
        Field::new("window", DataType::UInt32, false),
        Field::new("copy", DataType::UInt32, false),
        Field::new("cluster_id", DataType::UInt32, false),
        Field::new("text", DataType::Utf8, false),
    ]))
}

fn copy_fields() -> Fields {
    Fields::from(vec![Field::new("copy", DataType::UInt32, false), Field::new("shuffle", DataType::UInt64, false)])
}

/// SQL `draws(domain, document, window, rate)`: one (copy, shuffle) per copy, where `shuffle` is its place in the global
/// pseudo-random order.
pub fn draws_function(seed: u64) -> ScalarUDF {
    let (draw, shuffle) = (Stream::new(seed, "draw"), Stream::new(seed, "shuffle"));
    let item = Arc::new(Field::new("item", DataType::Struct(copy_fields()), false));
    let returns = DataType::List(Arc::clone(&item));
    let compute = move |arguments: &[ColumnarValue]| {
        let columns = ColumnarValue::values_to_arrays(arguments)?;
        let (domains, documents) = (columns[0].as_string_view(), columns[1].as_string_view());
        let (windows, rates) = (columns[2].as_primitive::<UInt32Type>(), columns[3].as_primitive::<Float64Type>());
        let (mut copies, mut places, mut lengths) = (Vec::new(), Vec::new(), Vec::new());
        for row in 0..rates.len() {
            let mut key =
                [domains.value(row).as_bytes(), b"\0", &window_key(documents.value(row), windows.value(row))].concat();
            let count = multiplicity(rates.value(row), unit(draw.bits(&key)));
            let stem = key.len();
            for copy in 0..count {
                key.truncate(stem);
                key.extend(copy.to_le_bytes());
                copies.push(copy);
                places.push(shuffle.bits(&key));
            }
            lengths.push(count as usize);
        }
        let columns: Vec<ArrayRef> = vec![Arc::new(UInt32Array::from(copies)), Arc::new(UInt64Array::from(places))];
        let structs = StructArray::try_new(copy_fields(), columns, None)?;
        let list = ListArray::try_new(Arc::clone(&item), OffsetBuffer::from_lengths(lengths), Arc::new(structs), None)?;
        Ok(ColumnarValue::Array(Arc::new(list)))
    };
    let arguments = vec![DataType::Utf8View, DataType::Utf8View, DataType::UInt32, DataType::Float64];
    create_udf("draws", arguments, returns, Volatility::Immutable, Arc::new(compute))
}

/// The number of integers j >= 0 with `j + u < rate`.
fn multiplicity(rate: f64, u: f64) -> u32 {
    (rate - u).ceil().clamp(0.0, f64::from(u32::MAX)) as u32
}

/// Counts what was drawn and writes the table `diagnostics`.
pub fn write_diagnostics(engine: &Engine, outputs: &Outputs, by: ShardBy) -> Result<()> {
    let session = engine.parallel_session([]);
    let files: Vec<&Path> = outputs.corpus().filter_map(|u| u.draws.as_deref()).collect();
    engine.register(&session, "draws", &files)?;
    for (table, path) in [("weights", &outputs.weights), ("histograms", &outputs.histograms), ("rates", &outputs.rates)] {
        engine.register(&session, table, &[path])?;
    }
    let drawn = match by {
        ShardBy::Domain => include_str!("sql/drawn.sql"),
        ShardBy::Cluster => include_str!("sql/planned.sql"),
    };
    register_batches(&session, "drawn", engine.collect(&session, drawn)?, &drawn_schema())?;
    let frame = engine.query(&session, include_str!("sql/diagnostics.sql"))?;
    engine.write(frame, &diagnostics_schema(), &outputs.diagnostics).map(|_| ())
}

fn drawn_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("domain", DataType::Utf8View, false),
        Field::new("cluster_id", DataType::UInt32, false),
        Field::new("draws", DataType::Int64, false),
        Field::new("repeats", DataType::Int64, true),
    ]))
}

/// The columns of the table `diagnostics`.
pub fn diagnostics_schema() -> SchemaRef {
    let names = [
        "kl_before",
        "kl_after",
        "ess",
        "ess_share",
        "lost_mass",
        "repeat_share",
        "max_epochs",
        "entropy",
        "top_cluster_share",
        "capped_share",
    ];
    let domain = Field::new("domain", DataType::Utf8, false);
    Arc::new(Schema::new(
        std::iter::once(domain).chain(names.map(|n| Field::new(n, DataType::Float64, false))).collect::<Vec<_>>(),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn supply(cluster_id: u32, windows: f64, weight: f64) -> Supply {
        Supply { cluster_id, windows, bytes: windows * 100.0, weight }
    }

    #[test]
    fn rates_follow_the_weights_and_meet_the_budget() {
        let supply = [supply(0, 10.0, 3.0), supply(1, 30.0, 1.0), supply(2, 60.0, 0.0)];
        let rates = rates(&supply, 12_000.0, 1.0, None).unwrap();
        // 30 draws per unit of scale from the first cluster and 30 from the second; 120 draws are wanted.
        assert_eq!(rates.iter().map(|r| r.epochs).collect::<Vec<_>>(), [6.0, 2.0, 0.0]);
        assert_eq!(rates.iter().map(|r| r.expected_draws).sum::<f64>(), 120.0);
    }

    #[test]
    fn a_cap_moves_draws_to_other_clusters_or_refuses() {
        let supply = [supply(0, 10.0, 3.0), supply(1, 30.0, 1.0)];
        let capped = rates(&supply, 12_000.0, 1.1, Some(4.0)).unwrap();
        assert_eq!(capped[0].epochs, 4.0);
        assert!((capped[1].epochs - 80.0 / 30.0).abs() < 1e-12);
        assert_eq!(capped[0].wanted_draws, 60.0);
        assert_eq!(rates(&supply, 12_000.0, 1.1, Some(2.0)), Err(8_000.0));
    }

    #[test]
    fn copies_average_to_the_rate_and_differ_by_at_most_one() {
        let stream = Stream::new(1, "draw");
        for rate in [0.0, 0.3, 1.0, 2.75] {
            let counts: Vec<u32> = (0..20_000u32).map(|i| multiplicity(rate, unit(stream.bits(&i.to_le_bytes())))).collect();
            let mean = f64::from(counts.iter().sum::<u32>()) / counts.len() as f64;
            // The standard error is at most 0.0036.
            assert!((mean - rate).abs() < 0.015, "{mean} for {rate}");
            assert!(counts.iter().all(|&n| f64::from(n) > rate - 1.0 && f64::from(n) < rate + 1.0));
        }
    }
}
