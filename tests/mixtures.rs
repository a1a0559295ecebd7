//! Mixtures of domains: the weighted mean of their histograms, and like a domain in all that follows.

use std::collections::BTreeMap;
use std::fs::File;

use arrow::array::AsArray;
use arrow::datatypes::UInt32Type;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use crate::bench::Bench;

const MIXTURE: [&str; 4] = ["--set", "domains.both={mixture: {sacred: 3, music: 1}}", "--set", "resample.tokens=60k"];
const BY_CLUSTER: [&str; 4] = ["--set", "cluster={levels: [3, 2]}", "--set", "shard.by=cluster"];
/// The formula: what the cluster shares of the mixture must be.
const EXPECTED: &str = "(SELECT cluster_id, sum(CASE domain WHEN 'sacred' THEN 0.75 ELSE 0.25 END * share) AS share \
                        FROM histograms WHERE domain IN ('sacred', 'music') GROUP BY cluster_id)";

fn run(bench: &Bench, more: &[&[&str]]) -> Value {
    bench.call(&[&["run", "p.yaml", "--json"], &more.concat()[..]].concat()).json()
}

fn redone(report: &Value) -> Vec<&str> {
    let stages = report["stages"].as_array().unwrap();
    stages.iter().filter(|s| s["cached"] == false).map(|s| s["stage"].as_str().unwrap()).collect()
}

fn number(bench: &Bench, sql: &str) -> f64 {
    bench.query(sql)[0]["n"].as_f64().unwrap()
}

/// The histogram, the weights and the plan of draws are those of the formula.
fn check_tables(bench: &Bench) {
    let of_mixture = |table: &str, worst: &str, condition: &str| {
        let sql = format!(
            "SELECT max(abs({worst})) AS n FROM {table} t JOIN {EXPECTED} e ON e.cluster_id = t.cluster_id \
             WHERE t.domain = 'both' AND {condition}"
        );
        number(bench, &sql)
    };
    assert!(of_mixture("histograms", "t.share - e.share", "true") < 1e-12);
    assert!(of_mixture("weights", "t.p_domain - e.share", "true") < 1e-12);
    assert!(of_mixture("weights", "t.weight - e.share / t.p_corpus", "t.p_corpus > 0") < 1e-12);
    // Counts are rounded, in proportion to the shares.
    let windows = number(bench, "SELECT sum(windows) AS n FROM histograms WHERE domain IN ('sacred', 'music')");
    assert!(of_mixture("histograms", &format!("t.windows - e.share * {windows:?}"), "true") <= 0.5);
    let bytes = "SELECT max(abs(t.bytes - e.bytes)) AS n FROM histograms t JOIN (
                   SELECT h.cluster_id, sum(CASE h.domain WHEN 'sacred' THEN 0.75 ELSE 0.25 END * h.bytes / o.own) AS bytes
                   FROM histograms h JOIN (SELECT domain, sum(windows) AS own FROM histograms GROUP BY domain) o ON o.domain = h.domain
                   WHERE h.domain IN ('sacred', 'music') GROUP BY h.cluster_id
                 ) e ON e.cluster_id = t.cluster_id WHERE t.domain = 'both'";
    assert!(number(bench, &bytes.replace("e.bytes)", &format!("e.bytes * {windows:?})"))) <= 0.5);
    // What is drawn looks like the mixture.
    let row = &bench.query("SELECT kl_before, kl_after, lost_mass FROM diagnostics WHERE domain = 'both'")[0];
    let (before, after) = (row["kl_before"].as_f64().unwrap(), row["kl_after"].as_f64().unwrap());
    assert!(before > 0.1 && after < before / 10.0 && row["lost_mass"] == 0.0, "{row}");
}

#[test]
fn its_histogram_weights_and_shards_are_those_of_the_formula() {
    let bench = Bench::new();
    assert!(bench.call(&[&["check", "p.yaml"], &MIXTURE[..]].concat()).stdout.contains("3 domains"));
    let report = run(&bench, &[&MIXTURE]);
    assert_eq!(run(&bench, &[&MIXTURE, &["--threads", "1", "--run-dir", "one"]])["checksums"], report["checksums"]);
    check_tables(&bench);
    let mut drawn: BTreeMap<u64, f64> = BTreeMap::new();
    for shard in bench.query("SELECT path FROM shards WHERE domain = 'both'") {
        let file = File::open(bench.path(shard["path"].as_str().unwrap())).unwrap();
        for batch in ParquetRecordBatchReaderBuilder::try_new(file).unwrap().build().unwrap() {
            let clusters = batch.unwrap().column_by_name("cluster_id").unwrap().as_primitive::<UInt32Type>().clone();
            clusters.values().iter().for_each(|c| *drawn.entry(u64::from(*c)).or_default() += 1.0);
        }
    }
    let all: f64 = drawn.values().sum();
    for row in bench.query(&format!("SELECT * FROM {EXPECTED}")) {
        let found = drawn.get(&row["cluster_id"].as_u64().unwrap()).copied().unwrap_or(0.0) / all;
        assert!((found - row["share"].as_f64().unwrap()).abs() < 0.05, "{found} of {all} for {row}");
    }

    // The same proportions on another scale are nothing new; others redo what depends on them.
    let with = |proportions: &str| {
        let domain = format!("domains.both={{mixture: {proportions}}}");
        run(&bench, &[&MIXTURE, &["--set", &domain]])
    };
    assert_eq!(redone(&with("{sacred: 0.75, music: 0.25}")), [""; 0]);
    assert_eq!(redone(&with("{sacred: 1, music: 1}")), ["histogram", "weigh", "resample", "shard"]);
    // A folder holds the shards of one plan.
    assert_eq!(redone(&run(&bench, &[&MIXTURE])), ["shard"]);
}

