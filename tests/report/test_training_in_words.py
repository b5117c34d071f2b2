"""What section 2 says of a training: when most was learned, which step was kept, and how it ended."""

import json

import pytest
from reading import change, report

from plopfast.report.sections_training import learned_by


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([10.0, 5.0, 1.0, 0.5, 0.0], 3),  # 9 of 10 nats are gone at the third step
        ([10.0, 1.1, 1.0, 0.5, 0.0], 3),
        ([10.0, 0.0, 5.0, 5.0], 2),
        ([1.0, 1.0, 1.0], None),
        ([1.0, 2.0, 3.0], None),
        ([2.0, 1.0], None),  # too few to say
        ([], None),
    ],
)
def test_when_most_was_learned(losses, step):
    assert learned_by([(float(at), loss) for at, loss in enumerate(losses, 1)]) == step


def logged(folder, valid, **told):
    lines = [{"step": step, "loss": 12 / step} for step in range(1, 61)]
    lines += [{"step": step, "valid_loss": loss} for step, loss in valid]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    change(folder, "training.json", **told)
    return report(folder).text


def test_the_step_that_was_kept(full):
    text = logged(full, [(20, 0.5), (40, 0.25), (60, 0.375)], best_step=40)
    assert "Most was learned in the first 17 steps." in text
    assert "Validation loss went from 0.5 at step 20 to 0.375 at step 60." in text
    assert "The adapter is that of step 40, where it was lowest (0.25). Training stopped at its step limit." in text
    text = logged(full, [(60, 0.375)], best_step=60)
    assert "Validation loss was 0.375 at step 60, the only look." in text and "that of step" not in text
    text = logged(full, [(20, 0.5), (40, 0.6)], best_step=20, stopped="early: the validation loss stopped improving")
    assert "The adapter is that of step 20" in text and "as the validation loss no longer improved" in text
    assert "Training stopped at its step limit" not in text


def test_the_last_step_is_no_warning_where_training_stopped_by_itself(full):
    valid = [(30, 0.5), (60, 0.4)]
    assert "The last step was the best." in logged(full, valid, best_step=60)
    assert "The last step was the best." not in logged(full, valid, best_step=60, stopped="early: of itself")
    assert "--max-steps" in logged(full, valid, best_step=60, stopped="max_steps", rows_seen=3430)
