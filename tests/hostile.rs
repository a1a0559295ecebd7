//! Broken inputs: each has a clear error and leaves nothing half-written.

use std::os::unix::fs::PermissionsExt;
use std::process::Stdio;
use std::sync::Arc;

use arrow::array::{Int64Array, StringArray};

use crate::bench::{Bench, corpus, text, unfinished};

/// Runs `p.yaml` after `break_it`, and expects a failure with all of `said`; then nothing is half-written.
fn refuses(code: i32, said: &[&str], break_it: impl FnOnce(&Bench) -> Vec<String>) {
    let bench = Bench::new();
    let more = break_it(&bench);
    let more: Vec<&str> = more.iter().map(String::as_str).collect();
    let called = bench.call(&[&["run", "p.yaml", "--until", "shard"], &more[..]].concat());
    assert_eq!(called.code, code, "{}", called.stderr);
    for part in said {
        assert!(called.stderr.contains(part), "`{part}` is not in:\n{}", called.stderr);
    }
    assert!(called.stderr.contains("hint: "), "{}", called.stderr);
    assert!(unfinished(&bench.path("runs")).is_empty());
    assert!(!bench.path("runs/small/shards/music/manifest.json").exists());
}

fn set(overlays: &[&str]) -> Vec<String> {
    overlays.iter().flat_map(|o| ["--set".to_owned(), o.to_string()]).collect()
}

#[test]
fn an_unknown_key_names_the_nearest() {
    refuses(2, &["--set resample.tokns=5: unknown key `tokns`", "did you mean `tokens`?"], |_| set(&["resample.tokns=5"]));
}

#[test]
fn a_missing_column_lists_the_others() {
    refuses(1, &["bad.parquet", "there is no column `text`", "`body`"], |bench| {
        bench.write_parquet("corpus/bad.parquet", &[("body", Arc::new(StringArray::from(vec!["a"])))]);
        vec![]
    });
}

#[test]
fn check_finds_every_file_that_lacks_a_column() {
    let bench = Bench::new();
    bench.write_parquet("corpus/bad.parquet", &[("body", Arc::new(StringArray::from(vec!["a"])))]);
    bench.write("music/train.jsonl", "{\"content\": \"a\", \"title\": \"b\"}\nno json\n");
    bench.write("corpus/worse.parquet", "this is no Parquet file at all");
    let called = bench.call(&["check", "p.yaml", "--set", "train={model: slm-4m, tokens: 1M}"]);
    assert_eq!(called.code, 2);
    assert!(called.stderr.contains("--set train={model: slm-4m, tokens: 1M}: unknown model `slm-4m`"), "{}", called.stderr);
    let called = bench.call(&["check", "p.yaml"]);
    assert_eq!(called.code, 1);
    for said in [
        "error: corpus/bad.parquet: there is no column `text`\n\nhint: the columns are `body`; ",
        "error: corpus/worse.parquet: not a whole Parquet file",
        "error: music/train.jsonl: there is no column `text`\n\nhint: the columns are `content`, `title`; ",
    ] {
        assert!(called.stderr.contains(said), "`{said}` is not in:\n{}", called.stderr);
    }
    assert!(!bench.path("runs").exists());
}

#[test]
fn a_column_of_numbers_is_no_text() {
    refuses(1, &["bad.parquet", "the column `text` holds Int64, not text", "`other`"], |bench| {
        let columns: [(&str, arrow::array::ArrayRef); 2] =
            [("text", Arc::new(Int64Array::from(vec![1]))), ("other", Arc::new(StringArray::from(vec!["a"])))];
        bench.write_parquet("corpus/bad.parquet", &columns);
        vec![]
    });
}

