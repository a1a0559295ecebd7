//! From a sample of vectors to clusters, flat or as a tree.

/// Flat k-means on a sample.
pub mod kmeans;
/// A tree of k-means, whose leaves are the clusters.
pub mod tree;
/// The stage: sample, fit, write.
pub mod stage;
