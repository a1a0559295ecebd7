"""A selection as one would write it by hand: model2vec, faiss, numpy, tokenizers and pyarrow.

python3 handwritten.py OUT TOKENIZER DOMAIN K TOKENS THREADS CORPUS...
"""
import itertools, pathlib, sys
import faiss, numpy as np, pyarrow as pa, pyarrow.parquet as pq
from tokenizers import Tokenizer
from static_table import static_model

WINDOW, SHARD_TOKENS = 4096, 16_000_000


def cut(text):
    start = 0
    while len(text) - start > WINDOW:
        end = text.rfind(" ", start + WINDOW // 2, start + WINDOW) + 1 or start + WINDOW
        yield text[start:end]
        start = end
    yield text[start:]


def windows(*files):
    texts = itertools.chain.from_iterable(pq.read_table(file, columns=["text"])["text"].to_pylist() for file in files)
    return [window for text in texts if text for window in cut(text)]


def main(out, tokenizer, domain, k, tokens, threads, *corpus):
    faiss.omp_set_num_threads(int(threads))
    k, random, model = int(k), np.random.default_rng(17), static_model()
    embed = lambda texts: model.encode(texts, max_length=None, batch_size=64, multiprocessing_threshold=0)

    texts = windows(*corpus)
    vectors = embed(texts)
    kmeans = faiss.Kmeans(vectors.shape[1], k, niter=20, seed=17, min_points_per_centroid=1)  # on 256 for each cluster
    kmeans.train(vectors)
    clusters = kmeans.index.search(vectors, 1)[1][:, 0]
    wanted = kmeans.index.search(embed(windows(domain)), 1)[1][:, 0]

    p_corpus, p_domain = (np.bincount(ids, minlength=k) / len(ids) for ids in (clusters, wanted))
    weight = np.divide(p_domain, p_corpus, out=np.zeros(k), where=p_corpus > 0)[clusters]
    tokenizer = Tokenizer.from_file(tokenizer)
    count = lambda sample: sum(len(each.ids) for each in tokenizer.encode_batch_fast(sample, add_special_tokens=False))
    sample = [texts[i] for i in random.choice(len(texts), min(len(texts), 500), p=weight / weight.sum())]
    length = np.array([len(text) for text in texts]) * (count(sample) / sum(map(len, sample)))  # in tokens, about
    rate = weight * int(tokens) / (weight * length).sum()
    copies = np.floor(rate + random.random(len(rate))).astype(int)
    order = random.permutation(np.repeat(np.arange(len(texts)), copies))

    rows, per_shard = len(order), max(1, int(SHARD_TOKENS / length.mean()))
    for number, first in enumerate(range(0, rows, per_shard)):
        chosen = order[first:first + per_shard]
        part = [texts[i] for i in chosen]
        ids = [np.array(each.ids, np.uint16) for each in tokenizer.encode_batch_fast(part, add_special_tokens=False)]
        table = pa.table({"text": part, "tokens": pa.array(ids, pa.list_(pa.uint16())), "cluster_id": clusters[chosen]})
        pq.write_table(table, pathlib.Path(out) / f"{number:05}.parquet", compression="zstd")


if __name__ == "__main__":
    main(*sys.argv[1:])
