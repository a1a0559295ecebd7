//! Stage `histogram`: how often each cluster occurs in the corpus, in each domain and in each mixture of domains, and what each
//! cluster is about.

use std::borrow::Cow;
use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use arrow::array::{ArrayRef, AsArray, Float64Array, ListBuilder, RecordBatch, StringArray, StringBuilder};
use arrow::datatypes::{DataType, Field, Float64Type, Int64Type, Schema, SchemaRef, UInt32Type};
use datafusion::prelude::SessionContext;
use rayon::prelude::*;
use trommel_core::error::{Error, Result};
use trommel_spec::plan::Mixture;

use crate::cluster;
use crate::embed::read_sample;
use crate::engine::{Engine, register_batches, write_parquet};
use crate::outputs::Outputs;

/// Terms that describe a cluster.
const TOP_TERMS: usize = 8;

/// One row of the table `histograms`.
#[derive(Debug, Clone, PartialEq)]
pub struct Bin {
    /// `corpus` or the domain's name.
    pub domain: String,
    /// The cluster.
    pub cluster_id: u32,
    /// Windows in it.
    pub windows: i64,
    /// Bytes of text in it.
    pub bytes: i64,
    /// Share of the domain's windows.
    pub share: f64,
}

/// Writes what is missing of `histograms` and the statistics of the clusters.
pub fn run(engine: &Engine, outputs: &Outputs, mixtures: &[Mixture]) -> Result<()> {
    if !(outputs.histograms.exists() && outputs.cluster_statistics.exists()) {
        count(engine, outputs)?;
    }
    let Some(path) = outputs.mixtures.as_ref().filter(|path| !path.exists()) else { return Ok(()) };
    let session = engine.session([]);
    engine.register(&session, "histograms", &[&outputs.histograms])?;
    register_mixtures(&session, mixtures)?;
    let frame = engine.query(&session, include_str!("sql/mixture.sql"))?;
    engine.write(frame, &schema(), path).map(|_| ())
}

fn count(engine: &Engine, outputs: &Outputs) -> Result<()> {
    let session = engine.parallel_session([]);
    let files: Vec<&Path> = outputs.units.iter().map(|u| u.assignments.as_path()).collect();
    register_counts(engine, &session, &files)?;
    engine.register(&session, "tree", &[&outputs.clusters])?;
    let statistics = engine.collect(&session, include_str!("sql/cluster_statistics.sql"))?;
    let described = describe(engine, outputs, statistics)?;
    write_parquet(&outputs.cluster_statistics, &statistics_schema(), described.into_iter().map(Ok))?;
    let frame = engine.query(&session, include_str!("sql/histogram.sql"))?;
    engine.write(frame, &schema(), &outputs.histograms).map(|_| ())
}

/// Counts the windows of files of assignments by domain and cluster, as the table `counts`.
pub fn register_counts(engine: &Engine, session: &SessionContext, files: &[&Path]) -> Result<()> {
    engine.register(session, "assignments", files)?;
    let counts = engine.collect(session, include_str!("sql/counts.sql"))?;
    register_batches(session, "counts", counts, &counts_schema())
}

fn counts_schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("domain", DataType::Utf8View, false),
        Field::new("cluster_id", DataType::UInt32, false),
        Field::new("windows", DataType::Int64, false),
        Field::new("bytes", DataType::Int64, true),
        Field::new("distance", DataType::Float64, true),
    ]))
}

/// The table `mixtures` of queries: the share of each domain in each mixture, without a row if the plan has none.
pub fn register_mixtures(session: &SessionContext, mixtures: &[Mixture]) -> Result<()> {
    let text = |name: &str| Field::new(name, DataType::Utf8, false);
    let schema = Arc::new(Schema::new(vec![text("mixture"), text("domain"), Field::new("share", DataType::Float64, false)]));
    let rows = mixtures.iter().flat_map(|m| m.shares.iter().map(|(domain, share)| (&m.name, domain, *share)));
    let rows: Vec<_> = rows.collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(StringArray::from_iter_values(rows.iter().map(|(mixture, ..)| mixture))),
        Arc::new(StringArray::from_iter_values(rows.iter().map(|(_, domain, _)| domain))),
        Arc::new(Float64Array::from_iter_values(rows.iter().map(|(.., share)| *share))),
    ];
    let batch = RecordBatch::try_new(Arc::clone(&schema), columns);
    let batch = batch.map_err(|e| Error::internal("mixtures do not form a table").source(e))?;
    register_batches(session, "mixtures", vec![batch], &schema)
}

/// The columns of the table `histograms`.
pub fn schema() -> SchemaRef {
    Arc::new(Schema::new(vec![
        Field::new("domain", DataType::Utf8, false),
        Field::new("cluster_id", DataType::UInt32, false),
        Field::new("windows", DataType::Int64, false),
        Field::new("bytes", DataType::Int64, false),
        Field::new("share", DataType::Float64, false),
    ]))
}

fn statistics_schema() -> SchemaRef {
    let terms = DataType::List(Arc::new(Field::new("item", DataType::Utf8, true)));
    Arc::new(Schema::new(vec![
        Field::new("cluster_id", DataType::UInt32, false),
        Field::new("windows", DataType::Int64, false),
        Field::new("bytes", DataType::Int64, false),
        Field::new("mean_distance", DataType::Float64, true),
        Field::new("top_terms", terms, false),
    ]))
}

