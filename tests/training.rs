//! Training, fine-tuning, evaluation and generation from the command line.

use serde_json::Value;

use crate::bench::Bench;

const TRAIN: [&str; 4] = ["--set", "train={model: slm-1m, context: 64, tokens: 6k}", "--set", "finetune={tokens: 3k}"];

fn results(bench: &Bench, more: &[&str]) -> Value {
    bench.call(&[&["run", "p.yaml", "--json"], &TRAIN[..], more].concat()).json()
}

#[test]
fn a_run_compares_every_method_and_repeats_itself() {
    let bench = Bench::new();
    let report = results(&bench, &[]);
    let rows = report["results"].as_array().unwrap();
    // Per domain: generic and resampled before and after tuning, and the domain alone.
    assert_eq!(rows.len(), 10, "{report}");
    for row in rows {
        for figure in ["perplexity", "stderr", "bits_per_byte", "train_tokens", "seconds", "flops"] {
            assert!(row[figure].as_f64().is_some_and(|x| x.is_finite() && x > 0.0), "{figure} in {row}");
        }
        assert!(["slm", "slm-is", "slm-nopt"].contains(&row["method"].as_str().unwrap()));
        assert!(["pretrained", "finetuned"].contains(&row["stage"].as_str().unwrap()));
    }
    for key in ["weights", "shards/music", "shards/sacred", "shards/corpus"] {
        assert_eq!(report["checksums"][key].as_str().map(str::len), Some(16), "{key}");
    }
    let again = results(&bench, &[]);
    assert!(again["stages"].as_array().unwrap().iter().all(|s| s["cached"] == true), "{again}");
    assert_eq!(again["results"], report["results"]);
    let elsewhere = results(&bench, &["--run-dir", "elsewhere", "--threads", "1"]);
    let perplexities = |report: &Value| -> Vec<Value> {
        report["results"].as_array().unwrap().iter().map(|r| r["perplexity"].clone()).collect()
    };
    assert_eq!(perplexities(&elsewhere), perplexities(&report));
}

#[test]
fn the_trainer_runs_on_shards_alone() {
    let bench = Bench::new();
    assert_eq!(bench.call(&["run", "p.yaml"]).code, 0);
    bench.write("t.yaml", "name: alone\nshards: runs/small/shards/music\nmodel: slm-1m\ncontext: 64\ntokens: 4k\n");
    let trained = bench.call(&["train", "t.yaml", "--json"]).json();
    let checkpoint = trained["checkpoint"].as_str().unwrap();
    let before = bench.call(&["eval", checkpoint, "music/test.jsonl", "--json"]).json();
    let tuned = bench.call(&["finetune", checkpoint, "music/train.jsonl", "--tokens", "8k", "--out", "tuned", "--json"]).json();
    let after = bench.call(&["eval", tuned["checkpoint"].as_str().unwrap(), "music/test.jsonl", "--json"]).json();
    assert!(after["perplexity"].as_f64() < before["perplexity"].as_f64(), "{after} {before}");
    let prompt = ["generate", checkpoint, "--prompt", "the violin", "--max-tokens", "8"];
    let said = bench.call(&prompt);
    assert!(said.code == 0 && said.stdout.starts_with("the violin"), "{}", said.stderr);
    assert_eq!(bench.call(&prompt).stdout, said.stdout);
    let wrong = bench.call(&["train", "t.yaml", "--set", "model=slm-2m"]);
    assert!(wrong.code == 2 && wrong.stderr.contains("slm-1m"), "{}", wrong.stderr);
    let nowhere = bench.call(&["train", "t.yaml", "--set", "shards=nowhere"]);
    assert!(nowhere.code == 1 && nowhere.stderr.contains("manifest.json"), "{}", nowhere.stderr);
}
