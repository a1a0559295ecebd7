"""A plain Llama-like decoder in PyTorch, of the sizes of `slm-9m` unless others are given, and its training step.

As a program it trains some steps, then as many again, and prints `{"seconds", "loss"}` of these and `{"peak_rss_bytes",
"imported_rss_bytes"}` of the process.
"""
import json, sys, time
from typing import NamedTuple
import torch, torch.nn as nn, torch.nn.functional as F


class Shape(NamedTuple):
    vocabulary: int = 8192
    width: int = 256
    layers: int = 6
    heads: int = 8
    mlp: int = 1088
    gated: bool = True  # SwiGLU, or else GELU


SLM_9M = Shape()
SLM_126M = Shape(32_000, 1024, 7, 8, 4096, False)
VOCABULARY = SLM_9M.vocabulary


def rotate(x, cosine, sine):  # (batch, heads, time, width of a head)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        width, self.shape = shape.width, shape
        self.attention_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.projections = nn.Linear(width, 3 * width, bias=False)
        self.attention_output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, (1 + shape.gated) * shape.mlp, bias=False)
        self.down = nn.Linear(shape.mlp, width, bias=False)

    def forward(self, x, cosine, sine):  # (batch, time, width)
        batch, time, width = x.shape
        heads = self.projections(self.attention_norm(x)).view(batch, time, 3, self.shape.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        query, key = (rotate(each, cosine, sine).type_as(value) for each in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_output(mixed.transpose(1, 2).reshape(batch, time, width))
        inner = self.up(self.mlp_norm(x))
        if not self.shape.gated:
            return x + self.down(F.gelu(inner, approximate="tanh"))
        gate, up = inner.chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, shape, context):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)  # also the output layer
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width)
        half = shape.width // shape.heads // 2
        angles = torch.outer(torch.arange(context), 10_000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cosine", angles.cos())
        self.register_buffer("sine", angles.sin())
        for weight in self.parameters():
            if weight.dim() == 2:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens):  # (batch, context + 1) gives the mean loss
        x = self.embedding(tokens[:, :-1])
        for block in self.blocks:
            x = block(x, self.cosine, self.sine)
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


class Trainer:
    def __init__(self, batch, context, precision, compiled=False, shape=SLM_9M, device="cpu"):
        torch.manual_seed(17)
        self.model = Decoder(shape, context).to(device)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.shape, self.autocast = (batch, context + 1), precision == "bf16"
        self.vocabulary, self.device = shape.vocabulary, device
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def train(self, steps):
        """Trains on random tokens and returns the last step's loss."""
        for _ in range(steps):
            tokens = torch.randint(self.vocabulary, self.shape, device=self.device)
            with torch.autocast(self.device, torch.bfloat16, enabled=self.autocast):
                loss = self.forward(tokens)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return loss.item()


def resident(field):
    """`VmRSS` or its peak, `VmHWM`, in bytes."""
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    return int(status[field].split()[0]) * 1024


if __name__ == "__main__":
    precision, way, *sizes = sys.argv[1:]
    batch, context, steps, threads = map(int, sizes)
    torch.set_num_threads(threads)
    imported = resident("VmRSS")
    trainer = Trainer(batch, context, precision, compiled=way == "compiled")
    trainer.train(steps)
    start = time.perf_counter()
    loss = trainer.train(steps)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "loss": loss, "peak_rss_bytes": resident("VmHWM"), "imported_rss_bytes": imported}))
