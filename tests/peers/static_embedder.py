#!/usr/bin/env python3
"""The shipped static table on windows of 4 KB: `trommel-embed` against model2vec, both without truncation."""
from peers import Ours, arguments, cached_texts, compare, fastest, note, seconds, size, windows
import numpy as np
from static_table import static_model

texts = windows(size(4096, 64), 4096)
megabytes = sum(len(text.encode()) for text in texts) / 1e6
written = cached_texts(texts)
out = written.with_suffix(".static.f32")
ours = Ours("embed", "static", written, out, arguments.threads, "f32")
model = static_model()


def encode(sample=texts, **how):
    return model.encode(sample, max_length=None, **how)


# Both use every core: the first within the tokenizer, the second by Python threads.
ways = {"one thread of Python": encode,
        "several": lambda sample=texts: encode(sample, multiprocessing_threshold=0, batch_size=64)}
peer = fastest(ways, lambda way: way(texts[:512]))


def agree():
    expected = peer()
    difference = np.abs(np.fromfile(out, np.float32).reshape(expected.shape) - expected).max()
    note(f"largest difference {difference:.1e}")
    return difference <= 1e-5


compare("static embedder", "MB/s", ours.seconds, lambda: seconds(peer), floor=8, goal=20, agree=agree,
        figure=lambda cost: megabytes / cost, packages=["model2vec", "tokenizers"])