#[test]
fn an_empty_corpus_and_an_empty_domain() {
    refuses(1, &["all.jsonl", "the corpus holds no documents"], |bench| {
        bench.write("corpus/all.jsonl", "");
        vec![]
    });
    refuses(1, &["music/test.parquet", "`domains.music.test` holds no documents"], |bench| {
        bench.write_texts("music/test.parquet", &[]);
        set(&["domains.music.test=music/test.parquet"])
    });
    refuses(1, &["`domains.music.train` holds no documents"], |bench| {
        bench.write("music/train.jsonl", "\n\n");
        vec![]
    });
    refuses(1, &["`domains.music.test`", "holds no text"], |bench| {
        bench.write("music/test.jsonl", "{\"text\": 5}\n{\"text\": null}\n");
        vec![]
    });
    refuses(
        1,
        &["music/test.jsonl", "3 of 4 rows of `domains.music.test` cannot be used", "row 1: line 2: not a JSON"],
        |bench| {
            bench.write("music/test.jsonl", "{\"text\": \"a\"}\nb\nc\nd\n");
            vec![]
        },
    );
    refuses(1, &["corpus/all.jsonl.gz:1:1: the file is damaged: invalid gzip header"], |bench| {
        std::fs::rename(bench.path("corpus/all.jsonl"), bench.path("corpus/all.jsonl.gz")).unwrap();
        vec![]
    });
    refuses(2, &["p.yaml:3:18", "`corpus` holds no readable file"], |bench| {
        std::fs::remove_file(bench.path("corpus/all.jsonl")).unwrap();
        vec![]
    });
}

#[test]
fn rows_of_another_kind_may_come_first_and_a_pipe_is_no_file() {
    let bench = Bench::new();
    let more = "{\"meta\": 1}\n".repeat(4);
    let lines = more.clone() + &std::fs::read_to_string(bench.path("corpus/all.jsonl")).unwrap();
    bench.write("corpus/all.jsonl", lines);
    bench.write("corpus/meta.jsonl", more.repeat(30));
    let called = bench.call(&["run", "p.yaml", "--until", "windows", "--set", "corpus.max_reject_share=0.5"]);
    assert_eq!(called.code, 0, "{}", called.stderr);
    let made = std::process::Command::new("mkfifo").arg(bench.path("corpus/pipe.jsonl")).status();
    assert!(made.is_ok_and(|status| status.success()));
    let called = bench.call(&["check", "p.yaml"]);
    assert!(called.code == 2 && called.stderr.contains("pipe.jsonl` is not a file"), "{}", called.stderr);
}

#[test]
fn an_empty_file_beside_good_ones_is_no_obstacle() {
    let bench = Bench::new();
    bench.write("corpus/empty.jsonl", "");
    let called = bench.call(&["run", "p.yaml"]);
    assert_eq!(called.code, 0, "{}", called.stderr);
}

#[test]
fn a_domain_that_the_corpus_has_nothing_of_is_refused_each_time() {
    let bench = Bench::new();
    let far = ["--set", "weigh.temperature=0.0001"];
    for _ in 0..2 {
        let called = bench.call(&[&["run", "p.yaml"], &far[..]].concat());
        assert_eq!(called.code, 2);
        assert!(called.stderr.contains("raise `weigh.temperature`"), "{}", called.stderr);
    }
}

#[test]
fn a_budget_that_would_repeat_the_corpus_a_thousand_times() {
    refuses(1, &["stage `resample`", "would repeat a cluster"], |_| set(&["resample.tokens=10G"]));
}

#[test]
fn a_truncated_parquet_file_and_one_with_wrong_magic() {
    refuses(1, &["cut.parquet", "not a whole Parquet file"], |bench| {
        bench.write_texts("corpus/cut.parquet", &corpus());
        let whole = std::fs::read(bench.path("corpus/cut.parquet")).unwrap();
        bench.write("corpus/cut.parquet", &whole[..whole.len() / 2]);
        vec![]
    });
    refuses(1, &["magic.parquet", "not a whole Parquet file"], |bench| {
        bench.write("corpus/magic.parquet", "this is no Parquet file at all");
        vec![]
    });
    refuses(1, &["torn.parquet", "stage `embed`"], |bench| {
        bench.write_texts("corpus/torn.parquet", &corpus());
        let mut torn = std::fs::read(bench.path("corpus/torn.parquet")).unwrap();
        let middle = torn.len() / 3;
        torn[middle..middle + 400].fill(0xA5);
        bench.write("corpus/torn.parquet", torn);
        vec![]
    });
}

