"""What the peer comparisons share: the data, rounds that alternate, the record.

Importing this module parses the command line and goes on in the environment of `tests/environment.py`, which holds the peers.
"""
import argparse, hashlib, json, os, pathlib, platform, statistics, subprocess, sys, time
from importlib.metadata import version

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import environment
from environment import CACHE, ROOT

BENCH = os.environ.get("TROMMEL_BENCH", str(ROOT / "target/release/examples/trommel-bench"))
TROMMEL = os.environ.get("TROMMEL", str(ROOT / "target/release/trommel"))


def parse_arguments():
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--json", metavar="FILE", help="write the record to this file")
    parser.add_argument("--corpus", metavar="DIR", type=pathlib.Path, default=ROOT / "data/quickstart/corpus",
                        help="folder of .parquet files with a column `text`")
    parser.add_argument("--threads", type=int, default=2, help="threads of either side")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one that is not")
    parser.add_argument("--tiny", action="store_true", help="little data: shows that the script works, and no more")
    return parser.parse_args()


def enter_environment():
    """Goes on with the peers' packages, in an environment that limits every library to the given threads."""
    threads = str(arguments.threads)
    settings = {f"{name}_NUM_THREADS": threads for name in ["OMP", "MKL", "OPENBLAS", "RAYON"]}
    settings |= {"LOKY_MAX_CPU_COUNT": threads, "TOKENIZERS_PARALLELISM": "true", "HF_HUB_OFFLINE": "1",
                 "TQDM_DISABLE": "1", "TORCHINDUCTOR_CACHE_DIR": str(CACHE / "inductor")}
    environment.enter(settings)


arguments = parse_arguments()
enter_environment()
import numpy as np, pyarrow.parquet as pq  # only the environment has them


def size(full, tiny):
    return tiny if arguments.tiny else full


def note(text):
    print(f"  {text}", file=sys.stderr, flush=True)


def cached(name, make):
    """A file of `.cache/peers-data` that `make(path)` writes when it is not there."""
    path = CACHE / "peers-data" / name
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name("unfinished-" + path.name)
        make(unfinished)
        unfinished.rename(path)
    return path


def cached_texts(texts):
    """A file of `{"text": ...}` lines, named after what it holds."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    return cached(f"texts-{hashlib.sha256(lines.encode()).hexdigest()[:16]}.jsonl", lambda path: path.write_text(lines))


def documents(*files):
    return [text for file in files for text in pq.read_table(file, columns=["text"])["text"].to_pylist()]


def corpus_files():
    files = sorted(arguments.corpus.glob("*.parquet"))
    assert files, f"{arguments.corpus} holds no .parquet files; --corpus names a folder that does"
    return files


def windows(count, length):
    """`count` stretches of up to `length` characters from all over the corpus."""
    parts = [text[at:at + length] for text in documents(*corpus_files()) for at in range(0, len(text), length)]
    return parts[::max(1, len(parts) // count)][:count]


def vectors(count, width=384):
    """A file of unit vectors that lie in 2,000 overlapping clusters, and the vectors."""
    def make(path):
        random = np.random.default_rng(17)
        centres = random.standard_normal((2_000, width), dtype=np.float32) / np.float32(width**0.5)
        rows = centres[random.integers(len(centres), size=count)]
        rows += random.standard_normal(rows.shape, dtype=np.float32) * np.float32(0.05)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        rows.tofile(path)
    path = cached(f"vectors-{count}x{width}.f32", make)
    return path, np.fromfile(path, np.float32).reshape(count, width)


class Ours:
    """A `trommel-bench` that has loaded its data and does one round whenever it is told to."""

    def __init__(self, *parameters):
        command = [BENCH, *map(str, parameters)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
        line = self.process.stdout.readline()
        assert line.split(maxsplit=1)[:1] == ["ready"], f"{command} said {line!r}"

    def round(self):
        """What the round said: `seconds` and more."""
        self.process.stdin.write("go\n")
        line = self.process.stdout.readline()
        assert line, f"{self.process.args} ended"
        return json.loads(line)

    def seconds(self):
        return self.round()["seconds"]

    def quit(self):
        self.process.communicate("quit\n")


def seconds(work):
    """How long `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def fastest(ways, sample=lambda way: way()):
    """The way of the peer, out of several by name, whose `sample` takes the least time, the first time left out."""
    times = {name: min([seconds(lambda: sample(way)) for _ in range(3)][1:]) for name, way in ways.items()}
    return ways[take_least(times)]


def take_least(times):
    """The name of the least of some `times` of the peer, in seconds by name, and a note of it."""
    best = min(times, key=times.get)
    note(f"peer: {best} is taken of " + ", ".join(f"{name} {time:.3f} s" for name, time in times.items()))
    return best


def processor():
    """What /proc/cpuinfo says of the last CPU, and those of its instructions that decide a row."""
    cpu = dict(line.split(":", 1) for line in open("/proc/cpuinfo").read().replace("\t", "").splitlines() if ":" in line)
    return cpu, [name for name in ["avx2", "avx512f", "avx512_bf16", "amx_bf16"] if name in cpu["flags"].split()]


def multiplies_bf16():
    """Whether the processor has instructions for bf16."""
    return bool({"avx512_bf16", "amx_bf16"} & set(processor()[1]))


def machine(packages):
    """The machine, and the versions of the peer's packages."""
    cpu, instructions = processor()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    parts = [f"{cpu['model name'].strip()} (family {cpu['cpu family'].strip()}, model {cpu['model'].strip()})",
             f"{arguments.threads} of {os.cpu_count()} CPUs", " ".join(instructions), f"{memory:.0f} GiB", platform.system(),
             *(f"{name} {version(name)}" for name in packages)]
    return ", ".join(parts)


def compare(row, unit, ours, peer, *, floor, goal, agree, figure=lambda cost: cost, packages=()):
    """Lets both sides work in turn, prints the row, and writes its record.

    `ours()` and `peer()` do one round and return its cost, seconds or bytes; `figure` turns a cost into the row's unit.
    The first round of either side is not counted. `agree()` is called at the end.
    """
    costs = [(ours(), peer()) for _ in range(1 + size(arguments.rounds, 1))][1:]
    ratios = [theirs / mine for mine, theirs in costs]
    mine, theirs = (figure(statistics.median(side)) for side in zip(*costs))
    record = {"row": row, "unit": unit, "ours": mine, "peer": theirs, "ratio_median": statistics.median(ratios),
              "ratio_min": min(ratios), "ratio_max": max(ratios), "floor": floor, "goal": goal, "agree": bool(agree()),
              "machine": machine(packages)}
    print(f"{row}: ours {mine:.4g} {unit}, peer {theirs:.4g} {unit}, ratio {record['ratio_median']:.2f} "
          f"({min(ratios):.2f}-{max(ratios):.2f}), floor {floor} goal {goal}, agree {'yes' if record['agree'] else 'no'}")
    if arguments.json:
        pathlib.Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")
