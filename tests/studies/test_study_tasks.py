"""The six tasks of the study: the same rows from the same seed, none in two splits, answers that are right."""

import hashlib
import importlib
import io
import json
import random
import re
import sys
import tarfile
from itertools import islice, pairwise
from pathlib import Path

import pytest

from plopfast.data.labels import tokenize
from plopfast.data.rows import DEMO, read_jsonl

BENCH = Path(__file__).parents[2] / "bench"
sys.path.append(str(BENCH))
study_made, study_tasks, study_texts = map(importlib.import_module, ("study_made", "study_tasks", "study_texts"))

SIZES = {"train": 2000, "valid": 256, "test": 400}
TESTED = {"extraction": 200, "python-docs": 150}  # test rows, where not as many
SHA256 = {  # of each test file of seed 0, on every machine and Python
    "arithmetic": "f6f86f77fdc43a374515ce504b63c4c6253f20a45ee5b77d79483472d8940e8b",
    "categories": "e6931baa6ba8285ee5bccbda91d317863c7aa5301eeace4bc2888490c53ca2a3",
    "extraction": "59cc96173e6bcb6e5802d421656b3bdc8d6dd3f42c83a89d5b275c98d30b3941",
    "rule": "8f1b650d1aaadeb93c950b3debcc9acee79077856f080ca889dda4d414f627a4",
}


def packed(name, content):
    """A .tar.gz of one file, as bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    return out.getvalue()


def ratings():
    """Text -> mean rating: enough for each label, some between the labels, and many that are too long or too short."""
    found = {f"A film that nobody could call number {n:04}, à part ça.": (n % 9 - 4) * 0.5 for n in range(4200)}
    short = {f"Film {n:04}, short.": 3.0 for n in range(1000)}
    return found | short | {text * 4: 3.0 for text in islice(found, 1000)}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A folder with an archive laid out as vaderSentiment's is."""
    folder = tmp_path_factory.mktemp("sources")
    lines = [f"{n}\t{rating}\t{text}" for n, (text, rating) in enumerate(ratings().items())]
    lines.append("9999\t3.0\ta film that nobody could call number 0000 à part ça!")  # 0000 again, rated otherwise
    inner = packed(study_texts.SNIPPETS, "\n".join(lines).encode())
    (folder / study_texts.ARCHIVE).write_bytes(packed(study_texts.INNER, inner))
    return folder


@pytest.fixture(scope="module")
def written(tmp_path_factory, sources):
    """All tasks as the command writes them, sentiment from the made-up archive."""
    out = tmp_path_factory.mktemp("tasks")
    content = (sources / study_texts.ARCHIVE).read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_texts, "ARCHIVE_SHA256", hashlib.sha256(content).hexdigest())
        patch.setattr(sys, "argv", ["study_tasks.py", "--out", str(out), "--sources", str(sources)])
        study_tasks.main()
    return out


