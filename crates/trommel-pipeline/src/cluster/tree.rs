//! A tree of k-means, whose leaves are the clusters; flat k-means is a tree of one level. [PE 2.3, CR]
//!
//! The tree is kept as rows, one per node below the root, which are also the table `clusters`:
//!
//! ```text
//!   cluster_id  parent_id  level            level 1    level 2
//!       0           4        2                4 ------- 0, 1
//!       1           4        2        root <
//!       2           5        2                5 ------- 2, 3
//!       3           5        2
//!       4         null       1        leaves are 0.., in depth-first order; inner nodes follow
//!       5         null       1
//! ```

use std::collections::HashMap;

use trommel_core::seed::Stream;
use trommel_kernels::nearest::Centroids;

use crate::cluster::kmeans;

/// One node below the root.
#[derive(Debug, Clone, PartialEq)]
pub struct Node {
    /// Leaves are `0..leaves`; inner nodes follow.
    pub cluster_id: u32,
    /// The node above; `None` below the root.
    pub parent_id: Option<u32>,
    /// Distance from the root, from 1.
    pub level: u32,
    /// The mean of the sample's rows in it.
    pub centroid: Vec<f32>,
}

/// The cluster of a vector.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Assignment {
    /// The leaf.
    pub cluster_id: u32,
    /// Euclidean distance to the leaf's centroid.
    pub distance: f32,
}

/// A tree that is ready to assign.
#[derive(Debug)]
pub struct Tree {
    dimensions: usize,
    children: Centroids,
    below: Vec<Below>,
}

#[derive(Debug)]
enum Below {
    Leaf(u32),
    Node(Tree),
}

/// How to fit a tree.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Children per node, from root to leaves.
    pub levels: Vec<u32>,
    /// Rounds of k-means per node.
    pub iterations: u32,
    /// See [`kmeans::Settings::balance`].
    pub balance: Option<f64>,
    /// The seed of the run.
    pub seed: u64,
}

/// Fits a tree to `sample`, which is `(rows, dimensions)`, from the root down; each node sees the rows that fall to it.
/// A node with fewer distinct rows than children gets fewer children.
pub fn fit(sample: &[f32], dimensions: usize, settings: &Settings) -> Vec<Node> {
    let mut growth = Growth { dimensions, settings, leaves: 0, nodes: Vec::new() };
    growth.grow(sample, None, 1, "cluster");
    let Growth { leaves, mut nodes, .. } = growth;
    // Inner nodes were numbered apart, from the top of the range, because leaves come in depth-first order.
    let inner = |id: u32| leaves + (u32::MAX - id);
    for node in &mut nodes {
        node.parent_id = node.parent_id.map(inner);
        if node.cluster_id >= leaves {
            node.cluster_id = inner(node.cluster_id);
        }
    }
    nodes.sort_by_key(|n| n.cluster_id);
    nodes
}

struct Growth<'a> {
    dimensions: usize,
    settings: &'a Settings,
    leaves: u32,
    nodes: Vec<Node>,
}

impl Growth<'_> {
    fn grow(&mut self, sample: &[f32], parent_id: Option<u32>, level: u32, name: &str) {
        let settings = kmeans::Settings {
            k: self.settings.levels[level as usize - 1] as usize,
            iterations: self.settings.iterations,
            balance: self.settings.balance,
            stream: Stream::new(self.settings.seed, name),
        };
        let children = kmeans::fit(sample, self.dimensions, &settings);
        let is_leaf = level as usize == self.settings.levels.len();
        let members = (!is_leaf).then(|| kmeans::members(&children.nearest(sample), children.count()));
        for (child, centroid) in children.points().chunks_exact(self.dimensions).enumerate() {
            let rows = members.as_ref().map(|members| &members[child]);
            // The last move of the centroids can leave one without a row; nothing would ever grow below it.
            if rows.is_some_and(Vec::is_empty) {
                continue;
            }
            let cluster_id = if is_leaf {
                self.leaves += 1;
                self.leaves - 1
            } else {
                u32::MAX - self.nodes.iter().filter(|n| n.level < self.settings.levels.len() as u32).count() as u32
            };
            self.nodes.push(Node { cluster_id, parent_id, level, centroid: centroid.to_vec() });
            if let Some(rows) = rows {
                let rows: Vec<f32> =
                    rows.iter().flat_map(|&r| &sample[r as usize * self.dimensions..][..self.dimensions]).copied().collect();
                self.grow(&rows, Some(cluster_id), level + 1, &format!("{name}/{child}"));
            }
        }
    }
}

impl Tree {
    /// The tree of `nodes`, or `None` if they do not form one.
    pub fn new(nodes: &[Node], dimensions: usize) -> Option<Tree> {
        let mut by_parent: HashMap<Option<u32>, Vec<&Node>> = HashMap::new();
        nodes.iter().for_each(|node| by_parent.entry(node.parent_id).or_default().push(node));
        Self::below(&by_parent, None, dimensions)
    }

