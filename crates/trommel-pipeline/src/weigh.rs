//! Stage `weigh`: from histograms to importance weights. [PE 2.4]

use std::sync::Arc;

use arrow::array::AsArray;
use arrow::datatypes::{DataType, Field, Float64Type, Schema, SchemaRef, UInt32Type};
use trommel_core::error::{Error, Result};
use trommel_spec::pipeline::{Pipeline, Weigh};

use crate::engine::{Engine, Written};
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
    let session = engine.session(1, []);
    engine.register(&session, "histograms", &[&outputs.histograms])?;
    let frame = engine.query(&session, &sql(&spec.weigh))?;
    let written = engine.write(frame, &schema(), &outputs.weights)?;
    let weights = read(engine, outputs)?;
    for domain in spec.domains.keys() {
        let rows = weights.iter().filter(|w| w.domain == *domain);
        let (total, drawable) = rows.fold((0.0, 0.0), |(t, d), w| (t + w.p_domain, d + if w.weight > 0.0 { w.p_domain } else { 0.0 }));
        if !(total - 1.0f64).abs().le(&1e-9) {
            return Err(Error::internal(format!("the shares of `{domain}` sum to {total}")));
        }
        if drawable <= 0.0 {
            return Err(Error::data(format!("every cluster of the domain `{domain}` is empty in the corpus"))
                .hint("the corpus holds nothing like this domain: lower `cluster.k`, set `weigh.smoothing` above 0, or add to the corpus"));
        }
    }
    Ok(written)
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

/// Reads the weights back, ordered by domain and cluster.
pub fn read(engine: &Engine, outputs: &Outputs) -> Result<Vec<Weight>> {
    let session = engine.session(1, []);
    engine.register(&session, "weights", &[&outputs.weights])?;
    let mut weights = Vec::new();
    let sql = "SELECT domain, cluster_id, p_domain, p_corpus, weight FROM weights ORDER BY domain, cluster_id";
    for batch in engine.collect(&session, sql)? {
        let number = |i: usize| batch.column(i).as_primitive::<Float64Type>();
        for row in 0..batch.num_rows() {
            weights.push(Weight {
                domain: batch.column(0).as_string_view().value(row).to_owned(),
                cluster_id: batch.column(1).as_primitive::<UInt32Type>().value(row),
                p_domain: number(2).value(row),
                p_corpus: number(3).value(row),
                weight: number(4).value(row),
            });
        }
    }
    match weights.iter().all(|w| w.weight.is_finite() && w.weight >= 0.0) {
        true => Ok(weights),
        false => Err(Error::internal("a weight is negative or not finite")),
    }
}
