//! Stage `cluster`: sample the corpus's vectors, fit the tree, write it as rows.

use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, AsArray, BooleanArray, FixedSizeListArray, Float32Array, RecordBatch, UInt32Array};
use arrow::datatypes::{DataType, Field, Float32Type, Schema, SchemaRef, UInt32Type, UInt64Type};
use rayon::prelude::*;
use trommel_core::error::{Error, Result};
use trommel_spec::pipeline::Pipeline;

use crate::cluster::tree::{Node, Settings, Tree, fit};
use crate::embed::{append_numbers, priority_function};
use crate::engine::{Engine, Written, write_parquet};
use crate::outputs::Outputs;

/// Fits the clusters and writes them. `windows` is the number of windows in the corpus.
pub fn run(engine: &Engine, outputs: &Outputs, spec: &Pipeline, windows: u64) -> Result<Written> {
    let settings = Settings {
        levels: spec.cluster.levels(),
        iterations: spec.cluster.iterations(),
        balance: spec.cluster.balance(),
        seed: spec.seed,
    };
    let (sample, dimensions) = sample(engine, outputs, spec, windows)?;
    let rows = sample.len() / dimensions.max(1);
    let leaves = spec.cluster.leaves();
    if (rows as u64) < leaves {
        return Err(Error::config(format!(
            "{leaves} clusters need at least as many windows to be fitted on, and there are {rows}"
        ))
        .hint("lower `cluster.k` (or `cluster.levels`), or add to the corpus"));
    }
    let nodes = fit(&sample, dimensions, &settings);
    write(&outputs.clusters, &nodes, dimensions)
}

/// The windows of lowest priority, `(rows, dimensions)`.
fn sample(engine: &Engine, outputs: &Outputs, spec: &Pipeline, windows: u64) -> Result<(Vec<f32>, usize)> {
    let session = engine.parallel_session([priority_function(spec.seed)]);
    let files: Vec<&Path> = outputs.corpus().map(|u| u.embeddings.as_path()).collect();
    engine.register(&session, "embeddings", &files)?;
    let limit = spec.cluster.sample();
    // Priorities are uniform, so this bound passes a little more than `limit` windows.
    let share = (limit as f64 * 1.1 + 1000.0) / windows.max(1) as f64;
    let highest = if share < 1.0 { (share * u64::MAX as f64) as u64 } else { u64::MAX };
    let sql = include_str!("../sql/cluster_sample.sql").replace("{highest}", &highest.to_string());
    // One memory for all vectors: a sample is as large as anything that a run holds.
    let (mut priorities, mut vectors, mut dimensions) = (Vec::<u64>::new(), Vec::new(), 1);
    for batch in engine.stream(engine.query(&session, &sql)?)? {
        let batch = batch?;
        if vectors.is_empty() {
            dimensions = batch.column(1).as_fixed_size_list().value_length() as usize;
            vectors.reserve_exact(windows.min((limit as f64 * 1.2) as u64 + 2000) as usize * dimensions);
        }
        append_numbers(batch.column(1), &mut vectors)?;
        priorities.extend(batch.column(0).as_primitive::<UInt64Type>().values());
    }
    let row = |i: u32| &vectors[i as usize * dimensions..][..dimensions];
    let mut order: Vec<u32> = (0..priorities.len() as u32).collect();
    // The vector settles a tie, so that the order of the files does not.
    let bits = |i: u32| row(i).iter().map(|x| x.to_bits());
    order.par_sort_unstable_by(|&a, &b| priorities[a as usize].cmp(&priorities[b as usize]).then_with(|| bits(a).cmp(bits(b))));
    permute(&mut vectors, dimensions, &mut order);
    vectors.truncate(limit as usize * dimensions);
    Ok((vectors, dimensions))
}

