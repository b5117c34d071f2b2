"""Rows, tokens, label ranges, batches; and one clear error for each kind of broken file."""

import hashlib
import json

import pytest
import torch
from helpers import prompted

import plopfast as pf
from plopfast.data.batches import batches_of, collate, group_by_length
from plopfast.data.rows import DEMO
from plopfast.support.errors import DataError


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def test_demo_data_is_whole_and_disjoint():
    rows = {split: [row["prompt"] for _, row in pf.read_jsonl(path)] for split, path in DEMO.items()}
    assert {split: len(r) for split, r in rows.items()} == {"train": 3430, "valid": 366, "test": 770}
    assert len(set().union(*rows.values())) == 3430 + 366 + 770
    assert "Princeton University" in (DEMO["train"].parent / "README.md").read_text()


def test_prompt_and_completion(tokenizer, tmp_path):
    path = write(
        tmp_path / "d.jsonl", {"prompt": "Definition: a dog\nCategory:", "completion": " animal"}, "", {"text": "a dog"}
    )
    first, second = pf.tokenize(pf.read_jsonl(path), tokenizer)
    assert tokenizer.decode(first.tokens[: first.start]) == "Definition: a dog\nCategory:"
    assert tokenizer.decode(first.tokens[first.start : -1]) == " animal" and first.completion == " animal"
    assert first.tokens[-1] == tokenizer.eos_token_id and first.where.endswith("d.jsonl:1")
    assert second.start == 1 and second.completion is None and second.where.endswith("d.jsonl:3")


