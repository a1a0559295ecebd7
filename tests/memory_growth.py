#!/usr/bin/env python3
"""Peak memory of windows..shard on the shipped corpus, and on one eight times as large.

  pip install pyarrow
  python3 tests/memory_growth.py [--binary target/release/trommel]

The large corpus holds every document eight times, each time with its words in another rotation, so that no two are equal.
Prints both peaks and their ratio; the goal is below 1.2.
"""
import argparse, pathlib, tempfile
import pyarrow as pa, pyarrow.parquet as pq
from processes import run

ROOT = pathlib.Path(__file__).resolve().parent.parent


def rotated(text, copy):
    words = text.split(" ")
    cut = len(words) * copy // 8
    return " ".join(words[cut:] + words[:cut])


def peak(binary, corpus, run_dir):
    """Peak resident memory of one run, in MB."""
    _, resident = run(binary, "run", "pipelines/quickstart.yaml", "--until", "shard", "--run-dir", run_dir,
                      "--set", f"corpus.paths=[{corpus}]", cwd=ROOT)
    return resident / 2**20


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--binary", default=str(ROOT / "target/release/trommel"))
    binary = parser.parse_args().binary
    with tempfile.TemporaryDirectory() as folder:
        large = pathlib.Path(folder) / "large"
        large.mkdir()
        for part in sorted((ROOT / "data/quickstart/corpus").glob("*.parquet")):
            texts = pq.read_table(part, columns=["text"])["text"].to_pylist()
            for copy in range(8):
                table = pa.table({"text": [rotated(t, copy) for t in texts]})
                pq.write_table(table, large / f"{part.stem}-{copy}.parquet", compression="zstd")
        small_peak = peak(binary, "data/quickstart/corpus", f"{folder}/small-run")
        large_peak = peak(binary, str(large), f"{folder}/large-run")
    print(f"corpus x 1: {small_peak:.0f} MB   corpus x 8: {large_peak:.0f} MB   ratio {large_peak / small_peak:.2f}")


if __name__ == "__main__":
    main()