#[test]
fn bad_lines_are_listed_and_too_many_of_them_stop_the_run() {
    let bench = Bench::new();
    bench.write(
        "corpus/bad.jsonl",
        b"{\"text\": \"a good one\"}\nno json\n{\"text\": \"\xff\xfe\"}\n{\"text\": null}\n{\"text\": \"\"}\n",
    );
    let called = bench.call(&["run", "p.yaml"]);
    assert_eq!(called.code, 0, "{}", called.stderr);
    assert!(called.stderr.contains("4 rows of `corpus` cannot be used"), "{}", called.stderr);
    let listed = bench.query("SELECT \"row\", reason FROM rejects ORDER BY \"row\"");
    let listed: Vec<String> = listed.iter().map(|r| format!("{} {}", r["row"], r["reason"].as_str().unwrap())).collect();
    assert_eq!(
        listed,
        [
            "1 line 2: not a JSON object: expected ident, at column 2",
            "2 line 3: invalid UTF-8 at byte 11",
            "3 the text is null",
            "4 the text is empty",
        ]
    );
    refuses(1, &["rows of `corpus` cannot be used", "bad.jsonl", "line 1: not a JSON object", "1.00% are allowed"], |bench| {
        bench.write("corpus/bad.jsonl", "no json\n".repeat(50));
        vec![]
    });
}

#[test]
fn more_clusters_than_windows() {
    refuses(2, &["stage `cluster`", "5000 clusters need at least as many windows", "lower `cluster.k`"], |_| {
        set(&["cluster.k=5000"])
    });
}

#[test]
fn a_budget_that_the_corpus_cannot_meet() {
    refuses(1, &["stage `resample`", "10M are asked for", "lower `resample.tokens`"], |_| {
        set(&["resample.tokens=10M", "weigh.max_epochs=2"])
    });
}

#[test]
fn a_run_directory_that_cannot_be_written() {
    refuses(1, &["cannot write", "name another folder"], |bench| {
        bench.write("blocked", "a file where a folder should be");
        vec!["--run-dir".into(), "blocked/run".into()]
    });
}

#[test]
fn a_full_disk() {
    let probe = std::process::Command::new("unshare").args(["--user", "--map-root-user", "--mount", "true"]).status();
    if !probe.is_ok_and(|status| status.success()) {
        eprintln!("NOT TESTED: a full disk, because this machine grants no user namespaces");
        return;
    }
    let bench = Bench::new();
    std::fs::create_dir(bench.path("disk")).unwrap();
    // A file system of 256 KB that only this call sees; it is gone when the call ends.
    let script = format!(
        "mount -t tmpfs -o size=256k none disk && {} run p.yaml --run-dir disk/run; code=$?; find disk -name '.unfinished*'; exit $code",
        env!("CARGO_BIN_EXE_trommel")
    );
    let mut call = std::process::Command::new("unshare");
    let output =
        call.args(["--user", "--map-root-user", "--mount", "sh", "-c", &script]).current_dir(bench.path("")).output().unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("cannot write") && stderr.contains("free some space"), "{stderr}");
    assert!(output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stdout));
}

#[test]
fn two_runs_of_one_directory() {
    let bench = Bench::new();
    std::fs::create_dir_all(bench.path("runs/small")).unwrap();
    let lock = std::fs::File::create(bench.path("runs/small/.lock")).unwrap();
    lock.lock().unwrap();
    let called = bench.call(&["run", "p.yaml"]);
    assert_eq!(called.code, 1);
    assert!(called.stderr.contains("another `trommel` is working in this folder"), "{}", called.stderr);
    drop(lock);
    assert_eq!(bench.call(&["run", "p.yaml", "--until", "windows"]).code, 0);
}

