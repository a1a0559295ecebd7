//! Shards by cluster, and what is trained on them: every method, projected networks, expert choice.

use std::thread::sleep;
use std::time::Instant;

use serde_json::Value;

use crate::bench::{Bench, corpus};

/// Two levels of clusters, shards by cluster.
const BY_CLUSTER: [&str; 6] =
    ["--set", "cluster={levels: [3, 2]}", "--set", "shard.by=cluster", "--set", "shard.shard_tokens=4k"];

fn run(bench: &Bench, more: &[&str]) -> Value {
    bench.call(&[&["run", "p.yaml", "--json"], &BY_CLUSTER[..], more].concat()).json()
}

#[test]
fn one_folder_holds_the_whole_corpus_by_cluster() {
    let bench = Bench::new();
    let report = run(&bench, &[]);
    let number = |sql: &str| bench.query(sql)[0]["n"].as_u64().unwrap();
    assert_eq!(
        number("SELECT sum(rows) AS n FROM shards"),
        number("SELECT count(*) AS n FROM assignments WHERE source = 'corpus'")
    );
    assert_eq!(number("SELECT count(DISTINCT domain) AS n FROM shards"), 1);
    // Each file holds one cluster, and the manifest says which.
    let folder = bench.path("runs/small/shards/corpus");
    let manifest: Value = serde_json::from_slice(&std::fs::read(folder.join("manifest.json")).unwrap()).unwrap();
    let mut rows = std::collections::BTreeMap::new();
    for shard in manifest["shards"].as_array().unwrap() {
        let cluster = shard["cluster_id"].as_u64().unwrap();
        *rows.entry(cluster).or_insert(0) += shard["rows"].as_u64().unwrap();
        assert!(shard["path"].as_str().unwrap().starts_with(&format!("{cluster:08}-")), "{shard}");
    }
    for row in bench.query("SELECT cluster_id, windows FROM histograms WHERE domain = 'corpus' AND windows > 0") {
        assert_eq!(rows.remove(&row["cluster_id"].as_u64().unwrap()), row["windows"].as_u64(), "{row}");
    }
    assert!(rows.is_empty(), "{rows:?}");
    // The diagnostics plan what training will draw.
    for row in bench.query("SELECT kl_before, kl_after, repeat_share FROM diagnostics") {
        assert!(row["kl_after"].as_f64().unwrap() < row["kl_before"].as_f64().unwrap() / 10.0, "{row}");
        assert!((0.0..=1.0).contains(&row["repeat_share"].as_f64().unwrap()), "{row}");
    }

    // Neither threads nor another split of the corpus change a byte, and a new domain finds the shards done.
    let expected = &report["checksums"];
    assert_eq!(run(&bench, &["--threads", "1", "--run-dir", "one"])["checksums"], *expected);
    let more = run(&bench, &["--set", "domains.tables={train: sacred/test.jsonl}"]);
    assert_eq!(more["checksums"]["shards/corpus"], expected["shards/corpus"]);
    let stage = |name: &str| more["stages"].as_array().unwrap().iter().find(|s| s["stage"] == name).unwrap()["cached"].clone();
    assert_eq!((stage("weigh"), stage("shard")), (false.into(), true.into()));
    std::fs::remove_file(bench.path("corpus/all.jsonl")).unwrap();
    bench.write_lines("corpus/b.jsonl", &corpus()[..250]);
    bench.write_lines("corpus/a.jsonl", &corpus()[250..]);
    assert_eq!(run(&bench, &["--run-dir", "split"])["checksums"], *expected);
}

