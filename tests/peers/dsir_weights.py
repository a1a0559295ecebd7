#!/usr/bin/env python3
"""Shows that the method `dsir` weighs and selects windows as DSIR's own package does (PyPI `data-selection`).

Runs `trommel` on a part of the corpus that ships with the repository, gives the package the same windows, and compares: words
and log importance weights of every window; and which windows are selected, when the package is given our noise in place of its
own. Ends with 1 if they disagree. No row of the comparison: no time is taken.

    cargo build --release && python3 tests/peers/dsir_weights.py
    python3 tests/peers/dsir_weights.py --fixture     # writes what the tests of `trommel-pipeline` compare with

The first call makes an environment in `.cache/dsir` (200 MB). NLTK is pinned because its words changed with 3.10.
"""
import argparse, glob, json, os, pathlib, subprocess, sys, tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGES = "data-selection==1.0.3 nltk==3.10.4 numpy==2.4.6 pyarrow==26.0.1".split()
DATA = ROOT / "data/quickstart"
FIXTURE = ROOT / "crates/trommel-pipeline/tests/fixtures/dsir.json"
TROMMEL = os.environ.get("TROMMEL", str(ROOT / "target/release/trommel"))
DOMAINS = ["politics", "religion"]
# Scripts and signs that are split or lower-cased in their own way; part of the fixture.
ODD = "ΟΔΟΣ ΣΟΦΙΑΣ İstanbul x²+½ हिन्दी में 日本語、テスト e\u0301te\u0301 don't_stop... <|end|> \u00a03.5%\u2028ﬁn\u1c80 "


def enter_environment():
    environment = ROOT / ".cache/dsir"
    installed = environment / "installed.txt"
    if not installed.exists() or installed.read_text().split() != PACKAGES:
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        subprocess.run([environment / "bin/pip", "install", "--quiet", *PACKAGES], check=True)
        installed.write_text("\n".join(PACKAGES))
    if pathlib.Path(sys.prefix) != environment:
        python = str(environment / "bin/python")
        os.execve(python, [python, *sys.argv], os.environ | {"TQDM_DISABLE": "1"})


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--documents", type=int, default=2_000, help="documents of the corpus (default 2000)")
parser.add_argument("--fixture", action="store_true", help="write the fixture of the Rust tests instead")
arguments = parser.parse_args()
enter_environment()
import numpy as np, pyarrow.parquet as pq  # only the environment has them
from data_selection import HashedNgramDSIR


def package(raw, target, noise=None, picks=None):
    """What the package makes of two lists of texts: words, log weights, and the numbers of the texts it picks."""
    def lines(path, texts):
        path.write_text("".join(json.dumps({"text": text, "number": i}) + "\n" for i, text in enumerate(texts)))
        return str(path)

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        dsir = HashedNgramDSIR([lines(folder / "raw.jsonl", raw)], [lines(folder / "target.jsonl", target)],
                               cache_dir=str(folder / "cache"), num_proc=1)
        dsir.fit_importance_estimator(num_tokens_to_fit="auto")
        dsir.compute_importance_weights()
        weights = np.load(folder / "cache/log_importance_weights/0.npy")
        words = np.load(folder / "cache/perexample_metadata/0.npy").astype(int)
        if noise is None:
            return words, weights, None
        own, np.random.gumbel = np.random.gumbel, lambda size: noise[words >= dsir.min_example_length]
        dsir.resample(out_dir=str(folder / "out"), num_to_sample=picks, cache_dir=str(folder / "resampled"))
        np.random.gumbel = own
        picked = [json.loads(line)["number"] for file in folder.glob("out/**/*.jsonl") for line in open(file)]
        return words, weights, set(picked)


def documents(file, count=None):
    return pq.read_table(file, columns=["text"])["text"].to_pylist()[:count]