/// Moves row `order[i]` to row `i`, for each of them, in place; `order` is used up.
fn permute(rows: &mut [f32], len: usize, order: &mut [u32]) {
    let mut first = vec![0.0; len];
    for start in 0..order.len() {
        if order[start] as usize == start {
            continue;
        }
        // Around a cycle of rows, each of which takes the place of the one before.
        first.copy_from_slice(&rows[start * len..][..len]);
        let mut to = start;
        while order[to] as usize != start {
            let from = order[to] as usize;
            rows.copy_within(from * len..(from + 1) * len, to * len);
            order[to] = to as u32;
            to = from;
        }
        rows[to * len..][..len].copy_from_slice(&first);
        order[to] = to as u32;
    }
}

fn schema(dimensions: usize) -> SchemaRef {
    let item = Arc::new(Field::new("item", DataType::Float32, false));
    Arc::new(Schema::new(vec![
        Field::new("cluster_id", DataType::UInt32, false),
        Field::new("parent_id", DataType::UInt32, true),
        Field::new("level", DataType::UInt32, false),
        Field::new("leaf", DataType::Boolean, false),
        Field::new("centroid", DataType::FixedSizeList(item, dimensions as i32), false),
    ]))
}

fn write(path: &Path, nodes: &[Node], dimensions: usize) -> Result<Written> {
    let schema = schema(dimensions);
    let item = Arc::new(Field::new("item", DataType::Float32, false));
    let values = Float32Array::from_iter_values(nodes.iter().flat_map(|n| n.centroid.iter().copied()));
    let centroids = FixedSizeListArray::try_new(item, dimensions as i32, Arc::new(values), None);
    let parents: std::collections::HashSet<u32> = nodes.iter().filter_map(|n| n.parent_id).collect();
    let columns: Vec<ArrayRef> = vec![
        Arc::new(UInt32Array::from_iter_values(nodes.iter().map(|n| n.cluster_id))),
        Arc::new(UInt32Array::from_iter(nodes.iter().map(|n| n.parent_id))),
        Arc::new(UInt32Array::from_iter_values(nodes.iter().map(|n| n.level))),
        Arc::new(BooleanArray::from_iter(nodes.iter().map(|n| Some(!parents.contains(&n.cluster_id))))),
        Arc::new(centroids.map_err(|e| Error::internal("centroids have a wrong shape").source(e))?),
    ];
    let batch = RecordBatch::try_new(Arc::clone(&schema), columns).map_err(|e| Error::internal("no table").source(e))?;
    write_parquet(path, &schema, std::iter::once(Ok(batch)))
}

/// Reads the tree back.
pub fn read(engine: &Engine, outputs: &Outputs) -> Result<Tree> {
    let session = engine.session([]);
    engine.register(&session, "tree", &[&outputs.clusters])?;
    let (mut nodes, mut dimensions) = (Vec::new(), 0);
    for batch in engine.collect(&session, "SELECT cluster_id, parent_id, level, centroid FROM tree ORDER BY cluster_id")? {
        let number = |i: usize| batch.column(i).as_primitive::<UInt32Type>();
        let centroids = batch.column(3).as_fixed_size_list();
        dimensions = centroids.value_length() as usize;
        for row in 0..batch.num_rows() {
            nodes.push(Node {
                cluster_id: number(0).value(row),
                parent_id: (!number(1).is_null(row)).then(|| number(1).value(row)),
                level: number(2).value(row),
                centroid: centroids.value(row).as_primitive::<Float32Type>().values().to_vec(),
            });
        }
    }
    Tree::new(&nodes, dimensions).ok_or_else(|| {
        let error = Error::data("the clusters do not form a tree").file(outputs.clusters.display());
        error.hint("remove this file and run the same command again")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_change_places_along_every_cycle() {
        for order in [vec![], vec![0], vec![1, 0], vec![2, 0, 1, 3], vec![4, 1, 0, 5, 2, 3]] {
            let mut rows: Vec<f32> = (0..order.len()).flat_map(|i| [i as f32, -(i as f32)]).collect();
            let wanted: Vec<f32> = order.iter().flat_map(|&i| [i as f32, -(i as f32)]).collect();
            permute(&mut rows, 2, &mut order.clone());
            assert_eq!(rows, wanted);
        }
    }
}
