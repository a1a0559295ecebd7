"""What the two comparisons of whole selections share: the settings, our run, and whether a selection fits the domain."""
from peers import CACHE, ROOT, TROMMEL, arguments, cached, corpus_files, documents, size
import collections, re, shutil, zlib
import numpy as np
from processes import run
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

DOMAIN = ROOT / "data/quickstart/domains/religion/train.parquet"
CLUSTERS = size(1024, 32)
TOKENS = size(1_500_000, 50_000)
FOLDER = CACHE / "peers-runs"

CORPUS = corpus_files()[:size(None, 1)]
TEXTS = documents(*CORPUS)
MEGABYTES = sum(len(text.encode()) for text in TEXTS) / 1e6


def train_tokenizer(path):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    step = 1 + round(MEGABYTES / 8)  # 8 MB are enough
    trainer = trainers.BpeTrainer(vocab_size=8192, min_frequency=2, special_tokens=["<|endoftext|>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(TEXTS[::step], trainer)
    tokenizer.save(str(path))


# A byte-level BPE that both sides are given.
TOKENIZER = cached(f"tokenizer-{zlib.crc32(''.join(TEXTS).encode()):08x}.json", train_tokenizer)


def fresh(name):
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def ours():
    """Runs `trommel` up to the shards, in an empty folder: seconds and peak bytes."""
    folder = fresh("ours")
    (folder / "pipeline.yaml").write_text(f"""
name: peers
corpus: {{paths: [{', '.join(map(str, CORPUS))}]}}
domains: {{religion: {{train: {DOMAIN}}}}}
cluster: {{k: {CLUSTERS}}}
resample: {{tokens: {TOKENS}}}
shard: {{tokenizer: {{path: {TOKENIZER}}}}}
""")
    return run(TROMMEL, "--threads", arguments.threads, "run", folder / "pipeline.yaml", "--until", "shard",
               "--run-dir", folder)


def our_shards():
    return sorted((FOLDER / "ours/shards/religion").glob("*.parquet"))


def shares(texts):
    """The distribution of words over 4,096 hashed buckets, of up to 4 MB of text from all over."""
    texts = texts[::1 + sum(map(len, texts)) // 4_000_000]
    words = collections.Counter(word for text in texts for word in re.findall(r"\w+", text.lower()))
    counts = np.ones(4096)
    for word, times in words.items():
        counts[zlib.crc32(word.encode()) % 4096] += times
    return counts / counts.sum()


def divergence(texts):
    """KL(domain || texts) of the words, in nats: small where the texts are like the domain's."""
    domain = shares(documents(DOMAIN))
    return float((domain * np.log(domain / shares(texts))).sum())