#[test]
fn a_killed_run_ends_like_an_undisturbed_one() {
    let bench = Bench::new();
    let start = Instant::now();
    let expected = run(&bench, &["--run-dir", "whole"])["checksums"].clone();
    let whole = start.elapsed();
    for i in 4..8 {
        let mut child = bench.command(&[&["run", "p.yaml", "--run-dir", "killed"], &BY_CLUSTER[..]].concat()).spawn().unwrap();
        sleep(whole * i / 8);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(run(&bench, &["--run-dir", "killed"])["checksums"], expected);
}

#[test]
fn every_method_trains_on_clusters_and_repeats_itself() {
    let bench = Bench::new();
    let train = "train={model: slm-1m, context: 64, tokens: 4k, methods: [slm, slm-is, slm-nopt, slm-pn, slm-mix, trunk-decay, llm, slm-d, lora, lora-mix], \
                 llm: slm-3m, levels: [1, 2], seeds: {slm: 2, slm-is: 2}, experts: {levels: [1], choices: [top-cluster, lowest-loss, mixture, best-tuned]}}";
    let settings = ["--set", train, "--set", "finetune={tokens: 2k}"];
    let report = run(&bench, &settings);
    let rows = report["results"].as_array().unwrap();
    let count = |method: &str, stage: &str| rows.iter().filter(|r| r["method"] == method && r["stage"] == stage).count();
    // For each of two domains; the second level of slm-is has the first seed only.
    for (method, models) in
        [("slm", 2), ("slm-is", 3), ("slm-pn", 4), ("lora-mix", 4), ("slm-mix", 1), ("trunk-decay", 1), ("llm", 1)]
    {
        assert_eq!((count(method, "pretrained"), count(method, "finetuned")), (2 * models, 2 * models), "{method}");
    }
    for method in ["slm-nopt", "slm-d", "lora"] {
        assert_eq!((count(method, "pretrained"), count(method, "finetuned")), (0, 2), "{method}");
    }
    for row in rows {
        assert!(row["perplexity"].as_f64().is_some_and(f64::is_finite), "{row}");
        let (all, generic) = (row["train_tokens"].as_u64().unwrap(), row["generic"]["tokens"].as_u64().unwrap());
        let method = row["method"].as_str().unwrap();
        assert_eq!(generic == 0, ["slm-is", "slm-nopt"].contains(&method), "{row}");
        assert!(generic <= all, "{row}");
        if method == "trunk-decay" && row["stage"] == "pretrained" {
            // Four fifths of the budget, up to the last step, are shared.
            assert!((0.7..0.9).contains(&(generic as f64 / all as f64)), "{row}");
        }
    }
    let again = run(&bench, &settings);
    assert!(again["stages"].as_array().unwrap().iter().all(|s| s["cached"] == true), "{again}");
    assert_eq!(again["results"], report["results"]);
    // Another domain leaves alone what the others are trained on.
    let made = |stage: &str| std::fs::read_dir(bench.path("runs/small").join(stage)).unwrap().count();
    let (before, tuned) = (made("train"), made("finetune"));
    run(&bench, &[&settings[..], &["--set", "domains.tables={train: sacred/train.jsonl, test: sacred/test.jsonl}"]].concat());
    // Three of slm-is and a decay; every start but slm-mix's once, three choices that may agree, and slm-nopt.
    assert_eq!(made("train") - before, 4);
    assert!(made("finetune") - tuned <= 21);
    let planned = bench.call(&[&["plan", "p.yaml", "--json"], &BY_CLUSTER[..], &settings].concat()).json();
    assert!(planned["stages"].as_array().unwrap().iter().all(|s| s["cached"] == true), "{planned}");
    project(&bench);
}

/// `trommel project` on the network of the run before.
fn project(bench: &Bench) {
    let trained = std::fs::read_dir(bench.path("runs/small/train")).unwrap().flatten().map(|e| e.path());
    let network = trained.into_iter().find(|p| p.to_string_lossy().contains("slm-pn")).unwrap().join("checkpoint");
    let network = network.to_string_lossy().into_owned();
    let project = |more: &[&str]| bench.call(&[&["project", &network, "--json"], more].concat());
    let of_domain = ["--run", "runs/small", "--domain", "music"];
    let top = project(&[&["--out", "top"], &of_domain[..]].concat()).json();
    let shares: Vec<f64> = top["shares"].as_array().unwrap().iter().map(|s| s.as_f64().unwrap()).collect();
    assert_eq!((shares.len(), shares.iter().sum::<f64>()), (3, 1.0));
    let expert = shares.iter().position(|s| *s == 1.0).unwrap().to_string();
    project(&["--out", "same", "--expert", &expert]).json();
    let weights = |out: &str| std::fs::read(bench.path(&format!("{out}/checkpoint/model.safetensors"))).unwrap();
    assert!(weights("top") == weights("same"));
    project(&[&["--out", "mixed", "--choice", "mixture"], &of_domain[..]].concat()).json();
    project(&["--out", "tried", "--choice", "lowest-loss", "--documents", "music/train.jsonl"]).json();
    let measured = bench.call(&["eval", "top/checkpoint", "music/test.jsonl", "--json"]).json();
    assert!(measured["perplexity"].as_f64().is_some_and(f64::is_finite));

    for (arguments, message) in [
        (vec!["--out", "top", "--expert", "0"], "there is a checkpoint already"),
        (vec!["--out", "x", "--expert", "3"], "no expert 3"),
        (vec!["--out", "x", "--run", "runs/small", "--domain", "tax"], "no domain `tax`"),
        (vec!["--out", "x"], "`--run` and `--domain`"),
        (vec!["--out", "x", "--choice", "lowest-loss"], "`--documents`"),
    ] {
        let refused = project(&arguments);
        assert!(refused.code == 2 && refused.stderr.contains(message) && refused.stderr.contains("hint"), "{}", refused.stderr);
        assert!(!bench.path("x").exists());
    }
    let plain = bench.call(&["project", "top/checkpoint", "--out", "x", "--expert", "0"]);
    assert!(plain.code == 2 && plain.stderr.contains("plain model"), "{}", plain.stderr);
    for command in [
        vec!["eval", &network, "music/test.jsonl"],
        vec!["finetune", &network, "music/train.jsonl", "--out", "x"],
        vec!["generate", &network],
        vec!["export", &network, "--format", "hf", "--out", "x"],
    ] {
        let refused = bench.call(&command);
        assert!(refused.code == 2 && refused.stderr.contains("trommel project"), "{command:?}: {}", refused.stderr);
        assert!(!bench.path("x").exists());
    }
}

#[test]
fn plans_that_contradict_themselves_are_refused_with_their_places() {
    let bench = Bench::new();
    let check = |more: &[&str]| bench.call(&[&["check", "p.yaml"], more].concat());
    let train = |rest: &str| format!("train={{model: slm-1m, tokens: 4k, {rest}}}");
    for (settings, message) in [
        (vec![train("methods: [slm-pn]")], "`slm-pn` draws clusters"),
        (vec![train("methods: [llm]")], "`llm` needs `train.llm`"),
        (vec![train("levels: [1]")], "levels need shards by cluster"),
        (vec![train("seeds: {llm: 2}")], "`llm` is not among"),
        (vec![train("methods: [slm, slm]")], "unique"),
        (vec![train("methods: [slm, slm-d]")], "`slm-d` is `slm` taught by `llm`"),
        (vec![train("methods: [slm-is, lora]"), "finetune={tokens: 1k}".into()], "`lora` adapts the model of `slm`"),
        (vec![train("methods: [slm, lora]"), "finetune={tokens: 1k, lora: {rank: 512}}".into()], "rank 512"),
        (vec!["finetune={tokens: 1k, learning_rate_multiplier: 0}".into()], "learning_rate_multiplier"),
        (vec![train("experts: {choices: [best-tuned]}")], "`best-tuned` needs fine-tuning"),
        (vec![train("experts: {levels: [3]}"), "shard.by=cluster".into()], "no level 3"),
        (vec![train("methods: [slm]"), "shard.by=cluster".into(), "weigh.max_epochs=2".into()], "drawn without a cap"),
    ] {
        let sets: Vec<&str> = settings.iter().flat_map(|s| ["--set", s.as_str()]).collect();
        let refused = check(&sets);
        assert!(refused.code == 2 && refused.stderr.contains(message), "{settings:?}: {}", refused.stderr);
    }
}

#[test]
fn each_way_of_sharding_has_its_own_diagnostics() {
    let bench = Bench::new();
    let diagnostics = |more: &[&str]| {
        assert_eq!(bench.call(&[&["run", "p.yaml", "--until", "resample"], more].concat()).code, 0);
        bench.query("SELECT * FROM diagnostics ORDER BY domain")
    };
    let by_domain = diagnostics(&[]);
    let by_cluster = diagnostics(&["--set", "shard.by=cluster"]);
    assert_ne!(by_domain, by_cluster);
    assert_eq!(diagnostics(&[]), by_domain);
    for row in by_domain.iter().chain(&by_cluster) {
        assert!(row["kl_after"].as_f64().unwrap() >= 0.0, "{row}");
    }
}
