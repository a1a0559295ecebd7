//! A spec whose files are found and whose contradictions are refused.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Serialize;
use trommel_core::error::Error;
use trommel_core::schema::CORPUS;

use crate::pipeline::{Choice, LEARNT, Method, Pipeline, ShardBy, Train};
use crate::validate;
use crate::yaml::{Document, escape};

/// What a run needs to know; nothing in it refers to YAML.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The spec, with defaults filled in.
    pub spec: Pipeline,
    /// The directory of all outputs.
    pub run_dir: PathBuf,
    /// The corpus.
    pub corpus: Source,
    /// The domains that have documents of their own, by name.
    pub domains: Vec<DomainSources>,
    /// The domains that are mixtures of those, by name.
    pub mixtures: Vec<Mixture>,
}

/// The files of one set of documents.
#[derive(Debug, Clone)]
pub struct Source {
    /// `corpus` or the domain's name.
    pub name: String,
    /// The files, sorted by path, at least one.
    pub files: Vec<PathBuf>,
    /// The column that holds the text.
    pub text: String,
    /// The column that identifies a document, or none for a hash of its text.
    pub id: Option<String>,
}

/// The two sets of a domain.
#[derive(Debug, Clone)]
pub struct DomainSources {
    /// For weights and fine-tuning.
    pub train: Source,
    /// For the final evaluation only.
    pub test: Option<Source>,
}

/// A domain that is made of others.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Mixture {
    /// Its name.
    pub name: String,
    /// The share of each domain in it; they sum to 1.
    pub shares: BTreeMap<String, f64>,
}

impl Mixture {
    fn new(name: &str, proportions: &BTreeMap<String, f64>) -> Mixture {
        let sum: f64 = proportions.values().sum();
        let shares = proportions.iter().map(|(domain, proportion)| (domain.clone(), proportion / sum)).collect();
        Mixture { name: name.to_owned(), shares }
    }
}

/// File name endings that can be read.
pub const EXTENSIONS: [&str; 10] =
    ["parquet", "jsonl", "jsonl.gz", "jsonl.zst", "ndjson", "ndjson.gz", "ndjson.zst", "json", "json.gz", "json.zst"];

