"""What the report reads of each file: every field is needed but those that older files lack, and none may be of another type."""

import copy
import json

import pytest
from full_folder import make

from plopfast.report import kinds
from plopfast.support.errors import FileError

MAY_LACK = {  # files of earlier versions
    "eval": {"rows", "accuracy_low", "accuracy_high", "answer_loss", "end_loss", "gain", "general", "samples", "must_keep"}, "audit": {"missing", "scored_tokens"}, "trial": {"general_loss"},
    "training": {"tokens", "validation", "unmoved", "steps", "best_step", "stopped", "padding", "rows_seen", "clipped"},
    "search": {"steps", "seconds", "why"}, "config": {"settings", "data", "versions", "machine"}, "result": {"error"},
    "test": {"general_loss"}, "estimate": set(), "data": set(), "grpo": {"mean_before", "mean_after"},
}  # fmt: skip
MAY_BE_NULL = {
    "audit": {"tau", "cost", "extra_mib"}, "trial": {"rank_low", "rank_high", "general_loss", "forgetting", "versus"},
    "training": {"validation"}, "search": {"best", "valid_loss", "steps", "seconds", "why"}, "eval": {"answer_loss", "end_loss"}, "result": {"valid_loss"}, "test": {"general_loss"},
}  # fmt: skip
READ = {  # the fields that a reader uses; the files hold more
    "eval": "base tuned loss accuracy metric examples tokens rows accuracy_low accuracy_high gain difference low high general file before after "
    "samples row prompt expected right_before right_after must_keep prompts kept lost where answer wrong_before answer_loss end_loss", "training": "tokens validation unmoved steps best_step stopped padding rows_seen clipped", "search": "best trials number params state valid_loss steps seconds why", "estimate": "batch_tokens rows row_tokens accumulate device dtype "
    "choices name types parameters weights_mib adapters_mib activations_mib logits_mib total_mib tflops_per_step memory_of_full "
    "flops_of_full", "audit": "verdict prompts pick types criteria controls tokens stability name chooses tau seconds cost "
    "extra_mib needs source what repeats tau_low same_pick kind why", "trial": "confidence reference base arms test metric "
    "test_rows seeds seconds command general data versions machine name types parameters rank_low rank_high lr runs accuracy "
    "accuracy_low accuracy_high loss forgetting peak_mib versus difference low high p_corrected verdict file sha256 tokens",
    "data": "splits overlap split rows tokens learned shortest longest percentiles histogram notes where row",
    "result": "seed lr valid_loss seconds peak_mib tokens_per_s", "test": "accuracy loss metric right seconds",
    "grpo": "reward steps test_prompts mean_before mean_after samples notes prompt before after reward_before reward_after",
}  # fmt: skip
SOME = {"estimate": {"choices"}, "trial": {"arms", "runs"}, "data": {"splits", "histogram"}, "test": {"right"}}
OTHERS = {
    "grpo": {"reward": "number", "steps": 2, "test_prompts": 3, "mean_before": 0.25, "mean_after": 0.5, "notes": ["a note"], "idle": 0.5,
             "samples": [{"prompt": "2 + 2 =", "before": "5", "after": "4", "reward_before": 0.0, "reward_after": 1.0}]},
    "result": {"seed": 1, "lr": 1e-3, "valid_loss": 0.5, "seconds": 1.0, "peak_mib": 9.0, "tokens_per_s": 3.0},
    "test": {"accuracy": 0.5, "loss": 1.0, "metric": "choice", "right": [1.0], "seconds": 1.0, "general_loss": 2.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kinds")
    make(folder)
    read = {
        name: json.loads((folder / f"{name}.json").read_text())
        for name in kinds.KINDS
        if (folder / f"{name}.json").exists()
    }
    return read | OTHERS


def fields(value, steps=()):
    """The place of every field, within lists those of the last item."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*steps, key)
            yield from fields(item, (*steps, key))
    elif isinstance(value, list) and value:
        yield from fields(value[-1], (*steps, len(value) - 1))


def changed(value, steps, change):
    found = copy.deepcopy(value)
    at = found
    for step in steps[:-1]:
        at = at[step]
    change(at, steps[-1])
    return found


def fits(tmp_path, name, value):
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(value))
    try:
        assert kinds.read(path, "plopfast") == value
    except FileError as error:
        assert str(path) in str(error)
        return False
    return True


@pytest.mark.parametrize("name", READ)
def test_every_field_is_needed_and_of_its_type(files, tmp_path, name):
    whole = files[name]
    assert fits(tmp_path, name, whole) and fits(tmp_path, name, whole | {"more": 1})
    places = [
        steps
        for steps in fields(whole)
        if steps[-1] in READ[name].split() and not {"types", "data", "sweep"} & {*steps[:-1]}
    ]
    assert {steps[-1] for steps in places} == {*READ[name].split()}
    for steps in places:
        key = steps[-1]
        if name == "trial" and steps[:3:2] == ("arms", "runs") and key != "general_loss":
            continue  # of a single training the report shows its forgetting alone
        if steps[0] != "missing" and key == "kind":
            continue  # the stability table says what, and not of which kind
        if (steps[0], key) in (("controls", "seconds"), ("tokens", "seconds"), ("criteria", "types")):
            continue
        kept = whole
        for step in steps:
            kept = kept[step]
        lacks = fits(tmp_path, name, changed(whole, steps, lambda at, key: at.pop(key)))
        assert lacks == (key in MAY_LACK[name]), f"without {steps}"
        null = fits(tmp_path, name, changed(whole, steps, lambda at, key: at.update({key: None})))
        assert null == (key in MAY_BE_NULL.get(name, ()) and steps[0] != "stability"), f"null at {steps}"
        odd = 3 if isinstance(kept, str | list | dict) or kept is None else "x"
        if kept is not None or key == "versus":
            assert not fits(tmp_path, name, changed(whole, steps, lambda at, key, odd=odd: at.update({key: odd}))), (
                f"{odd!r} at {steps}"
            )
        if isinstance(kept, list):
            empty = fits(tmp_path, name, changed(whole, steps, lambda at, key: at.update({key: []})))
            assert empty == (key not in SOME.get(name, ())), f"nothing in {steps}"


@pytest.mark.parametrize("name", ["eval", "training", "config", "audit", "trial"])
def test_older_files_are_read(files, tmp_path, name):
    def without(value):
        if isinstance(value, dict):
            return {key: without(item) for key, item in value.items() if key not in MAY_LACK[name]}
        return [without(item) for item in value] if isinstance(value, list) else value

    assert fits(tmp_path, name, without(files[name]))


@pytest.mark.parametrize("name", ["eval_rows", "metrics"])
def test_every_field_of_a_line(files_of_lines, tmp_path, name):
    may_lack = {"eval_rows": {"answered", "chance"}, "metrics": {*files_of_lines["metrics"]} - {"step"}}
    may_be_null = {"eval_rows": {"expected", "answered", "chance"}, "metrics": may_lack["metrics"]}
    path, whole = tmp_path / f"{name}.jsonl", files_of_lines[name]

    def reads(value):
        path.write_text(json.dumps(whole) + "\n" + json.dumps(value) + "\n")
        try:
            assert kinds.read(path, "plopfast eval") == [whole, value]
        except FileError as error:
            assert str(path) in str(error)
            return False
        return True

    assert reads(whole) and reads(whole | {"more": 1})
    for steps in fields(whole):
        key = steps[-1]
        if name == "metrics" and key == "positions":
            continue  # not read
        assert reads(changed(whole, steps, lambda at, key: at.pop(key))) == (key in may_lack[name]), f"without {steps}"
        assert reads(changed(whole, steps, lambda at, key: at.update({key: None}))) == (key in may_be_null[name]), steps
        assert not reads(changed(whole, steps, lambda at, key: at.update({key: [3]}))), f"a list at {steps}"


@pytest.fixture(scope="module")
def files_of_lines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    make(folder)
    return {
        name: json.loads((folder / f"{name}.jsonl").read_text().splitlines()[0]) for name in ("eval_rows", "metrics")
    }
