//! Equal plans give equal bytes: at any thread count, any split of the corpus, after any number of kills.

use std::thread::sleep;
use std::time::{Duration, Instant};

use crate::bench::{Bench, corpus, unfinished};

#[test]
fn threads_and_splits_and_formats_change_nothing() {
    let bench = Bench::new();
    let expected = bench.checksums(&["--threads", "1", "--run-dir", "one"]);
    assert_eq!(expected.as_object().unwrap().len(), 3, "{expected}");
    assert_eq!(bench.checksums(&["--threads", "2", "--run-dir", "two"]), expected);

    std::fs::remove_file(bench.path("corpus/all.jsonl")).unwrap();
    let mut documents = corpus();
    documents.reverse();
    bench.write_lines("corpus/a.jsonl", &documents[..7]);
    bench.write_texts("corpus/deep/b.parquet", &documents[7..300]);
    bench.write_lines("corpus/c.ndjson", &documents[300..]);
    assert_eq!(bench.checksums(&["--run-dir", "split"]), expected);
}

#[test]
fn the_instructions_of_the_processor_change_nothing() {
    let bench = Bench::new();
    let expected = bench.checksums(&["--run-dir", "best"]);
    for level in ["portable", "avx2", "avx512", "avx512vnni", "avx512bf16"] {
        let mut run = bench.command(&["run", "p.yaml", "--json", "--run-dir", level]);
        let output = run.env("TROMMEL_ISA", level).output().unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        if errors.contains("this processor has") {
            continue;
        }
        let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {errors}"));
        assert_eq!(report["checksums"], expected, "{level}");
    }
    let mut run = bench.command(&["run", "p.yaml"]);
    let output = run.env("TROMMEL_ISA", "avx9").output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.code() == Some(2) && errors.contains("TROMMEL_ISA is `avx9`"), "{errors}");
}

#[test]
fn a_second_run_does_nothing_and_a_new_budget_redoes_the_draws_only() {
    let bench = Bench::new();
    let redone = |more: &[&str]| -> Vec<String> {
        let report = bench.call(&[&["run", "p.yaml", "--json"], more].concat()).json();
        let stages = report["stages"].as_array().unwrap();
        stages.iter().filter(|s| s["cached"] == false).map(|s| s["stage"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(redone(&[]).len(), 9);
    assert_eq!(redone(&[]), [""; 0]);
    assert!(bench.call(&["run", "p.yaml"]).stdout.contains("Everything was done already"));
    assert_eq!(redone(&["--set", "resample.tokens=30k"]), ["resample", "shard"]);
    assert_eq!(redone(&["--set", "cluster.k=6"]), ["cluster", "assign", "histogram", "weigh", "resample", "shard"]);
    bench.write_lines("corpus/more.jsonl", &["one more document about the concerto".to_owned()]);
    assert_eq!(redone(&[]), ["windows", "embed", "cluster", "assign", "histogram", "weigh", "tokenizer", "resample", "shard"]);
}

#[test]
fn a_killed_run_ends_like_an_undisturbed_one() {
    let bench = Bench::new();
    let start = Instant::now();
    let expected = bench.checksums(&["--run-dir", "whole"]);
    let whole = start.elapsed();
    let tries: u32 = 8;
    for i in 1..tries {
        let mut child = bench.command(&["run", "p.yaml", "--run-dir", "killed"]).spawn().unwrap();
        sleep(whole * i / tries);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(bench.checksums(&["--run-dir", "killed"]), expected);
    assert_eq!(unfinished(&bench.path("killed")), [""; 0].map(std::path::PathBuf::from));
}

#[test]
fn an_interrupt_keeps_what_is_finished() {
    let bench = Bench::new();
    let mut child = bench.command(&["run", "p.yaml"]).spawn().unwrap();
    while !bench.path("runs/small/windows").exists() {
        sleep(Duration::from_millis(1));
    }
    let killed = std::process::Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(killed.success());
    let code = child.wait().unwrap().code();
    // A run this small may be faster than the signal.
    assert!(code == Some(130) || code == Some(0), "{code:?}");
    assert_eq!(bench.call(&["run", "p.yaml"]).code, 0);
}

#[test]
fn hierarchical_clusters_and_options_are_deterministic_too() {
    let bench = Bench::new();
    let options = [
        "--set",
        "cluster.k=null",
        "--set",
        "cluster={levels: [3, 3]}",
        "--set",
        "weigh={smoothing: 0.5, temperature: 2, max_epochs: 3}",
    ];
    let run = |threads: &str, dir: &str| bench.checksums(&[&options[..], &["--threads", threads, "--run-dir", dir]].concat());
    assert_eq!(run("1", "a"), run("2", "b"));
}
