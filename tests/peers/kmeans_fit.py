#!/usr/bin/env python3
"""Lloyd's iterations from the same start, k = 1,024, 200,000 x 384: `trommel-kernels` against faiss's Kmeans."""
from peers import Ours, arguments, cached, compare, note, seconds, size, vectors
import faiss, numpy as np

ITERATIONS = 5
faiss.omp_set_num_threads(arguments.threads)
path, rows = vectors(size(200_000, 3_000))
count, width, clusters = *rows.shape, size(1024, 32)
start = rows[np.random.default_rng(18).choice(count, clusters, replace=False)]
start_path = cached(f"start-{count}-{clusters}.f32", start.tofile)
out = path.with_suffix(".kmeans.f32")
ours = Ours("kmeans", path, start_path, width, ITERATIONS, out, arguments.threads)
# Every row counts: faiss would take 256 for each cluster.
kmeans = faiss.Kmeans(width, clusters, niter=ITERATIONS, max_points_per_centroid=count, min_points_per_centroid=1)


def objective(centroids):
    """The sum of squared distances to the nearest centroid, measured by faiss for both."""
    index = faiss.IndexFlatL2(width)
    index.add(centroids)
    return index.search(rows, 1)[0].astype(np.float64).sum()


def agree():
    mine = objective(np.fromfile(out, np.float32).reshape(clusters, width))
    theirs = objective(kmeans.centroids)
    note(f"objective: ours {mine:.6g}, peer {theirs:.6g}")
    return abs(mine / theirs - 1) <= 1e-3


compare("k-means fit", "s/iteration", ours.seconds, lambda: seconds(lambda: kmeans.train(rows, init_centroids=start)),
        floor=1, goal=2, agree=agree, figure=lambda cost: cost / ITERATIONS, packages=["faiss-cpu"])
