//! From the tiny BERT to a static table.

use std::fs;

use trommel_core::progress::Silent;
use trommel_embed::distill::distill;
use trommel_embed::load::load;
use trommel_kernels::panels::Precision;

use crate::contract::bits;
use crate::tiny_bert;

#[test]
fn a_distilled_folder_loads_and_is_reproducible() {
    let encoder = tempfile::tempdir().unwrap();
    tiny_bert::write(encoder.path(), "bert.");
    let folder = tempfile::tempdir().unwrap();
    let outputs = ["a", "b"].map(|name| folder.path().join(name));
    let [first, second] = outputs.each_ref().map(|output| distill(encoder.path(), output, 16, &Silent).unwrap());
    assert_eq!(first, second);
    // 45 tokens less [PAD], [unused0], [CLS] and [SEP].
    assert_eq!((first.tokens, first.dimensions), (41, 16));
    assert!(first.explained_variance > 0.5 && first.explained_variance < 1.0);
    for file in ["tokenizer.json", "static_table.safetensors"] {
        let [a, b] = outputs.each_ref().map(|output| fs::read(output.join(file)).unwrap());
        assert_eq!(a, b, "{file}");
    }
    let [a, b] = outputs.each_ref().map(|output| load(output.to_str().unwrap(), Precision::F32).unwrap());
    assert_eq!(a.key(), b.key());
    assert_eq!(a.dimensions(), 16);
    let vectors = bits(&*a, &["gold", "Gold gold", "gravel", "\u{4e00}"]);
    let cosine = |i: usize, j: usize| -> f32 {
        vectors[i].iter().zip(&vectors[j]).map(|(x, y)| f32::from_bits(*x) * f32::from_bits(*y)).sum()
    };
    assert!(cosine(0, 1) > 0.999_999 && cosine(0, 2) < 0.99);
    assert!(vectors[3].iter().all(|x| *x == 0));
}

#[test]
fn impossible_distillations_are_refused() {
    let encoder = tempfile::tempdir().unwrap();
    tiny_bert::write(encoder.path(), "");
    let folder = tempfile::tempdir().unwrap();
    for dimensions in [0, 33] {
        let error = distill(encoder.path(), &folder.path().join("table"), dimensions, &Silent).unwrap_err();
        assert_eq!(error.to_string(), format!("`dimensions` is {dimensions}, possible is 1 to 32, the encoder's own"));
    }
    let error = distill(encoder.path(), encoder.path(), 8, &Silent).unwrap_err();
    assert!(error.message().contains("is not overwritten"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}
