//! The report of a run: one page that says what the run's tables say.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::Value;

use crate::bench::{Bench, unfinished};

/// Clusters of two levels, one seed or two, and methods with and without a shared cost.
const SETTINGS: [&str; 8] = [
    "--set",
    "cluster={levels: [3, 2]}",
    "--set",
    "shard={by: cluster, shard_tokens: 4k, tokenizer: {train: {vocab: 400}}}",
    "--set",
    "train={model: slm-600k, context: 64, tokens: 4k, methods: [slm, slm-is, slm-nopt, slm-pn], levels: [1, 2], \
     seeds: {slm: 2, slm-pn: 2}, experts: {levels: [1], choices: [top-cluster, mixture]}}",
    "--set",
    "finetune={tokens: 2k}",
];

fn run(bench: &Bench, more: &[&str]) -> Value {
    bench.call(&[&["run", "p.yaml", "--json"], &SETTINGS[..], more].concat()).json()
}

/// The page at `path`, as `read_html.py` sees it.
fn page(path: &Path) -> Value {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/read_html.py");
    let mut python = Command::new("python3")
        .arg(script)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    python.stdin.take().unwrap().write_all(&std::fs::read(path).unwrap()).unwrap();
    let output = python.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let page: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&page["scripts"], &page["addresses"]), (&0.into(), &Value::Array(Vec::new())));
    page
}

