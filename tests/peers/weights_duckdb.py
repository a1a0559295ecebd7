#!/usr/bin/env python3
"""Histogram and weights over 100M assignments in Parquet: the pipeline's stages against DuckDB, the same SQL.

Both count once and go on with the counts.
"""
from peers import Ours, ROOT, arguments, cached, compare, note, seconds, size
import json, math
import duckdb, numpy as np, pyarrow as pa, pyarrow.parquet as pq

ROWS, FILES, CLUSTERS = size(100_000_000, 400_000), 20, 1024
DOMAINS = ["law", "medicine", "politics", "religion"]
SQL = ROOT / "crates/trommel-pipeline/src/sql"
counts, histogram, weigh = ((SQL / f"{name}.sql").read_text() for name in ["counts", "histogram", "weigh"])
weigh = weigh.replace("{smoothing}", "0.0").replace("{exponent}", "1.0")
query = f"WITH histograms AS (\n{histogram}) SELECT * FROM (\n{weigh}) ORDER BY domain, cluster_id"


def assignments(path):
    """The columns that the queries read; one source per file, the last fifth of them domains."""
    path.mkdir(exist_ok=True)
    random = np.random.default_rng(17)
    names = []
    for file in range(FILES):
        corpus, rows = file < FILES - len(DOMAINS), ROWS // FILES
        popularity = random.permutation(1 / np.arange(1, CLUSTERS + 1) ** 0.7)
        table = pa.table({
            "source": pa.array(["corpus" if corpus else DOMAINS[file - FILES]] * rows, pa.string()),
            "cluster_id": random.choice(CLUSTERS, rows, p=popularity / popularity.sum()).astype(np.uint32),
            "byte_len": random.integers(500, 4097, rows, dtype=np.int32),
            "distance": random.random(rows, dtype=np.float32)})
        names.append(f"{file:02}.parquet")
        pq.write_table(table, path / names[-1], compression="zstd")
    ids = np.arange(CLUSTERS, dtype=np.uint32)
    tree = {"cluster_id": ids, "parent_id": pa.nulls(CLUSTERS, pa.uint32()), "level": pa.array(ids * 0),
            "leaf": np.ones(CLUSTERS, bool), "centroid": pa.nulls(CLUSTERS, pa.list_(pa.float32()))}
    pq.write_table(pa.table(tree), path / "tree.parquet")


folder = cached(f"counted-assignments-{ROWS}", assignments)
out = folder / "weights.json"
ours = Ours("weights", folder, out, arguments.threads)


connection = duckdb.connect(config={"threads": arguments.threads})
connection.execute(f"CREATE VIEW assignments AS FROM read_parquet('{folder}/[0-9]*.parquet')")
connection.execute(f"CREATE VIEW tree AS FROM read_parquet('{folder}/tree.parquet')")


def peer():
    connection.execute(f"CREATE OR REPLACE TABLE counts AS {counts}")
    return connection.sql(query).to_arrow_table()


def agree():
    mine = [tuple(row.values()) for row in json.loads(out.read_text())]
    theirs = [tuple(row.values()) for row in peer().to_pylist()]
    note(f"{len(mine)} rows of ours, {len(theirs)} of the peer")
    return len(mine) == len(theirs) == len(DOMAINS) * CLUSTERS and all(
        a[:2] == b[:2] and all(math.isclose(x, y, rel_tol=1e-9) for x, y in zip(a[2:], b[2:])) for a, b in zip(mine, theirs))


compare("histogram+weights vs DuckDB", "M rows/s", ours.seconds, lambda: seconds(peer), floor=0.7, goal=1,
        agree=agree, figure=lambda cost: ROWS / 1e6 / cost, packages=["duckdb"])
