"""A training is what its settings say: each step is taken again in plain torch, and the results are the same."""

import math
from itertools import islice

import pytest
import torch
from helpers import build, everywhere, made, parameters, randomise
from torch import nn

import plopfast as pf
from plopfast.data.batches import collate
from plopfast.data.example import Example
from plopfast.support.errors import TrainingError
from plopfast.training.evaluate import choices_of, evaluate
from plopfast.training.intervals import of_shares, wilson
from plopfast.training.plan import Plan
from plopfast.training.state import CHECKPOINTS, TrainState

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


def losses_of(model, rows):
    """The sum of the losses of the label tokens, from the model's own logits, and their number."""
    batch = collate(rows, torch.device("cpu"))
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    labels = batch["labels"][:, 1:]
    loss = nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]), labels.reshape(-1), reduction="sum"
    )
    return loss, int((labels != -100).sum())


def rate(config, step):
    rising = round(config.warmup * config.max_steps)
    if step < rising:
        return config.lr * (step + 1) / (rising + 1)
    done = (step - rising) / (config.max_steps - rising)
    share = {"constant": 1, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return config.lr * share[config.schedule]


def by_hand(model, config, train, valid):
    """(the trained parameters, step -> loss, step -> validation loss)"""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    groups = Plan(train, [], config).groups()
    b = [p for name, p in trained.items() if name.endswith("lora_B")]
    a = [p for name, p in trained.items() if not name.endswith("lora_B")]
    both = [{"params": a}, {"params": b}] if b else [{"params": a}]
    optimizer = torch.optim.AdamW(both, lr=config.lr, weight_decay=config.weight_decay)
    average = {name: p.detach().clone() for name, p in trained.items()}
    best, best_loss, worse, losses, valid_losses = average, math.inf, 0, {}, {}
    for step in range(1, config.max_steps + 1):
        for group, ratio in zip(optimizer.param_groups, (1, config.lora_plus), strict=False):
            group["lr"] = rate(config, step - 1) * ratio
        optimizer.zero_grad()
        parts = [losses_of(model, [train[i] for i in next(groups)]) for _ in range(config.accumulate)]
        loss = sum(part for part, _ in parts) / sum(count for _, count in parts)
        loss.backward()
        losses[step] = float(loss)
        norm = torch.stack([p.grad.norm() for p in trained.values()]).norm()
        if config.clip and norm > config.clip:
            for p in trained.values():
                p.grad.mul_(config.clip / norm)
        optimizer.step()
        with torch.no_grad():
            now = {name: p.detach().clone() for name, p in trained.items()}
            average = {name: config.ema * average[name] + (1 - config.ema) * now[name] for name in now}
            if step % config.eval_every and step < config.max_steps:
                continue
            for name, p in trained.items():
                p.copy_(average[name])
            total, count = losses_of(model, valid[: config.eval_rows])
            for name, p in trained.items():
                p.copy_(now[name])
        valid_losses[step] = float(total / count)
        if valid_losses[step] < best_loss:
            best, best_loss, worse = average, valid_losses[step], 0
        else:
            worse += 1
        if worse >= config.patience:
            break
    return best, losses, valid_losses


SETTINGS = [
    {"weight_decay": 0.4},
    {"weight_decay": 3.0, "full": True, "lr": 1e-3},
    {"clip": 0.0, "schedule": "linear"},
    {"clip": 0.01, "schedule": "constant", "warmup": 0.5},
    {"accumulate": 3, "batch_rows": 2},
    {"lora_plus": 8.0, "warmup": 0.0},
    {"ema": 0.6, "eval_every": 1},
    {"eval_rows": 2, "patience": 1, "lr": 0.5, "max_steps": 9},
    {"rslora": True, "seed": 3, "eval_every": 3},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_training_is_that_by_hand(settings):
    train, valid = rows_of(18), rows_of(5, seed=1)
    settings = {**DEFAULT, **settings}
    full, rslora = settings.pop("full", False), settings.pop("rslora", False)
    config = pf.TrainConfig(**settings)
    results = []
    for hand in (True, False):
        model = build("llama")
        if full:
            model.requires_grad_(True)
        else:
            ranks = {
                info.name: (2 + number % 3, 3.0 + number % 2) for number, info in enumerate(pf.linear_modules(model))
            }
            pf.inject(model, pf.Placement(ranks, [], "explicit", 0), rslora=rslora)
            torch.manual_seed(2)
            randomise(model)
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        if hand:
            results.append(by_hand(model, config, train, valid))
            continue
        trainer = pf.Trainer(model, config, train, valid)
        trainer.fit()
        history = trainer.history
        losses = {r["step"]: r["loss"] for r in history if "loss" in r}
        valid_losses = {r["step"]: r["valid_loss"] for r in history if "valid_loss" in r}
        results.append((parameters(trainer), losses, valid_losses))
    (theirs, *said), (ours, *logged) = results
    for expected, got in zip(said, logged, strict=True):
        assert got == {step: pytest.approx(loss, rel=1e-4) for step, loss in expected.items()}
    assert ours.keys() == theirs.keys() == before.keys()
    for name, value in theirs.items():
        moved = (value - before[name]).norm()
        assert moved > 0 and (ours[name] - value).norm() <= 0.02 * moved, name


def test_the_seed_of_dropout_is_a_setting():
    """All rows are in one micro-batch, so that the order of rows is not what differs."""

    def losses(seed):
        model = build("llama")
        pf.inject(model, everywhere(model), dropout=0.3)
        torch.manual_seed(0)
        randomise(model)
        trainer = pf.Trainer(
            model, pf.TrainConfig(max_steps=2, batch_tokens=999, seed=seed), sorted(rows_of(6), key=str)
        )
        trainer.fit()
        return [r["loss"] for r in trainer.history if "loss" in r]

    assert losses(1) == losses(1)
    assert abs(losses(1)[0] - losses(2)[0]) > 1e-4


def test_rows_that_are_learned_otherwise_are_another_run(tmp_path):
    rows = rows_of(9)
    made(rows, out=tmp_path, max_steps=1).fit()
    other = [Example.after_prompt(row.tokens, max(1, row.start - 1), row.completion, row.where) for row in rows]
    assert [row.tokens for row in rows] == [row.tokens for row in other] and rows != other
    with pytest.raises(TrainingError):
        made(other, out=tmp_path, max_steps=1).fit(resume=True)


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("alpha", [8.0, 6.0])
def test_other_adapters_are_another_run(dropout, alpha, tmp_path):
    def trainer(dropout, alpha):
        model = build("llama")
        pf.inject(model, everywhere(model, alpha=alpha), dropout=dropout)
        return made(rows_of(9), out=tmp_path, max_steps=1, model=model)

    trainer(0.2, 8.0).fit()
    if (dropout, alpha) == (0.2, 8.0):
        trainer(dropout, alpha).fit(resume=True)
        return
    with pytest.raises(TrainingError):
        trainer(dropout, alpha).fit(resume=True)


@pytest.mark.parametrize("settings", [{"accumulate": 2}, {"batch_rows": 3}, {"packing": True}, {"seed": 4}], ids=str)
def test_a_resumed_plan_goes_on(settings):
    plan = Plan(rows_of(20), [], pf.TrainConfig(max_steps=5, batch_tokens=40, **settings))
    groups = list(islice(plan.groups(), 40))
    for step in (0, 1, 3):
        assert list(islice(plan.groups(step), 10)) == groups[step * plan.groups_in_step :][:10]


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"batch_rows": 2}], ids=str)
def test_an_epoch_has_every_row_once(settings):
    rows, orders = rows_of(23), []
    for seed in (0, 1):
        plan = Plan(rows, [], pf.TrainConfig(epochs=2.0, batch_tokens=25, seed=seed, **settings))
        groups = list(islice(plan.groups(), plan.max_steps))
        assert sorted(i for group in groups for i in group) == sorted([*range(23)] * 2)
        orders.append(groups)
    assert orders[0] != orders[1]


