#!/usr/bin/env python3
"""Histogram and weights over 100M assignments in Parquet: `trommel sql` against DuckDB, the same SQL.

The SQL is the pipeline's own. Ours is a whole process; DuckDB begins with `connect`, so its import is not timed.
"""
from peers import ROOT, TROMMEL, arguments, cached, compare, note, run, seconds, size
import json, math, subprocess
import duckdb, numpy as np, pyarrow as pa, pyarrow.parquet as pq

ROWS, FILES, CLUSTERS = size(100_000_000, 400_000), 20, 1024
DOMAINS = ["law", "medicine", "politics", "religion"]
SQL = ROOT / "crates/trommel-pipeline/src/sql"
histogram = (SQL / "histogram.sql").read_text()
weigh = (SQL / "weigh.sql").read_text().replace("{smoothing}", "0.0").replace("{exponent}", "1.0")
query = f"SELECT * FROM (WITH histograms AS (\n{histogram}\n) SELECT * FROM (\n{weigh}\n)) ORDER BY domain, cluster_id"


def assignments(path):
    """A run folder with the columns that the query reads; one source per file, the last fifth of them domains."""
    path.mkdir(exist_ok=True)
    random = np.random.default_rng(17)
    names = []
    for file in range(FILES):
        corpus, rows = file < FILES - len(DOMAINS), ROWS // FILES
        popularity = random.permutation(1 / np.arange(1, CLUSTERS + 1) ** 0.7)
        table = pa.table({
            "source": pa.array(["corpus" if corpus else DOMAINS[file - FILES]] * rows, pa.string()),
            "cluster_id": random.choice(CLUSTERS, rows, p=popularity / popularity.sum()).astype(np.uint32),
            "byte_len": random.integers(500, 4097, rows, dtype=np.int32)})
        names.append(f"{file:02}.parquet")
        pq.write_table(table, path / names[-1], compression="zstd")
    ids = np.arange(CLUSTERS, dtype=np.uint32)
    tree = {"cluster_id": ids, "parent_id": pa.nulls(CLUSTERS, pa.uint32()), "level": pa.array(ids * 0),
            "leaf": np.ones(CLUSTERS, bool), "centroid": pa.nulls(CLUSTERS, pa.list_(pa.float32()))}
    pq.write_table(pa.table(tree), path / "tree.parquet")
    catalog = {"tables": {"assignments": names, "tree": ["tree.parquet"]}, "documents": [], "shards": []}
    (path / "catalog.json").write_text(json.dumps(catalog))


folder = cached(f"assignments-{ROWS}", assignments)
command = [TROMMEL, "--threads", str(arguments.threads), "sql", str(folder), "--format", "json", "-c", query]


def peer():
    with duckdb.connect(config={"threads": arguments.threads}) as connection:
        connection.execute(f"CREATE VIEW assignments AS FROM read_parquet('{folder}/[0-9]*.parquet')")
        connection.execute(f"CREATE VIEW tree AS FROM read_parquet('{folder}/tree.parquet')")
        return connection.execute(query).fetchall()


def agree():
    mine = [tuple(row.values()) for row in json.loads(subprocess.run(command, capture_output=True, check=True).stdout)]
    theirs = peer()
    note(f"{len(mine)} rows of ours, {len(theirs)} of the peer")
    return len(mine) == len(theirs) == len(DOMAINS) * CLUSTERS and all(
        a[:2] == b[:2] and all(math.isclose(x, y, rel_tol=1e-9) for x, y in zip(a[2:], b[2:])) for a, b in zip(mine, theirs))


compare("histogram+weights vs DuckDB", "M rows/s", lambda: run(*command)[0], lambda: seconds(peer), floor=0.7, goal=1,
        agree=agree, figure=lambda cost: ROWS / 1e6 / cost, packages=["duckdb"])
