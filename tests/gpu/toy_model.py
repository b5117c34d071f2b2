"""A small model of two repeated layers, each with a shared input and a bias, and with more work after the last of them."""

import torch
from torch import nn


class Layer(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.gate, self.up = nn.Linear(width, inner), nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width)
        nn.init.normal_(self.gate.bias)  # as large as what it is added to

    def forward(self, x):
        x = x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return x


class Toy(nn.Module):
    """`finished` counts the passes that ran to their end."""

    def __init__(self, width=32, inner=48, dtype=torch.bfloat16, device="cpu"):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(50, width)
        self.layers = nn.ModuleList(Layer(width, inner) for _ in range(2))
        self.pool = nn.Linear(width, width)
        self.finished = 0
        self.to(dtype).to(device)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        x = self.pool(x)
        self.finished += 1
        return x


def batches(count=3, rows=3, tokens=8):
    """Batches of one length, so that each is run as it comes."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 50, (count, rows, tokens), generator=generator)
    return [{"input_ids": one, "attention_mask": torch.ones_like(one)} for one in ids]
