#!/usr/bin/env python3
"""The nearest of 1,024 centroids for 200,000 vectors of 384 dimensions: `trommel-kernels` against faiss's IndexFlatL2.

The row is our search with the fastest first look that the processor has (8-bit integers; `bf16` with AMX) and a check of close
calls in f32; the one in f32 alone is printed before it.
"""
from peers import Ours, arguments, cached, compare, note, seconds, size, vectors
import faiss, numpy as np

faiss.omp_set_num_threads(arguments.threads)
path, rows = vectors(size(200_000, 3_000))
count, width, clusters = *rows.shape, size(1024, 32)


def fit(path):
    kmeans = faiss.Kmeans(width, clusters, niter=2, seed=17, max_points_per_centroid=64)
    kmeans.train(rows)
    kmeans.centroids.tofile(path)


centroids_path = cached(f"centroids-{count}-{clusters}.f32", fit)
centroids = np.fromfile(centroids_path, np.float32).reshape(clusters, width)
index = faiss.IndexFlatL2(width)
index.add(centroids)
out = {look: path.with_suffix(f".{look}.u32") for look in ["f32", "fastest"]}


def same(look):
    """Whether no centroid of ours is farther than faiss's by more than f32 can tell."""
    found = np.fromfile(out[look], np.uint32)
    expected = index.search(rows, 1)[1][:, 0]
    other = np.flatnonzero(found != expected)
    squared = [((rows[other] - centroids[choice[other]].astype(np.float64)) ** 2).sum(1) for choice in (found, expected)]
    worst = max(squared[0] - squared[1], default=0.0)
    note(f"{look}: {len(other)} of {count} differ from faiss, at most {worst:.1e} farther (squared distance, exact)")
    return len(found) == count and worst <= 1e-6


for look, row in [("f32", "nearest centroid (f32 only)"), ("fastest", "nearest centroid")]:
    ours = Ours("nearest", path, centroids_path, width, out[look], arguments.threads, look)
    compare(row, "GFLOP/s", ours.seconds, lambda: seconds(lambda: index.search(rows, 1)), floor=1, goal=4,
            agree=lambda: same(look), figure=lambda cost: 2e-9 * count * clusters * width / cost,
            packages=["faiss-cpu"])
    ours.quit()
