"""What the trials of a study say of each criterion: does its order predict results, and what does its pick cost?

- Kendall's tau between a criterion's order of the module types and the loss of each type trained alone. `p` is exact: the
  share of all orders of the types (of 10,000 random ones above 8 types) that agree as well or as badly. Over the tasks of a
  model, one order is tried on all of them, as neither criteria nor results of one model's tasks are independent.
- Regret: the test loss of the criterion's pick minus that of the placement of lowest validation loss, in nats a token, and the
  same of the accuracy. It can be below 0, as the best by validation rows need not be the best by test rows.
- Arms that were dropped have fewer seeds, and a seed is hard or easy for all arms: any two are compared on the seeds of both, and
  the types alone on those of all of them.
- Intervals of one trial draw other test rows and other seeds, as in paired.py. Those of means are Student's over pairs of
  a model and a task; a pair's budgets are averaged. Models that are controls are in no mean.
- The default: the criterion of lowest mean regret on every other pair, in the plan's order, is held against PLoP's pick on the
  pairs between them.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

import torch

from ..placing.rules import ranked
from ..scoring.stopping import student_t
from .agreement import kendall_tau, pair_signs
from .paired import holm, resampled
from .plan import Cell

REFERENCE = "plop"
DRAWS, ORDERS = 2000, 10_000
FEW = 8  # types, of which all orders are tried


@dataclass(frozen=True)
class Trial:
    """A finished trial. `value`: its trial.json. `nats` of each arm [seeds, test rows] and the rows' `tokens` [rows]."""

    cell: Cell
    value: dict[str, Any]
    nats: dict[str, torch.Tensor]
    tokens: torch.Tensor

    @property
    def arms(self) -> list[dict[str, Any]]:
        """Those with all seeds, then those that were dropped."""
        return [*self.value["arms"], *self.value["dropped"]]

    def arm(self, name: str) -> dict[str, Any] | None:
        """The arm of this name, or the one that it shares its placement with."""
        name = self.value["same"].get(name, name)
        return next((arm for arm in self.arms if arm["name"] == name), None)

    def alone(self) -> dict[str, dict[str, Any]]:
        """Type -> the arm that trains it alone."""
        types = self.value["criteria"][REFERENCE]["types"]
        return {type_: arm for type_ in types if (arm := self.arm(type_)) and arm["types"] == [type_]}

    def best(self) -> dict[str, Any]:
        """The arm of lowest validation loss among those that have all seeds, without the one that trains all weights."""
        return min((arm for arm in self.value["arms"] if arm["types"]), key=lambda arm: _over([arm], "valid_loss")[0])


def _shared(arms: Sequence[Mapping[str, Any]]) -> set[int]:
    """The seeds that all of these arms have."""
    return set.intersection(*({run["seed"] for run in arm["runs"]} for arm in arms))