def rows_of(written, task, split):
    return [json.loads(line) for line in (written / task / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def sizes(task):
    return SIZES | {"test": TESTED.get(task, SIZES["test"])}


def pairs(written, task):
    return [(r["prompt"], r["completion"]) for split in SIZES for r in rows_of(written, task, split)]


@pytest.mark.parametrize("task", study_tasks.TASKS)
def test_a_task_has_all_its_rows_and_none_in_two_splits(written, task):
    splits = {split: rows_of(written, task, split) for split in SIZES}
    assert {split: len(rows) for split, rows in splits.items()} == sizes(task)
    keys = [
        re.sub(r"[\W_]+", "", (r["prompt"] if "prompt" in r else r["text"]).lower()) for s in splits.values() for r in s
    ]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("task", study_tasks.TASKS)
def test_what_is_told_of_a_task_is_so(written, task):
    about = json.loads((written / task / "about.json").read_text(encoding="utf-8"))
    assert about["task"] == task and about["seed"] == 0 and about["rows"] == sizes(task)
    assert about["kind"] and about["source"] and about["licence"]
    files = {path.name for path in (written / task).iterdir()} - {"about.json"}
    assert {*about["sha256"]} == files
    for name, sha256 in about["sha256"].items():
        assert hashlib.sha256((written / task / name).read_bytes()).hexdigest() == sha256


@pytest.mark.parametrize("task", study_tasks.TASKS)
@pytest.mark.filterwarnings("ignore:.*the tokenizer does not hold all")  # it was trained on the demo
def test_plopfast_reads_and_tokenises_the_rows(written, task, tokenizer):
    rows = read_jsonl(written / task / "test.jsonl")
    examples = tokenize(rows, tokenizer)
    assert len(examples) == sizes(task)["test"]
    if task == "python-docs":
        assert all(example.answer is None for example in examples)
    else:
        assert [e.completion for e in examples] == [row["completion"] for _, row in rows]


@pytest.mark.parametrize("task", SHA256)
def test_the_same_bytes_on_every_machine(written, task):
    assert hashlib.sha256((written / task / "test.jsonl").read_bytes()).hexdigest() == SHA256[task]


def test_another_seed_gives_other_rows_and_the_same_one_the_same(written, tmp_path):
    for seed in 0, 1:
        study_tasks.write("rule", tmp_path / str(seed), seed, tmp_path)
    assert rows_of(tmp_path / "0", "rule", "train") == rows_of(written, "rule", "train")
    assert not {r["prompt"] for r in rows_of(tmp_path / "1", "rule", "train")[:50]} & {
        r["prompt"] for r in rows_of(written, "rule", "train")[:50]
    }


def test_a_categories_split_is_a_share_of_the_demos(written):
    for split in SIZES:
        demo = {(row["prompt"], row["completion"]) for _, row in read_jsonl(DEMO[split])}
        assert demo >= {(r["prompt"], r["completion"]) for r in rows_of(written, "categories", split)}


def solved(question):
    """The answer to a puzzle, worked out from its text."""
    numbers = [*map(int, re.findall(r"\d+", question))]
    if "more. How many" in question:
        return str(sum(numbers))
    if "are left" in question:
        return str(numbers[0] - numbers[1])
    if "What comes next" in question:
        (step,) = {b - a for a, b in pairwise(numbers)}
        return str(numbers[-1] + step)
    if "largest" in question or "smallest" in question:
        return str(sorted(numbers)[-1 if "largest" in question else 0])
    if "Who is" in question:
        above = {}  # who is older, taller or faster -> than whom
        for one, how, two in re.findall(r"(\w+) is (\w+) than (\w+)", question):
            one, two = (one, two) if how in ("older", "taller", "faster") else (two, one)
            above[one] = two
        (first,) = above.keys() - above.values()
        return first if re.search("oldest|tallest|fastest", question) else above[above[first]]
    name, one, other = re.search(r"(\w+) (\w+) or (\w+)\.", question).groups()
    (false,) = re.findall(rf"not so that {name} (\w+)", question)
    return other if false == one else one


def test_arithmetic_is_right(written):
    found = pairs(written, "arithmetic")
    kinds = set()
    for prompt, completion in found:
        question = re.fullmatch(r"Question: (.*)\nAnswer:", prompt)[1]
        assert completion == f" {solved(question)}", prompt
        kinds.add(re.search(r"more|left|next|largest|smallest|Who is the \w+|What is true", question)[0])
    assert len(kinds) == 12


MONTH = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"


def test_extraction_is_what_the_sentence_says(written):
    people = {*study_made.NAMES, *study_made.SURNAMES}
    assert not people & {*" ".join([*study_made.CITIES, *study_made.MONTHS]).split()}
    patterns = [
        re.compile(re.sub(r"\\{(\w+)\\}", lambda m: f"(?P<{m[1]}>.+?)", re.escape(said)))
        for said in study_made.SENTENCES
    ]
    for prompt, completion in pairs(written, "extraction"):
        sentence = prompt.removesuffix("\nJSON:")
        fields = json.loads(completion)
        assert completion == " " + json.dumps(fields, separators=(",", ":"))
        said = [m.groupdict() for p in patterns if (m := p.fullmatch(sentence))]
        said = [one for one in said if one["name"] in people and one["city"] in study_made.CITIES]
        assert len(said) == 1, sentence
        number, month = re.search(r"\d+", said[0]["day"])[0], re.search(MONTH, said[0]["day"])[0]
        expected = {"name": said[0]["name"], "city": said[0]["city"], "sum": int(said[0]["sum"])}
        assert fields == expected | {"day": f"{number} {month}"}
        assert len(people & {*re.findall(r"\w+", sentence)}) == 1 + ("other" in said[0])


NUMBERS = {"2": "two", "3": "three", "4": "four", "5": "five", "6": "six", "7": "seven", "8": "eight", "9": "nine",
           "10": "ten", "11": "eleven", "12": "twelve"}  # fmt: skip


def test_the_rule_can_be_inverted(written):
    for prompt, completion in pairs(written, "rule"):
        words = [NUMBERS.get(word, word) for word in completion.split()][::-1]
        assert sum(word.endswith("ka") for word in words) == 1
        assert prompt == f"English: {' '.join(w.removesuffix('ka') for w in words)}\nOrvan:"


def test_sentiment_has_the_raters_labels_equally_often(written):
    rated, counts = ratings(), dict.fromkeys((" negative", " neutral", " positive"), 0)
    for prompt, completion in pairs(written, "sentiment"):
        text = re.fullmatch(r"Review: (.*)\nSentiment:", prompt)[1]
        rating = rated[text]
        expected = "neutral" if abs(rating) < 1 else "positive" if rating >= 1.5 else "negative"
        assert completion == f" {expected}" and 40 <= len(text) <= 140 and (abs(rating) < 1 or abs(rating) >= 1.5)
        counts[completion] += 1
    assert sorted(counts.values()) == [885, 885, 886]


def test_another_archive_is_refused_and_a_missing_one_says_what_to_do(sources, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"expected sha256 5d7c06e0\w+, got \w+: delete the file"):
        study_texts.archive(sources)
    for status in "1", "0":
        monkeypatch.setattr(study_texts, "FETCH", [sys.executable, "-c", f"raise SystemExit({status})"])
        with pytest.raises(SystemExit, match=r"expected vaderSentiment-3.3.2.tar.gz in .*--sources FOLDER"):
            study_texts.archive(tmp_path / "empty")


MODULE = '''
"""What this module is for, told in one long sentence that ends here.

A doctest is no prose, though it is long enough for one, as here:
>>> what()
This is it.

Too short.
"""
class Thing:
    """A thing of the module, with a sentence broken
    over two lines of the source."""
    try:
        def act(self):
            """no capital at the beginning, so that this is no whole paragraph."""
        async def wait(self):
            """What this module is for, told in one long sentence that ends here."""
    except ValueError as error:
        def do(self):
            """Does what the thing is there for, without a full stop at the end

            Returns whatever it was that came of it, or else what did not."""
'''


def test_docs_are_the_paragraphs_of_prose(tmp_path):
    for path in ("a/__init__.py", "test/b.py", "site-packages/c.py", "pydoc_data/topics.py"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(MODULE if path[0] == "a" else MODULE.replace("that", f"({path}) that"))
    found = [*study_texts.python_docs(random.Random(0), tmp_path)]
    assert found == [
        [
            {"text": "a: What this module is for, told in one long sentence that ends here."},
            {"text": "a.Thing: A thing of the module, with a sentence broken over two lines of the source."},
            {"text": "a.Thing.do: Returns whatever it was that came of it, or else what did not."},
        ]
    ]


def test_docs_take_whole_modules_for_a_split_and_no_more_than_some_rows_of_each(written):
    modules = list(study_texts.python_docs(random.Random("python-docs 0")))  # in the order of seed 0
    assert max(map(len, modules)) == 40
    module_of = {row["text"]: number for number, rows in enumerate(modules) for row in rows}
    taken = [{module_of[row["text"]] for row in rows_of(written, "python-docs", split)} for split in SIZES]
    assert sum(map(len, taken)) == len(set.union(*taken)) > 150


def test_a_python_of_too_few_docstrings_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(study_texts, "python_docs", lambda draw: [[{"text": f"{n}"} for n in range(500)]])
    with pytest.raises(ValueError, match="too few docstrings in this Python for valid, train"):
        study_tasks.python_docs(random.Random(0), tmp_path)


def test_the_general_text_of_docs_is_of_another_kind(written):
    text = (written / "python-docs" / "general.txt").read_text(encoding="utf-8")
    assert len(text) >= 20_000 and "Mr. Sherlock Holmes" in text
    words = text.split()
    runs = {tuple(words[i : i + 8]) for i in range(len(words))}
    for split in SIZES:
        for row in rows_of(written, "python-docs", split):
            said = row["text"].split()
            assert not runs & {tuple(said[i : i + 8]) for i in range(len(said) - 7)}


def test_an_unknown_task_is_named(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "argv", ["study_tasks.py", "--out", str(tmp_path), "--only", "rule,rules"])
    with pytest.raises(SystemExit):
        study_tasks.main()
    assert "expected some of categories" in (said := capsys.readouterr().err) and "got 'rules'" in said
    assert not [*tmp_path.iterdir()]


def test_too_few_different_rows_are_an_error():
    with pytest.raises(ValueError, match="expected 2656 different rows, got 3"):
        study_tasks.dealt([{"prompt": str(n)} for n in range(3)])
    rows = [{"prompt": p} for p in ("A b.", "a B", "c", "C?", "d")]
    assert study_tasks.distinct(iter(rows), 2) == [rows[0], rows[2]]
    assert [*islice(study_made.rule(random.Random(3)), 2)] == [*islice(study_made.rule(random.Random(3)), 2)]
