"""Runs a program, and tells how long it took and how much memory it had."""
import subprocess, sys, time

PEAK = """import resource, subprocess, sys
status = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
sys.exit(status != 0)"""


def run(*command, cwd=None):
    """Runs a program to its end: its seconds and its peak resident bytes.

    A small process starts it: until a child calls `exec`, its peak is that of its parent, which may hold a corpus.
    """
    start = time.perf_counter()
    child = subprocess.run([sys.executable, "-c", PEAK, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert child.returncode == 0, f"{command} failed:\n{child.stderr}"
    return time.perf_counter() - start, int(child.stdout) * 1024
