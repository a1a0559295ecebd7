//! In which proportions a training draws the clusters of a corpus, for a domain and at any level of the cluster tree.
//!
//! A domain's windows fall to the nodes of a level in the shares `P(node | domain)`. A node that is drawn gives its leaves as
//! the corpus holds them, so a leaf is drawn in proportion to `P(node | domain) / P(node | corpus) * bytes of the leaf`
//! [PE 2.4]: importance sampling with as many clusters as the level has. Bytes stand for tokens, since a training draws
//! sequences of equal length and not windows.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use arrow::array::AsArray;
use arrow::datatypes::{DataType, Float64Type, UInt32Type};
use trommel_core::error::{Error, Result};
use trommel_core::schema::CORPUS;

use crate::catalog::Tables;
use crate::engine::runtime;

/// The cluster tree of a run and what falls to its leaves.
#[derive(Debug, Clone)]
pub struct Proportions {
    levels: u32,
    /// The nodes of each level, from 1, in the order of their ids.
    nodes: Vec<Vec<u32>>,
    /// The node of each level that a leaf lies in.
    ancestors: BTreeMap<u32, Vec<u32>>,
    /// `share` and bytes by domain and leaf.
    bins: BTreeMap<String, BTreeMap<u32, (f64, f64)>>,
    /// `weight` by domain and leaf, with the options of `weigh`.
    weights: BTreeMap<String, BTreeMap<u32, f64>>,
}

/// A leaf and its share of what is drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LeafShare {
    /// The leaf.
    pub cluster_id: u32,
    /// Its share, on any scale; 0 for a leaf that is not drawn.
    pub share: f64,
}

impl Proportions {
    /// Reads them from a run directory whose stage `weigh` is done.
    pub fn read(run_dir: &Path) -> Result<Proportions> {
        runtime(1)?.block_on(async {
            let tables = Tables::open(run_dir).await?;
            let bins = rows(&tables, "SELECT domain, cluster_id, share, bytes FROM histograms").await?;
            let weights = rows(&tables, "SELECT domain, cluster_id, weight, 0 FROM weights").await?;
            if bins.is_empty() {
                let error = Error::config("the run has no histograms yet").file(run_dir.display());
                return Err(error.hint("run `trommel run` until the stage `weigh` first"));
            }
            let tree = rows(&tables, "SELECT '', cluster_id, coalesce(parent_id, cluster_id), level FROM clusters").await?;
            Self::of(&tree, bins, weights)
        })
    }

    fn of(tree: &[Row], bins: Vec<Row>, weights: Vec<Row>) -> Result<Proportions> {
        let parents: BTreeMap<u32, (u32, u32)> =
            tree.iter().map(|(_, id, p, level)| (*id, (*p as u32, *level as u32))).collect();
        let levels = parents.values().map(|(_, level)| *level).max().unwrap_or(1);
        let mut nodes = vec![BTreeSet::new(); levels as usize];
        let mut ancestors = BTreeMap::new();
        for (&leaf, _) in parents.iter().filter(|(_, (_, level))| *level == levels) {
            let mut path = vec![leaf];
            let mut at = leaf;
            while let Some(&(parent, _)) = parents.get(&at).filter(|(parent, _)| *parent != at) {
                at = parent;
                path.insert(0, at);
            }
            if path.len() != levels as usize {
                return Err(Error::internal(format!("leaf {leaf} of the cluster tree hangs at no level")));
            }
            for (known, node) in nodes.iter_mut().zip(&path) {
                known.insert(*node);
            }
            ancestors.insert(leaf, path);
        }
        let mut by_domain: BTreeMap<String, BTreeMap<u32, (f64, f64)>> = BTreeMap::new();
        for (domain, id, share, bytes) in bins {
            by_domain.entry(domain).or_default().insert(id, (share, bytes));
        }
        let mut weight: BTreeMap<String, BTreeMap<u32, f64>> = BTreeMap::new();
        for (domain, id, w, _) in weights {
            weight.entry(domain).or_default().insert(id, w);
        }
        let nodes = nodes.into_iter().map(|level| level.into_iter().collect()).collect();
        Ok(Proportions { levels, nodes, ancestors, bins: by_domain, weights: weight })
    }

    /// Levels of the tree below its root; the last one is that of the leaves.
    pub fn levels(&self) -> u32 {
        self.levels
    }

    /// Clusters at a level, from 1.
    pub fn clusters(&self, level: u32) -> Result<usize> {
        Ok(self.level(level)?.len())
    }

    /// The level with so many clusters, if there is one.
    pub fn level_of(&self, clusters: usize) -> Option<u32> {
        (1..=self.levels).find(|level| self.nodes[*level as usize - 1].len() == clusters)
    }

    fn level(&self, level: u32) -> Result<&[u32]> {
        let nodes = level.checked_sub(1).and_then(|i| self.nodes.get(i as usize));
        nodes.map(Vec::as_slice).ok_or_else(|| {
            Error::config(format!("the cluster tree has no level {level}"))
                .hint(format!("it has {} levels; `cluster.levels` sets them", self.levels))
        })
    }

    fn bins(&self, domain: &str) -> Result<&BTreeMap<u32, (f64, f64)>> {
        let known = self.bins.keys().cloned().collect::<Vec<_>>().join("`, `");
        let found = self.bins.get(domain).filter(|bins| !bins.is_empty());
        found.ok_or_else(|| Error::config(format!("the run has no domain `{domain}`")).hint(format!("it has `{known}`")))
    }