def test_the_longest_row_just_fits():
    rows = rows_of(6)
    longest = max(len(row.tokens) for row in rows)
    assert Plan(rows, [], pf.TrainConfig(batch_tokens=longest)).batch_tokens == longest
    with pytest.raises(pf.PlopfastError):
        Plan(rows, [], pf.TrainConfig(batch_tokens=longest - 1))


@pytest.mark.parametrize("raising", [False, True])
def test_the_average_is_in_place_for_a_while(raising):
    parameters = {"a": nn.Parameter(torch.zeros(3))}
    state = TrainState(parameters, torch.optim.AdamW(parameters.values()), validated=False, averaged=True)
    with torch.no_grad():
        parameters["a"].add_(1)
    state.update_average(0.75)
    try:
        with state.averaged():
            assert parameters["a"].tolist() == [0.25] * 3
            if raising:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert parameters["a"].tolist() == [1.0] * 3 and state.average["a"].tolist() == [0.25] * 3


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"max_steps": 7, "eval_every": 3, "keep": 2}, [6, 7]),
        ({"max_steps": 7, "eval_every": 3, "keep": 9}, [3, 6, 7]),
        ({"max_steps": 6, "eval_every": 9, "save_every": 2, "keep": 2}, [4, 6]),
        ({"max_steps": 5, "eval_every": 1, "save_every": 4, "keep": 9}, [4, 5]),
    ],
    ids=str,
)
def test_which_checkpoints_there_are(settings, steps, tmp_path):
    rows = rows_of(9)
    model = build("llama")
    pf.inject(model, everywhere(model, rank=1))
    pf.Trainer(model, pf.TrainConfig(batch_rows=3, patience=9, **settings), rows[:7], rows[7:], out=tmp_path).fit()
    assert sorted(path.name for path in (tmp_path / CHECKPOINTS).iterdir()) == [
        f"step-{n:08d}.safetensors" for n in steps
    ]