    fn below(by_parent: &HashMap<Option<u32>, Vec<&Node>>, parent_id: Option<u32>, dimensions: usize) -> Option<Tree> {
        let children = by_parent.get(&parent_id)?;
        if children.iter().any(|n| n.centroid.len() != dimensions) {
            return None;
        }
        let points = children.iter().flat_map(|n| &n.centroid).copied().collect();
        let below =
            |n: &&Node| Self::below(by_parent, Some(n.cluster_id), dimensions).map_or(Below::Leaf(n.cluster_id), Below::Node);
        Some(Tree { dimensions, children: Centroids::new(points, dimensions), below: children.iter().map(below).collect() })
    }

    /// The length of a vector.
    pub fn dimensions(&self) -> usize {
        self.dimensions
    }

    /// The leaf of each of `vectors`, `(rows, dimensions)`, found by the nearest child at each level.
    pub fn assign(&self, vectors: &[f32]) -> Vec<Assignment> {
        let nearest = self.children.nearest(vectors);
        let mut assignments = vec![Assignment { cluster_id: 0, distance: 0.0 }; nearest.len()];
        for (below, rows) in self.below.iter().zip(kmeans::members(&nearest, self.children.count())) {
            match below {
                Below::Leaf(cluster_id) => rows.iter().for_each(|&row| {
                    let distance = nearest[row as usize].squared_distance.sqrt();
                    assignments[row as usize] = Assignment { cluster_id: *cluster_id, distance };
                }),
                Below::Node(tree) if !rows.is_empty() => {
                    let part: Vec<f32> = rows
                        .iter()
                        .flat_map(|&r| &vectors[r as usize * self.dimensions..][..self.dimensions])
                        .copied()
                        .collect();
                    rows.iter().zip(tree.assign(&part)).for_each(|(&row, found)| assignments[row as usize] = found);
                }
                Below::Node(_) => {}
            }
        }
        assignments
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(rows: usize) -> Vec<f32> {
        let stream = Stream::new(3, "test");
        (0..rows * 8).map(|i| stream.uniform(&(i as u64).to_le_bytes()) as f32).collect()
    }

    fn settings(levels: &[u32]) -> Settings {
        Settings { levels: levels.to_vec(), iterations: 10, balance: None, seed: 1 }
    }

    #[test]
    fn leaves_come_first_and_parents_lead_to_the_root() {
        let nodes = fit(&sample(500), 8, &settings(&[3, 4]));
        assert_eq!(nodes.len(), 15);
        for (id, node) in nodes.iter().enumerate() {
            assert_eq!(node.cluster_id as usize, id);
            assert_eq!(node.level, if id < 12 { 2 } else { 1 });
            assert_eq!(node.parent_id.map(|p| nodes[p as usize].level), (id < 12).then_some(1));
        }
    }

    #[test]
    fn a_tree_assigns_to_the_nearest_leaf_of_the_nearest_branch() {
        let rows = sample(400);
        let nodes = fit(&rows, 8, &settings(&[3, 4]));
        let tree = Tree::new(&nodes, 8).unwrap();
        let near = |vector: &[f32], candidates: &[&Node]| {
            let distance = |n: &&Node| n.centroid.iter().zip(vector).map(|(a, b)| (a - b) * (a - b)).sum::<f32>();
            candidates.iter().min_by(|a, b| distance(a).total_cmp(&distance(b))).unwrap().cluster_id
        };
        for (vector, found) in rows.chunks_exact(8).zip(tree.assign(&rows)) {
            let branch = near(vector, &nodes.iter().filter(|n| n.parent_id.is_none()).collect::<Vec<_>>());
            let leaf = near(vector, &nodes.iter().filter(|n| n.parent_id == Some(branch)).collect::<Vec<_>>());
            assert_eq!(found.cluster_id, leaf);
        }
    }

    #[test]
    fn a_small_node_gets_fewer_children() {
        let nodes = fit(&sample(6), 8, &settings(&[2, 8]));
        let tree = Tree::new(&nodes, 8).unwrap();
        assert_eq!(nodes.iter().filter(|n| n.level == 2).count(), 6);
        assert_eq!(tree.assign(&sample(6)).len(), 6);
    }

    #[test]
    fn nodes_of_mixed_lengths_are_no_tree() {
        let node = |cluster_id, centroid: Vec<f32>| Node { cluster_id, parent_id: None, level: 1, centroid };
        assert!(Tree::new(&[node(0, vec![1.0]), node(1, vec![1.0, 2.0])], 1).is_none());
        assert!(Tree::new(&[], 1).is_none());
    }
}
