#!/usr/bin/env python3
"""The same steps with products in bf16 and master weights in f32, against PyTorch's bf16 autocast."""
from training_f32 import run

run("bf16", floor=1.5, goal=3)
