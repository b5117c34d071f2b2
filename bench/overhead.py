"""The overhead of one eager call of a LoRA linear, ours and PEFT's: tiny operands on one CPU thread.

    python bench/overhead.py [--repeats 101]

At 2 x 2 tokens of 64 features the products take almost no time, so what is timed is Python, autograd and operators.
Target: a call (forward, with gradients wanted) no slower than PEFT's.
"""

import argparse

from plopfast.support import threads

threads.set_waiting_policy()

import measure
import torch
from peft import LoraConfig, get_peft_model

import plopfast as pf

CALLS = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=101)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    base = torch.nn.Linear(64, 64, bias=False).requires_grad_(False)
    peft = get_peft_model(torch.nn.Sequential(base), LoraConfig(r=8, lora_alpha=16, target_modules=["0"]))
    modules = {"frozen": base, "plopfast": pf.LoRALinear(base, 8, 16), "peft": peft.base_model.model[0]}
    x, dy = torch.randn(2, 2, 64, requires_grad=True), torch.randn(2, 2, 64)

    def forward(module):
        return lambda: [module(x) for _ in range(CALLS)]

    def step(module):
        return lambda: [module(x).backward(dy) for _ in range(CALLS)]

    lines, figures = [f"{'':<10}{'call, us':>10}{'call + backward, us':>22}"], {}
    for what, make in (("call", forward), ("step", step)):
        seconds = measure.interleaved({name: make(module) for name, module in modules.items()}, arguments.repeats)
        micros = {name: sorted(values)[len(values) // 2] / CALLS * 1e6 for name, values in seconds.items()}
        figures[what] = {"median_us": micros, "plopfast / peft": measure.ratios(seconds, "plopfast", "peft")}
    for name in modules:
        lines.append(
            f"{name:<10}{figures['call']['median_us'][name]:>10.1f}{figures['step']['median_us'][name]:>22.1f}"
        )
    for what in figures:
        median, low, high = figures[what]["plopfast / peft"]
        lines.append(f"{what}: plopfast / peft {median:.2f} ({low:.2f} to {high:.2f})")
    measure.save("overhead", "\n".join(lines), figures)


if __name__ == "__main__":
    main()
