#!/usr/bin/env python3
"""Steps of an 8.7M decoder on 16 x 256 random tokens: `trommel-trainer` against the better of eager and compiled PyTorch."""
from peers import Ours, arguments, compare, fastest, note, seconds, size
import math
import torch
from decoder import VOCABULARY, Trainer

BATCH, CONTEXT, STEPS = size((16, 256, 3), (2, 16, 1))


def same_loss(mine, theirs):
    """Both start elsewhere, and random tokens teach nothing: what can be equal is the loss, about ln(vocabulary)."""
    note(f"loss: ours {mine:.4f}, peer {theirs:.4f}, ln(vocabulary) {math.log(VOCABULARY):.4f}")
    return abs(mine / theirs - 1) <= 0.02


def run(precision, floor, goal):
    torch.set_num_threads(arguments.threads)
    ours = Ours("train", VOCABULARY, BATCH, CONTEXT, precision, STEPS, arguments.threads)
    trainers = {way: Trainer(BATCH, CONTEXT, precision, compiled=way == "compiled") for way in ["eager", "compiled"]}
    peer = fastest(trainers, lambda trainer: trainer.train(STEPS))
    compare(f"training {precision}", "tokens/s", ours.seconds, lambda: seconds(lambda: peer.train(STEPS)), floor=floor,
            goal=goal, agree=lambda: same_loss(ours.round()["loss"], peer.train(STEPS)),
            figure=lambda cost: BATCH * CONTEXT * STEPS / cost, packages=["torch"])


if __name__ == "__main__":
    run("f32", floor=1, goal=1.5)
