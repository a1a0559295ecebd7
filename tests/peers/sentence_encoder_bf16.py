#!/usr/bin/env python3
"""all-MiniLM-L6-v2 in bf16: `trommel-embed` against the faster way that sentence-transformers has."""
from sentence_encoder_f32 import run

run("bf16", floor=1.5, goal=3, bound=0.999)
