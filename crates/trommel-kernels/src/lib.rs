//! Dense kernels that embedding, clustering and training share.

/// The nonlinearities of the MLP.
pub mod activation;
/// AdamW and the norm of a gradient.
pub mod adamw;
/// Products of pairs in the tiles of AMX.
#[cfg(target_arch = "x86_64")]
mod amx;
/// Causal attention within documents.
pub mod attention;
/// The output layer and its loss.
pub mod cross_entropy;
/// Rows of a table by token, and the gradient of the table.
pub mod embedding;
/// What an encoder layer does between its products.
pub mod encoder;
/// Rounding to `bf16`, and pairs.
mod bf16;
/// Which instructions there are.
pub mod isa;
/// Memory that begins at the border of a cache line.
pub mod lines;
/// Products of matrices that lie in slices.
pub mod matmul;
/// Root-mean-square normalisation of rows.
pub mod norm;
/// Products with a right operand that was rearranged once.
pub mod panels;
/// Weights that are mixed from a basis.
pub mod projection;
/// Rows that were rounded once for several products.
pub mod rows;
/// Products tile by tile.
mod tiles;
/// Rotary positions.
pub mod rotary;
/// One body, several instruction sets.
mod vectorize;

/// The nearest of many centroids.
pub mod nearest;
#[cfg(test)]
mod probe;
