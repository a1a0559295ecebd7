//! The weights of a model as safetensors, under the names of `transformers`.
//!
//! We write one file of `f32`. Read is that, and what `transformers` saves: tensors of `f32`, `bf16` or `f16`, all in
//! `model.safetensors` or spread over the files that `model.safetensors.index.json` lists. Each tensor must be there with the
//! shape that `config.json` implies, and no other tensor: one that is left over would be a part that we do not compute.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Deserialize;
use trommel_core::error::{Error, Result};

use crate::model::Config;
use crate::parameters::{Layout, Slot};

/// The file's name in a model's folder.
pub(crate) const FILE: &str = "model.safetensors";
/// The list of files that hold the weights of larger models.
const INDEX: &str = "model.safetensors.index.json";

const EMBEDDING: &str = "model.embed_tokens.weight";
/// The output layer. With tied weights it is the embedding, and some programs write it a second time.
const OUTPUT: &str = "lm_head.weight";
/// The end of the names of rotary frequencies, which old versions of `transformers` saved and newer ones compute.
const FREQUENCIES: &str = ".rotary_emb.inv_freq";

/// The file's content for numbers of this layout.
pub(crate) fn write(layout: &Layout, flat: &[f32]) -> Result<Vec<u8>> {
    let bytes: Vec<u8> = flat.iter().flat_map(|number| number.to_le_bytes()).collect();
    let mut views = Vec::new();
    for slot in layout.slots() {
        let data = &bytes[slot.range.start * 4..slot.range.end * 4];
        let view = TensorView::new(Dtype::F32, slot.shape.clone(), data)
            .map_err(|e| Error::internal("a tensor has a wrong size").source(e))?;
        views.push((slot.name.as_str(), view));
    }
    // `transformers` refuses files that do not say which framework's layout they have.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(|e| Error::internal("the weights cannot be written").source(e))
}

/// Reads the weights in a model's folder.
pub(crate) fn read_folder(folder: &Path, config: &Config) -> Result<Vec<f32>> {
    let (single, index) = (folder.join(FILE), folder.join(INDEX));
    if single.exists() || !index.exists() { read(&single, config) } else { read_files(&index, &listed(&index)?, config) }
}

/// Reads the numbers of a model of this shape from one file.
pub(crate) fn read(path: &Path, config: &Config) -> Result<Vec<f32>> {
    read_files(path, &[path.to_owned()], config)
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

fn listed(index: &Path) -> Result<Vec<PathBuf>> {
    let bytes = fs::read(index).map_err(|e| damaged(index).source(e))?;
    let Index { weight_map } = serde_json::from_slice(&bytes).map_err(|e| damaged(index).source(e))?;
    let names: BTreeSet<String> = weight_map.into_values().collect();
    Ok(names.iter().map(|name| index.with_file_name(name)).collect())
}

/// A tensor and the file that holds it.
struct Found<'a> {
    path: &'a Path,
    view: TensorView<'a>,
}

/// `whole` is the file to name where a tensor is in none of `paths`.
fn read_files(whole: &Path, paths: &[PathBuf], config: &Config) -> Result<Vec<f32>> {
    let mut files = Vec::new();
    for path in paths {
        files.push(fs::read(path).map_err(|e| damaged(path).source(e))?);
    }
    let mut found = BTreeMap::new();
    for (path, bytes) in paths.iter().zip(&files) {
        let tensors = SafeTensors::deserialize(bytes).map_err(|e| damaged(path).source(e))?;
        found.extend(tensors.tensors().into_iter().map(|(name, view)| (name, Found { path, view })));
    }
    // A configuration may ask for more layers than a layout can list.
    if config.layers > found.len() {
        return Err(missing(whole, &format!("model.layers.{}.input_layernorm.weight", config.layers - 1)));
    }
    let layout = Layout::new(config);
    for slot in layout.slots() {
        check(slot, found.get(&slot.name).ok_or_else(|| missing(whole, &slot.name))?)?;
    }
    refuse_others(&layout, &found)?;
    let mut flat = vec![0.0; layout.len()];
    for slot in layout.slots() {
        let Found { path, view } = &found[&slot.name];
        let numbers = &mut flat[slot.range.clone()];
        copy(view, numbers);
        if numbers.iter().any(|number| !number.is_finite()) {
            let message = format!("the tensor `{}` holds numbers that are not finite", slot.name);
            return Err(Error::data(message).file(path.display()).hint("this model cannot be used; take an earlier one"));
        }
    }
    Ok(flat)
}

