#!/usr/bin/env python3
"""Peak resident memory of training the 8.7M decoder in f32 on 16 x 256 tokens: all of ours against what PyTorch adds to
its own import, which is half a gigabyte, mostly CUDA. A fresh process each round; eager, because compiling takes more."""
from training_f32 import compare_training

compare_training("training memory", "MB", "f32", "eager", {},
                 lambda said: said["peak_rss_bytes"] - said.get("imported_rss_bytes", 0), floor=1, goal=2,
                 figure=lambda cost: cost / 1e6)