#[test]
fn a_model_folder_of_the_wrong_architecture() {
    refuses(2, &["LlamaForCausalLM"], |bench| {
        bench.write("model/config.json", r#"{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}"#);
        set(&["embed.model=model"])
    });
    refuses(2, &["--set embed.model=nowhere: `nowhere` is not a folder"], |_| set(&["embed.model=nowhere"]));
}

#[test]
fn a_single_document_of_200_megabytes() {
    let bench = Bench::new();
    let paragraph = text(1, 5, 400) + "\n";
    bench.write_lines("corpus/long.jsonl", &[paragraph.repeat(200_000_000 / paragraph.len())]);
    let called = bench.call(&["run", "p.yaml", "--set", "windows.bytes=4096", "--until", "resample"]);
    assert_eq!(called.code, 0, "{}", called.stderr);
    let windows = &bench.query("SELECT count(*) AS n, max(byte_len) AS longest FROM windows WHERE file LIKE '%long%'")[0];
    assert!(windows["n"].as_u64().unwrap() > 48_000 && windows["longest"].as_u64().unwrap() <= 4096, "{windows}");
}

/// Two files at a time are sorted, and their texts are more than all sorts together may hold in memory.
#[test]
fn files_whose_windows_do_not_fit_in_memory() {
    let bench = Bench::new();
    let documents = |file: usize| {
        let words = text(file, 0, 1_000);
        // Long documents between those of one window, all of them different, and longer than the 12 bytes that a view holds.
        let document =
            |i: usize| if i.is_multiple_of(2) { format!("{i} a document of one window") } else { format!("{i} {words}") };
        (0..40_000).map(document).collect::<Vec<_>>()
    };
    (0..2).for_each(|file| bench.write_texts(&format!("corpus/{file}.parquet"), &documents(file)));
    let until = ["run", "p.yaml", "--until", "resample", "--set", "shard.by=cluster", "--json"];
    let called = bench.call(&until);
    assert_eq!(called.code, 0, "{}", called.stderr);
    let counts =
        bench.query("SELECT (SELECT count(*) FROM windows WHERE source = 'corpus') - (SELECT count(*) FROM draws) AS lost");
    assert_eq!(counts[0]["lost"], 0);
}

/// The files' samples together are more than a query may hold in memory.
#[test]
fn many_files_with_full_samples() {
    let bench = Bench::new();
    let paragraph = text(1, 7, 100_000) + "\n";
    for file in 0..6 {
        let document = |i: usize| format!("{file} {i} {}", paragraph.repeat(34_000_000 / 8 / paragraph.len()));
        bench.write_texts(&format!("corpus/{file}.parquet"), &(0..8).map(document).collect::<Vec<_>>());
    }
    let called = bench.call(&["run", "p.yaml", "--until", "resample", "--set", "windows.bytes=65536"]);
    assert_eq!(called.code, 0, "{}", called.stderr);
    let sampled = &bench.query("SELECT count(top_terms) AS described FROM clusters WHERE cardinality(top_terms) > 0")[0];
    assert!(sampled["described"].as_u64().unwrap() > 0, "{sampled}");
}

/// Each thread that reads files keeps memory for a while.
#[test]
#[cfg(target_os = "linux")]
fn many_files_take_no_more_threads() {
    let bench = Bench::new();
    corpus().chunks(10).enumerate().for_each(|(file, texts)| bench.write_lines(&format!("corpus/{file}.jsonl"), texts));
    let mut command = bench.command(&["--threads", "2", "run", "p.yaml", "--until", "shard"]);
    let mut run = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    let mut most = 0;
    let ended = loop {
        let status = std::fs::read_to_string(format!("/proc/{}/status", run.id())).unwrap_or_default();
        let threads = status.lines().find_map(|line| line.strip_prefix("Threads:")?.trim().parse().ok());
        most = most.max(threads.unwrap_or(0));
        if let Some(ended) = run.try_wait().unwrap() {
            break ended;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    };
    assert!(ended.success() && (1..30).contains(&most), "{most} threads for 61 files, {ended}");
}

#[test]
fn a_folder_without_permission() {
    // The superuser may write everywhere, so this needs a user who may not.
    let bench = Bench::new();
    std::fs::create_dir(bench.path("closed")).unwrap();
    std::fs::set_permissions(bench.path("closed"), std::fs::Permissions::from_mode(0o500)).unwrap();
    if std::fs::write(bench.path("closed/probe"), "").is_ok() {
        std::fs::remove_file(bench.path("closed/probe")).unwrap();
    } else {
        let called = bench.call(&["run", "p.yaml", "--run-dir", "closed/run"]);
        assert!(called.code == 1 && called.stderr.contains("make the directory writable"), "{}", called.stderr);
    }
    std::fs::set_permissions(bench.path("closed"), std::fs::Permissions::from_mode(0o700)).unwrap();
}
