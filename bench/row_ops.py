"""Rotary embedding and the label loss on the CPU, one thread: transformers' and torch's own operations against ours.

    OMP_NUM_THREADS=1 python bench/row_ops.py [--repeats 15]

Forward and backward, interleaved: 8 rows of 512 tokens with 9 query heads and 3 key heads of 64, then rows of 20 tokens;
and the loss of 1,500 tokens under a vocabulary of 49,152, whose products are timed alone too.
"""

import argparse
import statistics

import measure
import torch
from torch.nn.functional import cross_entropy
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from plopfast.models.cross_entropy import chunked_cross_entropy
from plopfast.models.rotary import rotary

HEADS, KEYS, D = 9, 3, 64
TOKENS, HIDDEN, VOCABULARY = 1500, 576, 49152


def rotations(rows: int, tokens: int, dtype: torch.dtype):
    q, k = (torch.randn(rows, tokens, h * D).to(dtype).requires_grad_() for h in (HEADS, KEYS))
    angle = torch.randn(1, tokens, D // 2).repeat(1, 1, 2)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    dy = [torch.randn(rows, tokens, h, D).to(dtype).transpose(1, 2) for h in (HEADS, KEYS)]

    def of(function):
        def run():
            y = function(*(x.unflatten(2, (-1, D)).transpose(1, 2) for x in (q, k)), cos, sin)
            torch.autograd.grad(y, [q, k], dy)

        return run

    return {"transformers": of(apply_rotary_pos_emb), "plopfast": of(rotary)}


def losses(dtype: torch.dtype):
    hidden = torch.randn(TOKENS, HIDDEN).to(dtype).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN) * 3 * HIDDEN**-0.5).to(dtype)  # logits of a size that models have
    targets = torch.randint(0, VOCABULARY, (TOKENS,))

    def torchs():
        cross_entropy((hidden @ weight.T).float(), targets, reduction="sum").backward()

    def products():
        with torch.no_grad():
            (hidden @ weight.T) @ weight

    return {
        "torch": torchs,
        "plopfast": lambda: chunked_cross_entropy(hidden, weight, targets).backward(),
        "products alone": products,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=15)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    lines, figures = [], {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, candidates in (
            ("rotary, 8 x 512", rotations(8, 512, dtype)),
            ("rotary, 8 x 20", rotations(8, 20, dtype)),
            ("loss", losses(dtype)),
        ):
            seconds = measure.interleaved(candidates, max(3, repeats // 5) if name == "loss" else repeats)
            base, ours, *_ = candidates
            ratio, low, high = measure.ratios(seconds, base, ours)
            ms = {key: 1e3 * statistics.median(values) for key, values in seconds.items()}
            figures[f"{name}, {str(dtype)[6:]}"] = {"ms": ms, "speedup": [ratio, low, high]}
            each = ", ".join(f"{key} {value:.2f} ms" for key, value in ms.items())
            lines.append(f"{name}, {str(dtype)[6:]}: {each}; {ratio:.2f} times as fast ({low:.2f} to {high:.2f})")
    measure.save("row_ops", "\n".join(lines), {"row_ops": figures})


if __name__ == "__main__":
    main()