def test_messages(tokenizer, tmp_path):
    template = "{% for m in messages %}<s>{{ m['role'] }}<s>{{ m['content'] }}</s>{% endfor %}{% if add_generation_prompt %}<s>assistant<s>{% endif %}"
    chat = [{"role": "user", "content": "a dog"}, {"role": "assistant", "content": "animal"}]
    path = write(tmp_path / "d.jsonl", {"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]})
    with pytest.raises(DataError, match=r"d\.jsonl:1: .*chat template"):
        pf.tokenize(pf.read_jsonl(path), tokenizer)
    tokenizer.chat_template = template
    try:
        one, two = pf.tokenize(pf.read_jsonl(path), tokenizer)
    finally:
        tokenizer.chat_template = None
    assert one.tokens == two.tokens and one.start == two.start
    assert tokenizer.decode(one.tokens[one.start :]) == "animal</s>"


def test_which_tokens_are_scored(tokenizer, tmp_path):
    template = "{% for m in messages %}<s>{{ m['content'] }}</s>{% endfor %}"
    system, user, answer = (
        {"role": role, "content": text}
        for role, text in (("system", "be brief"), ("user", "a dog"), ("assistant", "animal"))
    )
    path = write(tmp_path / "d.jsonl", {"messages": [system, user, answer]}, {"messages": [user, answer]})
    tokenizer.chat_template = template
    try:
        examples = pf.tokenize(pf.read_jsonl(path), tokenizer, roles=True)
        # a part of an answer that is shown only while it is the last message, as some templates do with reasoning
        shown = "m['content'] if m['role'] != 'assistant' or loop.last else m['content'].split('|')[-1]"
        tokenizer.chat_template = template.replace("m['content']", shown)
        row = {"messages": [user, {**answer, "content": "because|animal"}, user, answer]}
        forgetful = pf.tokenize([("d.jsonl:1", row)], tokenizer, roles=True)
    finally:
        tokenizer.chat_template = None
    for role, text in (("system", "<s>be brief</s>"), ("user", "<s>a dog</s>"), ("assistant", "<s>animal</s>")):
        (batch,) = batches_of(examples, 2, role)
        told = [
            tokenizer.decode(ids[counted]) for ids, counted in zip(batch["input_ids"], batch["counted"], strict=True)
        ]
        assert told == [text, "" if role == "system" else text]
    (batch,) = batches_of(examples, 2, "assistant", skip_first=True)
    assert batch["counted"].sum() == 2 * len(tokenizer("<s>animal</s>")["input_ids"])
    (batch,) = batches_of(examples, 2, skip_first=True)
    assert not batch["counted"][:, 0].any() and int(batch["counted"].sum()) == sum(len(e.tokens) - 1 for e in examples)
    assert "counted" not in batches_of(examples, 2)[0]
    for which in ("prompt", "completion"):
        (batch,) = batches_of(examples, 2, which)
        inside = batch["attention_mask"].bool()
        assert torch.equal(batch["counted"][inside], (batch["labels"] != -100)[inside] == (which == "completion"))
    with pytest.raises(
        DataError, match=r"d\.jsonl:1 and 1 more rows: no tool token.*roles are assistant, system, user"
    ):
        batches_of(examples, 2, "tool")
    for examples in (forgetful, pf.tokenize([("d.jsonl:1", {"text": "a dog"})], tokenizer, roles=True)):
        with pytest.raises(DataError, match=r"d\.jsonl:1: scoring the user's tokens needs rows of messages"):
            batches_of(examples, 2, "user")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"prompt": "a", "completion": "b"}', '{"prompt": "a", '], r"d\.jsonl:2: not valid JSON"),
        (['{"prompt": "a"}'], r"d\.jsonl:1: expected a row like .* got the keys \['prompt'\]"),
        (['{"prompt": "a", "completion": 3}'], r"d\.jsonl:1: expected a row like"),
        (['{"messages": []}'], r"d\.jsonl:1: expected a row like"),
        (["[1, 2]"], r"d\.jsonl:1: expected a JSON object, got list"),
        ([""], r"d\.jsonl: no rows"),
    ],
)
def test_broken_files(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        pf.read_jsonl(write(tmp_path / "d.jsonl", *rows))


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: no such data file"):
        pf.read_jsonl(tmp_path / "absent.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"text": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match="UTF-8"):
        pf.read_jsonl(tmp_path / "latin.jsonl")


def test_odd_but_valid_lines(tokenizer, tmp_path):
    path = tmp_path / "d.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbf" + '{"text": "a\u2028dog\u0085"}\r\n{"prompt": "a", "completion": " b", "messages": []}'.encode()
    )
    rows = pf.read_jsonl(path)
    assert rows[0][1]["text"] == "a\u2028dog\u0085" and rows[1][0].endswith(":2")
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    assert pf.tokenize([("x:1", {"prompt": "a", "messages": chat, "text": "a dog"})][:0], tokenizer) == []
    with pytest.raises(DataError, match="chat template"):  # prompt without completion: the messages are the row
        pf.tokenize([("x:1", {"prompt": "a", "messages": chat})], tokenizer)


def test_longer_than_the_context(tokenizer, tmp_path):
    path = write(tmp_path / "d.jsonl", {"text": "short"}, {"prompt": "a dog " * 50, "completion": " b"})
    with pytest.raises(DataError, match=r"d\.jsonl:2: the row has \d+ tokens, the limit is 64"):
        pf.tokenize(pf.read_jsonl(path), tokenizer, 64)


def test_an_empty_row(tokenizer, tmp_path):
    with pytest.raises(DataError, match="nothing to learn"):
        pf.tokenize(pf.read_jsonl(write(tmp_path / "d.jsonl", {"text": ""})), tokenizer)


@pytest.mark.parametrize("seed", [None, 0, 1])
def test_groups_cover_everything_once_within_the_budget(examples, seed):
    lengths = [len(e.tokens) for e in examples]
    groups = group_by_length(lengths, 256, seed)
    assert sorted(i for g in groups for i in g) == list(range(len(lengths)))
    assert all(len(g) * max(lengths[i] for i in g) <= 256 for g in groups)
    padded = sum(len(g) * max(lengths[i] for i in g) for g in groups)
    assert sum(lengths) / padded > 0.85
    assert group_by_length(lengths, 256, seed) == groups
    assert group_by_length([500, 3], 256) == [[1], [0]], "a row above the budget stands alone"
    assert group_by_length([], 256) == []


def test_collate():
    batch = collate(prompted([[5, 6, 7], [8]], [1, 1]))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, -100]]


def test_the_learned_tokens_of_the_default_run(default_model):
    """They are pairs of strings, learned as they are written; a change of this hash is a change of what is learned."""
    _, tokenizer = default_model
    learned = {}
    for split, path in DEMO.items():
        examples = pf.tokenize(pf.read_jsonl(path), tokenizer)
        assert all(e.learned == ((e.start, len(e.tokens)),) for e in examples)
        learned[split] = [(e.tokens, e.start, e.completion) for e in examples]
    digest = hashlib.sha256(repr(learned).encode()).hexdigest()
    assert digest == "17cb069cf43eef69f61129fdad7b04c0425bb15224b7204292e8d877040fbfba"
