"""What eval and run measure before and after training beside the test rows, and what they say at their end."""

import json

import pytest
import torch
from helpers import adapted, plopfast

import plopfast as pf
from plopfast.data.text import read_text
from plopfast.lora.layer import adapters
from plopfast.models.generating import generate
from plopfast.training.evaluate import evaluate
from plopfast.training.intervals import of_gain

GENERAL = "The weather of the islands is mild. Ships bring letters, tea and news from the mainland twice a week.\n\n"


def read(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture
def trained(base, tmp_path, capsys):
    out = tmp_path / "run"
    assert plopfast("run", *base, "--out", out) == 0
    capsys.readouterr()
    return out


def test_each_row_and_how_it_was_judged(trained, model_folder, data):
    rows = [json.loads(line) for line in (trained / "eval_rows.jsonl").read_text().splitlines()]
    test = pf.read_jsonl(data[-1])
    assert [row["row"] for row in rows] == list(range(1, 41)) and rows[11]["where"] == "test.jsonl:12"
    assert [(row["prompt"], row["expected"]) for row in rows] == [
        (r["prompt"], r["completion"].strip()) for _, r in test
    ]
    summary = read(trained, "eval")
    for who, key in (("base", "before"), ("tuned", "after")):
        judged = [row[key] for row in rows]
        assert sum(one["right"] for one in judged) / 40 == pytest.approx(summary[who]["accuracy"])
        assert sum(one["nats"] for one in judged) / summary[who]["tokens"] == pytest.approx(summary[who]["loss"])
        assert summary[who]["metric"] == "choice", "so every row has an answer and its chance"
        for row, one in zip(rows, judged, strict=True):
            assert one["right"] == (one["answered"] == row["expected"]) and 0 < one["chance"] < 1
    gain = summary["gain"]
    assert gain["difference"] == pytest.approx(summary["tuned"]["accuracy"] - summary["base"]["accuracy"])
    assert gain["low"] < gain["difference"] < gain["high"]


def test_the_gain_of_an_adapter_that_changes_much(model_folder, data, tmp_path):
    """Its sign, and that it is paired: the base and this random adapter are right on other rows."""
    model = adapted()
    torch.manual_seed(3)
    for module in adapters(model).values():
        torch.nn.init.normal_(module.lora_B, std=0.6)
    pf.save_adapter(model, tmp_path / "saved")
    out = tmp_path / "run"
    given = ["--model", model_folder, *data, "--adapter", tmp_path / "saved", "--out", out]
    assert plopfast("eval", *given) == 0
    rows = [json.loads(line) for line in (out / "eval_rows.jsonl").read_text().splitlines()]
    before, after = ([row[key]["right"] for row in rows] for key in ("before", "after"))
    assert sum(before) != sum(after)
    assert read(out, "eval")["gain"] == of_gain(before, after)._asdict()


def test_how_many_rows_the_steps_took(trained):
    training = read(trained, "training")
    steps = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    steps = [step for step in steps if "grad_norm" in step]
    assert len(steps) == training["steps"] and training["rows_seen"] == sum(step["rows"] for step in steps)
    assert training["clipped"] == sum(step["grad_norm"] > 1 for step in steps) < len(steps)


def test_free_answers(trained, model_folder, data):
    model, tokenizer = pf.load_model(model_folder)
    examples = pf.tokenize(pf.read_jsonl(data[-1]), tokenizer)
    found = read(trained, "eval")["samples"]
    assert [one["row"] for one in found] == [1, 14, 27]
    chosen = [examples[one["row"] - 1] for one in found]
    prompts = [example.tokens[: example.start] for example in chosen]
    most = max(16, 2 * max(example.answer[1] - example.answer[0] for example in chosen))
    for key in ("before", "after"):
        expected = [answer.text for answer in generate(model, tokenizer, prompts, max_new_tokens=most)]
        assert [one[key] for one in found] == expected
        if key == "before":
            pf.load_adapter(model, trained / "adapter")
    for one, example in zip(found, chosen, strict=True):
        assert one["expected"] == example.completion.strip() and one["right_after"] == (
            one["after"].strip() == one["expected"]
        )


def test_forgetting(trained, base, model_folder, tmp_path, capsys):
    """The loss on general text, before and after: the default one, and a file."""
    general = read(trained, "eval")["general"]
    assert general["file"] == "pydoc_data.topics" and 1024 <= general["tokens"] < 1024 + 256
    file = tmp_path / "general.txt"
    file.write_text(GENERAL * 4)
    assert plopfast("eval", "--out", trained, "--overwrite", "--general", file) == 0
    found = read(trained, "eval")["general"]
    model, tokenizer = pf.load_model(model_folder)
    rows = read_text(file, tokenizer, 128)
    before = evaluate(model, rows).loss
    pf.load_adapter(model, trained / "adapter")
    assert (found["before"], found["after"]) == pytest.approx((before, evaluate(model, rows).loss), rel=1e-5)
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("general"))
    assert f"{found['before']:.4f} before, {found['after']:.4f} after ({found['after'] - found['before']:+.4f})" in line


