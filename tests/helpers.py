"""What several wings' tests share: small random models, batches, placements, trainers."""

import os
import subprocess
import sys
from pathlib import Path

import torch
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import plopfast as pf
from plopfast.cli import main
from plopfast.data.example import Example
from plopfast.lora.layer import adapters
from plopfast.models.linears import linear_modules
from plopfast.models.quantized import quantized
from plopfast.models.running import body

SMALL = {
    "vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "qwen2": lambda: transformers.Qwen2Config(**SMALL),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**SMALL),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SMALL, head_dim=8, sliding_window=16),
    "phi3": lambda: transformers.Phi3Config(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=300, n_embd=32, n_layer=3, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=2
    ),
}


def build(architecture: str, seed: int = 0):
    """A small random causal language model; biases and norms are random too, so that neither can hide."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[architecture]()).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * (0.5 if name.endswith("bias") else 0.1))
    return model


def random_batches(count=3, rows=4, longest=19, vocabulary=300, seed=0, side="right"):
    """Padded batches of random tokens with a BOS (1) in front, and labels on the last half of each row."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        lengths = torch.randint(2, longest, (rows,), generator=generator).tolist()
        batch = {"input_ids": torch.zeros(rows, max(lengths), dtype=torch.long)}
        batch["attention_mask"] = torch.zeros_like(batch["input_ids"])
        batch["labels"] = torch.full_like(batch["input_ids"], -100)
        for i, n in enumerate(lengths):
            tokens = torch.randint(3, vocabulary, (n,), generator=generator)
            tokens[0] = 1
            at = slice(0, n) if side == "right" else slice(max(lengths) - n, max(lengths))
            batch["input_ids"][i, at] = tokens
            batch["attention_mask"][i, at] = 1
            batch["labels"][i, at][n // 2 :] = tokens[n // 2 :]
        batches.append(batch)
    return batches


def everywhere(model, rank=4, alpha=8.0):
    modules = {info.name: (rank, alpha) for info in pf.linear_modules(model)}
    return pf.Placement(modules, [], "all", 0)


def prompted(rows, starts):
    """Examples whose tokens are learned from a place on."""
    return [Example.after_prompt(row, start) for row, start in zip(rows, starts, strict=True)]


def adapted_in(wrapped):
    """Name -> (rank, alpha) of what PEFT adapts in a PeftModel, where names of parameters stand for those of experts."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = {}
    for name, module in wrapped.base_model.model.named_modules():
        if isinstance(module, BaseTunerLayer):
            parameter = getattr(module, "parameter_name", None)
            name = name.replace(".base_layer", "") + (f".{parameter}" if parameter not in (None, "weight") else "")
            found[name] = module.r["default"], float(module.lora_alpha["default"])
    return found


def randomise(model):
    with torch.no_grad():
        for module in adapters(model).values():
            module.lora_B.normal_(std=0.1)


def logits(model):
    batch = random_batches(count=1)[0]
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def made(examples, out=None, model=None, **config):
    model = model or build("llama")
    if not adapters(model):
        pf.inject(model, everywhere(model))
    settings = {"max_steps": 12, "batch_tokens": 300, "eval_every": 4, **config}
    return pf.Trainer(model, pf.TrainConfig(**settings), examples[:48], examples[48:], out=out)


def adapted():
    model = build("llama")
    pf.inject(model, everywhere(model))
    return model


def parameters(trainer):
    return {n: p.detach().clone() for n, p in trainer.parameters.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def exact_inputs(model, batches, names, skip_bos=True):
    """Module -> its counted inputs [tokens, n_in], float64, each row run alone and without padding."""
    seen = {name: [] for name in names}
    handles = [
        model.get_submodule(n).register_forward_hook(lambda _m, a, _o, n=n: seen[n].append(a[0].reshape(-1, a[0].shape[-1])))
        for n in names
    ]  # fmt: skip
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                start = {name: len(calls) for name, calls in seen.items()}
                body(model)(input_ids=ids[mask][None], attention_mask=None)
                if skip_bos and ids[mask][0] == 1:
                    for name, calls in seen.items():
                        calls[start[name]] = calls[start[name]][1:]
    for handle in handles:
        handle.remove()
    return {name: torch.cat(calls).double() for name, calls in seen.items()}


class Odd(nn.Module):
    """Layers that use modules twice, on flattened, 3-D and 4-D inputs."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 12)
        self.layers = nn.ModuleList(
            [
                nn.ModuleDict(
                    {
                        n: nn.Linear(6 if "head" in n else 12, 6 if "head" in n else 12)
                        for n in ("twice", "flat", "head_first", "head_last")
                    }
                )
                for _ in range(2)
            ]
        )
        self.seen = []

    def forward(self, input_ids, attention_mask):
        x = self.embed(input_ids)
        rows, tokens, _ = x.shape
        for layer in self.layers:
            self.seen += [("twice", x, x), ("twice", 2 * x + 1, 2 * x + 1)]
            x = layer["twice"](x) + layer["twice"](2 * x + 1)
            flat = x.reshape(-1, 12)
            x = layer["flat"](flat).view(rows, tokens, 12)
            heads = x.view(rows, tokens, 2, 6)
            x = (layer["head_last"](heads) + layer["head_first"](heads.transpose(1, 2)).transpose(1, 2)).reshape(
                rows, tokens, 12
            )
        return x


class Syncs(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


ROWS = [tuple(range(5, 24)), (7, 8), tuple(range(40, 53))]


STARTS = [4, 1, 12]


def trained(model):
    pf.inject(model, everywhere(model, rank=3))
    generator = torch.Generator().manual_seed(1)
    for module in adapters(model).values():
        module.lora_B.data.normal_(std=0.2, generator=generator)
    return model


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plopfast(*arguments):
    return main.main([str(a) for a in arguments])


def torchrun(program, *arguments, **environment):
    """The finished torchrun of a program of the tests, on two processes with one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    paths = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment}
    command = [*launcher, *map(str, (program, *arguments))]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | own)


def edit(options, name, value):
    changed = [str(o) for o in options]
    changed[changed.index(name) + 1] = str(value)
    return changed


QUICK = [
    "--score-prompts",
    "12",
    "--max-steps",
    "4",
    "--rank",
    "2",
    "--alpha",
    "4",
    "--eval-rows",
    "8",
    "--eval-every",
    "2",
]


def quantize(model, kind, nested=False):
    """All linear modules inside the layers, in place."""
    for info in linear_modules(model):
        parent, _, child = info.name.rpartition(".")
        setattr(model.get_submodule(parent), child, quantized(info.module, kind, nested=nested))
    return model


def model_for_bitsandbytes(folder):
    """Saves a model whose shapes bitsandbytes' products on a CPU take."""
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


OF_BITSANDBYTES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nested nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def of_bitsandbytes(folder, kind):
    """Loaded by transformers. Its products on a CPU are float32's, which on some CPUs they would not be."""
    config = transformers.BitsAndBytesConfig(**OF_BITSANDBYTES[kind])
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False
    return model
