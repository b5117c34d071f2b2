"""What a training survives: kills at any moment, torn files, a full disk, losses that are not finite."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import made, parameters, same

from plopfast.support.errors import ConfigError, TrainingError
from plopfast.training.state import checkpoints


def test_killed_at_any_moment_it_ends_as_if_it_had_not_been(tmp_path):
    """SIGKILL at chosen moments (in a save, after a rename, in a line of the log) and at random ones, and a full disk."""
    script = Path(__file__).parent / "kill_and_resume.py"
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path), "0"], capture_output=True, text=True, cwd=script.parent
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.count("identical") == 10 and "DIFFERENT" not in run.stdout


def test_the_newest_good_checkpoint_is_found(examples, tmp_path):
    whole = made(examples, tmp_path / "whole", save_every=2)
    whole.fit()
    made(examples, tmp_path / "torn", save_every=2, keep=3).fit()
    newest, second, third = checkpoints(tmp_path / "torn" / "checkpoints")
    assert [p.stem for p in (newest, second, third)] == ["step-00000012", "step-00000010", "step-00000008"]
    newest.write_bytes(newest.read_bytes()[:-7])
    second.write_bytes(b"")
    (tmp_path / "torn" / "checkpoints" / ".step-00000012.safetensors.abcd1234.plopfast").mkdir()
    resumed = made(examples, tmp_path / "torn", save_every=2)
    with pytest.warns(UserWarning, match=r"step-00000012.*not a readable.*going on from step-00000008"):
        resumed.fit(resume=True)
    assert same(parameters(whole), parameters(resumed))
    assert [h["step"] for h in resumed.history if "lr" in h] == list(range(1, 13))
    left = sorted(path.name for path in (tmp_path / "torn" / "checkpoints").iterdir())
    assert left == [f"step-000000{n}" for n in ("10.damaged", "10.safetensors", "12.damaged", "12.safetensors")]


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_are_kept(examples, tmp_path, keep):
    made(examples, tmp_path, save_every=1, keep=keep).fit()
    assert [int(p.stem[5:]) for p in checkpoints(tmp_path / "checkpoints")] == list(range(12, 12 - keep, -1))


def broken(trainer, steps):
    """The embeddings are NaN in these steps (from 0)."""

    def break_it(module, args, output):
        return output * float("nan") if trainer.step in steps and module.training else output

    trainer.model.model.embed_tokens.register_forward_hook(break_it)
    return trainer


def test_steps_that_are_not_finite_are_skipped(examples, tmp_path):
    trainer = broken(made(examples, tmp_path, nonfinite="skip", save_every=1), {4, 5})
    states = {}
    plain = trainer._train_step

    def step(groups):
        plain(groups)
        states[trainer.step] = parameters(trainer)

    trainer._train_step = step
    assert trainer.fit().steps == 12
    assert same(states[4], states[5]) and same(states[4], states[6]) and not same(states[6], states[7])
    steps = {h["step"]: h for h in trainer.history if "lr" in h}
    assert [s for s in steps if steps[s].get("skipped")] == [5, 6] and steps[5]["loss"] is None
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert all(p.isfinite().all() for p in trainer.parameters.values())


def test_skipping_ends_where_nothing_is_finite_any_more(examples):
    trainer = broken(made(examples, nonfinite="skip", max_steps=30, eval_every=100), set(range(3, 40)))
    with pytest.raises(TrainingError, match=r"step 13: loss nan"):
        trainer.fit()


@pytest.mark.parametrize("ema", [0.0, 0.9])
def test_a_validation_loss_that_is_not_finite_brings_the_best_back(examples, tmp_path, ema):
    trainer = made(examples, tmp_path, ema=ema)
    kept = {}

    def break_it(module, args, output):
        if trainer.step == 4 and not module.training:
            kept.update(parameters(trainer))
        return output * float("nan") if trainer.step == 8 and not module.training else output

    trainer.model.model.embed_tokens.register_forward_hook(break_it)
    with pytest.raises(TrainingError, match=r"step 8: validation loss nan.*those of step 4"):
        trainer.fit()
    assert same(parameters(trainer), kept)
    assert [p.stem for p in checkpoints(tmp_path / "checkpoints")] == ["step-00000004"]


def test_damaged_files_do_not_count_among_those_to_keep(examples, tmp_path):
    made(examples, tmp_path, save_every=4, keep=3).fit()
    newest, *others = checkpoints(tmp_path / "checkpoints")
    newest.write_bytes(b"torn")
    for path in others[1:]:
        path.unlink()
    with pytest.warns(UserWarning, match="going on from step-00000008"):
        made(examples, tmp_path, save_every=1, keep=1).fit(resume=True)
    assert [path.stem for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000012"]
    assert made(examples, tmp_path).fit(resume=True).steps == 12


def test_free_settings_may_change_at_resume(examples, tmp_path):
    whole = made(examples, tmp_path / "whole")
    whole.fit()
    made(examples, tmp_path, save_every=3, keep=9).fit()
    for path in checkpoints(tmp_path / "checkpoints")[:2]:
        path.unlink()
    resumed = made(examples, tmp_path, keep=7, save_every=5)
    assert resumed.fit(resume=True).steps == 12 and len(resumed.history) == len(whole.history)
    assert same(parameters(whole), parameters(resumed))
    with pytest.raises(TrainingError, match=r"ema was 0\.0, is 0\.5"):
        made(examples, tmp_path, ema=0.5).fit(resume=True)


def test_a_budget_below_the_longest_row(examples):
    longest = max(examples[:48], key=lambda e: len(e.tokens))
    with pytest.raises(
        ConfigError, match=rf"batch_tokens: 30 is below the longest row, {len(longest.tokens)} tokens \(.*:\d+\)"
    ):
        made(examples, batch_tokens=30)
    assert torch.isfinite(torch.tensor(made(examples, batch_tokens=None, max_steps=2).fit().valid_loss))
