#!/usr/bin/env python3
"""Training steps of `slm-126m` on a GPU in bf16: ours against eager and compiled PyTorch, with its flash attention.

    python3 tests/peers/training_gpu.py [SEQUENCES [BINARY]]

Run where there is a GPU, by a Python that has PyTorch; a step has 32 sequences of 1,024 tokens unless told otherwise. BINARY is the
example `throughput`, built with `--features cuda`, which prints the median and the best of ten steps, also of a projected network
of 16 experts; of PyTorch it is the better of two rounds of ten steps.
"""
import subprocess, sys, time
import torch
from decoder import SLM_126M, Trainer

STEPS, CONTEXT = 10, 1024


def peer(sequences):
    for way in ["eager", "compiled"]:
        torch.cuda.empty_cache()
        trainer = Trainer(sequences, CONTEXT, "bf16", way == "compiled", SLM_126M, "cuda")
        trainer.train(3)
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            trainer.train(STEPS)  # ends with the loss, for which the host waits
            seconds.append(time.perf_counter() - start)
        rate = sequences * CONTEXT * STEPS / min(seconds)
        memory = torch.cuda.max_memory_allocated() / 2**30
        print(f"PyTorch {torch.__version__} {way}: {sequences} x {CONTEXT}: {rate:.0f} tokens/s, {memory:.1f} GiB", flush=True)


print(torch.cuda.get_device_name(), flush=True)
torch.set_float32_matmul_precision("highest")
sequences = int(sys.argv[1]) if len(sys.argv) > 1 else 32
for binary in sys.argv[2:]:
    for experts in ["0", "16"]:
        tokens = str(sequences * CONTEXT)
        subprocess.run([binary, "slm-126m", str(CONTEXT), "32000", "bf16", tokens, "cuda", experts], check=False)
peer(sequences)
