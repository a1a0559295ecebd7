//! What `Embedder` promises, for both kinds of model.

use tempfile::TempDir;
use trommel_embed::Embedder;
use trommel_embed::load::load;
use trommel_kernels::panels::Precision;

use crate::tiny_bert;

const TEXTS: [&str; 7] = [
    "the king turns gravel, and the screen turns gold.",
    "gold",
    "",
    "The Court of the surgeon AND the king",
    "turning turning turning turning turning turning turning turning turning turning turning turning",
    "\u{4e00}\u{4e01}",
    "gold gravel",
];

fn models() -> Vec<(TempDir, Box<dyn Embedder>)> {
    let folder = tempfile::tempdir().unwrap();
    tiny_bert::write(folder.path(), "");
    let encoder = load(folder.path().to_str().unwrap(), Precision::F32).unwrap();
    vec![(folder, encoder), (tempfile::tempdir().unwrap(), load("static", Precision::F32).unwrap())]
}

/// The vectors' bits, so that equality is exact.
pub(crate) fn bits(model: &dyn Embedder, texts: &[&str]) -> Vec<Vec<u32>> {
    let mut vectors = vec![f32::NAN; texts.len() * model.dimensions()];
    model.embed(texts, &mut vectors).unwrap();
    vectors.chunks(model.dimensions()).map(|vector| vector.iter().map(|x| x.to_bits()).collect()).collect()
}

#[test]
fn vectors_have_norm_one_or_zero() {
    for (_folder, model) in models() {
        for (text, vector) in TEXTS.iter().zip(bits(&*model, &TEXTS)) {
            let norm: f64 = vector.iter().map(|x| f64::from(f32::from_bits(*x)).powi(2)).sum();
            // The tiny vocabulary lacks the two ideographs; the real one has them.
            let known = !text.is_empty() && (text.is_ascii() || model.dimensions() != tiny_bert::HIDDEN);
            assert!((norm - f64::from(u8::from(known))).abs() < 1e-6, "{text}: {norm}");
        }
    }
}

#[test]
fn a_vector_does_not_depend_on_the_other_texts() {
    for (_folder, model) in models() {
        let together = bits(&*model, &TEXTS);
        let mut reversed: Vec<&str> = TEXTS.to_vec();
        reversed.reverse();
        let backwards = bits(&*model, &reversed);
        for (i, text) in TEXTS.iter().enumerate() {
            assert_eq!(together[i..=i], bits(&*model, &[text]), "{text}");
            assert_eq!(together[i], backwards[TEXTS.len() - 1 - i], "{text}");
        }
        assert!(bits(&*model, &[]).is_empty());
    }
}

#[test]
fn a_vector_does_not_depend_on_threads() {
    for (_folder, model) in models() {
        let with =
            |threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| bits(&*model, &TEXTS));
        assert_eq!(with(1), with(2));
    }
}

#[test]
fn only_the_first_tokens_count_in_the_encoder_and_all_in_the_table() {
    let long = "gold ".repeat(14); // with [CLS] and [SEP] the tiny encoder's 16 tokens
    let longer = format!("{long} surgeon");
    for (_folder, model) in models() {
        let vectors = bits(&*model, &[&long, &longer]);
        assert_eq!(vectors[0] == vectors[1], model.dimensions() == tiny_bert::HIDDEN);
    }
}

#[test]
fn the_prefix_of_tensor_names_changes_nothing_but_the_key() {
    let folders = ["", "bert."].map(|prefix| {
        let folder = tempfile::tempdir().unwrap();
        tiny_bert::write(folder.path(), prefix);
        folder
    });
    let [plain, prefixed] = folders.each_ref().map(|folder| load(folder.path().to_str().unwrap(), Precision::F32).unwrap());
    assert_eq!(bits(&*plain, &TEXTS), bits(&*prefixed, &TEXTS));
    assert_ne!(plain.key(), prefixed.key());
    assert_eq!(plain.key(), load(folders[0].path().to_str().unwrap(), Precision::F32).unwrap().key());
}

#[test]
fn near_in_meaning_is_near_in_the_embedded_table() {
    let model = load("static", Precision::F32).unwrap();
    let texts = [
        "The surgeon closed the wound after the operation.",
        "Doctors treat infections of the injured with antibiotics.",
        "The court held that the contract was void under the statute.",
    ];
    let mut vectors = vec![0.0; 3 * model.dimensions()];
    model.embed(&texts, &mut vectors).unwrap();
    let rows: Vec<&[f32]> = vectors.chunks(model.dimensions()).collect();
    let cosine = |a: usize, b: usize| rows[a].iter().zip(rows[b]).map(|(x, y)| x * y).sum::<f32>();
    assert!(cosine(0, 1) > cosine(0, 2) + 0.1, "{} {}", cosine(0, 1), cosine(0, 2));
}
