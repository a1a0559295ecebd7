#!/usr/bin/env python3
"""Models as `transformers` saves them, for us to read, and the logits that it computes.

Called by `tests/interop.rs` with a `tokenizer.json` and a folder to fill: one folder per model, with `logits.json` in those that
we must read. Each number is random and so is each gain, so that no two tensors can be confused.
"""
import json, pathlib, sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import environment

environment.enter({"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2", "TQDM_DISABLE": "1"})
import torch
from transformers import ArceeConfig, ArceeForCausalLM, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast

tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[1], bos_token="<|endoftext|>", eos_token="<|endoftext|>")
out = pathlib.Path(sys.argv[2])
shape = dict(vocab_size=len(tokenizer), hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
             max_position_embeddings=64, bos_token_id=0, eos_token_id=0, tie_word_embeddings=True, rms_norm_eps=1e-5,
             rope_parameters={"rope_type": "default", "rope_theta": 50_000.0})


def save(name, kind, config, dtype=torch.float32, **how):
    torch.manual_seed(17)
    model = kind(config)
    for weight in model.parameters():
        mean, deviation = (0.0, 0.2) if weight.dim() == 2 else (1.0, 0.3)
        torch.nn.init.normal_(weight, mean, deviation)
    model.to(dtype).save_pretrained(out / name, **how)
    tokenizer.save_pretrained(out / name)


def save_readable(name, *arguments, **how):
    save(name, *arguments, **how)
    # Computed in f32 from what was saved, as we do.
    model = AutoModelForCausalLM.from_pretrained(out / name, dtype=torch.float32)
    tokens = torch.randint(len(tokenizer), (40,), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits = model(tokens[None]).logits[0]  # (time, vocabulary)
    record = {"tokens": tokens.tolist(), "logits": logits.tolist()}
    (out / name / "logits.json").write_text(json.dumps(record))


save_readable("f32", LlamaForCausalLM, LlamaConfig(**shape))
save_readable("bf16-in-files", LlamaForCausalLM, LlamaConfig(**shape), torch.bfloat16, max_shard_size="20KB")
save_readable("f16", LlamaForCausalLM, LlamaConfig(**shape), torch.float16)
save_readable("gelu", ArceeForCausalLM, ArceeConfig(**shape, hidden_act="gelu_pytorch_tanh"))
save("untied", LlamaForCausalLM, LlamaConfig(**shape | {"tie_word_embeddings": False}))
save("grouped", LlamaForCausalLM, LlamaConfig(**shape, num_key_value_heads=2))
save("biased", LlamaForCausalLM, LlamaConfig(**shape, attention_bias=True))
save("scaled", LlamaForCausalLM, LlamaConfig(**shape | {
    "rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}}))
