//! The method `dsir`: its windows are those of highest key, and the same wherever the plan runs.

use std::path::Path;
use std::thread::sleep;
use std::time::Instant;

use crate::bench::{Bench, corpus, unfinished};

/// A plan with `dsir` only, and with windows that hold whole documents: those of at least 100 words can be selected.
const DSIR: [&str; 4] =
    ["--set", "windows.bytes=4096", "--set", "train={model: slm-1m, context: 64, tokens: 6k, methods: [dsir]}"];

fn until_shards(more: &[&str]) -> Vec<String> {
    [&["run", "p.yaml", "--json", "--until", "shard"], &DSIR[..], more].concat().iter().map(|s| s.to_string()).collect()
}

fn call(bench: &Bench, more: &[&str]) -> serde_json::Value {
    let arguments = until_shards(more);
    bench.call(&arguments.iter().map(String::as_str).collect::<Vec<_>>()).json()
}

/// Names of files and folders below a folder that speak of DSIR.
fn named_dsir(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if entry.path().is_dir() {
            found.extend(named_dsir(&entry.path()));
        }
        if name.contains("dsir") {
            found.push(name);
        }
    }
    found
}

#[test]
fn threads_and_splits_change_no_selection() {
    let bench = Bench::new();
    let expected = call(&bench, &["--threads", "1", "--run-dir", "one"])["checksums"].clone();
    assert_eq!(expected.as_object().unwrap().len(), 5, "{expected}");
    for domain in ["music", "sacred"] {
        let (own, dsir) = (&expected[format!("shards/{domain}")], &expected[format!("shards/{domain}.dsir")]);
        assert!(own.is_string() && dsir.is_string() && own != dsir, "{expected}");
    }
    assert_eq!(call(&bench, &["--threads", "2", "--run-dir", "two"])["checksums"], expected);

    std::fs::remove_file(bench.path("corpus/all.jsonl")).unwrap();
    let mut documents = corpus();
    documents.reverse();
    bench.write_lines("corpus/a.jsonl", &documents[..7]);
    bench.write_texts("corpus/deep/b.parquet", &documents[7..300]);
    bench.write_lines("corpus/c.ndjson", &documents[300..]);
    assert_eq!(call(&bench, &["--run-dir", "split"])["checksums"], expected);
}

