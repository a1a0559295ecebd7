"""The shipped static table as a model2vec `StaticModel`."""
import pathlib
import numpy as np
from model2vec import StaticModel
from safetensors.numpy import load_file
from tokenizers import Tokenizer

FOLDER = pathlib.Path(__file__).resolve().parents[2] / "data/models/static"


def static_model():
    table = load_file(FOLDER / "static_table.safetensors")
    rows = table["vectors"].astype(np.float32) * table["scales"][:, None]
    return StaticModel(rows, Tokenizer.from_file(str(FOLDER / "tokenizer.json")), normalize=True, max_length=None)
