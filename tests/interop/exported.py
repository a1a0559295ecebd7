#!/usr/bin/env python3
"""`transformers` opens our exports: logits, tokens and perplexity are ours.

Called by `tests/interop.rs` with JSON files, one per exported folder, of what we computed.
"""
import json, math, pathlib, sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import environment

environment.enter({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "TQDM_DISABLE": "1"})
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def check(ours):
    folder, end_of_text = ours["folder"], ours["end_of_text"]
    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == ours["architecture"], type(model)
    assert model.dtype == torch.float32, model.dtype
    assert not any(loading.values()), loading
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.bos_token_id == tokenizer.eos_token_id == model.config.eos_token_id == end_of_text
    nll, count, worst, largest = 0.0, 0, 0.0, 0.0
    for text, tokens, expected in zip(ours["texts"], ours["tokens"], ours["logits"], strict=True):
        assert tokenizer(text)["input_ids"] == tokens, text
        assert tokenizer.decode(tokens) == text, text
        with torch.no_grad():
            logits = model(torch.tensor([[end_of_text, *tokens]])).logits[0]  # (1 + tokens, vocabulary)
        worst = max(worst, (logits - torch.tensor(expected)).abs().max().item())
        largest = max(largest, logits.abs().max().item())
        nll += torch.nn.functional.cross_entropy(logits[:-1].double(), torch.tensor(tokens), reduction="sum").item()
        count += len(tokens)
    perplexity = math.exp(nll / count)
    # As the README says.
    prompt = tokenizer(tokenizer.bos_token + ours["texts"][0], return_tensors="pt")
    assert prompt["input_ids"].tolist() == [[end_of_text, *ours["tokens"][0]]]
    generated = model.generate(**prompt, max_new_tokens=5)
    print(f"{folder}: logits up to {largest:.2f} differ by at most {worst:.1e}, perplexity {perplexity:.4f}, "
          f"ours {ours['perplexity']:.4f}; goes on {tokenizer.decode(generated[0])!r}")
    assert largest > 1 and worst <= 1e-4
    assert abs(perplexity / ours["perplexity"] - 1) <= 1e-4


for path in sys.argv[1:]:
    check(json.loads(pathlib.Path(path).read_text()))