def write_fixture():
    """Twenty texts of the corpus and five of each domain, with odd ones among them, and their weights."""
    cut = lambda text: text[:800].rsplit(" ", 1)[0]
    raw = [cut(text) for text in documents(DATA / "corpus/part-00000.parquet", 20)]
    raw[3:6] = [ODD * 10, raw[4].upper(), "Too short: " + raw[5][:200]]
    targets = {d: [ODD] + [cut(text) for text in documents(DATA / f"domains/{d}/train.parquet", 4)] for d in DOMAINS}
    fixture = {"raw": raw, "targets": targets, "words": None, "log_weights": {}, "noise": {}, "picked": {}}
    random = np.random.default_rng(17)
    for domain in DOMAINS:
        # The package's selection among its own weights, with noise that is large enough to matter.
        noise = 30 * random.gumbel(size=len(raw))
        words, weights, picked = package(raw, targets[domain], noise, 7)
        fixture["words"] = words.tolist()
        fixture["log_weights"][domain], fixture["noise"][domain] = weights.tolist(), noise.tolist()
        fixture["picked"][domain] = sorted(picked)
    FIXTURE.write_text(json.dumps(fixture, ensure_ascii=False, indent=1) + "\n")
    print(f"wrote {FIXTURE}")


def run(folder):
    """Runs `trommel` until it has drawn, and returns the windows it makes of the corpus and of each domain."""
    texts = pq.read_table(DATA / "corpus/part-00000.parquet", columns=["text"]).slice(0, arguments.documents)
    pq.write_table(texts, folder / "corpus.parquet")
    sources = {d: DATA / f"domains/{d}/train.parquet" for d in DOMAINS}
    domains = ", ".join(f"{d}: {{train: {file}}}" for d, file in sources.items())
    (folder / "p.yaml").write_text(f"""
name: dsir
seed: 17
corpus: {{paths: [{folder / "corpus.parquet"}]}}
domains: {{{domains}}}
cluster: {{k: 16}}
resample: {{tokens: 300k}}
train: {{model: slm-1m, tokens: 1M, methods: [dsir]}}
""")
    command = [TROMMEL, "run", folder / "p.yaml", "--until", "resample", "--run-dir", folder / "run"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    sources["corpus"] = folder / "corpus.parquet"
    windows = {}
    for source, file in sources.items():
        texts = [text.encode() for text in documents(file)]
        rows = [row for part in table(folder / f"run/windows/{source}-[0-9a-f]*.parquet") for row in part]
        windows[source] = {(r["document"], r["window"]): texts[r["row"]][r["byte_start"]:r["byte_start"] + r["byte_len"]].decode()
                           for r in rows}
    return windows


def table(pattern):
    files = [file for file in glob.glob(str(pattern)) if "rejects" not in file]
    assert files, pattern
    return [pq.read_table(file).to_pylist() for file in files]


def compare(folder):
    windows = run(folder)
    [scores], [selection] = table(folder / "run/resample/dsir-scores-*"), table(folder / "run/resample/dsir-selection-*")
    agree = True
    for domain in DOMAINS:
        ours = {(s["document"], s["window"]): s for s in scores if s["domain"] == domain}
        end = next(s for s in selection if s["domain"] == domain)
        assert ours.keys() == windows["corpus"].keys()
        keys = list(ours)
        # A window that cannot be selected has no key, and the package does not ask for its noise.
        noise = np.array([(ours[k]["key"] or 0) - ours[k]["log_weight"] for k in keys])
        words, weights, picked = package([windows["corpus"][k] for k in keys], list(windows[domain].values()), noise,
                                         end["windows"])
        mine = np.array([ours[k]["log_weight"] for k in keys])
        difference = float((np.abs(mine - weights) / np.maximum(np.abs(weights), 1)).max())
        selected = {i for i, k in enumerate(keys) if ours[k]["key"] is not None and ours[k]["key"] >= end["key_min"]}
        same_words = [ours[k]["words"] for k in keys] == words.tolist()
        print(f"{domain}: {len(keys)} windows, words {'equal' if same_words else 'DIFFER'}, log weights differ by {difference:.1e} "
              f"at most, {len(selected)} windows selected, {len(selected ^ picked)} of them otherwise by the package")
        agree &= same_words and difference < 1e-6 and selected == picked
    return agree


if arguments.fixture:
    write_fixture()
else:
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(0 if compare(pathlib.Path(folder)) else 1)