/// Reads, checks and resolves a pipeline file; returns every mistake of shape or, where there is none, every other one. `more`
/// finds mistakes that only others know, each with the JSON pointer of its value.
pub fn load(
    file: &Path,
    overlays: &[String],
    run_dir: Option<&Path>,
    more: impl Fn(&Pipeline) -> Vec<(&'static str, Error)>,
) -> Result<Plan, Vec<Error>> {
    let document = read(file, overlays)?;
    let spec: Pipeline = validate::read(&document)?;
    let more = more(&spec).into_iter().map(|(pointer, error)| document.place(pointer, error));
    match (resolve(&document, spec, run_dir), more.collect::<Vec<_>>()) {
        (Ok(plan), more) if more.is_empty() => Ok(plan),
        (resolved, more) => Err(validate::in_file_order(resolved.err().into_iter().flatten().chain(more).collect())),
    }
}

/// Where the outputs of a pipeline file lie unless told otherwise; its sources may be gone.
pub fn run_dir(file: &Path) -> Result<PathBuf, Vec<Error>> {
    Ok(usual_run_dir(&validate::read(&read(file, &[])?)?))
}

fn usual_run_dir(spec: &Pipeline) -> PathBuf {
    Path::new("runs").join(&spec.name)
}

/// Reads a YAML file as a tree of values with positions.
pub fn read(file: &Path, overlays: &[String]) -> Result<Document, Vec<Error>> {
    let text = std::fs::read(file).map_err(|e| vec![Error::config("cannot read the file").file(file.display()).source(e)])?;
    let text = String::from_utf8(text).map_err(|_| vec![Error::config("the file is not UTF-8 text").file(file.display())])?;
    Document::parse(&file.display().to_string(), &text, overlays).map_err(|e| vec![e])
}

fn resolve(document: &Document, spec: Pipeline, run_dir: Option<&Path>) -> Result<Plan, Vec<Error>> {
    let mut mistakes = contradictions(document, &spec);
    let mut files = |pointer: &str, patterns: &[&String]| {
        let mut found = Vec::new();
        for (index, pattern) in patterns.iter().enumerate() {
            let pointer = if pointer == "/corpus/paths" { format!("{pointer}/{index}") } else { pointer.to_owned() };
            match find(pattern) {
                Ok(some) => found.extend(some),
                Err((message, hint)) => mistakes.push(document.error(&pointer, message).hint(hint)),
            }
        }
        found.sort();
        found.dedup();
        found
    };
    let corpus = Source {
        name: CORPUS.to_owned(),
        files: files("/corpus/paths", &spec.corpus.paths.iter().collect::<Vec<_>>()),
        text: spec.corpus.text.clone(),
        id: spec.corpus.id.clone(),
    };
    let (mut domains, mut mixtures) = (Vec::new(), Vec::new());
    for (name, domain) in &spec.domains {
        mixtures.extend(domain.mixture.iter().map(|proportions| Mixture::new(name, proportions)));
        let Some(train) = &domain.train else { continue };
        let mut source = |split: &str, pattern: &String| Source {
            name: name.clone(),
            files: files(&format!("/domains/{name}/{split}"), &[pattern]),
            text: domain.text.clone(),
            id: domain.id.clone(),
        };
        let train = source("train", train);
        domains.push(DomainSources { train, test: domain.test.as_ref().map(|test| source("test", test)) });
    }
    if !mistakes.is_empty() {
        return Err(validate::in_file_order(mistakes));
    }
    let run_dir = run_dir.map_or_else(|| usual_run_dir(&spec), Path::to_path_buf);
    Ok(Plan { spec, run_dir, corpus, domains, mixtures })
}

/// What the schema cannot say.
fn contradictions(document: &Document, spec: &Pipeline) -> Vec<Error> {
    let mut mistakes = Vec::new();
    let mut require = |holds: bool, pointer: &str, message: String, hint: &str| {
        if !holds {
            mistakes.push(document.error(pointer, message).hint(hint));
        }
    };
    domain_contradictions(document, spec, &mut require);
    let cluster = &spec.cluster;
    require(
        cluster.k.is_none() || cluster.levels.is_none(),
        "/cluster/levels",
        "`cluster.k` and `cluster.levels` exclude each other".into(),
        "keep `k` for flat k-means or `levels` for a tree",
    );
    require(
        cluster.levels().iter().all(|&n| n >= 2),
        "/cluster/levels",
        "a level needs at least 2 children".into(),
        "such as `[32, 32]`",
    );
    let leaves = cluster.leaves();
    require(leaves <= 1 << 24, "/cluster/levels", format!("{leaves} clusters are too many"), "at most 16,777,216");
    require(
        cluster.sample() >= leaves,
        "/cluster/sample",
        format!("a sample of {} windows cannot make {leaves} clusters", cluster.sample()),
        "leave `cluster.sample` out for 256 windows per cluster",
    );
    let tokenizer = &spec.shard.tokenizer;
    require(
        tokenizer.train.is_none() || tokenizer.path.is_none(),
        "/shard/tokenizer/path",
        "`shard.tokenizer.train` and `shard.tokenizer.path` exclude each other".into(),
        "keep one of them",
    );
    if let Some(path) = &tokenizer.path {
        require(
            path.is_file(),
            "/shard/tokenizer/path",
            format!("`{}` is not a file", path.display()),
            "name a `tokenizer.json`",
        );
    }
    let model = &spec.embed.model;
    require(
        model == "static" || model == LEARNT || Path::new(model).is_dir(),
        "/embed/model",
        format!("`{model}` is not a folder"),
        "use `static`, `learnt`, or the folder of a sentence-transformers model",
    );
    for (name, value) in [("temperature", spec.weigh.temperature), ("max_epochs", spec.weigh.max_epochs)] {
        let positive = value.is_none_or(|v| v > 0.0 && v.is_finite());
        require(
            positive,
            &format!("/weigh/{name}"),
            format!("`weigh.{name}` must be above 0"),
            "leave it out to switch it off",
        );
    }
    let mut counts = vec![("/resample/tokens", spec.resample.tokens), ("/shard/shard_tokens", spec.shard.shard_tokens)];
    counts.extend(spec.train.as_ref().map(|t| ("/train/tokens", t.tokens)));
    counts.extend(spec.finetune.as_ref().map(|f| ("/finetune/tokens", f.tokens)));
    for (pointer, count) in counts {
        let name = pointer.trim_start_matches('/').replace('/', ".");
        require(count.0 > 0, pointer, format!("`{name}` must be above 0"), "such as `20M`");
    }
    if let Some(train) = &spec.train {
        training_contradictions(spec, train, &mut require);
    }
    mistakes
}

/// What the schema cannot say of `domains`.
fn domain_contradictions(document: &Document, spec: &Pipeline, require: &mut impl FnMut(bool, &str, String, &str)) {
    let plain: Vec<String> = spec.domains.iter().filter(|(_, d)| d.mixture.is_none()).map(|(name, _)| name.clone()).collect();
    for (name, domain) in &spec.domains {
        let word = name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c)) && !name.is_empty();
        let pointer = format!("/domains/{}", escape(name));
        require(word, &pointer, format!("`{name}` cannot name a domain"), "use lower-case letters, digits, `-` and `_`");
        require(
            name != CORPUS,
            &pointer,
            "`corpus` cannot name a domain".into(),
            "the generic corpus has this name in every table",
        );
        let Some(mixture) = &domain.mixture else {
            let message = format!("the key `train` is missing in `domains.{name}`");
            require(domain.train.is_some(), &pointer, message, "name its documents, or the domains that it mixes as `mixture`");
            continue;
        };
        // `text` has a default, so only the document tells whether it was written.
        for key in ["train", "test", "text", "id"] {
            let pointer = format!("{pointer}/{key}");
            let message = format!("`{key}` and `mixture` exclude each other");
            let hint = "a mixture has the documents of the domains that it names";
            require(document.value.pointer(&pointer).is_none(), &pointer, message, hint);
        }
        let sum: f64 = mixture.values().sum();
        require(
            sum.is_finite(),
            &format!("{pointer}/mixture"),
            "these proportions are too large".into(),
            "such as 0.3 and 0.7",
        );
        for (member, &proportion) in mixture {
            let pointer = format!("{pointer}/mixture/{}", escape(member));
            let message = match spec.domains.contains_key(member) {
                true => format!("`{member}` is a mixture itself"),
                false => format!("`{member}` is not among `domains`"),
            };
            require(plain.contains(member), &pointer, message, &validate::nearest(member, &plain));
            let message = format!("the proportion of `{member}` must be above 0");
            require(proportion > 0.0, &pointer, message, "leave the domain out of the mixture, or give it a share");
        }
    }
}

