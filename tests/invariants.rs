//! What `crates/README.md` promises of the crates.

use std::fs;
use std::path::{Path, PathBuf};

fn crates() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

fn depends(crate_name: &str, on: &str) -> bool {
    let manifest = fs::read_to_string(crates().join(crate_name).join("Cargo.toml")).unwrap();
    let normal = manifest.split("[dev-dependencies]").next().unwrap();
    normal.lines().any(|line| line.starts_with(&format!("{on}.workspace")))
}

fn names() -> Vec<String> {
    let folders = fs::read_dir(crates()).unwrap().flatten().filter(|e| e.path().join("Cargo.toml").exists());
    folders.map(|e| e.file_name().to_string_lossy().into_owned()).collect()
}

fn only(these: &[&str], depend_on: &str) {
    for name in names() {
        assert_eq!(depends(&name, depend_on), these.contains(&name.as_str()), "{name} on {depend_on}");
    }
}

#[test]
fn heavy_libraries_have_one_home() {
    only(&["trommel-pipeline", "trommel"], "datafusion");
    only(&["trommel-trainer", "trommel"], "candle-core");
    only(&["trommel-spec"], "saphyr");
    only(&["trommel-kernels"], "gemm");
    only(&["trommel", "xtask"], "clap");
}

#[test]
fn libraries_do_not_know_the_stages_above_them() {
    for below in ["trommel-core", "trommel-kernels", "trommel-spec"] {
        for above in ["trommel-embed", "trommel-pipeline", "trommel-trainer"] {
            assert!(!depends(below, above), "{below} on {above}");
        }
    }
    assert!(!depends("trommel-pipeline", "trommel-trainer") && !depends("trommel-trainer", "trommel-pipeline"));
}

fn sources(folder: &Path, found: &mut Vec<PathBuf>) {
    for path in fs::read_dir(folder).unwrap().flatten().map(|e| e.path()) {
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|e| e == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn every_source_file_says_what_it_is_for_and_stays_readable() {
    let mut found = Vec::new();
    for name in names() {
        sources(&crates().join(name).join("src"), &mut found);
    }
    for path in found {
        let text = fs::read_to_string(&path).unwrap();
        assert!(text.starts_with("//!"), "{} does not open with `//!`", path.display());
        assert!(text.lines().count() <= 600, "{} is longer than 600 lines", path.display());
    }
}
