"""What a family's steps are held against: NFN by hooks, LoRA as W + scaling B A put in the weights' places, a plain training.

None of it calls plopfast's own products, losses, scores or optimizers. Every pass takes rows of tokens as they are.
"""

import inspect

import torch
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode

from plopfast.data.example import Example


def batches_of(vocabulary, count=3, rows=4, longest=14, seed=0):
    """Batches of random tokens with a BOS (1) in front, padded on the right."""
    generator, batches = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        lengths = torch.randint(3, longest, (rows,), generator=generator).tolist()
        ids = torch.zeros(rows, max(lengths), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, length in enumerate(lengths):
            ids[row, :length] = torch.randint(3, vocabulary, (length,), generator=generator)
            ids[row, 0], mask[row, :length] = 1, 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def examples_of(vocabulary, count, seed=0):
    """Rows of several lengths, of which all but the first tokens are learned."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for number in range(count):
        tokens = torch.randint(3, vocabulary, (6 + 2 * (number % 4),), generator=generator).tolist()
        rows.append(Example.after_prompt([1, *tokens], 3, "x", f"rows:{number}"))
    return rows


def padded(rows):
    """(a batch, which tokens are learned [rows, tokens]) of examples."""
    longest = max(len(row.tokens) for row in rows)
    ids, mask = torch.zeros(len(rows), longest, dtype=torch.long), torch.zeros(len(rows), longest, dtype=torch.long)
    learned = torch.zeros(len(rows), longest, dtype=torch.bool)
    for at, row in enumerate(rows):
        length = len(row.tokens)
        ids[at, :length], mask[at, :length], learned[at, row.start : length] = torch.tensor(row.tokens), 1, True
    return {"input_ids": ids, "attention_mask": mask}, learned


def logits_of(model, batch, weights=None):
    """Logits [rows, tokens, vocabulary]; `weights`: name -> what stands in a parameter's place."""
    takes = inspect.signature(model.forward).parameters
    given = {name: value for name, value in batch.items() if name in takes or "kwargs" in takes}
    if "use_cache" in takes or "kwargs" in takes:
        given["use_cache"] = False
    if weights is None:
        return model(**given).logits
    return functional_call(model, weights, kwargs=given, tie_weights=False).logits


def real_logits(model, batch, weights=None):
    """Logits [tokens, vocabulary] of the real tokens, without gradients."""
    with torch.no_grad():
        return logits_of(model, batch, weights)[batch["attention_mask"].bool()].float()


def nfn(model, batches, names, dtype=torch.float64):
    """(name -> NFN, the names that were never called) of modules by name, from passes row by row without padding."""
    model.to(dtype)
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped products take no float64
    config = model.config.get_text_config(decoder=True)
    bos = getattr(config, "bos_token_id", None)
    seen, ratios = {}, {name: [] for name in names}
    weights = dict(model.named_parameters())
    modules = {name: model.get_submodule(name) for name in names if name not in weights}
    experts = Watched({name: weights[name] for name in names if name in weights})
    hooks = [
        module.register_forward_hook(lambda _m, args, _o, name=name: seen.setdefault(name, []).append(args[0]))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for batch in batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True):
                seen.clear()
                with experts:
                    logits_of(model, {"input_ids": ids[mask][None], "attention_mask": mask[mask].long()[None]})
                for name, x, weight, tokens in experts.calls:
                    counted = x[(tokens >= int(ids[0] == bos)) & x.any(1)].double()
                    z = (counted @ weight.double()).norm(dim=-1) / counted.norm(dim=-1)
                    ratios[name].append(z * weight.shape[0] ** 0.5 / weight.double().norm())
                for name, calls in seen.items():
                    for x in calls:
                        flat, tokens = x.reshape(-1, x.shape[-1]).double(), int(mask.sum())
                        assert len(flat) % tokens == 0, f"{name} sees {len(flat)} rows for {tokens} tokens"
                        counted = flat.view(tokens, -1, x.shape[-1])[int(ids[0] == bos) :].flatten(0, 1)
                        weight = _weight_NK(modules[name]).double()
                        z = (counted @ weight.T).norm(dim=-1) / counted.norm(dim=-1)
                        ratios[name].append(z * weight.shape[1] ** 0.5 / weight.norm())
    for hook in hooks:
        hook.remove()
    called = {name: torch.cat(values).mean().item() for name, values in ratios.items() if values}
    return called, sorted(set(names) - called.keys())


class Watched(TorchFunctionMode):
    """Sees the products with a part of one of `weights`: `calls` are (name, x [rows, in], weight [in, out], tokens [rows]).

    The experts are run one by one, as transformers' plainest way does: it takes an expert's tokens by their numbers, and
    multiplies them with its part of the weights. Llama 4 multiplies all tokens with all parts at once.
    """

    def __init__(self, weights):
        super().__init__()
        self.weights, self.calls, self.tokens = weights, [], None

    def __enter__(self):
        self.calls = []
        return super().__enter__()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__ and isinstance(args[1], torch.Tensor) and args[1].dim() == 1:
            self.tokens = args[1]
        elif function is nn.functional.linear or function.__name__ in ("matmul", "__matmul__"):
            self._note(args[0], args[1].T if function is nn.functional.linear else args[1], self.tokens)
        elif function is torch.bmm:
            for x, weight in zip(*args[:2], strict=True):
                self._note(x, weight, torch.arange(len(x)))
        return function(*args, **(kwargs or {}))

    def _note(self, x, weight, tokens):
        for name, whole in self.weights.items():
            if weight.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr():
                self.calls.append((name, x, weight, tokens))


def _is_transposed(module):
    return type(module).__name__ == "Conv1D"


def _weight_NK(module):
    return module.weight.T if _is_transposed(module) else module.weight


class Adapted:
    """A model without any adapter, and LoRA's values for it: A and B by name. `scaling`: alpha / rank by module."""

    def __init__(self, model, values, scaling):
        self.model, self.scaling = model.requires_grad_(False), scaling
        self.values = {name: nn.Parameter(value.detach().clone()) for name, value in values.items()}
        self.names = sorted({name.rpartition(".")[0] for name in values})

    def weights(self):
        """Parameter name -> W + scaling B A, with gradients."""
        made = {}
        parameters = dict(self.model.named_parameters())
        for name in self.names:
            if name in parameters:  # of experts
                delta = self.scaling[name] * self.values[f"{name}.lora_B"] @ self.values[f"{name}.lora_A"]
                owner = self.model.get_submodule(name.rpartition(".")[0])
                stored = delta.mT if getattr(owner, "is_transposed", "Llama4" in type(owner).__name__) else delta
                made[name] = parameters[name] + stored
                continue
            module = self.model.get_submodule(name)
            delta = self.scaling[name] * self.values[f"{name}.lora_B"] @ self.values[f"{name}.lora_A"]
            made[f"{name}.weight"] = module.weight + (delta.T if _is_transposed(module) else delta)
        return made

    def logits(self, batch):
        return logits_of(self.model, batch, self.weights())

    def gradients(self):
        return {name: value.grad for name, value in self.values.items() if value.grad is not None}


def loss_of(logits, ids, learned):
    """The mean loss of the tokens that are learned [rows, tokens], each predicted from what is before it."""
    each = nn.functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return each[learned[:, 1:].flatten()].mean()


def train(adapted, steps, lr):
    """Trains by AdamW with a constant rate and no clipping; `steps`: the rows of each. Returns the losses."""
    optimizer, losses = torch.optim.AdamW(adapted.values.values(), lr=lr, weight_decay=0.0), []
    adapted.model.train()
    for rows in steps:
        batch, learned = padded(rows)
        optimizer.zero_grad()
        loss = loss_of(adapted.logits(batch), batch["input_ids"], learned)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
