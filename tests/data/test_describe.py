"""What is shown of the rows before anything is trained."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
from helpers import QUICK, plopfast
from small_tokenizers import MADE

import plopfast as pf
from plopfast.data.describe import OFF, ON, marked, parts_of
from plopfast.support.errors import ConfigError, DataError

PAIRS = [(f"d.jsonl:{i}", {"prompt": "a dog " * i, "completion": "animal"}) for i in range(1, 41)]


def test_the_figures_are_those_of_the_examples(tokenizer):
    facts = pf.describe_data({"train": PAIRS}, tokenizer)
    (split,) = facts.splits
    examples = pf.tokenize(PAIRS, tokenizer)
    lengths = sorted(len(e.tokens) for e in examples)
    assert (split.rows, split.tokens, split.shortest, split.longest) == (40, sum(lengths), lengths[0], lengths[-1])
    assert split.learned == sum(e.label_tokens for e in examples)
    assert (
        lengths[19] <= split.percentiles["50%"] <= lengths[20]
        and lengths[37] <= split.percentiles["95%"] <= lengths[38]
    )
    assert sum(count for _, count in split.histogram) == 40
    for (begin, count), (end, _) in zip(split.histogram, [*split.histogram[1:], (10**9, 0)], strict=True):
        assert count == sum(begin <= n < end for n in lengths)
    assert f"{split.learned / split.tokens:.1%}" in str(facts) and json.loads(json.dumps(facts.as_dict()))


@pytest.mark.parametrize("name", MADE)
def test_the_row_that_is_shown_is_the_whole_row(name):
    tokenizer = MADE[name]() if callable(MADE[name]) else MADE[name]
    (example,) = pf.tokenize([("d:1", {"prompt": "Q: one two\n", "completion": " three\n\nfour é"})], tokenizer)
    parts = parts_of(example, tokenizer)
    whole = tokenizer.decode(example.tokens, clean_up_tokenization_spaces=False)
    assert "".join(text for text, _ in parts) == whole
    assert [learned for _, learned in parts] == [False, True] and parts[1][0].startswith(" three\n\nfour é")
    assert marked(parts) == f"{parts[0][0]}[[{parts[1][0]}]]"
    assert marked(parts, color=True) == f"{parts[0][0]}{ON}{parts[1][0]}{OFF}"


def test_the_picture_shows_how_long_rows_are(tokenizer):
    rows = [*PAIRS[:1] * 8, *PAIRS[19:20]]
    (line,) = pf.describe_data({"train": rows}, tokenizer).picture().splitlines()
    longest = max(len(e.tokens) for e in pf.tokenize(rows, tokenizer))
    assert re.fullmatch(rf"train  0  *█ *▁ {longest} tokens", line)


def test_advice_is_given_once(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    facts = pf.describe_data({"train": PAIRS[:2], "test": PAIRS[2:4]}, tokenizer)
    assert "2 rows (first: d.jsonl:1): a prompt and completion of plain text" in str(facts)
    assert str(facts).count("although the model has a chat template") == 1


def test_a_long_row_is_shown_without_its_middle():
    shown = marked([("a" * 5000, False), ("b" * 10, True)])
    assert "4,000 characters" in shown and shown.endswith("[[bbbbbbbbbb]]") and len(shown) < 1100


def test_a_row_of_many_turns_is_shown_without_its_middle():
    shown = marked([(f"<{i}>", False) for i in range(100)])
    assert shown.startswith("<0><1>") and "<7> ... 84 parts ... <92>" in shown and shown.endswith("<98><99>")


@pytest.mark.parametrize("color", [True, False])
def test_a_row_cannot_steer_the_terminal(color):
    odd = "\x1b[31m\x9b1m\x07\b\r\x00\x7f\u202e\u2066\u2028"
    plain = "a\tb\n\u00e9 \u6570\u200d\U0001f600\\x1b"
    shown = marked([(plain + odd, False), (odd, True)], color)
    assert shown.startswith(plain) and shown.count("\\x1b[31m\\x9b1m\\x07\\x08\\r\\x00\\x7f\\u202e\\u2066\\u2028") == 2
    assert not set(shown.replace(ON, "").replace(OFF, "")) & (set(odd) - set("[31m"))


@pytest.mark.parametrize(
    "splits",
    [{}, PAIRS, pf.read_rows, "d.jsonl", {"train": "d.jsonl"}],
    ids=["none", "a list", "a function", "a name", "a name in a split"],
)
def test_what_are_no_splits(tokenizer, splits):
    with pytest.raises(ConfigError, match=r"splits: expected rows by their split, \{.train.: pf\.read_rows"):
        pf.describe_data(splits, tokenizer)


def test_an_unknown_way_with_bad_rows(tokenizer):
    with pytest.raises(ConfigError, match="bad_rows: expected error or skip, got 'skp'"):
        pf.describe_data({"train": PAIRS}, tokenizer, bad_rows="skp")


def test_rows_of_no_kind_are_left_out_of_the_overlap_too(tokenizer):
    odd = [("t:1", {"question": "a"})]
    facts = pf.describe_data({"train": [*PAIRS, *odd], "test": [*PAIRS[:1], *odd]}, tokenizer, bad_rows="skip")
    assert [split.rows for split in facts.splits] == [40, 1] and "of 2 test rows, 1 are train rows too" in str(facts)


def test_what_is_noticed_is_said_once(tokenizer):
    rows = {"train": [*PAIRS[:3], ("t:9", {"text": ""})], "test": PAIRS[2:4]}
    with pytest.raises(DataError, match=r"^t:9: only 1 token"):
        pf.describe_data(rows, tokenizer)
    facts = pf.describe_data(rows, tokenizer, max_length=10, long="cut", bad_rows="skip")
    assert facts.splits[0].rows == 3
    text = str(facts)
    assert "train: 1 of 4 rows cannot be used and are left out: t:9: only 1 token" in text
    assert text.count("cut to 10 tokens") == 2, "of each split"
    assert "of 2 test rows, 1" in text
    with pytest.raises(DataError, match=r"^train: no row can be used; 1 of 1 rows cannot be used .*t:9"):
        pf.describe_data({"train": rows["train"][3:]}, tokenizer, bad_rows="skip")


def test_the_command_and_the_run_show_it(model_folder, data, tmp_path, capsys, monkeypatch):
    assert plopfast("data", "--model", model_folder, *data) == 0
    shown = capsys.readouterr().out
    assert re.search(r"train +60 +[\d,]+ +\d+\.\d%", shown) and shown.count("[[") == 2 and "\033" not in shown
    assert "train: 60 rows: prompt and completion as text" in shown and not list(tmp_path.glob("runs"))
    assert plopfast("data", "--model", model_folder, *data, "--out", tmp_path / "run") == 0
    kept = json.loads((tmp_path / "run" / "data.json").read_text())
    assert [split["split"] for split in kept["splits"]] == ["train", "valid", "test"] and kept["splits"][2][
        "rows"
    ] == 40
    assert plopfast("data", "--model", model_folder, *data, "--out", tmp_path / "run") == 2, "it exists"
    capsys.readouterr()
    assert plopfast("run", "--model", model_folder, *data, *QUICK, "--out", tmp_path / "whole") == 0
    said = capsys.readouterr().err
    assert said.index("[[") < said.index("loading"), "before the model is loaded"
    assert json.loads((tmp_path / "whole" / "data.json").read_text()) == kept
    assert "One row, as the model sees it" in (tmp_path / "whole" / "report.html").read_text()


def test_text_without_labels_is_shown_too(model_folder, data, tmp_path, capsys):
    text = tmp_path / "u.txt"
    text.write_text("A dog. " * 100)
    assert plopfast("data", "--model", model_folder, *data, "--unlabeled", text, "--max-length", 100) == 0
    assert re.search(r"unlabeled +\d+ +\d+ +\d\d\.\d%", capsys.readouterr().out)
    assert plopfast("data", "--model", model_folder, *data, "--unlabeled", tmp_path / "no.txt") == 2
    assert "no.txt: no such data file" in capsys.readouterr().err


def test_a_character_that_the_output_lacks(model_folder, tmp_path):
    path = tmp_path / "d\u00e9.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n')
    command = [sys.executable, "-m", "plopfast", "data", "--model", str(model_folder), "--train", str(path)]
    done = subprocess.run(command, env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.returncode == 0 and "d\\xe9.jsonl:1 ([[...]] is learned):" in done.stdout


def test_rows_that_cannot_be_used_stop_a_run_before_the_model_is_loaded(model_folder, tmp_path, capsys):
    path = tmp_path / "d.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}\n' * 3 + '{"messages": [{"role": "user", "content": "a"}]}\n')
    assert plopfast("run", "--model", model_folder, "--train", path, *QUICK, "--out", tmp_path / "run") == 2
    said = capsys.readouterr().err
    assert "d.jsonl:4: messages need a tokenizer with a chat template" in said and "loading" not in said