    /// The place of a leaf's node among those of a level.
    pub fn node_of(&self, leaf: u32, level: u32) -> Result<usize> {
        let node = self.ancestors.get(&leaf).and_then(|path| path.get(level as usize - 1));
        let place = node.and_then(|node| self.level(level).ok()?.binary_search(node).ok());
        place.ok_or_else(|| Error::internal(format!("cluster {leaf} is no leaf of the tree")))
    }

    /// `P(node | domain)` over the nodes of a level.
    pub fn histogram(&self, domain: &str, level: u32) -> Result<Vec<f64>> {
        let mut shares = vec![0.0; self.level(level)?.len()];
        for (leaf, (share, _)) in self.bins(domain)? {
            shares[self.node_of(*leaf, level)?] += share;
        }
        Ok(shares)
    }

    /// What a training for `domain` draws, with the clusters of a level; `corpus` draws the corpus as it is.
    pub fn shares(&self, domain: &str, level: u32) -> Result<Vec<LeafShare>> {
        let corpus = self.bins(CORPUS)?;
        let (of_domain, of_corpus) = (self.histogram(domain, level)?, self.histogram(CORPUS, level)?);
        let weight = |leaf: u32| -> Result<f64> {
            if domain == CORPUS {
                return Ok(1.0);
            }
            // The leaves' weights are in the table, with smoothing and temperature if they are set.
            if level == self.levels {
                return Ok(self.weights.get(domain).and_then(|w| w.get(&leaf)).copied().unwrap_or(0.0));
            }
            let node = self.node_of(leaf, level)?;
            Ok(if of_corpus[node] > 0.0 { of_domain[node] / of_corpus[node] } else { 0.0 })
        };
        let share =
            |(leaf, (_, bytes)): (&u32, &(f64, f64))| Ok(LeafShare { cluster_id: *leaf, share: weight(*leaf)? * bytes });
        corpus.iter().map(share).collect()
    }
}

/// A text, an id and two numbers.
type Row = (String, u32, f64, f64);

async fn rows(tables: &Tables, sql: &str) -> Result<Vec<Row>> {
    let mut rows = Vec::new();
    for batch in tables.query(sql).await?.rows {
        let cast = |i: usize, to: DataType| {
            arrow::compute::cast(batch.column(i), &to).map_err(|e| Error::internal("a table has a wrong type").source(e))
        };
        let (names, ids) = (cast(0, DataType::Utf8)?, cast(1, DataType::UInt32)?);
        let (a, b) = (cast(2, DataType::Float64)?, cast(3, DataType::Float64)?);
        let (names, ids) = (names.as_string::<i32>(), ids.as_primitive::<UInt32Type>());
        let (a, b) = (a.as_primitive::<Float64Type>(), b.as_primitive::<Float64Type>());
        rows.extend((0..ids.len()).map(|i| (names.value(i).to_owned(), ids.value(i), a.value(i), b.value(i))));
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two nodes (10, 11) with two leaves each.
    fn proportions() -> Proportions {
        let name = String::new;
        let tree: Vec<Row> = vec![
            (name(), 0, 10.0, 2.0),
            (name(), 1, 10.0, 2.0),
            (name(), 2, 11.0, 2.0),
            (name(), 3, 11.0, 2.0),
            (name(), 10, 10.0, 1.0),
            (name(), 11, 11.0, 1.0),
        ];
        let bin = |domain: &str, id, share: f64| (domain.to_owned(), id, share, share * 10_000.0);
        let bins = vec![
            bin("corpus", 0, 0.1),
            bin("corpus", 1, 0.3),
            bin("corpus", 2, 0.6),
            bin("corpus", 3, 0.0),
            bin("law", 0, 0.75),
            bin("law", 1, 0.0),
            bin("law", 2, 0.0),
            bin("law", 3, 0.25),
        ];
        let weights = vec![("law".to_owned(), 0, 7.5, 0.0), ("law".to_owned(), 1, 0.0, 0.0)];
        Proportions::of(&tree, bins, weights).unwrap()
    }

    #[test]
    fn shares_follow_the_histogram_of_their_level() {
        let p = proportions();
        assert_eq!((p.levels(), p.clusters(1).unwrap(), p.clusters(2).unwrap(), p.level_of(4)), (2, 2, 4, Some(2)));
        assert_eq!(p.histogram("law", 1).unwrap(), [0.75, 0.25]);
        let shares = |domain, level| p.shares(domain, level).unwrap().iter().map(|s| s.share).collect::<Vec<_>>();
        assert_eq!(shares("corpus", 1), [1000.0, 3000.0, 6000.0, 0.0]);
        // At level 1 the nodes weigh 0.75 / 0.4 and 0.25 / 0.6; within them the leaves are as in the corpus.
        let level_1 = shares("law", 1);
        for (got, expected) in level_1.iter().zip([1875.0, 5625.0, 2500.0, 0.0]) {
            assert!((got - expected).abs() < 1e-9, "{level_1:?}");
        }
        assert_eq!(shares("law", 2), [7500.0, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn what_is_not_there_is_named() {
        let p = proportions();
        assert!(p.shares("tax", 1).unwrap_err().to_string().contains("`corpus`, `law`"));
        assert!(p.clusters(3).unwrap_err().to_string().contains("2 levels"));
    }
}