#[test]
fn equal_domains_and_a_single_one_mix_to_themselves() {
    let bench = Bench::new();
    let domains = "domains={music: {train: music/train.jsonl}, twin: {train: music/train.jsonl}, \
                   both: {mixture: {music: 2, twin: 2}}, alone: {mixture: {music: 0.1}}}";
    run(&bench, &[&["--until", "weigh", "--set", domains, "--set", "weigh.smoothing=2"]]);
    let differences = |domain: &str, windows: u32| {
        let sql = format!(
            "SELECT max(abs(a.share - b.share) + abs(a.windows - {windows} * b.windows) + abs(a.bytes - {windows} * b.bytes)) AS n \
             FROM histograms a JOIN histograms b ON b.cluster_id = a.cluster_id AND b.domain = 'music' WHERE a.domain = '{domain}'"
        );
        number(&bench, &sql)
    };
    assert_eq!((differences("both", 2), differences("alone", 1)), (0.0, 0.0));
    // Smoothing adds windows to the mixture as it does to a domain of as many windows.
    let sql = "SELECT max(abs(w.p_domain - (h.windows + 2.0) / (t.windows + 2.0 * 8))) AS n FROM weights w \
               JOIN histograms h ON h.domain = w.domain AND h.cluster_id = w.cluster_id \
               JOIN (SELECT domain, sum(windows) AS windows FROM histograms GROUP BY domain) t ON t.domain = w.domain";
    assert!(number(&bench, sql) < 1e-12);
}

#[test]
fn dsir_takes_the_mean_of_the_bags() {
    let bench = Bench::new();
    let dsir = ["--set", "windows.bytes=4096", "--set", "train={model: slm-1m, context: 64, tokens: 6k, methods: [dsir]}"];
    let report = run(&bench, &[&dsir, &MIXTURE[..2], &["--until", "shard"]]);
    assert!(report["checksums"]["shards/both.dsir"].is_string(), "{report}");
    let sql = "SELECT max(abs(b.p_domain - 0.75 * s.p_domain - 0.25 * m.p_domain)) AS n, count(*) AS buckets FROM dsir_ratios b \
               JOIN dsir_ratios s ON s.bucket = b.bucket AND s.domain = 'sacred' \
               JOIN dsir_ratios m ON m.bucket = b.bucket AND m.domain = 'music' WHERE b.domain = 'both'";
    let row = &bench.query(sql)[0];
    assert!(row["n"].as_f64().unwrap() < 1e-15 && row["buckets"] == 10_000, "{row}");
}

#[test]
fn a_mixture_is_a_row_of_the_comparison() {
    let bench = Bench::new();
    let train = "train={model: slm-1m, context: 64, tokens: 4k, methods: [slm, slm-is, slm-pn, slm-nopt], levels: [1, 2], \
                 experts: {levels: [1], choices: [mixture]}}";
    let settings = [&BY_CLUSTER[..], &MIXTURE, &["--set", train, "--set", "finetune={tokens: 2k}"]].concat();
    let without = run(&bench, &[&BY_CLUSTER, &["--run-dir", "without"]])["checksums"]["shards/corpus"].clone();
    let report = run(&bench, &[&settings]);
    check_tables(&bench);
    assert_eq!(report["checksums"]["shards/corpus"], without);
    let rows = report["results"].as_array().unwrap();
    let count = |method: &str| rows.iter().filter(|r| r["domain"] == "both" && r["method"] == method).count();
    assert_eq!(["slm", "slm-is", "slm-pn", "slm-nopt"].map(count), [2, 4, 2, 1], "{rows:?}");
    assert!(rows.iter().all(|row| row["perplexity"].as_f64().is_some_and(f64::is_finite)));
    assert_eq!(redone(&run(&bench, &[&settings])), [""; 0]);
    project(&bench);

    // Its own models depend on its proportions, and nobody else's: a model for each of two levels, and a projection.
    let names = |stage: &str| std::fs::read_dir(bench.path("runs/small").join(stage)).unwrap().count();
    let before = ["train", "project"].map(names);
    let other = [&settings[..], &["--set", "domains.both={mixture: {sacred: 1, music: 2}}"]].concat();
    let planned = bench.call(&[&["plan", "p.yaml", "--json"], &other[..]].concat()).json();
    assert_eq!(redone(&planned), ["histogram", "weigh", "resample", "train", "finetune", "eval"]);
    let changed = run(&bench, &[&other]);
    assert_eq!(redone(&changed), ["histogram", "weigh", "resample", "train", "finetune", "eval"]);
    assert_eq!(["train", "project"].map(names), [before[0] + 2, before[1] + 1]);
}

/// The projection of the network of the run before to the mixture, at an inner level.
fn project(bench: &Bench) {
    let trained = std::fs::read_dir(bench.path("runs/small/train")).unwrap().flatten().map(|e| e.path());
    let network = trained.into_iter().find(|p| p.to_string_lossy().contains("slm-pn")).unwrap().join("checkpoint");
    let arguments = ["--run", "runs/small", "--domain", "both", "--choice", "mixture", "--out", "mixed", "--json"];
    let found = bench.call(&[&["project", &network.to_string_lossy()], &arguments[..]].concat()).json();
    let sql = format!(
        "SELECT c.parent_id, sum(e.share) AS share FROM {EXPECTED} e JOIN clusters c ON c.cluster_id = e.cluster_id \
         GROUP BY c.parent_id ORDER BY c.parent_id"
    );
    let expected = bench.query(&sql);
    assert_eq!(expected.len(), 3);
    for (found, row) in found["shares"].as_array().unwrap().iter().zip(&expected) {
        assert!((found.as_f64().unwrap() - row["share"].as_f64().unwrap()).abs() < 1e-12, "{found} for {row}");
    }
}