def _over(arms: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """The mean of each arm over the seeds that all of them have: a seed is hard for all arms, or easy."""
    seeds = _shared(arms)
    return [fmean(run[key] for run in arm["runs"] if run["seed"] in seeds) for arm in arms]


def evidence(trials: Sequence[Trial], confidence: float = 0.95) -> dict[str, Any]:
    """Returns what study.json holds of the trials, as plain values."""
    rows = [_trial(one, confidence) for one in trials]
    counted = [row for row in rows if not row["control"]]
    criteria = list(dict.fromkeys(name for row in counted for name in row["tau"]))
    picks = list(dict.fromkeys(name for row in counted for name in row["regret"]))
    models = list(dict.fromkeys(row["model"] for row in rows))
    regret = [_regret(name, counted, confidence) for name in picks]
    versus = [row["versus"] for row in regret if row["versus"]]
    for one, p in zip(versus, holm([one["p"] for one in versus]), strict=True):
        one["p_corrected"] = p
    return {
        "confidence": confidence, "trials": rows,
        "tau": [{"criterion": name, **_mean(_by_pair(counted, "tau", name, "test"), confidence)} for name in criteria],
        "tau_by_model": [
            {"model": model, "criterion": name, **of}
            for model in models
            for name in dict.fromkeys(name for row in rows if row["model"] == model for name in row["tau"])
            if (of := _of_model([one for one in trials if one.cell.model == model], name))
        ],
        "regret": sorted(regret, key=lambda row: row["mean"]),
        "above_plop_by_model": [
            {"model": model, "name": name, **of}
            for model in models
            for name in picks
            if (of := _against([row for row in rows if row["model"] == model], name, confidence))
        ],
        "default": _default(counted, picks, confidence),
    }  # fmt: skip


def _trial(trial: Trial, confidence: float) -> dict[str, Any]:
    value, best, plop = trial.value, trial.best(), trial.arm(REFERENCE)
    regret = {}
    for name in [arm["name"] for arm in trial.arms if arm["types"]] + [*value["same"]]:
        arm = trial.arm(name)
        assert arm, "every name is an arm, or shares one"
        (loss, least), (accuracy, most) = (_over((arm, best), key) for key in ("loss", "accuracy"))
        regret[name] = {"nats": loss - least, "accuracy": most - accuracy, "forgetting": arm["forgetting"]}
        if plop:
            ours, theirs = _over((arm, plop), "loss")
            regret[name]["above_plop"] = ours - theirs
    arms = [
        {key: arm[key] for key in ("name", "types", "parameters", "lr", "loss", "accuracy", "forgetting")}
        | {"valid_loss": _over([arm], "valid_loss")[0], "seeds": len(arm["runs"])}
        for arm in trial.arms
    ]
    return {
        **{key: getattr(trial.cell, key) for key in ("name", "model", "task", "budget", "control")},
        "metric": value["metric"], "test_rows": value["test_rows"], "base": value["base"], "best": best["name"],
        "arms": arms, "nfn_order": ranked(value["criteria"][REFERENCE]["types"]), "same": value["same"], "seconds": value["seconds"], "regret": regret,
        "tau": _taus(trial, confidence),
    }  # fmt: skip


def _scores(trial: Trial, criterion: str, types: Sequence[str]) -> list[float]:
    """The criterion's scores, lowest first choice."""
    found = trial.value["criteria"][criterion]
    sign = -1.0 if found["chooses"] == "highest" else 1.0
    return [sign * found["types"][type_] for type_ in types]


def _taus(trial: Trial, confidence: float) -> dict[str, Any]:
    """Of each criterion; none where fewer than three types were trained alone. All are of the same draws."""
    alone = trial.alone()
    if len(alone) < 3:
        return {}
    valid, test = (_over([*alone.values()], key) for key in ("valid_loss", "loss"))
    drawn, tail = _drawn(trial, alone).tolist(), (1 - confidence) / 2
    found = {}
    for criterion in trial.value["criteria"]:
        scores = _scores(trial, criterion, [*alone])
        taus = sorted(kendall_tau(scores, losses) for losses in drawn)
        found[criterion] = {
            "valid": kendall_tau(scores, valid), "p": _exact_p([(scores, valid)]), "test": kendall_tau(scores, test),
            "low": taus[math.floor(tail * (len(taus) - 1))], "high": taus[math.ceil((1 - tail) * (len(taus) - 1))],
        }  # fmt: skip
    return found


def _drawn(trial: Trial, alone: Mapping[str, Mapping[str, Any]]) -> torch.Tensor:
    """Test losses of the types alone [draws, types], with other rows and other seeds. Seeds scatter in proportion to the loss: the
    variance of its logarithm is that of the arms with all seeds, without what a seed does to all of them."""
    generator = torch.Generator().manual_seed(0)
    logs_AS = torch.stack([trial.nats[arm["name"]].sum(1) / trial.tokens.sum() for arm in trial.value["arms"]]).log()
    gaps_AS = logs_AS - logs_AS.mean(1, keepdim=True)
    gaps_AS = gaps_AS - gaps_AS.mean(0)
    freedom = max((logs_AS.shape[0] - 1) * (logs_AS.shape[1] - 1), 1)
    seeds = _shared([*alone.values()])
    error = math.sqrt(float(gaps_AS.square().sum()) / freedom / len(seeds))
    rows = len(trial.tokens)
    times_BN = resampled(rows, DRAWS, generator)
    kept = [(arm["name"], [run["seed"] in seeds for run in arm["runs"]]) for arm in alone.values()]
    nats_TN = torch.stack([trial.nats[name][torch.tensor(of)].mean(0) for name, of in kept])
    losses_BT = (times_BN @ nats_TN.T) / (times_BN @ trial.tokens)[:, None]
    normal_BT = torch.randn(DRAWS, len(alone), generator=generator, dtype=torch.float64)
    spread_B = torch.randn(freedom, DRAWS, generator=generator, dtype=torch.float64).square().mean(0).sqrt()
    return losses_BT * (error * normal_BT / spread_B[:, None]).exp()


def _exact_p(pairs: Sequence[tuple[Sequence[float], Sequence[float]]]) -> float:
    """The two-sided p of the mean tau of pairs of (scores, losses) of the same types, by orders of the types that are the same
    for all pairs."""
    n = len(pairs[0][0])
    if n <= FEW:
        orders = torch.tensor([*itertools.permutations(range(n))])
    else:
        generator = torch.Generator().manual_seed(0)
        orders = torch.stack([torch.arange(n), *(torch.randperm(n, generator=generator) for _ in range(ORDERS - 1))])
    mean_P = torch.zeros(len(orders), dtype=torch.float64)
    for scores, losses in pairs:
        sign_s, sign_l = pair_signs(scores), pair_signs(losses)
        size = float((sign_s.abs().sum() * sign_l.abs().sum()).sqrt()) or 1.0
        mean_P += (sign_s[orders[:, :, None], orders[:, None, :]] * sign_l).sum((1, 2)) / size / len(pairs)
    return float((mean_P.abs() >= mean_P[0].abs() - 1e-9).double().mean())  # the first order is the one that is


def _of_model(trials: Sequence[Trial], criterion: str) -> dict[str, Any] | None:
    """The mean tau over a model's trials by their test loss, and its exact p; None where they share no three types."""
    have = [one for one in trials if criterion in one.value["criteria"]]
    types = [t for t in have[0].alone() if all(t in one.alone() for one in have)] if have else []
    if len(types) < 3:
        return None
    pairs = [
        (_scores(one, criterion, types), _over([arm for t, arm in one.alone().items() if t in types], "loss"))
        for one in have
    ]
    return {
        "mean": fmean(kendall_tau(*pair) for pair in pairs),
        "p": _exact_p(pairs),
        "trials": len(pairs),
        "types": len(types),
    }


def _by_pair(rows: Sequence[Mapping[str, Any]], part: str, name: str, key: str) -> dict[tuple[str, str], float]:
    """(model, task) -> the mean over its budgets of row[part][name][key], where there is one."""
    found: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if name in row[part]:
            found.setdefault((row["model"], row["task"]), []).append(row[part][name][key])
    return {pair: fmean(values) for pair, values in found.items()}


def _mean(by_pair: Mapping[Any, float], confidence: float) -> dict[str, Any]:
    """The mean over pairs, and Student's interval; None for what one pair does not tell."""
    values = [*by_pair.values()]
    mean, half = fmean(values), None
    if len(values) > 1:
        half = student_t((1 + confidence) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return {
        "mean": mean, "low": None if half is None else mean - half, "high": None if half is None else mean + half,
        "pairs": len(values),
    }  # fmt: skip


def _against(rows: Sequence[Mapping[str, Any]], name: str, confidence: float) -> dict[str, Any] | None:
    """Regret minus that of PLoP's pick in the trials that have both; `p` by all changes of sign (of 10,000 above 13 pairs)."""
    rows = [row for row in rows if "above_plop" in row["regret"].get(name, {})]
    both = _by_pair(rows, "regret", name, "above_plop")
    if not both or name == REFERENCE:
        return None
    values = torch.tensor([*both.values()], dtype=torch.float64)
    if len(values) <= 13:
        signs = torch.tensor([*itertools.product((1.0, -1.0), repeat=len(values))], dtype=torch.float64)
    else:
        generator = torch.Generator().manual_seed(0)
        signs = torch.randint(2, (ORDERS, len(values)), generator=generator).double() * 2 - 1
        signs[0] = 1.0
    flipped = (signs @ values).abs()
    p = float((flipped >= values.sum().abs() - 1e-12).double().mean())
    return _mean(both, confidence) | {"p": p}


def _regret(name: str, rows: Sequence[Mapping[str, Any]], confidence: float) -> dict[str, Any]:
    nats = _by_pair(rows, "regret", name, "nats")
    more = {key: fmean(_by_pair(rows, "regret", name, key).values()) for key in ("accuracy", "forgetting")}
    versus = _against(rows, name, confidence)
    return {"name": name, **_mean(nats, confidence), **more, "versus": versus}


def _default(rows: Sequence[Mapping[str, Any]], picks: Sequence[str], confidence: float) -> dict[str, Any] | None:
    """The pick of lowest mean regret on every other pair, held against PLoP's on the others; None with fewer than 4 pairs, or where
    no placement is in all of them."""
    pairs = list(dict.fromkeys((row["model"], row["task"]) for row in rows))
    choose, confirm = pairs[::2], pairs[1::2]
    if len(confirm) < 2:
        return None
    by_name = {name: _by_pair(rows, "regret", name, "nats") for name in picks}
    means = {name: fmean(of[pair] for pair in choose) for name, of in by_name.items() if set(pairs) <= of.keys()}
    if not means:
        return None
    best = min(means, key=lambda name: means[name])
    versus = _against([row for row in rows if (row["model"], row["task"]) in confirm], best, confidence)
    return {
        "chosen": best, "chosen_on": [" x ".join(pair) for pair in choose], "means": means,
        "confirmed_on": [" x ".join(pair) for pair in confirm], "versus": versus,
        "confirmed": bool(versus and versus["high"] is not None and versus["high"] < 0),
    }  # fmt: skip
