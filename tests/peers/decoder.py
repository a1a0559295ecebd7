"""A plain Llama-like decoder in PyTorch, of the sizes of `slm-9m`, and its training step.

As a program it trains a few steps in f32 and prints `{"peak_rss_bytes", "imported_rss_bytes", "loss"}`.
"""
import json, sys
import torch, torch.nn as nn, torch.nn.functional as F

VOCABULARY, WIDTH, LAYERS, HEADS, MLP = 8192, 256, 6, 8, 1088


def rotate(x, cosine, sine):  # (batch, heads, time, width of a head)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, first * sine + second * cosine], dim=-1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.mlp_norm = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.projections = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.attention_output = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate_and_up = nn.Linear(WIDTH, 2 * MLP, bias=False)
        self.down = nn.Linear(MLP, WIDTH, bias=False)

    def forward(self, x, cosine, sine):  # (batch, time, width)
        batch, time, _ = x.shape
        heads = self.projections(self.attention_norm(x)).view(batch, time, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        query, key, value = heads.unbind(0)
        query, key = (rotate(each, cosine, sine).type_as(value) for each in (query, key))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_output(mixed.transpose(1, 2).reshape(batch, time, WIDTH))
        gate, up = self.gate_and_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Decoder(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)  # also the output layer
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(WIDTH)
        half = WIDTH // HEADS // 2
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
    def __init__(self, batch, context, precision, compiled=False):
        torch.manual_seed(17)
        self.model = Decoder(context)
        self.forward = torch.compile(self.model) if compiled else self.model
        self.shape, self.autocast = (batch, context + 1), precision == "bf16"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def train(self, steps):
        """Trains on random tokens and returns the last step's loss."""
        for _ in range(steps):
            tokens = torch.randint(VOCABULARY, self.shape)
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
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
    batch, context, steps, threads = map(int, sys.argv[1:])
    torch.set_num_threads(threads)
    imported = resident("VmRSS")
    loss = Trainer(batch, context, "f32").train(steps)
    print(json.dumps({"peak_rss_bytes": resident("VmHWM"), "imported_rss_bytes": imported, "loss": loss}))