def test_general_text_that_was_learned_shows_nothing(base, tmp_path, capsys):
    train = tmp_path / "learned.jsonl"
    train.write_text("".join(json.dumps({"text": GENERAL}) + "\n" for _ in range(9)))
    file = tmp_path / "general.txt"
    file.write_text(GENERAL)
    given = [*base[:2], "--train", train, "--valid", train, "--max-steps", 2, "--rank", 2, "--allow-overlap"]
    assert plopfast("run", *given, "--general", file, "--out", tmp_path / "run") == 0
    value = read(tmp_path / "run", "eval")
    assert "general" not in value and "no loss on general text" in capsys.readouterr().err
    assert value["samples"] == [], "plain text asks nothing"


def test_what_must_be_kept(trained, base, model_folder, tmp_path, capsys):
    """What the base says is right before; a word of it that the adapter does not say is lost."""
    model, tokenizer = pf.load_model(model_folder)
    prompts = ["Definition: a bird", "Definition: a large house", "one"]
    tokens = [tokenizer(text)["input_ids"] for text in prompts]
    before = generate(model, tokenizer, tokens, max_new_tokens=128)
    pf.load_adapter(model, trained / "adapter")
    after = generate(model, tokenizer, tokens, max_new_tokens=128)
    apart = next(i for i in range(3) if before[i].text != after[i].text)
    file = tmp_path / "keep.jsonl"
    rows = [{"prompt": prompts[apart], "answer": before[apart].text}, {"prompt": "one", "answer": "never said"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plopfast("eval", "--out", trained, "--overwrite", "--must-keep", file) == 1
    printed = capsys.readouterr().out
    found = read(trained, "eval")["must_keep"]
    assert (found["kept"], found["wrong_before"], len(found["lost"])) == (0, 1, 1)
    assert found["lost"][0]["answer"] == after[apart].text and f"LOST {file}:1" in printed
    assert plopfast("run", *base, "--must-keep", file, "--out", tmp_path / "again") == 1
    assert f"LOST {file}:1" in capsys.readouterr().out
    file.write_text(json.dumps({"prompt": "one", "answer": before[2].text, "never": "never said"}) + "\n")
    code = plopfast("eval", "--out", trained, "--overwrite", "--must-keep", file)
    assert code == (before[2].text not in after[2].text)


@pytest.mark.parametrize("option", ["--must-keep", "--general"])
def test_broken_files_stop_a_run_before_its_work(option, base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("plopfast.run.run.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    file = tmp_path / ("broken.jsonl" if option == "--must-keep" else "broken.txt")
    for text in (None, "\n"):
        if text is not None:
            file.write_text(text)
        assert plopfast("run", *base, option, file, "--out", tmp_path / "run") == 2
        assert file.name in capsys.readouterr().err and not (tmp_path / "run" / "config.json").exists()


def test_the_end_of_a_run(base, tmp_path, capsys):
    out = tmp_path / "a run"
    assert plopfast("run", *base, "--out", out) == 0
    said = capsys.readouterr().out
    heads = [line.split("  ")[0].strip() for line in said.splitlines()]
    for head in ("adapters", "how sure", "base", "tuned", "gain", "general", "asked", "seconds", "written", "next"):
        assert head in heads, head
    assert heads.count("asked") == 3
    assert (
        "report.html" in said and f"plopfast generate --out '{out}' --prompt" in said and "plopfast trial --out" in said
    )
    assert "loss " in said and ", their ends " in said, "the loss of the answers and of what ends them, apart"


def test_no_sample_answers_of_a_model_that_generates_none(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.LlamaForCausalLM.generate", None)
    assert plopfast("run", *base, "--out", tmp_path / "run") == 0
    assert read(tmp_path / "run", "eval")["samples"] == []
    assert capsys.readouterr().err.count("no sample answers: ") == 1
