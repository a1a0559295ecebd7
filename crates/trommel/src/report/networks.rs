//! What the experts of a run's projected networks have learnt. [PE 2.5]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use trommel_core::error::Result;
use trommel_pipeline::proportions::Proportions;
use trommel_spec::pipeline::Method;
use trommel_trainer::checkpoint;
use trommel_trainer::spectrum::{Spectrum, spectrum};

use super::Cluster;
use super::chart::{Axis, Chart, Point, Series};
use crate::compare::is_finished;

/// Terms that name an expert.
const TERMS: usize = 5;

/// A projected network.
pub(super) struct Network {
    /// That of its folder, without the key.
    pub(super) name: String,
    pub(super) spectrum: Spectrum,
    /// What the cluster of each expert is about; empty if the run has no level with as many clusters.
    pub(super) terms: Vec<String>,
}

/// Every projected network of a run whose training is finished.
pub(super) fn read(run_dir: &Path, clusters: &[Cluster]) -> Result<Vec<Network>> {
    let prefix = format!("{}-", Method::SlmPn.name());
    let of_method = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix));
    let made = std::fs::read_dir(run_dir.join("train")).into_iter().flatten().flatten().map(|entry| entry.path());
    let mut folders: Vec<PathBuf> = made.filter(of_method).collect();
    folders.sort();
    // Where the clusters are not counted yet, as after a change of plan, the experts have no terms.
    let proportions = Proportions::read(run_dir).ok();
    let mut networks = Vec::new();
    for folder in folders {
        if !is_finished(&folder)? {
            continue;
        }
        let model = checkpoint::read_model(&folder.join(checkpoint::FOLDER))?;
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        networks.push(Network {
            name: name.rsplit_once('-').map_or(&*name, |(name, _)| name).to_owned(),
            spectrum: spectrum(&model.config, &model.parameters).map_err(|e| e.file(folder.display()))?,
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
