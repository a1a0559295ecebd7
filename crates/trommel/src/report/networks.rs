//! What the experts of a run's projected networks have learnt. [PE 2.5]

use std::collections::BTreeMap;
use std::path::Path;

use trommel_core::error::Result;
use trommel_pipeline::proportions::Proportions;
use trommel_spec::pipeline::Method;
use trommel_trainer::checkpoint;
use trommel_trainer::spectrum::{Spectrum, spectrum};

use super::Cluster;
use super::chart::{Axis, Chart, Point, Series};
use crate::compare::finished;

/// Experts whose distances fit a page.
const MOST: usize = 64;
/// Terms that name an expert.
const TERMS: usize = 5;

/// A projected network.
pub(super) struct Network {
    /// Its method, variant and seed.
    pub(super) name: String,
    pub(super) spectrum: Spectrum,
    /// What the cluster of each expert is about; empty if the run has no level with as many clusters.
    pub(super) terms: Vec<String>,
}

/// Every projected network of a run whose training is finished, but for those of more than [`MOST`] experts.
pub(super) fn read(run_dir: &Path, clusters: &[Cluster]) -> Result<Vec<Network>> {
    // Where the clusters are not counted yet, as after a change of plan, the experts have no terms.
    let proportions = Proportions::read(run_dir).ok();
    let mut networks = Vec::new();
    for network in finished(run_dir)?.into_iter().filter(|model| model.method == Method::SlmPn) {
        let model = checkpoint::read_model(&network.out.join(checkpoint::FOLDER))?;
        if model.config.experts() > MOST {
            continue;
        }
        networks.push(Network {
            name: format!("{} {}, seed {}", network.method.name(), network.variant, network.seed),
            spectrum: spectrum(&model.config, &model.parameters).map_err(|e| e.file(network.out.display()))?,
            terms: terms(proportions.as_ref(), clusters, model.config.experts())?,
        });
    }
    Ok(networks)
}

/// What the cluster of each expert is about: terms of the leaves below it, the largest leaf first.
fn terms(proportions: Option<&Proportions>, clusters: &[Cluster], experts: usize) -> Result<Vec<String>> {
    let found = proportions.and_then(|p| Some((p, p.level_of(experts)?)));
    let Some((proportions, level)) = found else { return Ok(Vec::new()) };
    let mut of_expert: BTreeMap<usize, Vec<&[String]>> = BTreeMap::new();
    for leaf in clusters.iter().filter(|c| c.level == proportions.levels()) {
        of_expert.entry(proportions.node_of(leaf.cluster_id, level)?).or_default().push(&leaf.top_terms);
    }
    let name = |leaves: Vec<&[String]>| {
        let of_each = TERMS.div_ceil(leaves.len());
        let terms = leaves.iter().flat_map(|terms| terms.iter().take(of_each)).take(TERMS);
        terms.cloned().collect::<Vec<_>>().join(", ")
    };
    Ok(of_expert.into_values().map(name).collect())
}

/// Singular values of each layer, falling.
pub(super) fn values(name: &str, layers: &[Vec<f64>]) -> anyhow::Result<String> {
    let series = layers.iter().enumerate().map(|(layer, values)| Series {
        name: format!("layer {}", layer + 1),
        look: layer,
        points: values.iter().enumerate().map(|(i, y)| Point { x: i as f64 + 1.0, y: *y, error: 0.0, size: 4 }).collect(),
    });
    let top = layers.iter().flatten().copied().fold(0.0, f64::max);
    let range = (0.0, if top > 0.0 { 1.05 * top } else { 1.0 });
    Chart { x: Axis::Places("place among the singular values"), y: name, range, series: series.collect() }.svg()
}
