#!/usr/bin/env python3
"""Steps of an 8.7M decoder on 16 x 256 random tokens: `trommel-trainer` against the better of eager and compiled PyTorch.

Either side starts a fresh process for each round, whose first steps are not timed: PyTorch's speed is steady within a process
and may differ by a tenth from one to the next. Its allocator keeps the memory that it has: to return it and fault it in
again in each step, as is the default, costs a quarter of the speed when eager and up to a tenth when compiled."""
from peers import Ours, arguments, compare, note, size, take_least
import json, math, os, pathlib, subprocess, sys
from decoder import VOCABULARY

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(16 << 30)}
BATCH, CONTEXT, STEPS = size((16, 256, 3), (2, 16, 1))


def ours(precision, batch=BATCH):
    """What `trommel-bench` says of a round, after one that does not count."""
    process = Ours("train", VOCABULARY, batch, CONTEXT, precision, STEPS, arguments.threads)
    process.round()
    said = process.round()
    process.quit()
    return said


def peer(precision, way, settings, batch=BATCH):
    """The same of PyTorch; `way` is eager or compiled, `settings` are variables of its environment."""
    program = pathlib.Path(__file__).with_name("decoder.py")
    command = [sys.executable, program, precision, way, *map(str, [batch, CONTEXT, STEPS, arguments.threads])]
    done = subprocess.run(command, check=True, env=os.environ | settings, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def compare_training(row, unit, precision, way, settings, cost, batch=BATCH, **parameters):
    """A row whose rounds cost what `cost` takes of what a process said."""
    losses = {}

    def side(name, process):
        said = process()
        losses[name] = said["loss"]
        return cost(said)

    def same_loss():
        """Both start elsewhere, and random tokens teach nothing: what can be equal is the loss, about ln(vocabulary)."""
        note(f"loss: ours {losses['ours']:.4f}, peer {losses['peer']:.4f}, ln(vocabulary) {math.log(VOCABULARY):.4f}")
        return abs(losses["ours"] / losses["peer"] - 1) <= 0.02

    compare(row, unit, lambda: side("ours", lambda: ours(precision, batch)),
            lambda: side("peer", lambda: peer(precision, way, settings, batch)), agree=same_loss, packages=["torch"], **parameters)


def run(precision, floor, goal, batch=BATCH):
    way = take_least({way: min(peer(precision, way, KEEP_MEMORY, batch)["seconds"] for _ in range(size(3, 1)))
                      for way in ["eager", "compiled"]})
    compare_training(f"training {precision}", "tokens/s", precision, way, KEEP_MEMORY, lambda said: said["seconds"],
                     batch=batch, floor=floor, goal=goal, figure=lambda cost: batch * CONTEXT * STEPS / cost)


if __name__ == "__main__":
    run("f32", floor=1, goal=1.5)
