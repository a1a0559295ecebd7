//! Files that are made from the code, and files that must pass it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn trommel(arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_trommel")).args(arguments).current_dir(root()).output().unwrap();
    let text = String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr }).into_owned();
    (output.status.success(), text)
}

#[test]
fn schemas_are_fresh() {
    for kind in ["pipeline", "training"] {
        let path = root().join(format!("pipelines/schema/{kind}.json"));
        let stored = fs::read_to_string(&path).unwrap();
        assert!(trommel(&["schema", kind]).1 == stored, "the schema of `{kind}` is stale: run `cargo xtask generate`");
    }
}

#[test]
fn every_pipeline_file_passes_the_check() {
    let files: Vec<PathBuf> = fs::read_dir(root().join("pipelines")).unwrap().flatten().map(|e| e.path()).collect();
    let files: Vec<&PathBuf> = files.iter().filter(|f| f.extension().is_some_and(|e| e == "yaml")).collect();
    assert!(files.len() >= 2);
    for file in files {
        let (passes, text) = trommel(&["check", &file.display().to_string()]);
        assert!(passes, "{text}");
    }
}

#[test]
fn the_readme_names_every_command() {
    let readme = fs::read_to_string(root().join("README.md")).unwrap();
    let help = trommel(&["--help"]).1;
    let commands = help.lines().skip_while(|l| *l != "Commands:").skip(1).take_while(|l| !l.is_empty());
    // A description that goes on in the next line stands further in.
    let commands = commands.filter(|l| !l.starts_with("   "));
    for command in commands.filter_map(|l| l.split_whitespace().next()).filter(|c| *c != "help") {
        assert!(readme.contains(&format!("trommel {command}")), "the README does not mention `trommel {command}`");
    }
}
