//! `trommel report`: what a run has found, as one HTML file that needs nothing else.

/// One kind of chart, as SVG.
mod chart;
/// How far networks of experts are ahead of the plain model while both train.
mod lead;
/// What the experts of projected networks have learnt.
mod networks;
/// The page.
mod page;
/// The comparison, as charts.
mod plots;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;

use serde::Deserialize;
use trommel_core::storage::write_bytes;
use trommel_pipeline::results::Outcome;

use crate::args::ReportArguments;
use crate::sql::Tables;

/// All that a report shows. What the run has not made yet is empty.
struct Report {
    name: String,
    diagnostics: Vec<Diagnostics>,
    /// The largest weights of each domain.
    weights: Vec<Weight>,
    outcomes: Vec<Outcome>,
    /// Clusters at each level of the tree, from 1.
    clusters: BTreeMap<u32, usize>,
    networks: Vec<networks::Network>,
    /// The chart of their lead over the plain model, if the run has both.
    lead: Option<String>,
}

/// A row of the table `diagnostics`.
#[derive(Deserialize)]
struct Diagnostics {
    domain: String,
    kl_before: Option<f64>,
    kl_after: Option<f64>,
    ess_share: Option<f64>,
    lost_mass: Option<f64>,
    repeat_share: Option<f64>,
    entropy: Option<f64>,
}

/// A row of `weights.sql`.
#[derive(Deserialize)]
struct Weight {
    domain: String,
    cluster_id: u32,
    weight: f64,
    p_domain: f64,
    p_corpus: f64,
    epochs: Option<f64>,
    #[serde(default)]
    top_terms: Vec<String>,
}

/// A node of the tree of clusters.
#[derive(Deserialize)]
struct Cluster {
    cluster_id: u32,
    level: u32,
    /// Of leaves only.
    #[serde(default)]
    top_terms: Vec<String>,
}

/// Writes the report of a run directory.
pub(crate) fn run(arguments: &ReportArguments) -> anyhow::Result<()> {
    let report = read(&arguments.run)?;
    let out = arguments.out.clone().unwrap_or_else(|| arguments.run.join("report.html"));
    let page = page::page(&report, &arguments.run)?;
    write_bytes(&out, page.as_bytes()).map_err(|e| e.hint("name another file with `--out`"))?;
    writeln!(std::io::stdout(), "{}", out.display())?;
    Ok(())
}

fn read(run_dir: &Path) -> anyhow::Result<Report> {
    let tables = Tables::open(run_dir)?;
    let (mut clusters, mut weights) = (Vec::new(), Vec::new());
    // The table has the columns of the embedding, so there is none before the clusters are made.
    if tables.has("clusters") {
        clusters = tables.rows("SELECT cluster_id, level, top_terms FROM clusters ORDER BY windows DESC, cluster_id")?;
        weights = tables.rows(include_str!("report/weights.sql"))?;
    }
    let mut of_level: BTreeMap<u32, usize> = BTreeMap::new();
    clusters.iter().for_each(|c: &Cluster| *of_level.entry(c.level).or_default() += 1);
    Ok(Report {
        name: tables.name().to_owned(),
        diagnostics: tables.rows("SELECT * FROM diagnostics ORDER BY domain")?,
        weights,
        outcomes: tables.rows(include_str!("report/results.sql"))?,
        clusters: of_level,
        networks: networks::read(run_dir, &clusters)?,
        lead: lead::chart(run_dir)?,
    })
}
