"""A layer of experts with adapters on both weights, forward and backward: plopfast against PEFT's target_parameters.

    OMP_NUM_THREADS=1 python bench/experts.py [--repeats 7]

The layer is Qwen3-MoE's sparse block of transformers with random weights: 1,024 tokens that are routed to 4 of E experts each, hidden
size 512, intermediate size 256, rank 16, float32. PEFT adds B A of all experts to their weights in each pass; plopfast computes
low-rank products for the rows of each expert. Times are interleaved. Memory is the peak of what torch allocates in a step
above what is alive before, gradients included. The frozen layer alone, with a gradient for its input, is the floor. "nf4" is
plopfast's layer whose experts are codes.
"""

import argparse
import copy
import statistics

import measure
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

import plopfast as pf
from plopfast.lora.layer import adapters
from plopfast.models.experts import expert_weights
from plopfast.models.quantized_experts import codes_of, put_codes
from plopfast.training.meter import Meter

TOKENS, HIDDEN, INNER, CHOSEN, RANK = 1024, 512, 256, 4, 16
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


class Layers(nn.Module):
    """A block in a list, as a model has it."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        config = Qwen3MoeConfig(
            hidden_size=HIDDEN, moe_intermediate_size=INNER, num_experts=experts, num_experts_per_tok=CHOSEN
        )
        config._experts_implementation = "grouped_mm"
        self.config = config
        self.layers = nn.ModuleList([Qwen3MoeSparseMoeBlock(config)])
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, x):
        return self.layers[0](x)


def candidates(experts: int) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    plain = Layers(experts).requires_grad_(False)
    theirs = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[], target_parameters=PARAMETERS)
    ours, codes, peft = (copy.deepcopy(plain) for _ in range(3))
    peft = get_peft_model(peft, theirs)
    names = [f"layers.0.{name}" for name in PARAMETERS]
    for info in expert_weights(codes):
        put_codes(info.mixture, info.key, "nf4", codes_of(info.frozen.weight_ENK, "nf4"))
    for model in (ours, codes):
        pf.inject(model, pf.Placement(dict.fromkeys(names, (RANK, 2.0 * RANK)), [], "explicit", 0))
    for name, module in adapters(ours).items():
        nn.init.normal_(module.lora_B, std=0.02)
        wrapper = next(m for m in peft.modules() if getattr(m, "parameter_name", None) == name.rpartition(".")[2])
        wrapper.lora_A.default.weight.data.copy_(module.lora_A.flatten(0, 1))
        wrapper.lora_B.default.weight.data.copy_(module.lora_B.permute(1, 2, 0).flatten(1))
    return {"PEFT": peft, "plopfast": ours, "nf4": codes, "frozen": plain}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    lines, figures = [], {}
    x, dy = torch.randn(1, TOKENS, HIDDEN, requires_grad=True), torch.randn(1, TOKENS, HIDDEN)
    for experts in (8, 32, 128):
        models = candidates(experts)

        def step(model):
            wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
            y = model(x)
            return y, torch.autograd.grad(y, wanted, dy)

        outputs = {name: step(model)[0].detach() for name, model in models.items()}
        off = float((outputs["plopfast"] - outputs["PEFT"]).norm() / outputs["PEFT"].norm())
        assert off < 1e-5 < float((outputs["frozen"] - outputs["PEFT"]).norm() / outputs["PEFT"].norm()), off
        memory = {}
        for name, model in models.items():
            with Meter() as meter:
                for parameter in model.parameters():
                    meter.add(parameter)  # else a view of one would count as new
                before = meter.now
                step(model)
            memory[name] = (meter.peak - before) / 2**20
        seconds = measure.interleaved({name: lambda m=model: step(m) for name, model in models.items()}, repeats)
        ms = {name: 1e3 * statistics.median(values) for name, values in seconds.items()}
        ratio, low, high = measure.ratios(seconds, "PEFT", "plopfast")
        over, *_ = measure.ratios(seconds, "plopfast", "frozen")
        coded = measure.ratios(seconds, "nf4", "plopfast")
        weights = {
            name: sum(p.nbytes for p in models[name].parameters() if not p.requires_grad) / 2**20
            for name in ("plopfast", "nf4")
        }
        figures[str(experts)] = {
            "ms": ms, "mib": memory, "speedup": [ratio, low, high], "of_frozen": over, "off": off, "nf4_time": list(coded),
            "weights_mib": weights,
        }  # fmt: skip
        lines.append(
            f"{experts} experts: {ratio:.2f} times as fast as PEFT ({low:.2f} to {high:.2f}), {over:.2f} of the frozen layer's time; "
            f"memory {memory['plopfast']:.0f} MiB against {memory['PEFT']:.0f} (frozen {memory['frozen']:.0f}); "
            f"nf4 {coded[0]:.2f} times the time ({coded[1]:.2f} to {coded[2]:.2f}), {memory['nf4']:.0f} MiB, weights "
            f"{weights['nf4']:.1f} of {weights['plopfast']:.1f} MiB"
        )
    measure.save("experts", "\n".join(lines), {"experts": figures})


if __name__ == "__main__":
    main()