/// What the schema cannot say of `train`.
fn training_contradictions(spec: &Pipeline, train: &Train, require: &mut impl FnMut(bool, &str, String, &str)) {
    let by_cluster = spec.shard.by == ShardBy::Cluster;
    for (index, method) in train.methods.iter().enumerate() {
        let message = format!("`{}` draws clusters, which these shards do not have", method.name());
        require(by_cluster || !method.needs_clusters(), &format!("/train/methods/{index}"), message, "set `shard.by: cluster`");
        let llm = *method != Method::Llm || train.llm.is_some();
        let hint = "such as `llm: slm-9m`";
        require(llm, &format!("/train/methods/{index}"), "`llm` needs `train.llm`, a larger preset".into(), hint);
    }
    if let Some(index) = train.methods.iter().position(|m| *m == Method::SlmD) {
        let both = train.methods.contains(&Method::Slm) && train.methods.contains(&Method::Llm);
        let message = "`slm-d` is `slm` taught by `llm`, and not both are among the methods".into();
        require(both, &format!("/train/methods/{index}"), message, "add them to `train.methods`");
        require(spec.finetune.is_some(), "/train/methods", "`slm-d` needs fine-tuning".into(), "add `finetune`");
        let enough = train.seeds(Method::SlmD) <= train.seeds(Method::Slm);
        let hint = "raise the seeds of `slm`";
        require(enough, "/train/seeds/slm-d", "`slm-d` has more seeds than `slm`, from which it starts".into(), hint);
    }
    if let Some(index) = train.methods.iter().position(|m| *m == Method::Lora) {
        require(spec.finetune.is_some(), "/train/methods", "`lora` needs fine-tuning".into(), "add `finetune`");
        for base in spec.finetune.iter().flat_map(|f| &f.lora.of).map(|base| base.method()) {
            let message = format!("`lora` adapts the model of `{0}`, and `{0}` is not among the methods", base.name());
            let listed = train.methods.contains(&base);
            require(
                listed,
                &format!("/train/methods/{index}"),
                message,
                "add it to `train.methods`, or set `finetune.lora.of`",
            );
            let enough = train.seeds(Method::Lora) <= train.seeds(base);
            let message = format!("`lora` has more seeds than `{}`, from which it starts", base.name());
            require(enough, "/train/seeds/lora", message, "raise the seeds of that");
        }
    }
    for (method, &seeds) in &train.seeds {
        let pointer = format!("/train/seeds/{}", method.name());
        let message = format!("`{}` is not among `train.methods`", method.name());
        require(train.methods.contains(method), &pointer, message, "add it there, or leave its seeds out");
        require((1..=1000).contains(&seeds), &pointer, format!("a method of {seeds} seeds"), "use 1 to 1,000, such as 3");
    }
    let tried = spec.finetune.is_some() || !train.experts.choices.contains(&Choice::BestTuned);
    let hint = "add `finetune`, or choose by `lowest-loss`";
    require(tried, "/train/experts/choices", "`best-tuned` needs fine-tuning".into(), hint);
    let depth = spec.cluster.levels().len() as u32;
    let levels = [("/train/levels", &train.levels), ("/train/experts/levels", &train.experts.levels)];
    for (pointer, levels) in levels {
        let wrong = levels.iter().flatten().find(|level| !(1..=depth).contains(*level));
        let message = format!("the cluster tree has {depth} levels, and no level {}", wrong.copied().unwrap_or(0));
        require(wrong.is_none(), pointer, message, "`cluster.levels` sets the tree; level 1 is below its root");
        let hint = "without `shard.by: cluster`, clusters are the leaves";
        require(levels.is_none() || by_cluster, pointer, "levels need shards by cluster".into(), hint);
    }
    let plain = spec.weigh.smoothing.is_none() && spec.weigh.temperature.is_none() && spec.weigh.max_epochs.is_none();
    let inner = train.levels.iter().flatten().any(|level| *level < depth);
    let hint = "leave out `train.levels`, or the options of `weigh`";
    require(plain || !inner, "/train/levels", "the options of `weigh` act on the leaves only".into(), hint);
    let capped = by_cluster && spec.weigh.max_epochs.is_some();
    let hint = "leave it out, or shard by domain";
    require(!capped, "/weigh/max_epochs", "shards by cluster are drawn without a cap".into(), hint);
}