/// A report before anything is trained, and one of everything.
#[test]
fn a_report_says_what_the_run_has_found_and_what_is_missing() {
    let bench = Bench::new();
    run(&bench, &["--until", "embed"]);
    let called = bench.call(&["report", "runs/small"]);
    assert_eq!((called.code, called.stdout.trim()), (0, "runs/small/report.html"), "{}", called.stderr);
    let text = page(&bench.path("runs/small/report.html"))["text"].to_string();
    assert!(text.contains("no diagnostics") && text.contains("no results"), "{text}");
    assert_eq!(bench.query("SELECT count(*) AS n FROM results")[0]["n"], 0);

    let results = run(&bench, &[])["results"].as_array().unwrap().clone();
    assert_eq!(bench.call(&["report", "runs/small", "--out", "new/r.html"]).stdout.trim(), "new/r.html");
    let page = page(&bench.path("new/r.html"));
    let rows: Vec<Vec<String>> = serde_json::from_value(page["rows"].clone()).unwrap();
    let number = |row: &Value, column: &str| row[column].as_f64().unwrap();
    let text = |row: &Value, column: &str| row[column].as_str().unwrap_or_default().to_owned();

    // One seed: the figure of the run with its standard error.
    for row in results.iter().filter(|r| ["slm-is", "slm-nopt"].contains(&&*text(r, "method"))) {
        let figure = format!("{:.2} ± {:.2}", number(row, "perplexity"), number(row, "stderr"));
        let (variant, domain) = (text(row, "variant"), text(row, "domain"));
        assert!(rows.iter().any(|r| r[..2] == [variant.as_str(), &domain] && r.contains(&figure)), "{row}: {rows:?}");
    }
    // Two seeds on two domains, by hand.
    let loss = |method: &str, variant: &str, seed: u64| {
        let of_model = |r: &&Value| text(r, "method") == method && text(r, "variant") == variant && r["seed"] == seed;
        let found = results.iter().filter(of_model).filter(|r| r["stage"] == "finetuned");
        let losses: Vec<f64> = found.map(|r| number(r, "perplexity").ln()).collect();
        assert_eq!(losses.len(), 2);
        losses.iter().sum::<f64>() / 2.0
    };
    let (a, b) = (loss("slm", "", 3).exp(), loss("slm", "", 4).exp());
    let macro_average = format!("{:.2} ± {:.2}", (a + b) / 2.0, ((a - b).powi(2) / 2.0).sqrt());
    let overview = rows.iter().find(|r| r.len() == 10 && r[0] == "slm").unwrap();
    assert_eq!(overview[2..4], [macro_average.as_str(), "-"]);
    let slm = results.iter().find(|r| r["method"] == "slm" && r["stage"] == "finetuned").unwrap();
    assert_eq!(overview[4], format!("{:.2}M", number(&slm["generic"], "tokens") / 1e6));
    // One seed of another method, against the model of that seed.
    let variant = text(results.iter().find(|r| r["method"] == "slm-is").unwrap(), "variant");
    let difference = format!("{:+.3}", loss("slm-is", &variant, 3) - loss("slm", "", 3));
    let resampled = rows.iter().find(|r| r.len() == 10 && r[0] == format!("slm-is {variant}")).unwrap();
    assert_eq!(resampled[3], difference);

    // Every method is in the tables and in the charts; a network of each seed has two charts and its distances.
    let names: BTreeSet<String> =
        results.iter().map(|r| format!("{} {}", text(r, "method"), text(r, "variant")).trim().to_owned()).collect();
    assert_eq!(names.len(), 6);
    let charts: Vec<&str> = page["charts"].as_array().unwrap().iter().map(|c| c.as_str().unwrap()).collect();
    assert_eq!(charts.len(), 3 + 2 * 2 + 1);
    assert!(charts[7].contains("slm-pn level-1") && charts[7].contains("tokens per parameter"), "{}", charts[7]);
    for name in &names {
        assert!(rows.iter().any(|r| r[0] == *name), "{name}");
        assert!(charts[..2].iter().all(|chart| chart.contains(name.as_str())), "{name}");
    }
    assert!(charts[2].contains("slm-is") && charts[2].contains("clusters") && !charts[2].contains("slm-pn"), "{}", charts[2]);
    assert!(charts[3].contains("layer 2"), "{}", charts[3]);
    assert_eq!(rows.iter().filter(|r| **r == ["expert", "0", "1", "2"]).count(), 2);

    // The table holds what the run printed.
    let sql = "SELECT count(*) AS n, sum(perplexity) AS p, sum(train_tokens) AS t, sum(generic_flops) AS f FROM results";
    let table = &bench.query(sql)[0];
    let sum = |get: fn(&Value) -> &Value| results.iter().map(|r| get(r).as_f64().unwrap()).sum::<f64>();
    assert_eq!(table["n"], results.len());
    let sums = [sum(|r| &r["perplexity"]), sum(|r| &r["train_tokens"]), sum(|r| &r["generic"]["flops"])];
    for (column, sum) in ["p", "t", "f"].into_iter().zip(sums) {
        assert!((number(table, column) / sum - 1.0).abs() < 1e-9, "{column}: {table}");
    }
    // A plan that has not been compared has no results, whatever an earlier one had.
    run(&bench, &["--until", "shard", "--set", "seed=4"]);
    assert_eq!(bench.query("SELECT count(*) AS n FROM results")[0]["n"], 0);
}

#[test]
fn what_is_no_run_and_what_cannot_be_written_is_refused() {
    let bench = Bench::new();
    let refused = bench.call(&["report", "corpus"]);
    assert!(refused.code == 2 && refused.stderr.contains("corpus: not a run directory"), "{}", refused.stderr);
    assert!(refused.stderr.contains("hint: ") && !bench.path("corpus/report.html").exists(), "{}", refused.stderr);
    assert_eq!(bench.call(&["run", "p.yaml", "--until", "embed"]).code, 0);
    let refused = bench.call(&["report", "runs/small", "--out", "runs"]);
    assert!(refused.code == 1 && refused.stderr.contains("runs: cannot write"), "{}", refused.stderr);
    assert!(refused.stderr.contains("hint: name another file with `--out`"), "{}", refused.stderr);
    assert!(unfinished(&bench.path(".")).is_empty());
    bench.write("runs/small/catalog.json", "{");
    let refused = bench.call(&["report", "runs/small"]);
    assert!(refused.code == 1 && refused.stderr.contains("the catalog is damaged"), "{}", refused.stderr);
}
