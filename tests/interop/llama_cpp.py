#!/usr/bin/env python3
"""llama.cpp opens our GGUF file: its tokens are ours, and so are the odds of all next tokens.

Called by `tests/interop.rs` with the file and the JSON file of what we computed. The package `xllamacpp` is a build of
llama.cpp's own server.
"""
import json, pathlib, sys, urllib.request

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import environment

environment.enter({})
import numpy as np
import xllamacpp

file, ours = sys.argv[1], json.loads(pathlib.Path(sys.argv[2]).read_text())
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.n_ctx, parameters.n_parallel = file, 64, 1
parameters.cpuparams.n_threads, parameters.verbosity, parameters.warmup = 2, 0, False
# By default llama.cpp rounds keys and values to 16 bits, which hides errors below 1e-2.
parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
parameters.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
server = xllamacpp.Server(parameters)


def ask(path, **question):
    request = urllib.request.Request(server.listening_address + path, json.dumps(question).encode(),
                                     {"Content-Type": "application/json"})
    return json.load(urllib.request.urlopen(request))


def odds(tokens):
    """The log-probability of each token after these."""
    answer = ask("/completion", prompt=tokens, n_predict=1, n_probs=len(ours["logits"][0][0]), temperature=0,
                 cache_prompt=False)
    return {each["id"]: each["logprob"] for each in answer["completion_probabilities"][0]["top_logprobs"]}


worst = 0.0
for text, tokens, expected in zip(ours["texts"], ours["tokens"], ours["logits"], strict=True):
    # Our documents begin with the end-of-text token, and the file says so.
    start = [ours["end_of_text"], *tokens]
    assert ask("/tokenize", content=text, add_special=True)["tokens"] == start, text
    for last in [0, len(tokens)]:
        logits = np.array(expected[last])
        logprobs = logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())
        found = odds(start[:last + 1])
        assert len(found) == len(logits)
        worst = max(worst, max(abs(found[token] - logprobs[token]) for token in found))
said = ask("/completion", prompt=ours["texts"][0], n_predict=5, temperature=0)["content"]
print(f"{file}: log-probabilities differ by at most {worst:.1e}; {ours['texts'][0]!r} goes on {said!r}")
assert worst <= 1e-4 and said
