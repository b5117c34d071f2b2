"""Which rows are tokenised for what."""

import json

from plopfast.run import run as module
from plopfast.run.run import Run
from plopfast.run.stages import run_score
from plopfast.support.config import RunConfig


def test_scoring_tokenises_the_scored_rows_alone(model_folder, tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"a dog {i}", "completion": " animal"}) + "\n" for i in range(200)))
    seen = []
    monkeypatch.setattr(
        module,
        "tokenize",
        lambda rows, *a, tokenize=module.tokenize, **k: seen.append(len(rows)) or tokenize(rows, *a, **k),
    )
    run = Run(tmp_path / "run", RunConfig(model=str(model_folder), train=str(path), score_prompts=16))
    report = run_score(run)
    assert seen == [16] and report.prompts <= 16
    assert len(run.examples("train")) == 190 and seen == [16, 190]


def test_bad_rows_of_the_sample_are_left_out(model_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    good, bad = '{"prompt": "a dog", "completion": " animal"}\n', '{"text": ""}\n'
    path.write_text((good + bad) * 20)
    run = Run(tmp_path / "run", RunConfig(model=str(model_folder), train=str(path), score_prompts=30, bad_rows="skip"))
    sample = run.sample()
    assert 0 < len(sample) < 30 and all(example.completion == " animal" for example in sample)
