#!/usr/bin/env python3
"""Peak resident memory of training the 8.7M decoder in f32 on 16 x 256 tokens: all of ours against what PyTorch adds to
its own import, which is half a gigabyte, mostly CUDA. A fresh process each round; eager, because compiling takes more."""
from peers import Ours, arguments, compare
import json, pathlib, subprocess, sys
from decoder import VOCABULARY
from training_f32 import BATCH, CONTEXT, STEPS, same_loss

losses = {}


def ours():
    process = Ours("train", VOCABULARY, BATCH, CONTEXT, "f32", STEPS, arguments.threads)
    said = process.round()
    process.quit()
    losses["ours"] = said["loss"]
    return said["peak_rss_bytes"]


def peer():
    program = pathlib.Path(__file__).with_name("decoder.py")
    command = [sys.executable, program, *map(str, [BATCH, CONTEXT, STEPS, arguments.threads])]
    said = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    losses["peer"] = said["loss"]
    return said["peak_rss_bytes"] - said["imported_rss_bytes"]


compare("training memory", "MB", ours, peer, floor=1, goal=2, agree=lambda: same_loss(losses["ours"], losses["peer"]),
        figure=lambda cost: cost / 1e6, packages=["torch"])
