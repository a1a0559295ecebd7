//! Training sequences drawn from the clusters of a corpus, in any proportions.
//!
//! One folder of shards, written by cluster, serves every domain: the unweighted corpus, a domain's histogram [PE 2.4], the
//! experts of a projected network [PE 2.5] or the two phases of trunk and decay differ in the shares only. Sequence `n` comes
//! from the cluster at the place `u_n = frac(u_0 + n / golden ratio)` of the cumulated shares: any run of sequences holds each
//! cluster in proportion, more evenly than independent draws would [Niederreiter 1992, 3.1]. Within a cluster, windows come
//! in the pseudo-random order of its shards, and begin again after the last one.

use std::path::Path;

use serde::{Deserialize, Serialize};
use trommel_core::error::{Error, Result};
use trommel_core::key::Key;
use trommel_core::seed::Stream;

use crate::batch::{Batch, Source};
use crate::loader::{self, Loader};

/// A cluster that sequences are drawn from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// The cluster of the shards.
    pub cluster_id: u32,
    /// Its share of the sequences; any scale, 0 for none.
    pub share: f64,
    /// The expert of a projected network that its sequences train; 0 for a plain model.
    pub expert: usize,
}

/// A place in the stream of a [`Mixture`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Position {
    /// Sequences that were drawn.
    pub drawn: u64,
    /// Each cluster with a share, and the place in it.
    pub clusters: Vec<(u32, loader::Position)>,
}

/// The stream.
pub struct Mixture {
    ids: Vec<u32>,
    clusters: Vec<Loader>,
    experts: Vec<usize>,
    cumulated: Vec<f64>,
    first: f64,
    drawn: u64,
}

const GOLDEN: f64 = 0.618_033_988_749_894_9;

impl Mixture {
    /// Opens the clusters with a share. `vocab` is the model's.
    pub fn open(folder: &Path, vocab: usize, shares: &[Share], seed: u64) -> Result<Mixture> {
        let wanted: Vec<&Share> = shares.iter().filter(|s| s.share > 0.0).collect();
        if wanted.is_empty() || !shares.iter().all(|s| s.share >= 0.0 && s.share.is_finite()) {
            return Err(Error::data("no cluster has a share to draw from").file(folder.display()));
        }
        let ids: Vec<u32> = wanted.iter().map(|s| s.cluster_id).collect();
        let clusters = Loader::open_clusters(folder, vocab, &ids)?;
        let mut sum = 0.0;
        let cumulated = wanted.iter().map(|s| {
            sum += s.share;
            sum
        });
        Ok(Mixture {
            ids,
            clusters,
            cumulated: cumulated.collect(),
            experts: wanted.iter().map(|s| s.expert).collect(),
            first: Stream::new(seed, "mixture").uniform(b"first"),
            drawn: 0,
        })
    }

    /// A name of the text and the proportions.
    pub fn fingerprint(&self) -> Key {
        let shares = self.cumulated.iter().map(|c| c.to_string());
        let experts = self.experts.iter().map(|e| e.to_string());
        Key::of(self.clusters.iter().map(|c| c.fingerprint().to_string()).chain(shares).chain(experts))
    }

    /// The id of the token that ends a document.
    pub fn end_of_text(&self) -> u32 {
        self.clusters[0].manifest().end_of_text
    }

    /// The most passes over any cluster.
    pub fn epochs(position: &Position) -> u64 {
        position.clusters.iter().map(|(_, p)| p.epoch).max().unwrap_or(0)
    }

    /// Sequence `n`'s cluster, by its place among those with a share.
    fn choose(&self, n: u64) -> usize {
        let place = (self.first + n as f64 * GOLDEN).fract() * self.cumulated.last().copied().unwrap_or(0.0);
        self.cumulated.partition_point(|c| *c <= place).min(self.cumulated.len() - 1)
    }

    /// The next `sequences` sequences of `time` tokens, grouped by expert, in the order of experts.
    pub fn deal(&mut self, sequences: usize, time: usize) -> Result<Vec<(usize, Batch)>> {
        let mut groups: Vec<(usize, Batch)> = Vec::new();
        for _ in 0..sequences {
            let cluster = self.choose(self.drawn);
            self.drawn += 1;
            let expert = self.experts[cluster];
            let at = match groups.binary_search_by_key(&expert, |(expert, _)| *expert) {
                Ok(at) => at,
                Err(at) => {
                    groups.insert(at, (expert, Batch::new(time)));
                    at
                }
            };
            self.clusters[cluster].next_sequence(&mut groups[at].1)?;
        }
        Ok(groups)
    }

    /// The place of the next sequence.
    pub fn position(&self) -> Position {
        let places = self.clusters.iter().map(Source::position);
        Position { drawn: self.drawn, clusters: self.ids.iter().copied().zip(places).collect() }
    }

    /// Goes to a place that [`Mixture::position`] returned.
    pub fn seek(&mut self, position: &Position) -> Result<()> {
        if !position.clusters.iter().map(|(id, _)| id).eq(&self.ids) {
            return Err(Error::data("the position belongs to another mixture"));
        }
        self.drawn = position.drawn;
        self.follow(position)
    }

    /// Begins each cluster where another mixture of the same shards has stopped, so that text comes again only when all of its
    /// cluster was read.
    pub fn follow(&mut self, position: &Position) -> Result<()> {
        for (id, place) in &position.clusters {
            if let Some(at) = self.ids.iter().position(|own| own == id) {
                self.clusters[at].seek(*place)?;
            }
        }
        Ok(())
    }
}
