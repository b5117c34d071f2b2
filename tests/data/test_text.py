"""Plain text as rows: no token lost or twice, paragraphs kept whole where that is possible, one error for each bad file."""

import copy

import pytest
from tokenizers.processors import TemplateProcessing

from plopfast.data.rows import DEMO, read_jsonl
from plopfast.data.text import read_text
from plopfast.support.errors import DataError


@pytest.fixture(scope="module")
def text():
    """Paragraphs of 1 to 9 lines, some longer than a row, with separators of all sorts."""
    glosses = [row["prompt"] for _, row in read_jsonl(DEMO["valid"])]
    paragraphs, at = [], 0
    for i in range(60):
        lines = 1 + i % 9
        paragraphs.append(
            "\n".join(glosses[(at + k) % len(glosses)] for k in range(lines)) + ["\n\n", "\n  \n", "\n\n\n\n"][i % 3]
        )
        at += lines
    return "".join(paragraphs)


def with_bos(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return other


@pytest.mark.parametrize("length", [4, 7, 64, 200, 10**6])
@pytest.mark.parametrize("bos", [False, True])
def test_every_token_is_in_exactly_one_row(tokenizer, tmp_path, text, length, bos):
    (tmp_path / "d.txt").write_text(text)
    whole = tokenizer(text)["input_ids"]
    rows = read_text(tmp_path / "d.txt", with_bos(tokenizer) if bos else tokenizer, length)
    assert all(2 <= len(row.tokens) <= length and row.start == 1 and row.completion is None for row in rows)
    assert all((row.tokens[0] == 1) == bos for row in rows)
    assert [t for row in rows for t in row.tokens[bos:]] == [*whole, tokenizer.eos_token_id]


@pytest.mark.parametrize("excess", range(1, 9))
def test_no_row_is_left_with_a_single_token(tokenizer, tmp_path, excess):
    (tmp_path / "d.txt").write_text("7 " * 40)
    count = len(tokenizer("7 " * 40)["input_ids"]) + 1
    rows = read_text(tmp_path / "d.txt", tokenizer, count - excess)
    assert sum(len(row.tokens) for row in rows) == count and min(len(row.tokens) for row in rows) >= 2


def test_a_long_text_is_tokenised_in_pieces_with_the_same_tokens(tokenizer, tmp_path, text):
    (tmp_path / "d.txt").write_text(text * 12)
    assert len(text * 12) > 3 * 2**16
    rows = read_text(tmp_path / "d.txt", tokenizer, 128)
    assert [t for row in rows for t in row.tokens][:-1] == tokenizer(text * 12)["input_ids"]
    assert rows[-1].where.split(":")[-1] > "1" and int(rows[-1].where.split(":")[-1]) <= (text * 12).count("\n")


def test_rows_end_with_paragraphs_and_name_their_line(tokenizer, tmp_path, text):
    (tmp_path / "d.txt").write_text(text)
    rows = read_text(tmp_path / "d.txt", tokenizer, 1200)
    lines = text.split("\n")
    decoded = [tokenizer.decode(row.tokens) for row in rows]
    ended = [d.endswith(("\n\n", "\n  \n", "\n\n</s>")) for d in decoded]
    assert len(rows) > 5 and sum(ended) / len(rows) > 0.8
    for row, shown, before in zip(rows[1:], decoded[1:], ended, strict=False):
        number = int(row.where.rpartition(":")[2])
        first = shown.split("\n")[0]
        assert lines[number - 1] == first if before else first in lines[number - 1]
    tiny = read_text(tmp_path / "d.txt", tokenizer, 64)
    assert sum(len(row.tokens) for row in tiny) / len(tiny) > 0.5 * 64, "short paragraphs do not make short rows"


def test_line_ends_and_byte_order_mark(tokenizer, tmp_path):
    (tmp_path / "d.txt").write_bytes("\ufeffa dog\r\n\r\na cat".encode())
    (row,) = read_text(tmp_path / "d.txt", tokenizer, 64)
    assert tokenizer.decode(row.tokens) == "a dog\n\na cat</s>" and row.where.endswith("d.txt:1")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("d.txt", None, r"d\.txt: no such data file"),
        ("d.txt", "é".encode("latin-1"), r"d\.txt: cannot be read as UTF-8"),
        ("d.txt", b" \n\n ", r"d\.txt: no text in it"),
        ("d.txt", b"7", r"d\.txt: only 1 token"),
        ("d.jsonl", b'{"text": "a dog"}', r"d\.jsonl: expected plain text .*--train"),
    ],
)
def test_files_that_are_no_text(tokenizer, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text(tmp_path / name, tokenizer, 64)


def test_rows_too_short_and_tokenizers_without_offsets(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "d.txt").write_text("a dog")
    with pytest.raises(DataError, match="rows of 3 tokens are too short for text; allow at least 4"):
        read_text(tmp_path / "d.txt", with_bos(tokenizer), 3)
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="needs a fast tokenizer"):
        read_text(tmp_path / "d.txt", tokenizer, 64)