/// Reads the histograms of the corpus and of the domains with documents of their own, ordered by domain and cluster.
pub fn read(engine: &Engine, outputs: &Outputs) -> Result<Vec<Bin>> {
    let session = engine.session([]);
    engine.register(&session, "histograms", &[&outputs.histograms])?;
    let mut bins = Vec::new();
    let sql = "SELECT domain, cluster_id, windows, bytes, share FROM histograms ORDER BY domain, cluster_id";
    for batch in engine.collect(&session, sql)? {
        for row in 0..batch.num_rows() {
            bins.push(Bin {
                domain: batch.column(0).as_string_view().value(row).to_owned(),
                cluster_id: batch.column(1).as_primitive::<UInt32Type>().value(row),
                windows: batch.column(2).as_primitive::<Int64Type>().value(row),
                bytes: batch.column(3).as_primitive::<Int64Type>().value(row),
                share: batch.column(4).as_primitive::<Float64Type>().value(row),
            });
        }
    }
    Ok(bins)
}

/// Adds the column `top_terms`, from the sample's windows in each leaf.
fn describe(engine: &Engine, outputs: &Outputs, statistics: Vec<RecordBatch>) -> Result<Vec<RecordBatch>> {
    let tree = cluster::stage::read(engine, outputs)?;
    let sample = read_sample(engine, outputs)?;
    let vectors: Vec<f32> = sample.iter().flat_map(|s| &s.embedding).copied().collect();
    let clusters = tree.assign(&vectors);
    let terms = top_terms(sample.iter().zip(&clusters).map(|(s, a)| (a.cluster_id, s.text.as_str())));
    let schema = statistics_schema();
    let add = |batch: RecordBatch| {
        let mut column = ListBuilder::new(StringBuilder::new());
        for id in batch.column(0).as_primitive::<UInt32Type>().values() {
            column.append_value(terms.get(id).into_iter().flatten().map(|t| Some(t.as_str())));
        }
        let columns: Vec<ArrayRef> = [batch.columns(), &[Arc::new(column.finish())]].concat();
        let columns = columns.iter().zip(schema.fields()).map(|(c, f)| arrow::compute::cast(c, f.data_type()));
        let columns = columns.collect::<Result<Vec<_>, _>>();
        columns.and_then(|c| RecordBatch::try_new(Arc::clone(&schema), c)).map_err(|e| Error::internal("no table").source(e))
    };
    statistics.into_iter().map(add).collect()
}

/// The terms that set each cluster apart, by class-based TF-IDF: a term's share of the cluster's windows times the log of
/// one plus the average number of windows per cluster over the windows that hold the term. [BERTopic, arXiv 2203.05794]
fn top_terms<'a>(windows: impl Iterator<Item = (u32, &'a str)>) -> HashMap<u32, Vec<String>> {
    let mut texts: HashMap<u32, Vec<&str>> = HashMap::new();
    windows.for_each(|(cluster, text)| texts.entry(cluster).or_default().push(text));
    let average = texts.values().map(Vec::len).sum::<usize>() as f64 / texts.len().max(1) as f64;
    let count = |(cluster, texts): (u32, Vec<&'a str>)| (cluster, texts.len(), count_terms(&texts));
    let counts: Vec<(u32, usize, HashMap<Cow<str>, usize>)> = texts.into_par_iter().map(count).collect();
    let overall = counts.par_iter().fold(HashMap::new, |sum, (_, _, terms)| added(sum, terms.iter().map(|(t, &n)| (&**t, n))));
    let overall: HashMap<&str, usize> = overall.reduce(HashMap::new, |a, b| match a.len() < b.len() {
        true => added(b, a.into_iter()),
        false => added(a, b.into_iter()),
    });
    let rank = |(cluster, size, terms): &(u32, usize, HashMap<Cow<str>, usize>)| {
        let score = |term: &str, n: usize| n as f64 / *size as f64 * (1.0 + average / overall[term] as f64).ln();
        let mut scored: Vec<(f64, &str)> = terms.iter().map(|(term, &n)| (score(term, n), &**term)).collect();
        let order = |a: &(f64, &str), b: &(f64, &str)| b.0.total_cmp(&a.0).then_with(|| a.1.cmp(b.1));
        if scored.len() > TOP_TERMS {
            scored.select_nth_unstable_by(TOP_TERMS, order);
            scored.truncate(TOP_TERMS);
        }
        scored.sort_unstable_by(order);
        (*cluster, scored.into_iter().map(|(_, term)| term.to_owned()).collect())
    };
    counts.par_iter().map(rank).collect()
}

/// How many of the texts hold each term: a word of three letters or more, in lower case.
fn count_terms<'a>(texts: &[&'a str]) -> HashMap<Cow<'a, str>, usize> {
    let mut counts: HashMap<Cow<str>, (usize, usize)> = HashMap::new(); // texts, and the number of the last one
    for (number, text) in texts.iter().enumerate() {
        for word in text.split(|c: char| !c.is_alphabetic()).filter(|word| word.chars().nth(2).is_some()) {
            let is_lower = word.bytes().all(|byte| byte.is_ascii_lowercase());
            let term = if is_lower { Cow::Borrowed(word) } else { Cow::Owned(word.to_lowercase()) };
            let (texts, last) = counts.entry(term).or_insert((0, usize::MAX));
            if *last != number {
                (*texts, *last) = (*texts + 1, number);
            }
        }
    }
    counts.into_iter().map(|(term, (texts, _))| (term, texts)).collect()
}

fn added<'a>(mut sum: HashMap<&'a str, usize>, terms: impl Iterator<Item = (&'a str, usize)>) -> HashMap<&'a str, usize> {
    terms.for_each(|(term, n)| *sum.entry(term).or_default() += n);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn terms_that_are_everywhere_do_not_describe() {
        let windows = [(0, "the psalm and the lamb"), (0, "the psalm"), (1, "the query and the index"), (1, "the query")];
        let terms = top_terms(windows.into_iter());
        assert_eq!(terms[&0][0], "psalm");
        assert_eq!(terms[&1][0], "query");
    }
}