/// The files that a path, a folder or a glob names, at least one; else what is wrong with it, and the remedy.
pub fn find(pattern: &str) -> Result<Vec<PathBuf>, (String, String)> {
    let supported = || format!("readable are {}", EXTENSIONS.map(|e| format!("`.{e}`")).join(", "));
    let path = Path::new(pattern);
    if path.is_dir() {
        let mut found = Vec::new();
        walk(path, &mut found).map_err(|e| (format!("cannot list `{pattern}`: {e}"), "check its permissions".to_owned()))?;
        return if found.is_empty() {
            Err((format!("the folder `{pattern}` holds no readable file"), supported()))
        } else {
            Ok(found)
        };
    }
    if path.is_file() {
        return if readable(path) {
            Ok(vec![path.to_owned()])
        } else {
            Err((format!("the kind of `{pattern}` is unknown"), supported()))
        };
    }
    let matches = glob::glob(pattern)
        .map_err(|e| (format!("`{pattern}` is not a valid pattern: {e}"), "quote special characters".to_owned()))?;
    let found: Vec<PathBuf> = matches.flatten().filter(|p| p.is_file() && readable(p)).collect();
    if found.is_empty() {
        let hint = format!("relative paths start from the working directory; {}", supported());
        return Err((format!("`{pattern}` names no readable file"), hint));
    }
    Ok(found)
}

fn readable(path: &Path) -> bool {
    let name = path.file_name().map(|n| n.to_string_lossy().to_lowercase()).unwrap_or_default();
    EXTENSIONS.iter().any(|e| name.strip_suffix(e).is_some_and(|stem| stem.len() > 1 && stem.ends_with('.')))
}

