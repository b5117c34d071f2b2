"""A training in plain torch, from what the settings say: no code of the trainer, its loss, its optimizer or its products.

Which rows a micro-batch holds is the plan's choice; that each epoch has every row once is checked here.
"""

import contextlib
import math

import torch
from torch import nn

from plopfast.data.batches import collate
from plopfast.data.example import Example
from plopfast.kernels import philox
from plopfast.lora.layer import adapters
from plopfast.training.plan import Plan

DEFAULT = {"max_steps": 7, "batch_rows": 3, "eval_every": 2, "lr": 0.02}


def rows_of(count, seed=0, longest=12):
    """Rows of several lengths, of which several shares are learned."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for number in range(count):
        length = 4 + int(torch.randint(longest - 3, (), generator=generator))
        tokens = [1, *torch.randint(3, 300, (length - 1,), generator=generator).tolist()]
        start = 1 + int(torch.randint(length - 1, (), generator=generator))
        rows.append(Example.after_prompt(tokens, start, "x", f"rows:{number}"))
    return rows


def losses_of(model, rows, neftune=0.0):
    """The sum of the losses of the label tokens, from the model's own logits, and their number.

    The last column is left out, as nothing is predicted from it: it would take numbers of dropout and of the noise.
    """
    batch = collate(rows, torch.device("cpu"))
    x = model.get_input_embeddings()(batch["input_ids"][:, :-1])
    if neftune:
        bound = neftune / math.sqrt(x.shape[1] * x.shape[2])
        x = x + bound * (2 * torch.rand(x.shape) - 1)
    logits = model(inputs_embeds=x, attention_mask=batch["attention_mask"][:, :-1]).logits.float()
    labels = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), labels.reshape(-1), reduction="sum")
    return loss, int((labels != -100).sum())


def plain_forward(module):
    """A forward of an adapted module by the formula: y = x W^T + b + scaling (drop(x) A^T) B^T, in float32."""

    def forward(x):
        p, dropped = module.dropout if module.training else 0.0, x.float()
        if p:
            seed = int(torch.randint(1 << 62, ()))
            keep = philox.keep_mask(seed, x[..., 0].numel(), x.shape[-1], p)
            dropped = dropped * keep.view(x.shape) / (1 - p)
        scaling = module.alpha / (module.rank**0.5 if module.rslora else module.rank)
        return module.base(x) + (scaling * dropped @ module.lora_A.T @ module.lora_B.T).to(x.dtype)

    return forward


@contextlib.contextmanager
def plain_adapters(model):
    with contextlib.ExitStack() as undo:
        for module in adapters(model).values():
            module.forward = plain_forward(module)
            undo.callback(delattr, module, "forward")
        yield


def rate(config, step, steps):
    rising = round(config.warmup * steps)
    if step < rising:
        return config.lr * (step + 1) / (rising + 1)
    done = (step - rising) / (steps - rising)
    share = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.lr * share[config.schedule]


def stages(config, train, unlabeled):
    """(micro-batches of unlabelled text that come first, of an epoch with what is mixed in, steps)"""
    in_epoch, of_text = (math.ceil(len(rows) / config.batch_rows) for rows in (train, unlabeled))
    first = 0 if config.unlabeled_share else of_text
    whole = in_epoch / (1 - config.unlabeled_share)
    steps = config.max_steps or math.ceil((first + config.epochs * whole) / config.accumulate)
    return first, whole, steps


def micro_batches(config, train, unlabeled):
    """Micro-batches of rows, as the plan has them, with checks of how often each row comes."""
    rows, labelled, (first, _, _) = [*train, *unlabeled], [], stages(config, train, unlabeled)
    share, of_text, before = config.unlabeled_share, 0, []
    for number, group in enumerate(Plan(train, unlabeled, config).groups(), 1):
        text = all(i >= len(train) for i in group)
        assert text or all(i < len(train) for i in group)
        of_text += text
        if share:
            assert abs(of_text - share * number) < 1
        else:
            assert text == (number <= first)
            before += group if text else []
            assert number != first or sorted(before) == list(range(len(train), len(rows)))
        labelled += [] if text else group
        if len(labelled) == len(train):  # an epoch
            assert sorted(labelled) == list(range(len(train)))
            labelled = []
        assert len(labelled) < len(train) and len(group) <= config.batch_rows
        yield [rows[i] for i in group]


def by_hand(model, config, train, valid, unlabeled=()):
    """(the trained parameters, step -> what is recorded of it, step -> validation loss)"""
    torch.manual_seed(config.seed)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups, (first, _, steps) = micro_batches(config, train, unlabeled), stages(config, train, unlabeled)
    b = [p for name, p in trained.items() if name.endswith("lora_B")]
    a = [p for name, p in trained.items() if not name.endswith("lora_B")]
    both = [{"params": a}, {"params": b}] if b else [{"params": a}]
    optimizer = torch.optim.AdamW(both, lr=config.lr, weight_decay=config.weight_decay)
    average = {name: p.detach().clone() for name, p in trained.items()}
    best, best_loss, worse, records, valid_losses = average, math.inf, 0, {}, {}
    for step in range(1, steps + 1):
        for group, ratio in zip(optimizer.param_groups, (1, config.lora_plus), strict=False):
            group["lr"] = rate(config, step - 1, steps) * ratio
        optimizer.zero_grad()
        model.train()
        rows = [next(groups) for _ in range(config.accumulate)]
        parts = [losses_of(model, group, config.neftune) for group in rows]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
        lengths = [[len(row.tokens) for row in group] for group in rows]
        records[step] = {
            "loss": float(loss.detach()),
            "lr": rate(config, step - 1, steps),
            "grad_norm": float(norm),
            "rows": sum(map(len, rows)),
            "tokens": sum(map(sum, lengths)),
            "positions": sum(sum(group) if config.packing else len(group) * max(group) for group in lengths),
        }
        if config.clip and norm > config.clip:
            for p in trained.values():
                p.grad.mul_(config.clip / norm)
        optimizer.step()
        model.eval()
        with torch.no_grad():
            now = {name: p.detach().clone() for name, p in trained.items()}
            average = {name: config.ema * average[name] + (1 - config.ema) * now[name] for name in now}
            if step % config.eval_every and step < steps:
                continue
            for name, p in trained.items():
                p.copy_(average[name])
            total, count = losses_of(model, valid[: config.eval_rows])
            for name, p in trained.items():
                p.copy_(now[name])
        valid_losses[step] = float(total / count)
        if valid_losses[step] < best_loss:
            best, best_loss, worse = average, valid_losses[step], 0
        elif step > first // config.accumulate:
            worse += 1
        if worse >= config.patience:
            break
    return best, records, valid_losses