class Spoiled(pf.Trainer):
    """Its loss is NaN in some steps."""

    bad: frozenset = frozenset()

    def _train_step(self, groups):
        hook = self.model.get_input_embeddings().register_forward_hook(
            lambda _m, _a, y: y * math.nan if self.step + 1 in self.bad else y
        )
        with hook:
            self.seen = [*getattr(self, "seen", []), self.state.copy()]
            super()._train_step(groups)


def spoiled(bad, **settings):
    model = build("llama")
    pf.inject(model, everywhere(model, rank=2))
    randomise(model)
    trainer = Spoiled(model, pf.TrainConfig(**{**DEFAULT, "max_steps": 30, **settings}), rows_of(18), rows_of(4, 1))
    trainer.bad = frozenset(bad)
    return trainer


def test_a_skipped_step_changes_nothing():
    trainer = spoiled({2, 5, 6}, nonfinite="skip", max_steps=8)
    trainer.fit()
    records = {r["step"]: r for r in trainer.history if "lr" in r}
    for step in range(1, 8):
        one, two = trainer.seen[step - 1 : step + 1]
        same = all(torch.equal(one[name], two[name]) for name in one)
        assert same == (step in trainer.bad) == bool(records[step].get("skipped")) == (records[step]["loss"] is None)


def test_ten_skipped_in_a_row_end_it():
    trainer = spoiled({*range(3, 12), *range(13, 30)}, nonfinite="skip", patience=99)
    with pytest.raises(TrainingError):
        trainer.fit()
    assert trainer.step == 21  # the nine before step 12 did not
    assert all(torch.equal(p, trainer.state.best[name]) for name, p in parameters(trainer).items())


def test_a_stop_leaves_the_best():
    trainer = spoiled({6}, eval_every=2)
    with pytest.raises(TrainingError):
        trainer.fit()
    best, latest = (trainer.seen[step] for step in (trainer.state.best_step, 5))
    found = parameters(trainer)
    assert all(torch.equal(p, best[name]) for name, p in found.items())
    assert not all(torch.equal(p, latest[name]) for name, p in found.items())


def greedy(model, rows):
    """For each row, whether each of its label tokens is the likeliest."""
    found = []
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.tokens])
            best = model(input_ids=ids).logits[0].argmax(-1)
            found.append([int(best[at - 1]) == row.tokens[at] for at in range(row.start, len(row.tokens))])
    return found


def partly_right(model):
    """Rows whose answers are all, partly and not at all what the model says."""
    rows = []
    for number, wrong in enumerate(((), (0,), (2,), (0, 1, 2), (), (1,))):
        tokens = [1, 5 + number, 40 + number]
        for at in range(3):
            with torch.no_grad():
                best = int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(best if at not in wrong else (best + 7) % 300)
        rows.append(Example.after_prompt(tokens, 3, "x", f"rows:{number}"))
    return rows


def test_a_row_is_right_where_all_of_it_is():
    model = build("llama")
    rows = partly_right(model)
    expected = greedy(model, rows)
    assert len({tuple(row) for row in expected}) > 3
    found = evaluate(model, rows, batch_tokens=20)
    assert found.metric == "exact-match" and found.right == [float(all(row)) for row in expected]
    assert found.accuracy == sum(map(all, expected)) / len(rows)
    assert (found.accuracy_low, found.accuracy_high) == wilson(found.accuracy, len(rows))
    total, count = losses_of(model, rows)
    assert found.loss == pytest.approx(float(total) / count, rel=1e-5) and found.tokens == count == 18


