#!/usr/bin/env python3
"""From a corpus to a selection for one domain: `trommel run --until shard` against DSIR (PyPI `data-selection`).

Ours ends with tokens in Parquet shards, DSIR with JSON lines. DSIR reads JSON lines that are made beforehand, and its worker
processes live on between rounds; ours is a process with an empty run folder each time.
"""
from peers import arguments, cached_texts, compare, documents, note, seconds
import json
from data_selection import HashedNgramDSIR
import selection

raw = [str(cached_texts(documents(file))) for file in selection.CORPUS]
target = [str(cached_texts(documents(selection.DOMAIN)))]
# As many documents as our tokens fill, at four bytes each.
picks = round(4e-6 * selection.TOKENS / selection.MEGABYTES * len(selection.TEXTS))


def dsir():
    folder = selection.fresh("dsir")
    dsir = HashedNgramDSIR(raw, target, cache_dir=str(folder / "cache"), num_proc=arguments.threads)
    dsir.fit_importance_estimator(num_tokens_to_fit="auto")
    dsir.compute_importance_weights()
    dsir.resample(out_dir=str(folder / "out"), num_to_sample=picks, cache_dir=str(folder / "resampled"))


def agree():
    """The methods differ: equal is that both selections are much closer to the domain than the corpus is."""
    lines = [line for file in (selection.FOLDER / "dsir/out").glob("**/*.jsonl") for line in open(file)]
    texts = {"corpus": selection.TEXTS, "ours": documents(*selection.our_shards()),
             "peer": [json.loads(line)["text"] for line in lines]}
    far = {name: selection.divergence(part) for name, part in texts.items()}
    note("KL of the domain's words: " + ", ".join(f"{name} {value:.3f}" for name, value in far.items()))
    return max(far["ours"], far["peer"]) < 0.8 * far["corpus"]


compare("corpus -> shards vs DSIR", "MB/s", lambda: selection.ours()[0], lambda: seconds(dsir), floor=10, goal=30,
        agree=agree, figure=lambda cost: selection.MEGABYTES / cost, packages=["data-selection"])
