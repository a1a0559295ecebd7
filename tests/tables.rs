//! The tables of a run directory, as SQL sees them.

use crate::bench::{Bench, corpus};

/// Table and columns of the contract, in `DESIGN.md`.
const CONTRACT: [(&str, &str); 10] = [
    ("corpus", "text, file, \"row\""),
    ("domains", "text, file, \"row\", domain, split"),
    ("assignments", "document, window, file, \"row\", byte_start, byte_len, cluster_id, distance, source"),
    ("clusters", "cluster_id, parent_id, level, windows, bytes, centroid, mean_distance, top_terms"),
    ("histograms", "domain, cluster_id, windows, bytes, share"),
    ("weights", "domain, cluster_id, p_domain, p_corpus, weight, expected_draws, epochs"),
    (
        "diagnostics",
        "domain, kl_before, kl_after, ess, ess_share, lost_mass, repeat_share, max_epochs, entropy, top_cluster_share",
    ),
    (
        "results",
        "domain, method, variant, seed, stage, perplexity, stderr, bits_per_byte, train_tokens, seconds, flops, generic_tokens, \
         generic_seconds, generic_flops",
    ),
    ("shards", "domain, shard, path, rows, tokens, bytes, checksum"),
    ("rejects", "file, \"row\", stage, reason"),
];

#[test]
fn every_table_of_the_contract_is_there_and_adds_up() {
    let bench = Bench::new();
    let called = bench.call(&["run", "p.yaml"]);
    assert_eq!(called.code, 0, "{}", called.stderr);
    for (table, columns) in CONTRACT {
        bench.query(&format!("SELECT {columns} FROM {table} LIMIT 1"));
    }
    let number = |sql: &str| bench.query(sql)[0]["n"].as_f64().unwrap();

    for (sql, expected) in [
        ("SELECT count(*) AS n FROM corpus", 600.0),
        ("SELECT count(*) AS n FROM domains WHERE split = 'test'", 16.0),
        ("SELECT count(DISTINCT document) AS n FROM assignments WHERE source = 'corpus'", 600.0),
        ("SELECT sum(windows) AS n FROM clusters", number("SELECT count(*) AS n FROM assignments WHERE source = 'corpus'")),
        ("SELECT sum(share) AS n FROM histograms", 3.0),
        ("SELECT sum(p_domain) AS n FROM weights WHERE domain = 'music'", 1.0),
        ("SELECT max(abs(weight - p_domain / p_corpus)) AS n FROM weights WHERE p_corpus > 0", 0.0),
        (
            "SELECT max(abs(w.epochs * h.windows - w.expected_draws)) AS n FROM weights w JOIN histograms h ON h.cluster_id = w.cluster_id AND h.domain = 'corpus'",
            0.0,
        ),
    ] {
        let found = number(sql);
        assert!((found - expected).abs() < 1e-9, "{found} for {sql}");
    }
    // The draws look like the domain: the divergence falls by an order of magnitude.
    for row in bench.query("SELECT domain, kl_before, kl_after, lost_mass FROM diagnostics") {
        let (before, after) = (row["kl_before"].as_f64().unwrap(), row["kl_after"].as_f64().unwrap());
        assert!(before > 0.3 && after < before / 10.0, "{row}");
        assert_eq!(row["lost_mass"], 0.0);
    }
    // Each window's text lies where its columns say.
    let sql = "SELECT count(*) AS n FROM assignments a JOIN corpus c ON c.file = a.file AND c.\"row\" = a.\"row\" \
               WHERE a.source = 'corpus' AND a.byte_start + a.byte_len <= octet_length(c.text)";
    assert_eq!(number(sql), number("SELECT count(*) AS n FROM assignments WHERE source = 'corpus'"));
}

#[test]
fn the_budget_is_met_within_one_window() {
    let bench = Bench::new();
    assert_eq!(bench.call(&["run", "p.yaml"]).code, 0);
    let shards =
        bench.query("SELECT domain, sum(tokens) AS tokens, count(*) AS shards FROM shards GROUP BY domain ORDER BY domain");
    assert_eq!(shards.len(), 2);
    for row in shards {
        let tokens = row["tokens"].as_u64().unwrap();
        // A window of 512 bytes has at most 512 tokens.
        assert!((20_000..20_512).contains(&tokens), "{row}");
        assert!(row["shards"].as_u64().unwrap() >= 2, "{row}");
    }
}