def test_tokens_of_plain_text():
    model = build("llama")
    rows = [
        Example.after_prompt(row.tokens[: len(row.tokens) - number % 3], 1)
        for number, row in enumerate(partly_right(model))
    ]
    expected = greedy(model, rows)
    found = evaluate(model, rows, batch_tokens=20)
    assert found.metric == "token" and found.accuracy == pytest.approx(
        sum(map(sum, expected)) / sum(map(len, expected))
    )
    assert sum(found.right) / len(rows) == pytest.approx(found.accuracy)
    hits, counts = [sum(row) for row in expected], [len(row) for row in expected]
    assert (found.accuracy_low, found.accuracy_high) == of_shares(hits, counts)


def test_of_several_parts_the_last_one_counts():
    model = build("llama")
    tokens = partly_right(model)[1].tokens
    best = greedy(model, [Example.after_prompt(tokens, 1)])[0]
    rows = [Example(tokens, ((1, 3), (3, 6)), None, None, ""), Example(tokens, ((1, 4), (4, 6)), None, None, "")]
    found = evaluate(model, rows)
    assert found.accuracy == pytest.approx((sum(best[2:]) + sum(best[3:])) / 5) != sum(best[:2]) / 2


@pytest.mark.parametrize("answers", [[(7,), (9,), (11,)], [(7, 8), (7, 9), (10, 11, 12)]], ids=str)
def test_the_likeliest_choice(answers):
    model = build("llama")
    rows = [
        Example.after_prompt((1, 20 + number, *answers[number % 3], 2), 2, str(number % 3), closing=1)
        for number in range(12)
    ]
    assert sorted(choices_of(rows)) == sorted(map(list, answers))
    right = []
    for row in rows:
        scores = []
        for answer in answers:
            ids = torch.tensor([(*row.tokens[:2], *answer)])
            with torch.no_grad():
                logprobs = model(input_ids=ids).logits[0].log_softmax(-1)
            scores.append(sum(float(logprobs[1 + at, token]) for at, token in enumerate(answer)))
        right.append(float(scores.index(max(scores)) == int(row.completion)))
    assert 0 < sum(right) < len(rows)
    assert evaluate(model, rows, choices=choices_of(rows), batch_tokens=20).right == right


def test_evaluating_keeps_nothing_for_gradients():
    model, seen = build("llama").requires_grad_(True), []
    model.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    evaluate(model, rows_of(4))
    assert seen and not any(seen)


def test_the_bootstraps_seed():
    hits, counts = [1, 2, 0, 3, 1], [2, 4, 1, 3, 5]
    assert of_shares(hits, counts, seed=1) == of_shares(hits, counts, seed=1) != of_shares(hits, counts, seed=2)


def test_no_dropout_in_validation():
    """The learning rate is too low to change a loss."""
    model, rows, valid = build("llama"), rows_of(9), rows_of(4, 1)
    pf.inject(model, everywhere(model), dropout=0.5)
    torch.manual_seed(0)
    randomise(model)
    total, count = losses_of(model, valid)
    trainer = pf.Trainer(
        model, pf.TrainConfig(**{**DEFAULT, "max_steps": 2, "eval_every": 1, "lr": 1e-30}), rows, valid
    )
    assert trainer.fit().best_step == 1  # of equal losses, the first
    validated = [record["valid_loss"] for record in trainer.history if "valid_loss" in record]
    assert len(set(validated)) == 1 and validated == [pytest.approx(float(total.detach()) / count, rel=1e-5)] * 2
    losses = [record["loss"] for record in trainer.history if "loss" in record]
    plain = [losses_of(model, [rows[i] for i in group])[0] for group in islice(trainer.plan.groups(), 2)]
    assert losses[0] != pytest.approx(float(plain[0].detach()), rel=1e-3)


def test_the_best_so_far_ends_the_waiting():
    parameters = {"a": nn.Parameter(torch.zeros(3))}
    state = TrainState(parameters, torch.optim.AdamW(parameters.values()), validated=True, averaged=False)
    state.step, state.worse = 7, 2
    with torch.no_grad():
        parameters["a"].add_(1)
    state.keep_best(0.5)
    assert (state.best_loss, state.best_step, state.worse) == (0.5, 7, 0) and state.best["a"].tolist() == [1.0] * 3
    with torch.no_grad():
        parameters["a"].add_(1)
    assert state.best["a"].tolist() == [1.0] * 3
