#!/usr/bin/env python3
"""The package `gguf` reads our GGUF file: metadata, tokens and tensors are those of the folder for `transformers`.

Called by `tests/interop.rs` with the file and the folder.
"""
import json, pathlib, sys

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))
import environment

environment.enter({})
import numpy as np
from gguf import GGUFReader, TokenType
from gguf.constants import MODEL_ARCH
from gguf.tensor_mapping import get_tensor_name_map
from safetensors.numpy import load_file

file, folder = sys.argv[1], pathlib.Path(sys.argv[2])
reader = GGUFReader(file)
config, tokenizer = (json.loads((folder / name).read_text()) for name in ["config.json", "tokenizer.json"])
value = {name: field.contents() for name, field in reader.fields.items()}

assert value["general.architecture"] == "llama"
heads, vocab = config["num_attention_heads"], config["vocab_size"]
for key, expected in {"vocab_size": vocab, "context_length": config["max_position_embeddings"],
                      "embedding_length": config["hidden_size"], "block_count": config["num_hidden_layers"],
                      "feed_forward_length": config["intermediate_size"], "attention.head_count": heads,
                      "attention.head_count_kv": config["num_key_value_heads"],
                      "attention.layer_norm_rms_epsilon": np.float32(config["rms_norm_eps"]),
                      "rope.dimension_count": config["head_dim"], "rope.freq_base": config["rope_theta"]}.items():
    assert value[f"llama.{key}"] == expected, (key, value[f"llama.{key}"], expected)

ids, end_of_text = tokenizer["model"]["vocab"], config["eos_token_id"]
assert {token: id for id, token in enumerate(value["tokenizer.ggml.tokens"])} == ids and len(ids) == vocab
assert value["tokenizer.ggml.merges"] == [" ".join(pair) for pair in tokenizer["model"]["merges"]]
kinds = [TokenType.CONTROL if id == end_of_text else TokenType.NORMAL for id in range(vocab)]
assert value["tokenizer.ggml.token_type"] == kinds
assert value["tokenizer.ggml.bos_token_id"] == value["tokenizer.ggml.eos_token_id"] == end_of_text


def permuted(weights):
    """As llama.cpp's `convert_hf_to_gguf.py` puts the rows of queries and keys."""
    rows, columns = weights.shape
    return weights.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


names = get_tensor_name_map(MODEL_ARCH.LLAMA, config["num_hidden_layers"])
expected = {}
for name, weights in load_file(folder / "model.safetensors").items():
    new = permuted(weights) if name.endswith(("q_proj.weight", "k_proj.weight")) else weights
    expected[names.get_name(name, try_suffixes=[".weight"])] = new
tensors = {tensor.name: tensor.data for tensor in reader.tensors}
assert tensors.keys() == expected.keys(), tensors.keys() ^ expected.keys()
for name, data in tensors.items():
    assert data.dtype == np.float32 and np.array_equal(data, expected[name]), name
print(f"{file}: {len(tensors)} tensors and {len(ids)} tokens are those of {folder}")