/// Readable files below a folder; names that start with `.` or `_` are other tools' bookkeeping and are left out.
fn walk(folder: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|n| n.to_string_lossy().starts_with(['.', '_'])) {
            continue;
        }
        if path.is_dir() {
            walk(&path, found)?;
        } else if readable(&path) {
            // A link to nowhere is told when it is opened, and a pipe would be waited for.
            if path.metadata().is_ok_and(|m| !m.is_file()) {
                return Err(std::io::Error::other(format!("`{}` is not a file", path.display())));
            }
            found.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every mistake in `yaml`, a line each, with the place.
    fn check(yaml: &str) -> Vec<String> {
        let document = match Document::parse("p.yaml", yaml, &[]) {
            Ok(document) => document,
            Err(error) => return vec![error.to_string()],
        };
        let result = validate::read(&document).and_then(|spec: Pipeline| resolve(&document, spec, None));
        result.err().unwrap_or_default().iter().map(|e| e.to_string().replace("\n\nhint: ", " | ")).collect()
    }

    const HEAD: &str = "name: a\ncorpus: {paths: [Cargo.toml]}\n";

    #[test]
    fn unknown_keys_name_the_nearest_known_one() {
        let found = check(&format!("{HEAD}domains:\n  law: {{train: x, tset: y}}\nresample: {{tokns: 1M}}\n"));
        assert_eq!(
            found,
            [
                "p.yaml:4:19: unknown key `tset` | did you mean `test`?",
                "p.yaml:5:1: the key `tokens` is missing in `resample`",
                "p.yaml:5:12: unknown key `tokns` | did you mean `tokens`?",
            ]
        );
    }

    #[test]
    fn words_and_numbers_that_do_not_fit_have_places_too() {
        let rest = "corpus: {paths: [Cargo.toml]}\ndomains: {law: {train: Cargo.toml}}\n";
        let found = check(&format!(
            "name: ../a\n{rest}resample: {{tokens: 1M}}\ntrain: {{model: a, tokens: 1M, schedule: foo, context: 1.0e1}}\n"
        ));
        assert_eq!(
            found,
            [
                "p.yaml:1:1: `name` is `../a`, but must be a text like `^[A-Za-z0-9][A-Za-z0-9._-]*$`",
                "p.yaml:5:31: `train.schedule` cannot be `foo` | use one of `cosine`, `wsd`",
            ]
        );
        let found = check(&format!("name: a\n{rest}seed: 18446744073709551615\nresample: {{tokens: 1e30}}\n"));
        let hint = "which is too large | use a number below 9,000,000,000,000,000";
        let expected = ["4:1: `seed` is 1.8446744073709552e+19", "5:12: `resample.tokens` is 1e+30"];
        assert_eq!(found, expected.map(|mistake| format!("p.yaml:{mistake}, {hint}")));
    }

    #[test]
    fn wrong_kinds_and_contradictions_have_places() {
        let found = check(&format!("{HEAD}domains: {{law: {{train: x}}}}\nresample: {{tokens: many}}\ncluster: {{k: four}}\n"));
        assert_eq!(
            found,
            [
                "p.yaml:4:12: `resample.tokens` is `many`, but must be a whole number such as `250000`, `250k` or `20M`",
                "p.yaml:5:11: `cluster.k` is `four`, but must be a whole number",
            ]
        );
        let found = check(&format!(
            "{HEAD}domains: {{corpus: {{train: src/*.rs}}}}\nresample: {{tokens: 0}}\ncluster: {{k: 4, levels: [2, 2]}}\n"
        ));
        assert_eq!(found.len(), 5, "{found:#?}");
        assert!(found[4].starts_with("p.yaml:5:17: `cluster.k` and `cluster.levels` exclude each other"), "{found:#?}");
    }

    #[test]
    fn a_mixture_names_plain_domains_above_zero() {
        let domains = "domains:\n  law: {train: src/*.rs}\n  none: {test: src/*.rs}\n  \
                       both: {train: src/*.rs, mixture: {law: 1}, text: body}\n  mixed: {mixture: {laws: 1, both: 2, law: 0}}\n  \
                       huge: {mixture: {law: 1.0e+308, none: 1.0e+308}}\n";
        let exclusive = "a mixture has the documents of the domains that it names";
        // Nothing here is a file that can be read.
        let own = |yaml: &str| check(yaml).into_iter().filter(|m| !m.contains("readable are")).collect::<Vec<_>>();
        assert_eq!(
            own(&format!("{HEAD}{domains}resample: {{tokens: 1M}}\n")),
            [
                "p.yaml:5:3: the key `train` is missing in `domains.none` | name its documents, or the domains that it mixes as `mixture`",
                &format!("p.yaml:6:10: `train` and `mixture` exclude each other | {exclusive}"),
                &format!("p.yaml:6:46: `text` and `mixture` exclude each other | {exclusive}"),
                "p.yaml:7:21: `laws` is not among `domains` | did you mean `law`?",
                "p.yaml:7:30: `both` is a mixture itself | use one of `law`, `none`",
                "p.yaml:7:39: the proportion of `law` must be above 0 | leave the domain out of the mixture, or give it a share",
                "p.yaml:8:10: these proportions are too large | such as 0.3 and 0.7",
            ]
        );
        let found =
            check(&format!("{HEAD}domains: {{a: {{mixture: {{}}}}, b: {{mixture: {{a: much}}}}}}\nresample: {{tokens: 1M}}\n"));
        assert!(found.len() == 2 && found[1].contains("`domains.b.mixture.a` is `much`, but must be a number"), "{found:#?}");
        let found = own(&format!("{HEAD}domains: {{a: {{mixture: {{b: 1}}}}}}\nresample: {{tokens: 1M}}\n"));
        assert_eq!(found, ["p.yaml:3:25: `b` is not among `domains` | there is none to choose"]);
    }

    #[test]
    fn proportions_become_shares() {
        let mixture = Mixture::new("both", &BTreeMap::from([("law".to_owned(), 3.0), ("tax".to_owned(), 1.0)]));
        assert_eq!(mixture.shares, BTreeMap::from([("law".to_owned(), 0.75), ("tax".to_owned(), 0.25)]));
    }

    #[test]
    fn a_list_names_nothing_twice() {
        let train = "train: {model: slm-1m, tokens: 1M, methods: [slm, slm], experts: {choices: [mixture, mixture]}}";
        let found = check(&format!("{HEAD}domains: {{law: {{train: src/*.rs}}}}\nresample: {{tokens: 1M}}\n{train}\n"));
        assert!(found.len() == 2 && found.iter().all(|m| m.starts_with("p.yaml:5:") && m.contains("unique")), "{found:#?}");
        let found = check(&format!("{HEAD}domains: {{}}\nresample: {{tokens: 1M}}\n"));
        assert!(found.len() == 1 && found[0].starts_with("p.yaml:3:"), "{found:#?}");
    }

    #[test]
    fn broken_yaml_has_a_place() {
        assert!(check("name: a\n  b: c\n")[0].starts_with("p.yaml:"), "{:?}", check("name: a\n  b: c\n"));
    }

    #[test]
    fn overlays_replace_and_create() {
        let overlays = ["resample.tokens=5M".to_owned(), "cluster.k=8".to_owned(), "train.methods=[slm]".to_owned()];
        let document = Document::parse("p.yaml", "resample: {tokens: 1M}", &overlays).unwrap();
        assert_eq!(document.value["resample"]["tokens"], "5M");
        assert_eq!(document.value["cluster"]["k"], 8);
        assert_eq!(document.value["train"]["methods"][0], "slm");
        let overlays = ["cluster.k=null".to_owned(), "resample.tokens=many".to_owned(), "a=x: y: z".to_owned()];
        let document = Document::parse("p.yaml", "cluster: {k: 4}\nresample: {tokens: 1M}", &overlays).unwrap();
        assert_eq!(document.value, serde_json::json!({"cluster": {}, "resample": {"tokens": "many"}, "a": "x: y: z"}));
        let place = |pointer| document.error(pointer, "wrong").to_string();
        assert_eq!(place("/resample/tokens"), "--set resample.tokens=many: wrong");
        assert_eq!(place("/cluster/k"), "--set cluster.k=null: wrong");
        assert_eq!(place("/resample"), "p.yaml:2:1: wrong");
        let set = |overlay: &str| Document::parse("p.yaml", "name: a", &[overlay.to_owned()]);
        assert_eq!(set("name=#1").unwrap().value["name"], "#1");
        assert_eq!(set("shard.tokenizer.path=null").unwrap().value, serde_json::json!({"name": "a"}));
        assert!(set("name= ").unwrap_err().to_string().contains("has no value"));
        let document = set("name=null").unwrap();
        let found = validate::read::<Pipeline>(&document).unwrap_err();
        assert!(found.iter().any(|e| e.to_string() == "--set name=null: the key `name` is missing"), "{found:?}");
    }
}
