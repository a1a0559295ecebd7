//! YAML to spec to plan; all mistakes of shape at once, then all of meaning.
//!
//! A pipeline file becomes a tree with positions (`yaml`), is checked against the JSON Schema that the spec's own types
//! give (`validate`), becomes a spec (`pipeline`, `training`), and is resolved into a plan (`plan`): files found,
//! defaults filled in, contradictions refused. Running never sees YAML. Nothing here reads a row of data.

/// Numbers such as `20M`.
pub mod count;
/// The spec of a pipeline file.
pub mod pipeline;
/// A spec whose files are found and whose contradictions are refused.
pub mod plan;
/// The spec of a training file.
pub mod training;
/// Every mistake in a tree, with line, column and the nearest right word.
pub mod validate;
/// YAML text to a tree of values with positions; `--set` overlays.
pub mod yaml;
