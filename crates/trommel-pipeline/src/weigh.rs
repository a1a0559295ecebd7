//! Stage `weigh`: from histograms to importance weights. [PE 2.4]

use std::sync::Arc;

use arrow::array::{AsArray, RecordBatch};
use arrow::datatypes::{DataType, Field, Float64Type, Schema, SchemaRef, UInt32Type};
use trommel_core::error::{Error, Result};
use trommel_spec::pipeline::{Pipeline, Weigh};

use crate::engine::{Engine, Written, write_parquet};
use crate::outputs::Outputs;

/// One row of the stage's output.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// The domain.
    pub domain: String,
    /// The cluster.
    pub cluster_id: u32,
    /// P(cluster | domain).
    pub p_domain: f64,
    /// P(cluster | corpus).
    pub p_corpus: f64,
    /// The importance weight, at least 0.
    pub weight: f64,
}

/// The query of the stage under the given options.
pub fn sql(weigh: &Weigh) -> String {
    let smoothing = format!("CAST({:?} AS DOUBLE)", weigh.smoothing.unwrap_or(0.0));
    let exponent = format!("CAST({:?} AS DOUBLE)", 1.0 / weigh.temperature.unwrap_or(1.0));
    include_str!("sql/weigh.sql").replace("{smoothing}", &smoothing).replace("{exponent}", &exponent)
}

/// Writes the weights; refuses a domain of which nothing can be drawn.
pub fn run(engine: &Engine, outputs: &Outputs, spec: &Pipeline) -> Result<Written> {
    let session = engine.session([]);
    engine.register(&session, "histograms", &outputs.histogram_files())?;
    let batches = engine.collect(&session, &sql(&spec.weigh))?;
    let weights: Vec<Weight> = batches.iter().flat_map(rows).collect();
    if weights.iter().any(|w| !w.weight.is_finite()) {
        return Err(Error::config("a weight is too large for a number").hint("raise `weigh.temperature`"));
    }
    for domain in spec.domains.keys() {
        let rows = weights.iter().filter(|w| w.domain == *domain);
        let sum = |(all, drawable): (f64, f64), w: &Weight| {
            (all + w.p_domain, drawable + if w.weight > 0.0 { w.p_domain } else { 0.0 })
        };
        let (all, drawable) = rows.fold((0.0, 0.0), sum);
        if (all - 1.0).abs() > 1e-9 {
            return Err(Error::internal(format!("the shares of `{domain}` sum to {all}")));
        }
        if drawable <= 0.0 {
            return Err(Error::data(format!("every cluster of the domain `{domain}` is empty in the corpus"))
                .hint("the corpus holds nothing like this domain: lower `cluster.k`, set `weigh.smoothing` above 0, or add to the corpus"));
        }
    }
    write_parquet(&outputs.weights, &schema(), batches.into_iter().map(Ok))
}

fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("domain", DataType::Utf8, false),
        Field::new("cluster_id", DataType::UInt32, false),
        Field::new("p_domain", DataType::Float64, false),
        Field::new("p_corpus", DataType::Float64, false),
        Field::new("weight", DataType::Float64, false),
    ]))
}

fn rows(batch: &RecordBatch) -> Vec<Weight> {
    let number = |i: usize| batch.column(i).as_primitive::<Float64Type>();
    let row = |row: usize| Weight {
        domain: batch.column(0).as_string_view().value(row).to_owned(),
        cluster_id: batch.column(1).as_primitive::<UInt32Type>().value(row),
        p_domain: number(2).value(row),
        p_corpus: number(3).value(row),
        weight: number(4).value(row),
    };
    (0..batch.num_rows()).map(row).collect()
}

/// Reads the weights back, ordered by domain and cluster.
pub fn read(engine: &Engine, outputs: &Outputs) -> Result<Vec<Weight>> {
    let session = engine.session([]);
    engine.register(&session, "weights", &[&outputs.weights])?;
    let sql = "SELECT domain, cluster_id, p_domain, p_corpus, weight FROM weights ORDER BY domain, cluster_id";
    let weights: Vec<Weight> = engine.collect(&session, sql)?.iter().flat_map(rows).collect();
    match weights.iter().all(|w| w.weight.is_finite() && w.weight >= 0.0) {
        true => Ok(weights),
        false => Err(Error::internal("a weight is negative or not finite")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use datafusion::prelude::SessionContext;

    /// Weights of one domain, times 1,000 and rounded, for window counts per cluster.
    fn weights(corpus: [i64; 3], domain: [i64; 3], weigh: &Weigh) -> Vec<f64> {
        let row = |name: &str, cluster: usize, counts: [i64; 3]| {
            let share = counts[cluster] as f64 / counts.iter().sum::<i64>() as f64;
            format!("('{name}', {cluster}, {}, 0, CAST({share} AS DOUBLE))", counts[cluster])
        };
        let rows: Vec<String> = (0..3).flat_map(|c| [row("corpus", c, corpus), row("law", c, domain)]).collect();
        let table = format!("SELECT * FROM (VALUES {}) AS h (domain, cluster_id, windows, bytes, share)", rows.join(", "));
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let batches = runtime.block_on(async {
            let session = SessionContext::new();
            let frame = session.sql(&table).await.unwrap();
            session.register_table("histograms", frame.into_view()).unwrap();
            session.sql(&sql(weigh)).await.unwrap().collect().await.unwrap()
        });
        let column = |b: &arrow::array::RecordBatch| b.column(4).as_primitive::<Float64Type>().values().to_vec();
        batches.iter().flat_map(column).map(|w| (w * 1000.0).round()).collect()
    }

    #[test]
    fn weights_are_ratios_of_shares() {
        // Shares 0.5, 0.3, 0.2 in the corpus and 0.25, 0.75, 0 in the domain.
        assert_eq!(weights([5, 3, 2], [1, 3, 0], &Weigh::default()), [500.0, 2500.0, 0.0]);
    }

    #[test]
    fn a_cluster_that_is_empty_in_the_corpus_has_no_weight() {
        assert_eq!(weights([5, 5, 0], [1, 1, 2], &Weigh::default()), [500.0, 500.0, 0.0]);
    }

    #[test]
    fn smoothing_adds_windows_and_temperature_takes_roots() {
        // (1 + 1) / (4 + 3) / 0.5, (3 + 1) / 7 / 0.3, (0 + 1) / 7 / 0.2
        let smoothed = Weigh { smoothing: Some(1.0), ..Weigh::default() };
        assert_eq!(weights([5, 3, 2], [1, 3, 0], &smoothed), [571.0, 1905.0, 714.0]);
        let flat = Weigh { temperature: Some(2.0), ..Weigh::default() };
        assert_eq!(weights([5, 3, 2], [1, 3, 0], &flat), [707.0, 1581.0, 0.0]);
    }
}