fn check(slot: &Slot, Found { path, view }: &Found) -> Result<()> {
    let readable = matches!(view.dtype(), Dtype::F32 | Dtype::BF16 | Dtype::F16);
    if readable && view.shape() == slot.shape {
        return Ok(());
    }
    let (name, found, shape, expected) = (&slot.name, view.dtype(), view.shape(), &slot.shape);
    let message = format!("the tensor `{name}` is {found:?} {shape:?}, expected F32, BF16 or F16 {expected:?}");
    Err(Error::data(message).file(path.display()).hint("`config.json` and the weights do not belong together"))
}

fn refuse_others(layout: &Layout, found: &BTreeMap<String, Found>) -> Result<()> {
    let known: BTreeSet<&str> = layout.slots().iter().map(|slot| slot.name.as_str()).collect();
    for (name, Found { path, view }) in found {
        let tied =
            name == OUTPUT && view.dtype() == found[EMBEDDING].view.dtype() && view.data() == found[EMBEDDING].view.data();
        if known.contains(name.as_str()) || tied || name.ends_with(FREQUENCIES) {
            continue;
        }
        let message = match name == OUTPUT {
            true => format!("the tensor `{OUTPUT}` differs from `{EMBEDDING}`"),
            false => format!("the tensor `{name}` has no place in the model that `config.json` describes"),
        };
        let hint = "trommel's decoder has no biases, and one matrix that is both embedding and output layer";
        return Err(Error::data(message).file(path.display()).hint(hint));
    }
    Ok(())
}

/// Every number of the narrower types is one of `f32` too.
fn copy(view: &TensorView, numbers: &mut [f32]) {
    match view.dtype() {
        Dtype::BF16 => fill(numbers, view.data(), |bytes| bf16::from_le_bytes(bytes).to_f32()),
        Dtype::F16 => fill(numbers, view.data(), |bytes| f16::from_le_bytes(bytes).to_f32()),
        _ => fill(numbers, view.data(), f32::from_le_bytes),
    }
}

fn fill<const N: usize>(numbers: &mut [f32], data: &[u8], read: impl Fn([u8; N]) -> f32) {
    for (number, bytes) in numbers.iter_mut().zip(data.as_chunks().0) {
        *number = read(*bytes);
    }
}

fn missing(path: &Path, name: &str) -> Error {
    let message = format!("the tensor `{name}` is missing");
    Error::data(message).file(path.display()).hint("`config.json` and the weights do not belong together")
}

