#!/usr/bin/env python3
"""The same steps with products in bf16 and master weights in f32, against PyTorch's bf16 autocast."""
from peers import multiplies_bf16
from training_f32 import BATCH, run

# PyTorch would take more than a minute for a step of 16 sequences without the instructions.
run("bf16", floor=1.5, goal=3, batch=BATCH if multiplies_bf16() else 1)
