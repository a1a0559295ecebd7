#!/usr/bin/env python3
"""From a corpus to shards for one domain: `trommel run --until shard` against the script `handwritten.py`.

Both are whole processes, embed with the shipped static table and tokenize with the same BPE. Also prints the peak memory.
"""
from peers import arguments, compare, documents, note
import pathlib, statistics, sys
import pyarrow.parquet as pq
import selection
from processes import run

peaks = {"ours": [], "peer": []}


def ours():
    seconds, peak = selection.ours()
    peaks["ours"].append(peak)
    return seconds


def peer():
    program = pathlib.Path(__file__).with_name("handwritten.py")
    seconds, peak = run(sys.executable, program, selection.fresh("peer"), selection.TOKENIZER, selection.DOMAIN,
                        selection.CLUSTERS, selection.TOKENS, arguments.threads, *selection.CORPUS)
    peaks["peer"].append(peak)
    return seconds


def agree():
    """Draws differ, their statistics must not: tokens within 5% of the budget, words as close to the domain's."""
    shards = {"ours": selection.our_shards(), "peer": sorted((selection.FOLDER / "peer").glob("*.parquet"))}
    tokens = {side: sum(len(row) for file in files for row in pq.read_table(file, columns=["tokens"])["tokens"])
              for side, files in shards.items()}
    far = {side: selection.divergence(documents(*files)) for side, files in shards.items()}
    memory = {side: statistics.median(values) / 1e6 for side, values in peaks.items()}
    note(f"tokens {tokens}, KL of the domain's words {far}")
    print(f"peak memory: ours {memory['ours']:.0f} MB, peer {memory['peer']:.0f} MB, "
          f"ratio {memory['peer'] / memory['ours']:.2f}, goal 5")
    return all(abs(t / selection.TOKENS - 1) <= 0.05 for t in tokens.values()) and abs(far["ours"] / far["peer"] - 1) <= 0.1


compare("corpus -> shards vs hand-written pipeline", "MB/s", ours, peer, floor=2, goal=5, agree=agree,
        figure=lambda cost: selection.MEGABYTES / cost, packages=["model2vec", "faiss-cpu", "tokenizers", "pyarrow"])