#[test]
fn it_is_made_once_and_only_where_it_is_wanted() {
    let bench = Bench::new();
    let redone = |more: &[&str]| -> Vec<String> {
        let report = call(&bench, more);
        let stages = report["stages"].as_array().unwrap();
        stages.iter().filter(|s| s["cached"] == false).map(|s| s["stage"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(redone(&["--set", "train.methods=[slm-is]"]).len(), 9);
    assert_eq!(named_dsir(&bench.path("runs")), [""; 0]);
    let without = call(&bench, &["--set", "train.methods=[slm-is]"])["checksums"].clone();
    assert_eq!(redone(&[]), ["weigh", "resample", "shard"]);
    assert_eq!(redone(&[]), [""; 0]);
    let with = call(&bench, &[])["checksums"].clone();
    assert!(without.as_object().unwrap().iter().all(|(name, checksum)| with[name] == *checksum), "{without} {with}");
    // The weights of clusters are no affair of DSIR's, and neither is the embedder; the budget is.
    let dsir =
        |checksums: &serde_json::Value| [checksums["shards/music.dsir"].clone(), checksums["shards/sacred.dsir"].clone()];
    assert_eq!(dsir(&call(&bench, &["--set", "weigh.smoothing=1"])["checksums"]), dsir(&with));
    assert_eq!(redone(&["--set", "resample.tokens=30k"]), ["resample", "shard"]);
}

#[test]
fn a_killed_run_selects_the_same() {
    let bench = Bench::new();
    let start = Instant::now();
    let expected = call(&bench, &["--run-dir", "whole"])["checksums"].clone();
    let whole = start.elapsed();
    let arguments = until_shards(&["--run-dir", "killed"]);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let tries: u32 = 8;
    for i in 1..tries {
        let mut child = bench.command(&arguments).stdout(std::process::Stdio::null()).spawn().unwrap();
        sleep(whole * i / tries);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(call(&bench, &["--run-dir", "killed"])["checksums"], expected);
    assert_eq!(unfinished(&bench.path("killed")), [""; 0].map(std::path::PathBuf::from));
}

#[test]
fn the_windows_of_highest_key_are_selected_until_the_budget_is_met() {
    let bench = Bench::new();
    call(&bench, &["--set", "resample.tokens=10k"]);
    let number = |sql: &str| bench.query(sql)[0]["n"].as_f64().unwrap();
    // 600 windows, of which those of fewer than 100 words have no key, for two domains.
    assert_eq!(number("SELECT count(*) AS n FROM dsir_scores"), 1200.0);
    assert_eq!(number("SELECT count(*) AS n FROM dsir_scores WHERE (key IS NULL) <> (words < 100)"), 0.0);
    for domain in ["music", "sacred"] {
        let above = "FROM dsir_scores s JOIN dsir_selection e ON e.domain = s.domain AND s.key >= e.key_min";
        let selected = format!("SELECT document, window {above} WHERE s.domain = '{domain}'");
        let drawn = format!("SELECT document, window FROM dsir_draws WHERE domain = '{domain}'");
        let of = |column: &str| number(&format!("SELECT {column} AS n FROM dsir_selection WHERE domain = '{domain}'"));
        assert_eq!(number(&format!("SELECT count(*) AS n FROM ({drawn})")), of("windows"));
        assert_eq!(number(&format!("SELECT count(*) AS n FROM ({drawn} EXCEPT {selected})")), 0.0);
        assert_eq!(number(&format!("SELECT count(*) AS n FROM ({selected} EXCEPT {drawn})")), 0.0);
        // Without its last window the selection would be below the budget; one window has at most 1,100 tokens.
        assert!((10_000.0..11_100.0).contains(&of("tokens")), "{}", of("tokens"));
        let shards = format!("FROM shards WHERE path LIKE '%/{domain}.dsir/%' AND domain = '{domain}'");
        let tokens = number(&format!("SELECT sum(tokens) AS n {shards}"));
        assert!((10_000.0..=of("tokens")).contains(&tokens), "{tokens}");
        // A third or a sixth of the corpus is of the domain's kind, and nearly all of the selection.
        let word = if domain == "music" { "violin" } else { "psalm" };
        let kind = number(&format!(
            "SELECT avg(CASE WHEN text LIKE '%{word}%' THEN 1.0 ELSE 0.0 END) AS n FROM dsir_draws WHERE domain = '{domain}'"
        ));
        assert!(kind > 0.95, "{kind}");
    }
}

#[test]
fn a_corpus_that_holds_too_little_is_refused() {
    let bench = Bench::new();
    let refused = |more: &[&str]| {
        let arguments = until_shards(more);
        let called = bench.call(&arguments.iter().map(String::as_str).collect::<Vec<_>>());
        assert_eq!(called.code, 1, "{}", called.stderr);
        for part in ["stage `resample`", "DSIR can select for `music`", "at least 100 words", "hint: lower `resample.tokens`"] {
            assert!(called.stderr.contains(part), "`{part}` is not in:\n{}", called.stderr);
        }
        assert!(unfinished(&bench.path("runs")).is_empty() && !bench.path("runs/small/shards/music.dsir").exists());
        called.stderr
    };
    // Our own method repeats windows; DSIR does not.
    assert!(!refused(&["--set", "resample.tokens=200k"]).contains("has 0 tokens"));
    // Windows that are all too short.
    assert!(refused(&["--set", "windows.bytes=256"]).contains("has 0 tokens"));
}

#[test]
fn a_model_is_trained_on_it_and_compared() {
    let bench = Bench::new();
    let methods = ["--set", "train.methods=[slm-is, dsir]", "--set", "finetune={tokens: 3k}"];
    let report = bench.call(&[&["run", "p.yaml", "--json"], &DSIR[..], &methods[..]].concat()).json();
    let rows: Vec<[&str; 3]> = report["results"]
        .as_array()
        .unwrap()
        .iter()
        .map(|r| ["domain", "method", "stage"].map(|key| r[key].as_str().unwrap()))
        .collect();
    for domain in ["music", "sacred"] {
        for stage in ["pretrained", "finetuned"] {
            assert!(rows.contains(&[domain, "dsir", stage]), "{rows:?}");
        }
    }
    assert_eq!(rows.len(), 8, "{rows:?}");
}