fn damaged(path: &Path) -> Error {
    let hint = "restore the file from a copy, or copy or download the model again";
    Error::data("the weights are missing, damaged or cut short").file(path.display()).hint(hint)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Activation, preset};

    /// Tensors as they are written to a file: type, shape, bytes.
    type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

    fn config() -> Config {
        Config { width: 8, heads: 2, mlp: 6, layers: 2, ..preset("slm-1m", 10).unwrap() }
    }

    /// Random numbers that `bf16` and `f16` hold exactly.
    fn numbers(config: &Config) -> Vec<f32> {
        Layout::new(config).initial(3).iter().map(|x| bf16::from_f32(*x).to_f32()).collect()
    }

    fn tensors(config: &Config, dtype: Dtype) -> Tensors {
        let flat = numbers(config);
        let bytes = |x: &f32| match dtype {
            Dtype::BF16 => bf16::from_f32(*x).to_le_bytes().to_vec(),
            Dtype::F16 => f16::from_f32(*x).to_le_bytes().to_vec(),
            _ => x.to_le_bytes().to_vec(),
        };
        let slots = Layout::new(config).slots().to_vec();
        slots.into_iter().map(|s| (s.name, (dtype, s.shape, flat[s.range].iter().flat_map(bytes).collect()))).collect()
    }

    fn write_file(path: &Path, tensors: &Tensors) {
        let view = |dtype, shape: &[usize], bytes| TensorView::new(dtype, shape.to_vec(), bytes).unwrap();
        let views = tensors.iter().map(|(name, (dtype, shape, bytes))| (name.as_str(), view(*dtype, shape, bytes)));
        fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
    }

    /// Two files and their index.
    fn write_shards(folder: &Path, tensors: &Tensors) {
        let (even, odd): (Vec<_>, Vec<_>) = tensors.clone().into_iter().enumerate().partition(|(i, _)| i % 2 == 0);
        let mut map = BTreeMap::new();
        for (name, part) in [("a.safetensors", even), ("b.safetensors", odd)] {
            let part: Tensors = part.into_iter().map(|(_, tensor)| tensor).collect();
            map.extend(part.keys().map(|tensor| (tensor.clone(), name)));
            write_file(&folder.join(name), &part);
        }
        fs::write(folder.join(INDEX), serde_json::json!({ "weight_map": map }).to_string()).unwrap();
    }

    #[test]
    fn every_type_is_read_exactly_from_one_file_or_several() {
        for activation in [Activation::SwiGlu, Activation::Gelu] {
            let config = Config { activation, ..config() };
            for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
                let folder = tempfile::tempdir().unwrap();
                let tensors = tensors(&config, dtype);
                write_shards(folder.path(), &tensors);
                let expected: Vec<f32> = match dtype {
                    Dtype::F16 => numbers(&config).iter().map(|x| f16::from_f32(*x).to_f32()).collect(),
                    _ => numbers(&config),
                };
                assert_eq!(read_folder(folder.path(), &config).unwrap(), expected);
                write_file(&folder.path().join(FILE), &tensors);
                assert_eq!(read_folder(folder.path(), &config).unwrap(), expected);
            }
        }
    }

    /// Reads a file of weights after `spoil`; gives the error's text.
    fn error_of(spoil: impl FnOnce(&mut Tensors)) -> String {
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = tensors(&config(), Dtype::F32);
        spoil(&mut tensors);
        write_file(&folder.path().join(FILE), &tensors);
        let error = read_folder(folder.path(), &config()).unwrap_err();
        assert!(error.place().file.as_ref().unwrap().ends_with(FILE) && error.remedy().is_some(), "{error}");
        error.message().to_owned()
    }

    #[test]
    fn tensors_that_do_not_fit_are_named() {
        let gate = "model.layers.1.mlp.gate_proj.weight";
        assert_eq!(error_of(|t| drop(t.remove(gate))), format!("the tensor `{gate}` is missing"));
        let transposed = error_of(|t| t.get_mut(gate).unwrap().1.reverse());
        assert_eq!(transposed, format!("the tensor `{gate}` is F32 [8, 6], expected F32, BF16 or F16 [6, 8]"));
        let whole = error_of(|t| t.get_mut(gate).unwrap().0 = Dtype::I32);
        assert!(whole.contains("is I32 [6, 8]"), "{whole}");
        let infinite = error_of(|t| t.get_mut(gate).unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes()));
        assert!(infinite.contains("not finite"), "{infinite}");
        let bias = "model.layers.0.self_attn.q_proj.bias".to_owned();
        let other = error_of(|t| drop(t.insert(bias, (Dtype::F32, vec![1], vec![0; 4]))));
        assert!(other.contains("q_proj.bias` has no place"), "{other}");
    }

    #[test]
    fn an_output_layer_must_be_the_embedding() {
        let folder = tempfile::tempdir().unwrap();
        let mut tensors = tensors(&config(), Dtype::F32);
        tensors.insert(OUTPUT.into(), tensors[EMBEDDING].clone());
        tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), (Dtype::F32, vec![1], vec![0; 4]));
        write_file(&folder.path().join(FILE), &tensors);
        assert_eq!(read_folder(folder.path(), &config()).unwrap(), numbers(&config()));
        let error = error_of(|t| {
            let mut output = t[EMBEDDING].clone();
            output.2[0] ^= 1;
            t.insert(OUTPUT.into(), output);
        });
        assert_eq!(error, "the tensor `lm_head.weight` differs from `model.embed_tokens.weight`");
    }

    #[test]
    fn files_that_are_missing_or_cut_short_are_named() {
        let folder = tempfile::tempdir().unwrap();
        let error = |config: &Config| read_folder(folder.path(), config).unwrap_err().to_string();
        assert!(error(&config()).contains("model.safetensors: the weights are missing"), "{}", error(&config()));
        write_shards(folder.path(), &tensors(&config(), Dtype::F32));
        let deep = Config { layers: usize::MAX, ..config() };
        assert!(error(&deep).contains("index.json: the tensor `model.layers."), "{}", error(&deep));
        let path = folder.path().join("b.safetensors");
        let whole = fs::read(&path).unwrap();
        fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        assert!(
            error(&config()).contains("b.safetensors: the weights are missing, damaged or cut short"),
            "{}",
            error(&config())
        );
        fs::remove_file(&path).unwrap();
        assert!(error(&config()).contains("b.safetensors: the weights are missing"), "{}", error(&config()));
    }
}