#[test]
fn sql_prints_tables_csv_json_and_parquet_and_names_mistakes() {
    let bench = Bench::new();
    assert_eq!(bench.call(&["run", "p.yaml", "--until", "histogram"]).code, 0);
    let sql = "SELECT domain, sum(windows) AS windows FROM histograms GROUP BY domain ORDER BY domain LIMIT 1";
    let shown = |format: &str| bench.call(&["sql", "p.yaml", "-c", sql, "--format", format]).stdout;
    assert!(shown("table").contains("| domain | windows |"), "{}", shown("table"));
    assert!(shown("csv").starts_with("domain,windows\ncorpus,"));
    assert!(shown("json").starts_with(r#"[{"domain":"corpus","windows":"#));
    let parquet = bench.command(&["sql", "p.yaml", "-c", sql, "--format", "parquet"]).output().unwrap().stdout;
    assert!(parquet.starts_with(b"PAR1") && parquet.ends_with(b"PAR1"));
    // A result without rows has its columns still.
    let nothing = |format: &str| {
        let sql = "SELECT domain, windows FROM histograms WHERE windows < 0";
        bench.call(&["sql", "p.yaml", "-c", sql, "--format", format]).stdout
    };
    assert!(nothing("table").contains("| domain | windows |"), "{}", nothing("table"));
    assert_eq!(nothing("csv"), "domain,windows\n");
    assert_eq!(nothing("json").trim(), "[]");
    // Stages that have not run give empty tables.
    assert!(bench.query("SELECT * FROM diagnostics").is_empty());
    let wrong = bench.call(&["sql", "p.yaml", "-c", "SELECT weight FROM histograms"]);
    assert_eq!(wrong.code, 1);
    assert!(wrong.stderr.contains("weight"), "{}", wrong.stderr);
    let nowhere = bench.call(&["sql", "nowhere", "-c", "SELECT 1"]);
    assert_eq!(nowhere.code, 2);
    assert!(nowhere.stderr.contains("not a run directory"), "{}", nowhere.stderr);
}

#[test]
fn a_query_reads_only() {
    let bench = Bench::new();
    assert_eq!(bench.call(&["run", "p.yaml", "--until", "weigh"]).code, 0);
    for sql in [
        "COPY weights TO 'out.csv'",
        "PREPARE p AS COPY weights TO 'out.csv'",
        "CREATE OR REPLACE TABLE weights AS SELECT 1",
        "DROP VIEW weights",
    ] {
        let called = bench.call(&["sql", "runs/small", "-c", sql]);
        let said = if sql.starts_with("PREPARE") { "Unsupported SQL" } else { "reads only" };
        assert!(called.code == 1 && called.stderr.contains(said), "{sql}: {}", called.stderr);
    }
    assert!(!bench.path("out.csv").exists());
}

#[test]
fn a_query_says_what_is_not_there() {
    let bench = Bench::new();
    assert_eq!(bench.call(&["run", "p.yaml"]).code, 0);
    assert_eq!(bench.call(&["run", "p.yaml", "--until", "weigh", "--set", "cluster.k=4"]).code, 0);
    let ask = |sql: &str| bench.call(&["sql", "runs/small", "-c", sql]);
    // The folder of shards is another plan's now.
    for (table, stage) in [("shards", "shard"), ("diagnostics", "resample")] {
        let called = ask(&format!("SELECT count(*) AS n FROM {table}"));
        assert!(called.code == 0 && called.stdout.contains("| 0 |"), "{}", called.stdout);
        assert!(
            called.stderr.contains(&format!("the table `{table}` is empty: stage `{stage}` has not run")),
            "{}",
            called.stderr
        );
    }
    for (sql, said) in [
        ("SELECT * FROM draws", "the table `draws` is not there: stage `resample` makes it"),
        ("SELECT * FROM dsir_scores", "in a run with the method `dsir`"),
        ("SELECT * FROM wieghts", "there is no table `wieghts`\n\nhint: the tables are: corpus, domains, windows, "),
        ("SELECT wieght FROM weights", "error: a query failed: No field named wieght. Did you mean 'weights.weight'?\n"),
        (
            "SELEC 1",
            "error: a query failed: sql parser error: Expected: an SQL statement, found: SELEC at Line: 1, Column: 1\n",
        ),
    ] {
        let called = ask(sql);
        assert!(called.code == 1 && called.stderr.contains(said), "`{said}` is not in:\n{}", called.stderr);
    }
    // A source that is new to a whole run is in some tables only.
    bench.write_lines("music/more.jsonl", &corpus()[..3]);
    let more = ["run", "p.yaml", "--until", "windows", "--set", "domains.more={train: music/more.jsonl}"];
    assert_eq!(bench.call(&more).code, 0);
    let called = ask("SELECT count(*) FROM assignments");
    assert!(
        called.code == 0 && called.stderr.contains("the table `assignments` is not whole: stage `assign`"),
        "{}",
        called.stderr
    );
    let listed = ask("SHOW TABLES").stdout;
    assert!(["corpus", "domains", "weights"].iter().all(|table| listed.contains(&format!(" {table} "))), "{listed}");
    assert!(
        ["tree", "weigh", "rates", "cluster_statistics"].iter().all(|table| !listed.contains(&format!(" {table} "))),
        "{listed}"
    );
}

#[test]
fn documents_that_changed_are_not_joined_with_old_windows() {
    let bench = Bench::new();
    assert_eq!(bench.call(&["run", "p.yaml", "--until", "weigh"]).code, 0);
    let ask = |sql: &str| bench.call(&["sql", "runs/small", "-c", sql]);
    bench.write_lines("corpus/all.jsonl", &corpus()[1..]);
    let sql = "SELECT count(*) FROM assignments a JOIN corpus c ON c.file = a.file AND c.\"row\" = a.\"row\"";
    let changed = ask(sql);
    assert_eq!(changed.code, 1);
    assert!(changed.stderr.contains("corpus/all.jsonl: the file has changed since the run read it"), "{}", changed.stderr);
    std::fs::remove_file(bench.path("music/train.jsonl")).unwrap();
    let gone = ask("SELECT * FROM domains");
    assert!(gone.code == 1 && gone.stderr.contains("music/train.jsonl: cannot read the file"), "{}", gone.stderr);
    for sql in ["SELECT * FROM weights", "SHOW TABLES"] {
        assert_eq!(ask(sql).code, 0, "{sql}");
        assert_eq!(bench.call(&["sql", "p.yaml", "-c", sql]).code, 0, "{sql}");
    }
}

#[test]
fn queries_from_a_pipe_stop_at_the_first_that_fails() {
    let bench = Bench::new();
    assert_eq!(bench.call(&["run", "p.yaml", "--until", "weigh"]).code, 0);
    let piped = |queries: &str| {
        bench.write("queries.sql", queries);
        let mut command = bench.command(&["sql", "runs/small"]);
        let output = command.stdin(std::fs::File::open(bench.path("queries.sql")).unwrap()).output().unwrap();
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let (code, shown) = piped("SELECT count(*) AS one FROM weights;\nSELECT nothing;\nSELECT 1 AS three;\n");
    assert!(code == Some(1) && shown.contains("| one |") && !shown.contains("| three |"), "{shown}");
    // Several on one line, a comment behind, and the last one without an end.
    let (code, shown) = piped("SELECT 1 AS one; SELECT 2 AS two; -- done\nSELECT 3 AS three\n");
    assert!(code == Some(0) && ["one", "two", "three"].iter().all(|c| shown.contains(&format!("| {c} "))), "{shown}");
    assert_eq!(piped("SELECT nothing").0, Some(1));
}

#[test]
fn a_run_learns_its_table_once() {
    let bench = Bench::new();
    let run = |more: &[&str]| {
        bench.call(&[&["run", "p.yaml", "--until", "weigh", "--set", "embed.model=learnt", "--json"], more].concat())
    };
    let tables = || -> Vec<_> {
        let folder = std::fs::read_dir(bench.path("runs/small/embed")).unwrap().map(|entry| entry.unwrap().path());
        folder.filter(|path| path.is_dir()).collect()
    };
    let first = run(&[]);
    let weights = first.json()["checksums"]["weights"].clone();
    assert!(first.stderr.contains("learnt an embedding table from"), "{}", first.stderr);
    let table = tables();
    assert_eq!(table.len(), 1);
    // The 44 words of the corpus fill no 240 dimensions.
    assert!(bench.query("SELECT max(cardinality(embedding)) AS n FROM embeddings")[0]["n"].as_u64().unwrap() < 60);
    let again = run(&[]);
    assert!(!again.stderr.contains("learnt an embedding table"), "{}", again.stderr);
    // A run that was stopped after the table ends with the same weights, and needs no other table.
    std::fs::remove_dir_all(bench.path("runs/small/assign")).unwrap();
    for entry in std::fs::read_dir(bench.path("runs/small/embed")).unwrap().map(|entry| entry.unwrap().path()) {
        if entry.is_file() {
            std::fs::remove_file(entry).unwrap();
        }
    }
    let resumed = run(&[]);
    assert!(resumed.json()["checksums"]["weights"] == weights && !resumed.stderr.contains("learnt an embedding table"));
    // One that was stopped while the table was written learns it again, in its place, whatever the domains.
    std::fs::remove_file(table[0].join("static_table.safetensors")).unwrap();
    let domain = run(&["--set", "domains.other={train: music/test.jsonl}"]);
    assert!(domain.code == 0 && domain.stderr.contains("learnt an embedding table"), "{}", domain.stderr);
    assert_eq!(tables(), table);
    // However the corpus is split and on however many threads.
    std::fs::remove_dir_all(bench.path("corpus")).unwrap();
    bench.write_lines("corpus/b.jsonl", &corpus()[..100]);
    bench.write_lines("corpus/a.jsonl", &corpus()[100..]);
    assert_eq!(run(&["--threads", "1"]).json()["checksums"]["weights"], weights);
}

#[test]
fn a_table_learnt_from_the_corpus_embeds_it() {
    let bench = Bench::new();
    let fit = |out: &str| bench.call(&["fit-embedder", "corpus", out, "--dimensions", "16", "--window-bytes", "400"]);
    let fitted = fit("table");
    assert_eq!(fitted.code, 0, "{}", fitted.stderr);
    let twice = fit("table");
    assert!(twice.code == 2 && twice.stderr.contains("table: there is something already"), "{}", twice.stderr);
    assert!(fitted.stdout.contains("0 rows were left out") && fitted.stdout.contains("16 dimensions"), "{}", fitted.stdout);
    // However the corpus is split, the table has the same bytes.
    let (first, second) = (&corpus()[..100], &corpus()[100..]);
    bench.write_lines("other/b.jsonl", first);
    bench.write_lines("other/a.jsonl", second);
    let other = bench.call(&["fit-embedder", "other", "again", "--dimensions", "16", "--window-bytes", "400"]);
    assert_eq!(other.code, 0, "{}", other.stderr);
    let table = |folder: &str| std::fs::read(bench.path(folder).join("static_table.safetensors")).unwrap();
    assert!(table("table") == table("again"));

    let called = bench.call(&["run", "p.yaml", "--until", "weigh", "--set", "embed.model=table"]);
    assert_eq!(called.code, 0, "{}", called.stderr);
    let longest = &bench.query("SELECT max(cardinality(embedding)) AS n FROM embeddings")[0];
    assert_eq!(longest["n"], 16);

    bench.write_lines("blank/none.jsonl", &[]);
    let blank = bench.call(&["fit-embedder", "blank", "large"]);
    assert_eq!(blank.code, 1);
    assert!(blank.stderr.contains("no text") && !bench.path("large").exists(), "{}", blank.stderr);
    let nothing = bench.call(&["fit-embedder", "nowhere", "large"]);
    assert_eq!(nothing.code, 2, "{}", nothing.stderr);
}

#[test]
fn a_damaged_file_is_named_and_made_anew() {
    let bench = Bench::new();
    bench.checksums(&[]);
    let count = ["sql", "runs/small", "-c", "SELECT count(DISTINCT document) AS n FROM assignments"];
    let whole = bench.call(&count).stdout;
    let assignments = std::fs::read_dir(bench.path("runs/small/assign")).unwrap().next().unwrap().unwrap().path();
    let content = std::fs::read(&assignments).unwrap();
    for broken in [Some(&content[..content.len() / 2]), None] {
        match broken {
            Some(content) => std::fs::write(&assignments, content).unwrap(),
            None => std::fs::remove_file(&assignments).unwrap(),
        }
        let called = bench.call(&count);
        let name = assignments.file_name().unwrap().to_str().unwrap();
        assert!(called.code == 1 && called.stderr.contains(name) && called.stderr.contains("made anew"), "{}", called.stderr);
    }
    assert_eq!(bench.call(&["run", "p.yaml"]).code, 0);
    assert_eq!(bench.call(&count).stdout, whole);
}
