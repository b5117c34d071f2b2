"""What calls of the public face are made on, and what is declared of each call.

A call is made on a `World` of its own, whose model has everything that a careless function could disturb: submodules in
different modes, hooks and a forward of the caller's, mixed `requires_grad`, gradients, dropout that draws numbers.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch
import transformers
from helpers import SMALL, random_batches

import plopfast as pf
from plopfast.data.example import Example
from plopfast.lora.layer import adapters

ATTENTION, DOWN = "model.layers.0.self_attn", "model.layers.1.mlp.down_proj"
ADAPTED = {  # rank and alpha; k and v share a product, as they have one input and one scaling, and q has another
    f"{ATTENTION}.q_proj": (2, 3.5), f"{ATTENTION}.k_proj": (3, 6.0), f"{ATTENTION}.v_proj": (4, 8.0), DOWN: (5, 14.25),
}  # fmt: skip
WRAPPED = rf"^model ({'|'.join(ADAPTED)})\b"
FROZEN = r"^model .* requires_grad$"
LEARNED = r"^model .*lora_[AB] values$"
PLACEMENT = pf.Placement(ADAPTED, [], "explicit", 0)


def odd_model():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**SMALL, "num_hidden_layers": 2}, attention_dropout=0.1)
    model = transformers.AutoModelForCausalLM.from_config(config).train()
    model.requires_grad_(True)
    layers = model.model.layers
    layers[0].eval()
    layers[1].mlp.down_proj.eval()
    layers[0].mlp.gate_proj.weight.requires_grad_(False)
    layers[1].input_layernorm.weight.grad = torch.ones_like(layers[1].input_layernorm.weight)
    layers[0].self_attn.q_proj.weight.grad = torch.ones_like(layers[0].self_attn.q_proj.weight)
    norm = model.model.norm
    norm.forward = lambda x: type(norm).forward(norm, x)
    layers[1].register_forward_hook(lambda *_: None)
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    model.note = ["the caller's"]
    return model


class World:
    """What a call needs, in a folder of its own."""

    def __init__(self, folder, tokenizer, model=None):
        self.folder, self.tokenizer, self.model = folder, tokenizer, model or odd_model()
        self.batches = random_batches(count=3)
        self.out = folder / "out"

    def examples(self, count=12, of=8):
        generator = torch.Generator().manual_seed(3)
        draw = lambda n: torch.randint(3, 300, (n,), generator=generator).tolist()  # noqa: E731
        return [Example.after_prompt([1, *draw(of + i % 5)], of // 2, f" {i % 3}", f"rows:{i}") for i in range(count)]

    def adapted(self, values=True):
        torch.manual_seed(1)
        pf.inject(self.model, PLACEMENT, dropout=0.1)
        for module in adapters(self.model).values():
            if values:
                torch.nn.init.normal_(module.lora_B, std=0.1)
        return self.model

    def rows(self, *more):
        path = self.folder / "rows.jsonl"
        rows = [{"prompt": f"a word {i}", "completion": f" kind {i % 3}"} for i in range(9)]
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
        return path

    def saved_adapter(self, **values):
        other = World(self.folder, self.tokenizer)
        path = pf.save_adapter(other.adapted(), self.folder / "adapter")
        if values:
            file = path / "adapter_config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
        return path

    def saved_model(self, **values):
        path = self.folder / "model"
        model = odd_model()
        with torch.no_grad():
            model.lm_head.weight[0, 0] = values.get("value", 0.0)
        model.save_pretrained(path)
        self.tokenizer.save_pretrained(path)
        return path

    def trainer(self, out=None, on_valid=None, **settings):
        rows, config = self.examples(), {"max_steps": 3, "batch_rows": 3, "eval_every": 2, **settings}
        return pf.Trainer(self.model, pf.TrainConfig(**config), rows[:9], rows[9:], out=out, on_valid=on_valid)

    def report(self):
        return pf.score(self.model, self.batches)


@dataclass(frozen=True)
class Case:
    name: str  # in `plopfast.__all__`, or of a function below it
    about: str
    start: Callable  # World -> (call, arguments)
    changes: tuple[str, ...] = ()
    raises: type[Exception] | None = None
    halfway: tuple[str, ...] = ()  # what may be otherwise after a failure half way; the call made again gives the same
    anew: bool = False  # made again on the model as it was at first
    dear: bool = False  # takes long
    look: Callable = lambda world: None  # at what the call changed, a part of its result

    def __str__(self):
        return f"{self.name}: {self.about}".replace(" ", "_")


CASES: list[Case] = []


def case(name, about="", changes=(), raises=None, halfway=(), **more):
    def add(start):
        about_it = about or start.__name__.strip("_").replace("_", " ")
        CASES.append(Case(name, about_it, start, tuple(changes), raises, tuple(halfway), **more))
        return start

    return add


def learned(w):
    return {name: p for name, p in w.model.named_parameters() if p.requires_grad}


def seen_of(w):
    """The model as the call left it: types, modes and values of its modules."""
    modules = [(name, type(m).__name__, m.training, vars(m).get("scaling")) for name, m in w.model.named_modules()]
    lora = [(n, m.rank, m.alpha, m.dropout, m.rslora, m.scaling) for n, m in adapters(w.model).items()]
    return modules, lora, w.model
