"""One LoRA linear, forward and forward + backward, on SmolLM2-135M's shapes: ours, PEFT's and the frozen layer alone.

    pytest bench --benchmark-only --benchmark-group-by=param:shape,param:backward

Compare medians within a group; the rounds of different variants are not interleaved, so small differences are noise.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model

import plopfast as pf

SHAPES = {"v 576->192": (576, 192), "up 576->1536": (576, 1536), "down 1536->576": (1536, 576)}
TOKENS, RANK = 320, 16


def variant(name: str, n_in: int, n_out: int) -> torch.nn.Module:
    torch.manual_seed(0)
    base = torch.nn.Linear(n_in, n_out, bias=False).requires_grad_(False)
    if name == "plopfast":
        return pf.LoRALinear(base, RANK, 32)
    if name == "peft":
        config = LoraConfig(r=RANK, lora_alpha=32, target_modules=["0"])
        return get_peft_model(torch.nn.Sequential(base), config)
    return base


@pytest.mark.parametrize("name", ["plopfast", "peft", "frozen"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
@pytest.mark.parametrize("shape", SHAPES)
def test_linear(benchmark, shape, backward, name):
    module = variant(name, *SHAPES[shape])
    x = torch.randn(TOKENS, SHAPES[shape][0], requires_grad=True)
    dy = torch.randn(TOKENS, SHAPES[shape][1])

    def step():
        if not backward:
            with torch.no_grad():
                return module(x)
        return module(x).backward(dy)

    benchmark(step)
