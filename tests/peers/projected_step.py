#!/usr/bin/env python3
"""Steps of a projected network of 16 experts against steps of the plain model of the same size, both ours, at 128 x 256 tokens.

The paper paid 1.64 times the plain model's time: 3.6 and 2.2 GPU-hours for 1B tokens [PE, table 1]. A ratio of 1 / 1.15 is the
goal. Both start as the same function, so their first losses are equal.
"""
from peers import Ours, arguments, compare, size

VOCABULARY, BATCH, CONTEXT, EXPERTS = 8192, *size((128, 256, 16), (8, 16, 4))
network, plain = (Ours("train", VOCABULARY, BATCH, CONTEXT, "bf16", 1, arguments.threads, *experts) for experts in [[EXPERTS], []])
losses = [network.round()["loss"], plain.round()["loss"]]
compare("projected network step", "tokens/s", network.seconds, plain.seconds, floor=round(1 / 1.4, 3), goal=round(1 / 1.15, 3),
        agree=lambda: abs(losses[0] / losses[1] - 1) <= 1e-4, figure=lambda cost: BATCH * CONTEXT / cost)
